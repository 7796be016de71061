"""The Python client: complete and in order over whatever breaks, told where it is not, and never stuck."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pubsub_mw.broker.memory import memory_broker
from pubsub_mw.client import Connection, Gap, Message, Presence, Subscription, backoff, connect
from pubsub_mw.errors import ConnectFailed, ConnectionClosed, SubscriptionRefused
from tests.client_world import Endpoint, ScriptedServer
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

SECRET = "s" * 32


@pytest.fixture(autouse=True)
async def _no_task_is_left(anyio_backend: object) -> AsyncIterator[None]:  # noqa: ARG001 - it makes the fixture async
    def tasks() -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks() if "TestRunner" not in repr(task.get_coro())}

    before = tasks()
    yield
    await eventually_async(lambda: tasks() <= before, message="tasks are left behind")


@pytest.fixture
async def endpoint(prefix: str) -> AsyncIterator[Endpoint]:
    async with Endpoint("memory://", prefix=prefix, secret=SECRET) as endpoint:
        yield endpoint


@pytest.fixture
async def script() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer().run() as script:
        yield script


async def take(subscription: Subscription, count: int) -> list[Any]:
    """The data of the next publications."""
    async with asyncio.timeout(10_000 * MS):
        return [(await anext(subscription)).data for _ in range(count)]


async def publish_all(endpoint: Endpoint, channel: str, data: range) -> None:
    await endpoint.publisher.many([(channel, item) for item in data])


async def wait_until(connection: Connection, state: str, timeout: float = 10_000 * MS) -> None:
    await eventually_async(lambda: connection.state == state, timeout, f"state is not {state}")


# What arrives.


async def test_iteration_gets_publications_in_order_with_all_they_carry(endpoint: Endpoint) -> None:
    async with connect(endpoint.url) as connection:
        subscription = await connection.subscribe("room:1")
        position = await endpoint.publisher.publish("room:1", {"text": "日本"}, event="said")
        await publish_all(endpoint, "room:1", range(50))

        assert await anext(subscription) == Message("room:1", "said", {"text": "日本"}, str(position))
        assert await take(subscription, 50) == list(range(50))
        assert subscription.position == str(await endpoint.publisher.position("room:1"))


async def test_callbacks_get_publications_one_after_another_whatever_they_raise(endpoint: Endpoint) -> None:
    got: list[tuple[str, Any]] = []

    async def slowly(message: Message) -> None:
        got.append(("begin", message.data))
        await asyncio.sleep(0)
        got.append(("end", message.data))
        if message.data == 1:
            raise RuntimeError("a fault of the application")

    async with connect(endpoint.url) as connection:
        await connection.subscribe("room:1", slowly)
        await publish_all(endpoint, "room:1", range(3))
        await eventually_async(lambda: len(got) == 6)

    assert got == [(step, number) for number in range(3) for step in ("begin", "end")]


async def test_a_callback_may_itself_wait_for_the_connection(endpoint: Endpoint) -> None:
    heard: list[object] = []
    first: list[Subscription] = []

    async def move_on(message: Message) -> None:
        await connection.subscribe(message.data, lambda message: heard.append(message.data))
        await first[0].unsubscribe()
        await endpoint.publisher.publish("next", "hello")

    async with connect(endpoint.url) as connection:
        first.append(await connection.subscribe("first", move_on))
        await endpoint.publisher.publish("first", "next")
        await eventually_async(lambda: heard == ["hello"])


async def test_a_callback_may_close_the_connection(endpoint: Endpoint) -> None:
    async def leave(_message: Message) -> None:
        await connection.close()

    async with connect(endpoint.url) as connection:
        await connection.subscribe("room:1", leave)
        await endpoint.publisher.publish("room:1", None)
        async with asyncio.timeout(10_000 * MS):
            await connection.wait_closed()
    assert connection.state == "closed"


async def test_a_position_brings_what_came_after_it(endpoint: Endpoint) -> None:
    await publish_all(endpoint, "room:1", range(3))
    position = await endpoint.publisher.position("room:1")
    await publish_all(endpoint, "room:1", range(3, 6))

    async with connect(endpoint.url) as connection:
        subscription = await connection.subscribe("room:1", position=str(position))
        await endpoint.publisher.publish("room:1", 6)

        assert await take(subscription, 4) == [3, 4, 5, 6]


async def test_private_publications_reach_on_private_also_those_missed_while_away(endpoint: Endpoint) -> None:
    got: list[tuple[str, Any]] = []
    grant = await endpoint.grant(user="7")

    async with connect(
        endpoint.url, grant=grant, on_private=lambda message: got.append((message.channel[:6], message.data))
    ) as connection:
        assert connection.user == "7"
        id_before = connection.id
        await endpoint.publisher.publish(f"#connection-{connection.id}", 1)
        await endpoint.publisher.publish("#user-7", 2)
        await eventually_async(lambda: len(got) == 2)
        await endpoint.stop()
        await endpoint.publisher.publish(f"#connection-{id_before}", 3)
        await endpoint.publisher.publish("#user-7", 4)
        await endpoint.start()
        await eventually_async(lambda: len(got) == 4)
        await endpoint.publisher.publish("#user-7", 5)
        await eventually_async(lambda: len(got) == 5)
        assert connection.id == id_before

    assert [item for item in got if item[0] == "#conne"] == [("#conne", 1), ("#conne", 3)]
    assert [item for item in got if item[0] == "#user-"] == [("#user-", 2), ("#user-", 4), ("#user-", 5)]


async def test_a_client_publishes_where_its_grant_allows_it(endpoint: Endpoint) -> None:
    grant = await endpoint.grant(publish=["room:*"])
    async with connect(endpoint.url, grant=grant) as connection:
        room, hall = await connection.subscribe("room:1"), await connection.subscribe("hall")
        await connection.publish("hall", "refused")
        await connection.publish("room:1", None, event="typing")
        await endpoint.publisher.publish("hall", "still here")

        assert (await anext(room)).event == "typing"
        assert await take(hall, 1) == ["still here"]
        with pytest.raises(ValueError, match="JSON"):
            await connection.publish("room:1", float("nan"))


# Who is there.


async def test_who_is_there_is_told_as_a_list_that_stays_right_over_a_reconnect(
    endpoint: Endpoint, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    grants = {user: await endpoint.grant(user=user, channels=["presence-*"], info={"name": user}) for user in "abc"}
    told: list[Presence] = []
    proxy = tcp_proxy(endpoint.port)
    async with connect(f"http://{proxy.address}/realtime", grant=grants["a"]) as ada:
        subscription = await ada.subscribe("presence-1", lambda _: None, on_members=told.append)
        async with connect(endpoint.url, grant=grants["b"]) as basho:
            await basho.subscribe("presence-1")
            await eventually_async(lambda: len(told) == 2)
            proxy.refuse()
            proxy.reset()
            await wait_until(ada, "waiting")
            async with connect(endpoint.url, grant=grants["c"]) as cho:
                await cho.subscribe("presence-1")
                assert set(subscription.members) == {"a", "b"}
                proxy.accept()
                await eventually_async(lambda: set(subscription.members) == {"a", "b", "c"})
                await endpoint.disconnect(user="b")
                await eventually_async(lambda: told[-1].left == "b")

    info = {user: {"name": user} for user in "abc"}
    assert told[:2] == [Presence({"a": info["a"]}), Presence({"a": info["a"], "b": info["b"]}, joined="b")]
    assert [presence for presence in told if presence.left] == [Presence({"a": info["a"], "c": info["c"]}, left="b")]
    assert subscription.members == {"a": info["a"], "c": info["c"]}


async def test_changes_of_who_is_there_come_in_their_place_among_the_publications(script: ScriptedServer) -> None:
    heard: list[object] = []
    async with scripted(script) as connection:
        subscribing = asyncio.create_task(
            connection.subscribe(
                "presence-1",
                lambda message: heard.append(message.data),
                on_members=lambda presence: heard.append((presence.joined, presence.left, sorted(presence.members))),
            )
        )
        await script.hear()
        members = [{"user": "a", "info": 1}, {"user": "b", "info": None}]
        await script.say("subscribed", channel="presence-1", position="e.0.a", recovered=None, members=members)
        await script.say("leave", channel="presence-1", member={"user": "a", "info": 1})
        await script.say_message("presence-1", "hello", 1)
        await script.say("join", channel="presence-1", member={"user": "c", "info": 3})
        await script.say("join", channel="presence-2", member={"user": "c", "info": 3})
        subscription = await subscribing
        await eventually_async(lambda: len(heard) == 4)
        assert subscription.members == {"b": None, "c": 3}

    assert heard == [(None, None, ["a", "b"]), (None, "a", ["b"]), "hello", ("c", None, ["b", "c"])]


# What breaks.


async def test_nothing_is_lost_or_doubled_over_a_server_restart(endpoint: Endpoint) -> None:
    async with connect(endpoint.url) as connection:
        subscription = await connection.subscribe("room:1")
        id_before = connection.id
        await publish_all(endpoint, "room:1", range(10))
        assert await take(subscription, 5) == list(range(5))
        await endpoint.stop()
        await publish_all(endpoint, "room:1", range(10, 20))
        await endpoint.start()
        assert await take(subscription, 15) == list(range(5, 20))
        assert connection.id == id_before
        await publish_all(endpoint, "room:1", range(20, 25))
        assert await take(subscription, 5) == list(range(20, 25))


async def test_another_server_takes_over_in_the_middle_of_the_traffic(
    redis_server: RedisServer, processes: Processes, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}
    first, second = (processes.uvicorn(env=env, wait=False) for _ in range(2))
    await asyncio.to_thread(first.wait_until_ready)
    await asyncio.to_thread(second.wait_until_ready)
    proxy = tcp_proxy(first.port)
    endpoint = Endpoint(redis_server.url, prefix=prefix, history_size=1_000)  # not started: for its publisher
    async with connect(f"http://{proxy.address}/realtime") as c:
        subscription, id_before = await c.subscribe("room:1"), c.id
        count = 300

        async def publish_steadily() -> None:
            for number in range(count):
                await endpoint.publisher.publish("room:1", number)

        publishing = asyncio.create_task(publish_steadily())
        got = await take(subscription, 50)
        proxy.target = ("127.0.0.1", second.port)
        first.kill()
        got += await take(subscription, count - 50)
        await publishing

        assert got == list(range(count))
        assert c.id == id_before
    await endpoint.publisher.close()


async def test_a_link_that_went_dead_is_noticed_by_its_silence(
    prefix: str, tcp_proxy: Callable[[int], TcpProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mw.client.connection._PONG_SECONDS", 1.5)
    async with Endpoint("memory://", prefix=prefix, ping_interval=0.1, ping_timeout=600) as endpoint:
        proxy = tcp_proxy(endpoint.port)
        async with connect(f"http://{proxy.address}/realtime") as connection:
            subscription = await connection.subscribe("room:1")
            proxy.blackhole()
            began = time.monotonic()
            await endpoint.publisher.publish("room:1", "into the void")
            await wait_until(connection, "waiting")
            assert time.monotonic() - began > 1.2, "the last ping came up to 0.1 s before"
            proxy.pass_through()

            assert await take(subscription, 1) == ["into the void"]


async def test_lost_history_is_told_in_its_place_and_iteration_goes_on(endpoint: Endpoint) -> None:
    got: list[object] = []

    async with connect(endpoint.url) as connection:
        told = asyncio.Event()

        async def on_gap(gap: Gap) -> None:
            got.append(gap.reason)
            told.set()

        def on_message(message: Message) -> None:
            got.append(message.data)

        await connection.subscribe("room:1", on_message, on_gap=on_gap)
        silent = await connection.subscribe("room:2")
        for channel in ("room:1", "room:2"):
            await endpoint.publisher.publish(channel, "before")
        assert await take(silent, 1) == ["before"]
        memory_broker(endpoint.publisher.settings).lose()
        await asyncio.wait_for(told.wait(), 10_000 * MS)
        for channel in ("room:1", "room:2"):
            await endpoint.publisher.publish(channel, "after")

        assert await take(silent, 1) == ["after"]
        await eventually_async(lambda: len(got) == 3)
    assert got == ["before", "epoch", "after"]


async def test_a_position_from_another_time_is_told_as_a_gap_first(endpoint: Endpoint) -> None:
    gaps: list[Gap] = []
    async with connect(endpoint.url) as connection:
        subscription = await connection.subscribe("room:1", position="0ld.7.abc", on_gap=gaps.append)
        await endpoint.publisher.publish("room:1", "new")

        message = await anext(subscription)
        assert message.data == "new"
        assert [gap.reason for gap in gaps] == ["unrecovered"]
        assert gaps[0].position != message.position


async def test_who_iterates_slowly_loses_nothing(prefix: str) -> None:
    async with (
        Endpoint("memory://", prefix=prefix, send_queue_bytes=200_000, history_size=1_000) as endpoint,
        connect(endpoint.url) as connection,
    ):
        subscription = await connection.subscribe("room:1", max_waiting=3)
        link = connection._link
        # Far more than the kernel's buffers take: the server must give this client up, and take it back, meanwhile.
        for number in range(800):
            await endpoint.publisher.publish("room:1", [number, "x" * 60_000])
            await asyncio.sleep(0)  # else all of it goes out as one batch
        got = [data[0] for data in await take(subscription, 800)]

        assert got == list(range(800))
        assert connection._link is not link


async def test_who_left_with_much_unread_holds_up_nobody(endpoint: Endpoint) -> None:
    async with connect(endpoint.url) as connection:
        full = await connection.subscribe("full", max_waiting=2)
        other = await connection.subscribe("other")
        await publish_all(endpoint, "full", range(20))
        await eventually_async(lambda: full.position is not None and full.position.split(".")[1] == "2")
        await full.unsubscribe()
        await endpoint.publisher.publish("other", "hello")

        assert await take(other, 1) == ["hello"]
        assert [message.data async for message in full] == [0, 1]


# What is refused, and what ends.


async def test_a_channel_that_is_not_allowed_is_refused_and_the_rest_goes_on(endpoint: Endpoint) -> None:
    async with connect(endpoint.url) as connection:
        for channel in ("private-1", "no such name", "#user-1"):
            with pytest.raises(SubscriptionRefused) as caught:
                await connection.subscribe(channel)
            assert caught.value.channel == channel
        subscription = await connection.subscribe("room:1")
        await endpoint.publisher.publish("room:1", 1)

        assert await take(subscription, 1) == [1]


async def test_what_a_later_grant_does_not_allow_any_more_ends_its_iteration(endpoint: Endpoint) -> None:
    grants = [await endpoint.grant(channels=["private-1"]), await endpoint.grant(channels=["private-2"])]
    async with connect(endpoint.url, grant=lambda: grants.pop(0) if len(grants) > 1 else grants[0]) as connection:
        subscription = await connection.subscribe("private-1")
        await endpoint.stop()
        await endpoint.start()

        with pytest.raises(SubscriptionRefused) as caught:
            await take(subscription, 1)
        assert caught.value.code == "forbidden"
        await connection.subscribe("private-2")


async def test_a_grant_that_is_wrong_ends_the_first_attempt(endpoint: Endpoint) -> None:
    with pytest.raises(ConnectionClosed) as caught:
        async with connect(endpoint.url, grant="no grant"):
            pytest.fail("it connected")
    assert caught.value.code == 3500


async def test_an_expired_grant_without_a_function_ends_the_first_attempt(endpoint: Endpoint) -> None:
    grant = await endpoint.grant(expires=0.001)
    with pytest.raises(ConnectionClosed) as caught:
        async with connect(endpoint.url, grant=grant):
            pytest.fail("it connected")
    assert caught.value.code == 3501


@pytest.mark.parametrize("how", ["disconnect", "close"])
async def test_a_terminal_code_reaches_whoever_waits(script: ScriptedServer, how: str) -> None:
    async with scripted(script) as connection:
        subscription = await subscribed(connection, script, "room:1")
        unanswered = asyncio.create_task(connection.subscribe("room:2"))
        await script.hear()
        await script.say_message("room:1", "last words", 1)
        if how == "disconnect":
            await script.say("disconnect", code=3503, reason="ended by the application", retry=None)
        else:
            await script.socket.close(3503, "ended by the application")

        assert await take(subscription, 1) == ["last words"]
        for waiting in (anext(subscription), unanswered, connection.wait_closed(), connection.subscribe("room:3")):
            with pytest.raises(ConnectionClosed) as caught:
                await waiting
            assert (caught.value.code, caught.value.reason) == (3503, "ended by the application")
        assert connection.state == "closed"


async def test_a_connection_that_was_taken_over_ends_for_good(endpoint: Endpoint) -> None:
    async with connect(endpoint.url) as connection:
        async with await RawClient.connect(endpoint.url.replace("http", "ws") + "/") as thief:
            await thief.hello(resume=connection._resume)
            with pytest.raises(ConnectionClosed) as caught:
                await connection.wait_closed()
        assert caught.value.code == 3502


# Grants.


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
async def test_a_grant_that_expires_is_renewed_on_the_live_connection(prefix: str, kind: str) -> None:
    async with Endpoint("memory://", prefix=prefix, secret=SECRET) as endpoint:
        grants = [await endpoint.grant(user="7", expires=3600), await endpoint.grant(user="7", expires=1)]
        asked: list[str] = []

        def fetch() -> str:
            asked.append(grants[0] if asked else grants[1])
            return asked[-1]

        async def fetch_slowly() -> str:
            await asyncio.sleep(0)
            return fetch()

        got: list[object] = []
        async with connect(
            endpoint.url,
            grant=fetch if kind == "function" else fetch_slowly,
            on_private=lambda message: got.append(message.data),
        ) as connection:
            link = connection._link
            await eventually_async(lambda: len(asked) == 2)
            await endpoint.publisher.publish("#user-7", "still you")
            await eventually_async(lambda: got == ["still you"])
            assert connection._link is link


async def test_a_function_without_a_fresh_grant_is_not_asked_in_a_loop(prefix: str) -> None:
    async with Endpoint("memory://", prefix=prefix, secret=SECRET, grant_grace=0.2) as endpoint:
        grant = await endpoint.grant(user="7", expires=1.5)
        fresh = await endpoint.grant(user="7")
        asked: list[str] = []

        def fetch() -> str:
            asked.append(grant)
            return grant

        async with connect(endpoint.url, grant=fetch) as connection:
            await wait_until(connection, "waiting")
            assert len(asked) == 2
            grant = fresh
            await wait_until(connection, "connected")


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_what_is_subscribed_while_the_grant_is_renewed_is_heard_with_the_fresh_one(
    prefix: str, transport: str
) -> None:
    channels = [f"private-{number}" for number in range(5)]
    async with Endpoint("memory://", prefix=prefix, secret=SECRET) as endpoint:
        is_renewing = asyncio.Event()
        asked: list[str] = []

        async def fetch_slowly() -> str:
            asked.append(await endpoint.grant(user="7", channels=["private-*"], expires=3600 if asked else 1))
            if len(asked) > 1:
                is_renewing.set()
                await asyncio.sleep(300 * MS)
            return asked[-1]

        async with connect(endpoint.url, grant=fetch_slowly, transports=[transport]) as connection:
            before = await connection.subscribe("private-before")
            await asyncio.wait_for(is_renewing.wait(), 5000 * MS)
            subscribing = [connection.subscribe(channel) for channel in channels]
            subscriptions = await asyncio.wait_for(asyncio.gather(*subscribing), 5000 * MS)
            for subscription in (before, *subscriptions):
                await endpoint.publisher.publish(subscription.channel, subscription.channel)
                assert await take(subscription, 1) == [subscription.channel]
            assert len(asked) == 2


async def test_a_grant_function_that_fails_is_asked_again(endpoint: Endpoint) -> None:
    grant = await endpoint.grant(user="7")
    answers: list[Exception | str] = [RuntimeError("the database is away"), grant]

    def fetch() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with connect(endpoint.url, grant=fetch) as connection:
        assert connection.user == "7"


async def test_a_grant_function_that_never_returns_is_given_up(endpoint: Endpoint) -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    with pytest.raises(ConnectFailed):
        async with connect(endpoint.url, grant=never, open_timeout=0.2):
            pytest.fail("it connected")


# Connecting.


@pytest.mark.parametrize("kind", ["nobody listens", "says nothing", "is no endpoint", "foreign origin"])
async def test_what_does_not_come_about_in_time_fails_in_time(kind: str, endpoint: Endpoint) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel takes connections, and nobody answers
    url, headers = endpoint.url, {}
    if kind == "nobody listens":
        url = f"ws://127.0.0.1:{free_port()}/realtime"
    elif kind == "says nothing":
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/realtime"
    elif kind == "is no endpoint":
        url = endpoint.url.replace("/realtime", "/nothing")
    else:
        headers = {"Origin": "https://evil.example"}
    began = time.monotonic()
    with pytest.raises(ConnectFailed) as caught:
        async with connect(url, headers=headers, open_timeout=0.5):
            pytest.fail("it connected")
    assert time.monotonic() - began < 4
    assert not str(caught.value).endswith(": ")
    silent.close()


async def test_a_refusal_comes_with_the_servers_reason(endpoint: Endpoint) -> None:
    with pytest.raises(ConnectFailed, match=r"HTTP 403.*Origin"):
        async with connect(endpoint.url, headers={"Cookie": "a=b"}, transports=("websocket",), open_timeout=0.5):
            pytest.fail("it connected")


async def test_giving_up_while_connecting_leaves_nothing_behind() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), connect(f"ws://127.0.0.1:{free_port()}/realtime"):
            pytest.fail("it connected")


async def test_closing_while_waiting_for_the_next_attempt_ends_everything_at_once(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 60.0)  # so that the first wait takes 30 s
    async with connect(endpoint.url) as connection:
        subscription = await connection.subscribe("room:1")
        iterating = [asyncio.create_task(take(subscription, 1)) for _ in range(2)]
        await endpoint.stop()
        await wait_until(connection, "waiting")
        subscribing = asyncio.create_task(connection.subscribe("room:2"))
        await asyncio.sleep(0)
        with pytest.raises(ConnectFailed):
            await connection.publish("room:1", 1)
        began = time.monotonic()
        await connection.close()
        assert time.monotonic() - began < 3

        for task in iterating:
            with pytest.raises(StopAsyncIteration):
                await task
        for late in (subscribing, connection.subscribe("room:3")):
            with pytest.raises(ConnectionClosed, match="closed here"):
                await late
        await connection.wait_closed()


async def test_wrong_use_raises_at_once(endpoint: Endpoint) -> None:
    for url in ("realtime", "ftp://a/realtime", "/realtime", "http:///realtime"):
        with pytest.raises(ValueError, match="must be the ws"):
            connect(url)
    with pytest.raises(RuntimeError, match="async with"):
        await connect(endpoint.url).subscribe("room:1")
    async with connect(endpoint.url) as connection:
        await connection.subscribe("room:1")
        with pytest.raises(ValueError, match="already"):
            await connection.subscribe("room:1")
        with pytest.raises(ValueError, match="max_waiting"):
            await connection.subscribe("room:2", max_waiting=0)
        called_back = await connection.subscribe("room:2", print)
        with pytest.raises(TypeError, match="on_message"):
            await anext(called_back)


@pytest.mark.parametrize(
    ("attempt", "chance", "seconds"),
    [(0, 0.0, 0.0), (0, 1.0, 0.5), (0, 0.5, 0.25), (1, 1.0, 1.0), (5, 1.0, 16.0), (6, 1.0, 20.0), (10_000, 0.5, 10.0)],
)
def test_the_back_off_doubles_up_to_its_cap_with_full_jitter(attempt: int, chance: float, seconds: float) -> None:
    assert backoff(attempt, chance) == seconds


# Races, which a scripted server makes happen each time.


@contextlib.asynccontextmanager
async def scripted(script: ScriptedServer, **options: Any) -> AsyncIterator[Connection]:
    """A connection to `script` that stands."""
    welcoming = asyncio.create_task(script.welcome())
    async with connect(script.url, transports=["websocket"], **options) as connection:
        await welcoming
        yield connection


async def subscribed(connection: Connection, script: ScriptedServer, channel: str, **options: Any) -> Subscription:
    subscribing = asyncio.create_task(connection.subscribe(channel, **options))
    assert (await script.hear())["type"] == "subscribe"
    await script.say_subscribed(channel)
    return await subscribing


async def reconnecting(script: ScriptedServer) -> dict[str, Any]:
    """Break the link and wait for the next `connect` frame, which is not answered yet."""
    await script.drop()
    return await script.accept()


async def test_a_connect_frame_carries_every_position_and_the_token(script: ScriptedServer) -> None:
    async with scripted(script, grant="text") as connection:
        await subscribed(connection, script, "room:1")
        await script.say_message("room:1", None, 4)
        await script.say_message("#connection-c1", None, 2)
        await script.say("gap", channel="#connection-c1", position="f.9.a", reason="epoch")
        await script.hears_nothing()

        assert await reconnecting(script) == {
            "type": "connect",
            "grant": "text",
            "resume": "token",
            "channels": {"room:1": "e.4.a", "#connection-c1": "f.9.a"},
        }
        await script.say("connected", connection="c2", resume="other", user="7", ping=25)
        await wait_until(connection, "connected")
        assert (connection.id, connection.user) == ("c2", "7")
        assert (await reconnecting(script))["channels"] == {"room:1": "e.4.a"}


async def test_subscribing_between_connect_and_connected_asks_once(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        await subscribed(connection, script, "room:1")
        assert list((await reconnecting(script))["channels"]) == ["room:1"]
        subscribing = asyncio.create_task(connection.subscribe("room:2", position="e.1.a"))
        await script.say("connected", connection="c1", resume="token", user=None, ping=25)

        assert await script.hear() == {"type": "subscribe", "channel": "room:2", "position": "e.1.a"}
        await script.say_subscribed("room:1")
        await script.say_subscribed("room:2")
        await subscribing
        await script.hears_nothing()


async def test_unsubscribing_between_connect_and_connected_is_made_good(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        subscription = await subscribed(connection, script, "room:1")
        await reconnecting(script)
        await subscription.unsubscribe()
        await script.say("connected", connection="c1", resume="token", user=None, ping=25)
        await script.hears_nothing()
        await script.say_subscribed("room:1")

        assert await script.hear() == {"type": "unsubscribe", "channel": "room:1"}


async def test_subscribing_anew_between_connect_and_connected_goes_on_from_the_new_position(
    script: ScriptedServer,
) -> None:
    async with scripted(script) as connection:
        old = await subscribed(connection, script, "room:1")
        await reconnecting(script)
        await old.unsubscribe()
        subscribing = asyncio.create_task(connection.subscribe("room:1", position="e.7.a"))
        await script.say("connected", connection="c1", resume="token", user=None, ping=25)
        await script.say_subscribed("room:1", "e.3.a")
        await script.say_message("room:1", "for the old one", 4)
        assert await script.hear() == {"type": "unsubscribe", "channel": "room:1"}
        await script.say("unsubscribed", channel="room:1", code="client", reason="as asked")

        assert await script.hear() == {"type": "subscribe", "channel": "room:1", "position": "e.7.a"}
        assert not subscribing.done()
        await script.say_subscribed("room:1", "e.7.a", recovered=True)
        await script.say_message("room:1", "for the new one", 8)
        assert await take(await subscribing, 1) == ["for the new one"]


async def test_subscribing_anew_at_once_waits_for_the_old_one_to_end(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        old = await subscribed(connection, script, "room:1")
        await old.unsubscribe()
        subscribing = asyncio.create_task(connection.subscribe("room:1", position="e.0.a"))
        assert (await script.hear())["type"] == "unsubscribe"
        await script.say_message("room:1", "for the old one", 1)
        await script.hears_nothing()
        await script.say("unsubscribed", channel="room:1", code="client", reason="as asked")
        assert await script.hear() == {"type": "subscribe", "channel": "room:1", "position": "e.0.a"}
        await script.say_subscribed("room:1", "e.0.a", recovered=True)
        await script.say_message("room:1", "again", 1)

        assert await take(await subscribing, 1) == ["again"]
        assert [message async for message in old] == []


async def test_a_server_that_ends_what_is_being_unsubscribed_confuses_nobody(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        old = await subscribed(connection, script, "room:1")
        await old.unsubscribe()
        subscribing = asyncio.create_task(connection.subscribe("room:1"))
        assert (await script.hear())["type"] == "unsubscribe"
        await script.say("unsubscribed", channel="room:1", code="forbidden", reason="no more")
        await script.hears_nothing()
        await script.say("error", channel="room:1", code="not_subscribed", message="it does not listen")

        assert (await script.hear())["type"] == "subscribe"
        await script.say_subscribed("room:1")
        await subscribing


async def test_a_subscribe_that_was_given_up_is_taken_back(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.subscribe("room:1"), 0.05)
        assert (await script.hear())["type"] == "subscribe"
        await script.say_subscribed("room:1")

        assert await script.hear() == {"type": "unsubscribe", "channel": "room:1"}


async def test_a_broker_that_is_away_is_asked_again_also_after_a_reconnect(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        subscribing = asyncio.create_task(connection.subscribe("room:1"))
        for _ in range(2):
            assert (await script.hear())["type"] == "subscribe"
            await script.say("error", channel="room:1", code="unavailable", message="the broker does not answer")
        assert (await script.hear())["type"] == "subscribe"
        await script.say("error", channel="room:1", code="unavailable", message="the broker does not answer")
        await reconnecting(script)
        await script.say("connected", connection="c1", resume="token", user=None, ping=25)
        await script.say("error", channel="room:1", code="unavailable", message="the broker does not answer")
        assert (await script.hear())["type"] == "subscribe"
        await script.say_subscribed("room:1")
        await subscribing


async def test_a_channel_whose_grant_expired_is_asked_for_until_a_fresh_one_counts_also_after_a_reconnect(
    script: ScriptedServer,
) -> None:
    expired = {"code": "grant_expired", "message": "send a fresh one"}
    asked: list[None] = []

    def fetch() -> str:
        asked.append(None)
        return f"grant {len(asked)}"

    async with scripted(script, grant=fetch) as connection:
        subscribing = asyncio.create_task(connection.subscribe("private-1"))
        assert (await script.hear())["type"] == "subscribe"
        await script.say("error", channel="private-1", **expired)
        await script.say("error", id="publish", channel="private-1", **expired)
        await script.say("error", **expired)
        # At once with the fresh one; and if it was refused before that arrived, a moment later.
        heard = [await script.hear() for _ in range(2)]
        assert heard[0] == {"type": "grant", "grant": "grant 2"}
        assert (heard[1]["type"], heard[1]["channel"]) == ("subscribe", "private-1")
        await script.say("error", channel="private-1", **expired)
        assert (await script.hear())["type"] == "subscribe"
        await script.say("error", channel="private-1", **expired)
        frame = await reconnecting(script)
        assert (frame["grant"], frame["channels"]) == ("grant 3", {"private-1": None})
        await script.say("connected", connection="c1", resume="token", user=None, ping=25)
        await script.say_subscribed("private-1")
        await subscribing


async def test_the_refusal_of_a_publication_is_not_one_of_a_subscription(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        subscription = await subscribed(connection, script, "room:1")
        await connection.publish("room:1", {"a": None})
        sent = await script.hear()
        assert (sent["type"], sent["data"]) == ("publish", {"a": None})
        await script.say("error", id=sent["id"], channel="room:1", code="forbidden", message="no grant of yours")
        await script.say_message("room:1", 1, 1)

        assert await take(subscription, 1) == [1]


async def test_what_a_newer_server_says_is_passed_over(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        subscription = await subscribed(connection, script, "room:1")
        await script.say("from_the_future", channel="room:1")
        await script.say("error", code="from_the_future", message="?")
        await script.say_message("room:9", "nobody asked", 1)
        await script.say_message("room:1", 1, 1)

        assert await take(subscription, 1) == [1]


async def test_a_disconnect_is_obeyed_before_the_socket_closes(script: ScriptedServer) -> None:
    async with scripted(script) as connection:
        began = time.monotonic()
        await script.say("disconnect", code=3001, reason="this server is going away", retry=0.8)
        await script.accept()
        assert 0.8 <= time.monotonic() - began < 5
        assert connection.state == "connecting"


async def test_who_is_dropped_again_and_again_waits_longer_each_time(
    script: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def noted(attempt: int, chance: float) -> float:
        attempts.append(attempt)
        return backoff(attempt, chance)

    monkeypatch.setattr("pubsub_mw.client.connection.backoff", noted)
    monkeypatch.setattr("random.random", lambda: 1.0)
    async with scripted(script):
        for least in (0.5, 1.0):
            began = time.monotonic()
            await script.drop()
            await script.welcome()
            assert time.monotonic() - began >= least
        await script.say("ping")
        await script.hear()
        await script.drop()
        await script.welcome()
    assert attempts == [0, 1, 0]
