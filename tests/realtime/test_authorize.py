"""The application decides who may listen: a Flask app with its own session cookie, asked through the queue."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import flask
import httpx
import pytest
import redis
from starlette.routing import Mount, Router
from starlette.types import ASGIApp

from pubsub_mw.asgi import with_realtime
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime import Realtime
from tests.realtime.serving import Server, Servers
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.raw_stream import RawStream
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

SECRET = "a secret of the tests, 32 bytes or more"
PATH = "/pubsub/authorize"
CANARY = "a-cookie-that-is-kept-nowhere"
Open = Callable[..., Awaitable[RawClient]]


class App:
    """A Flask app in which who is logged in may listen to what its name allows.

    Attributes:
        asked: channel and user of each question
        cookies: the Cookie header of each
        gate: questions wait until it is set
        status: answered instead of a decision, if not None
        chunks: streamed instead of a yes, if not None; at a None it raises
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.cookies: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.status: int | None = None
        self.chunks: list[bytes | None] | None = None
        self.names_user = True
        self.flask = flask.Flask("who")
        self.flask.secret_key = "the app's own key"
        self.flask.add_url_rule(PATH, view_func=self.authorize)
        self.flask.add_url_rule("/who", view_func=self.who)

    def authorize(self) -> Any:
        channel, user = flask.request.args["channel"], flask.session.get("user")
        self.asked.append((channel, user))
        self.cookies.append(flask.request.headers.get("Cookie", ""))
        assert flask.request.environ["pubsub.connection"] is not None
        assert self.gate.wait(10)
        if self.status is not None:
            return "", self.status
        if user is None or channel.endswith("-never"):
            return "", 403
        if self.chunks is not None:
            return flask.Response(self.stream(self.chunks), mimetype="application/json")
        return {"user": user, "info": {"name": f"user {user}"}} if self.names_user else {}

    def who(self) -> Any:
        return {"user": flask.request.environ["pubsub.connection"].user, "session": flask.session.get("user")}

    def stream(self, chunks: list[bytes | None]) -> Iterator[bytes]:
        for chunk in chunks:
            if chunk is None:
                raise RuntimeError("broken off")
            yield chunk

    def cookie(self, user: str) -> str:
        """The session cookie that the login of `user` sets."""
        serializer = self.flask.session_interface.get_signing_serializer(self.flask)  # type: ignore[attr-defined]
        return f"session={serializer.dumps({'user': user})}; other={CANARY}"


class World:
    def __init__(self, url: str, prefix: str, open_client: Open) -> None:
        self.options: dict[str, Any] = {"url": url, "prefix": prefix, "secret": SECRET, "authorize": PATH}
        self.app = App()
        self.publisher = Publisher(**self.options)
        self.servers = Servers()
        self._open = open_client
        self.a: Server

    async def serve(self, **settings: Any) -> Server:
        """A server with the app and its worker inside."""
        return await self.servers.start(lambda: with_realtime(self.app.flask, **{**self.options, **settings}))

    async def serve_without_worker(self, **settings: Any) -> Server:
        def build() -> ASGIApp:
            realtime = Realtime(**{**self.options, **settings})
            return Router(routes=[Mount("/realtime", realtime)], lifespan=realtime.router.lifespan_context)

        return await self.servers.start(build)

    async def open(self, user: str | None) -> RawClient:
        headers = {} if user is None else {"Cookie": self.app.cookie(user)}
        return await self._open(self.a.ws_url, origin=self.a.url, headers=headers)

    async def client(
        self, user: str | None = "7", server: Server | None = None, **hello: Any
    ) -> tuple[RawClient, Frame]:
        server = server or self.a
        headers = {} if user is None else {"Cookie": self.app.cookie(user)}
        client = await self._open(server.ws_url, origin=server.url, headers=headers)
        return client, await client.hello(**hello)

    async def say(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(getattr(self.publisher, method), *args, **kwargs)


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    url = "memory://"
    if request.param == "redis":
        redis_server: RedisServer = request.getfixturevalue("redis_server")
        url = redis_server.url
    async for world in _world(url, prefix, raw_client):
        world.a = await world.serve()
        yield world


@pytest.fixture
async def on_redis(redis_server: RedisServer, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    async for world in _world(redis_server.url, prefix, raw_client):
        yield world


async def _world(url: str, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    world = World(url, prefix, raw_client)
    async with world.servers:
        try:
            yield world
        finally:
            world.app.gate.set()
    world.publisher.close()


async def subscribe(client: RawClient, channel: str) -> Frame:
    """The answer to a subscription."""
    await client.send({"type": "subscribe", "channel": channel})
    return await client.recv(channel=channel)


async def test_who_is_logged_in_listens_and_who_is_not_is_refused(world: World) -> None:
    visitor, _ = await world.client("7")
    stranger, _ = await world.client(None)
    forger, _ = await world.client(None)
    assert (await subscribe(visitor, "private-a"))["type"] == "subscribed"
    for client in (stranger, forger):
        refused = await subscribe(client, "private-a")
        assert (refused["type"], refused["code"]) == ("error", "forbidden")
    await world.say("publish", "private-a", "secret")
    await visitor.recv("message", "private-a")
    assert stranger.messages("private-a") == []
    assert world.app.asked == [("private-a", "7"), ("private-a", None), ("private-a", None)]


async def test_a_refusal_says_the_same_as_where_no_app_is_asked(world: World) -> None:
    client, _ = await world.client("7")
    refused = await subscribe(client, "private-never")
    assert (refused["code"], refused["message"]) == ("forbidden", "no grant of yours allows it")


async def test_channels_for_all_and_channels_of_a_grant_are_not_asked_about(world: World) -> None:
    grant = world.publisher.grant("7", channels=["private-mine"])
    client, _ = await world.client("7", grant=grant)
    for channel in ("room", "private-mine"):
        assert (await subscribe(client, channel))["type"] == "subscribed"
    assert world.app.asked == []
    assert (await subscribe(client, "private-other"))["type"] == "subscribed"
    assert world.app.asked == [("private-other", "7")]


async def test_the_app_is_asked_about_what_an_expired_grant_allowed_and_its_no_is_not_final(world: World) -> None:
    grant = world.publisher.grant("7", channels=["private-mine", "private-mine-never"], expires=500 * MS)
    client, _ = await world.client("7", grant=grant)
    assert (await client.recv("error"))["code"] == "grant_expired"
    assert (await subscribe(client, "private-mine"))["type"] == "subscribed"
    assert (await subscribe(client, "private-mine-never"))["code"] == "grant_expired"
    assert (await subscribe(client, "private-other-never"))["code"] == "forbidden"
    assert [channel for channel, _ in world.app.asked] == ["private-mine", "private-mine-never", "private-other-never"]
    await client.send({"type": "grant", "grant": world.publisher.grant("7", channels=["private-mine-never"])})
    assert (await subscribe(client, "private-mine-never"))["type"] == "subscribed"


async def test_the_user_whom_the_app_names_gets_what_is_sent_to_that_user(world: World) -> None:
    client, hello = await world.client("7")
    assert hello["user"] is None
    await subscribe(client, "private-a")

    async def arrives() -> bool:
        await world.say("publish", "#user-7", "hello")
        return bool(client.messages("#user-7"))

    await eventually_async(arrives)
    await world.say("publish", "#user-8", "not for 7")
    assert client.messages("#user-8") == []


async def test_whom_the_app_names_its_views_see_over_a_websocket_and_in_the_session_by_post_too(
    world: World, http: httpx.AsyncClient, raw_stream: Callable[..., Awaitable[RawStream]]
) -> None:
    ask = {"type": "request", "id": "1", "method": "GET", "path": "/who"}
    client, _ = await world.client("7")
    await subscribe(client, "private-a")
    await client.send(ask)
    assert json.loads((await client.recv("response"))["body"]) == {"user": "7", "session": "7"}
    url, headers = f"{world.a.url}/realtime", {"Cookie": world.app.cookie("7"), "Origin": world.a.url}
    begun = await http.post(f"{url}/send", json={"frames": [{"type": "connect"}]}, headers=headers)
    (connected,) = begun.json()["frames"]
    resume = {"Authorization": f"Bearer {connected['resume']}"}
    stream = await raw_stream(f"{url}/events?frames=1&channel=private-a", headers=headers | resume)
    await stream.frame("subscribed", "private-a")
    await http.post(f"{url}/send", json={"frames": [ask]}, headers=headers | resume)
    assert json.loads((await stream.frame("response"))["body"]) == {"user": None, "session": "7"}


@pytest.mark.parametrize(
    "chunks",
    [
        [b'{"user": "7', b'", "info": {"name": "caf\xc3', b'\xa9"}}'],
        [b'{"user": "7", "info": {"name": "a"}, "more": "', b"x" * 30_000, b"x" * 30_000, b'"}'],
    ],
)
async def test_who_is_named_in_an_answer_that_is_streamed_is_known_too(
    world: World, chunks: list[bytes | None]
) -> None:
    world.app.chunks = chunks
    client, _ = await world.client("7")
    subscribed = await subscribe(client, "presence-a")
    assert [member["user"] for member in subscribed["members"]] == ["7"]
    assert subscribed["members"][0]["info"]["name"] in ("café", "a")


async def test_a_streamed_answer_that_is_too_long_allows_and_names_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.app.chunks = [b'{"user": "7", "info": "', *[b"x" * 60_000] * 4, b'"}']
    client, hello = await world.client("7")
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"
    assert "more than 65536 bytes" in caplog.text
    await world.say("publish", "#user-7", "not known to be 7")
    await world.say("publish", "private-a", "after it")
    await client.recv("message", "private-a")
    assert client.messages("#user-7") == []
    assert hello["user"] is None


@pytest.mark.parametrize("chunks", [[b'{"user": "7"}', None], [b'{"user"', b': "7"', None]])
async def test_a_streamed_answer_that_breaks_off_is_no_decision(world: World, chunks: list[bytes | None]) -> None:
    world.app.chunks = chunks
    client, _ = await world.client("7")
    assert (await subscribe(client, "private-a"))["code"] == "unavailable"
    world.app.chunks = None
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"


async def test_an_app_that_names_nobody_allows_all_the_same(world: World) -> None:
    world.app.names_user = False
    client, _ = await world.client("7")
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"


async def test_who_the_app_takes_for_somebody_else_than_the_grant_is_refused(world: World) -> None:
    client, _ = await world.client("7", grant=world.publisher.grant("8"))
    assert (await subscribe(client, "private-a"))["code"] == "forbidden"


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 429])
async def test_any_other_answer_refuses(world: World, status: int) -> None:
    world.app.status = status
    client, _ = await world.client("7")
    assert (await subscribe(client, "private-a"))["code"] == "forbidden"


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_an_app_that_fails_is_asked_again_later(world: World, status: int) -> None:
    world.app.status = status
    client, _ = await world.client("7")
    assert (await subscribe(client, "private-a"))["code"] == "unavailable"
    world.app.status = None
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"


async def test_who_leaves_as_soon_as_the_app_has_allowed_it_does_not_listen(world: World) -> None:
    other, _ = await world.client("8")  # keeps the channel followed, so that the answer comes at once
    assert (await subscribe(other, "private-a"))["type"] == "subscribed"
    client, _ = await world.client("7")
    for _ in range(20):
        assert (await subscribe(client, "private-a"))["type"] == "subscribed"
        await client.send({"type": "unsubscribe", "channel": "private-a"})
        assert (await client.recv("unsubscribed", "private-a"))["code"] == "client"
    assert (await subscribe(client, "private-b"))["type"] == "subscribed"
    await world.say("publish", "private-a", "unwanted")
    await world.say("publish", "private-b", "wanted")
    assert (await client.recv("message"))["channel"] == "private-b"


async def test_an_app_that_hangs_is_unavailable_after_request_timeout(world: World) -> None:
    server = await world.serve(request_timeout=0.3, request_grace=5, prefix=world.options["prefix"] + "-b")
    world.app.gate.clear()
    client, _ = await world.client("7", server)
    assert (await subscribe(client, "private-a"))["code"] == "unavailable"


async def test_without_a_worker_it_is_unavailable_and_the_connection_lives(on_redis: World) -> None:
    server = await on_redis.serve_without_worker(request_timeout=0.2, request_grace=0.1)
    client, _ = await on_redis.client("7", server)
    assert (await subscribe(client, "private-a"))["code"] == "unavailable"
    assert (await subscribe(client, "room"))["type"] == "subscribed"


async def test_a_full_queue_is_unavailable_at_once(on_redis: World) -> None:
    server = await on_redis.serve_without_worker(queue_size=1)
    client, _ = await on_redis.client("7", server)
    await client.send({"type": "subscribe", "channel": "private-waits"})
    assert (await subscribe(client, "private-b"))["code"] == "unavailable"


async def test_a_client_that_changes_its_mind_while_the_app_thinks_does_not_listen(world: World) -> None:
    world.app.gate.clear()
    client, _ = await world.client("7")
    await client.send({"type": "subscribe", "channel": "private-a"})
    await eventually_async(lambda: world.app.asked)
    await client.send({"type": "subscribe", "channel": "private-a"})
    assert (await client.recv("error", "private-a"))["code"] == "already_subscribed"
    await client.send({"type": "unsubscribe", "channel": "private-a"})
    assert (await client.recv("unsubscribed", "private-a"))["code"] == "client"
    world.app.gate.set()
    assert (await subscribe(client, "private-b"))["type"] == "subscribed"
    await world.say("publish", "private-a", "unwanted")
    await world.say("publish", "private-b", "wanted")
    await client.recv("message", "private-b")
    assert client.messages("private-a") == []
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"


async def test_a_connection_may_end_while_the_app_thinks(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.app.gate.clear()
    leaver, _ = await world.client("7")
    for number in range(5):
        await leaver.send({"type": "subscribe", "channel": f"private-{number}"})
    await eventually_async(lambda: world.app.asked)
    await leaver.close()
    world.app.gate.set()
    client, _ = await world.client("7")
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"
    assert not [record for record in caplog.records if record.name == "pubsub_mw" and record.levelname == "ERROR"]


async def test_many_channels_at_once_are_each_asked_about_once(world: World) -> None:
    names = [f"private-{number}" for number in range(100)] + [f"private-{number}-never" for number in range(20)]
    client, _ = await world.client("7", channels=dict.fromkeys(names))
    for name in names:
        answer = await client.recv(channel=name)
        assert answer["type"] == ("error" if name.endswith("never") else "subscribed")
    assert sorted(world.app.asked) == sorted((name, "7") for name in names)


async def test_no_more_channels_are_asked_about_at_once_than_a_connection_may_have(world: World) -> None:
    world.app.gate.clear()
    client, _ = await world.client("7")
    for number in range(129):
        await client.send({"type": "subscribe", "channel": f"private-{number}"})
    assert (await client.recv("error", "private-128"))["code"] == "too_many_channels"


async def test_every_resume_asks_again(world: World) -> None:
    client, hello = await world.client("7", channels={"private-a": None})
    position = (await client.recv("subscribed", "private-a"))["position"]
    await client.close()
    await world.say("publish", "private-a", "missed")
    again, restored = await world.client("7", resume=hello["resume"], channels={"private-a": position})
    assert restored["connection"] == hello["connection"]
    assert (await again.recv("subscribed", "private-a"))["recovered"] is True
    assert (await again.recv("message", "private-a"))["data"] == "missed"
    await again.close()
    # The login has ended: the id is still the visitor's, the channel is not.
    out, restored = await world.client(None, resume=hello["resume"], channels={"private-a": position})
    assert restored["connection"] == hello["connection"]
    assert (await out.recv("error", "private-a"))["code"] == "forbidden"
    assert out.messages("private-a") == []
    assert world.app.asked == [("private-a", "7"), ("private-a", "7"), ("private-a", None)]


async def test_what_was_sent_to_the_apps_user_while_away_is_recovered(world: World) -> None:
    client, hello = await world.client("7", channels={"private-a": None})
    await client.recv("subscribed", "private-a")

    async def arrives() -> bool:
        await world.say("publish", "#user-7", "first")
        return bool(client.messages("#user-7"))

    await eventually_async(arrives)
    await client.close()
    (*_, last) = [frame for frame in client.received if frame.get("channel") == "#user-7"]
    await world.say("publish", "#user-7", "missed")
    channels = {"private-a": None, "#user-7": last["position"]}
    again, _ = await world.client("7", resume=hello["resume"], channels=channels)
    assert (await again.recv("subscribed", "#user-7"))["recovered"] is True
    assert [frame for frame in again.received if frame["type"] == "error"] == []
    await eventually_async(lambda: "missed" in again.messages("#user-7"))
    other, _ = await world.client("8", resume=hello["resume"], channels=channels)
    await other.recv("subscribed", "private-a")
    await world.say("publish", "private-a", 1)
    await other.recv("message", "private-a")
    assert other.messages("#user-7") == []


async def test_the_apps_user_can_be_disconnected_and_may_come_back_if_the_app_says_so(world: World) -> None:
    client, _ = await world.client("7", channels={"private-a": None})
    other, _ = await world.client("8", channels={"private-a": None})
    for each in (client, other):
        await each.recv("subscribed", "private-a")
    await world.say("disconnect", user="7")
    assert (await client.closed(2000 * MS))[0] == 3503
    again, _ = await world.client("7")
    assert (await subscribe(again, "private-a"))["type"] == "subscribed"
    assert other.code is None


async def test_the_resume_token_of_the_apps_user_who_was_disconnected_is_void(world: World) -> None:
    client, hello = await world.client("7", channels={"private-a": None})
    await client.recv("subscribed", "private-a")
    await world.say("disconnect", user="7")
    assert (await client.closed(2000 * MS))[0] == 3503

    async def is_barred() -> bool:
        again = await world.open(None)
        await again.send({"type": "connect", "resume": hello["resume"]})
        answer: str = (await again.recv())["type"]
        return answer == "disconnect"

    end = time.monotonic() + 2000 * MS
    while not await is_barred():
        assert time.monotonic() < end, "who holds the token still gets what is sent to the connection"


async def test_the_apps_users_subscription_can_be_ended(world: World) -> None:
    client, _ = await world.client("7", channels={"private-a": None})
    await client.recv("subscribed", "private-a")
    await world.say("unsubscribe", "private-a", user="7")
    assert (await client.recv("unsubscribed", "private-a", 2000 * MS))["code"] == "revoked"
    assert (await subscribe(client, "private-a"))["type"] == "subscribed", "the app was asked, and said so"


@pytest.mark.parametrize("what", ["disconnect", "unsubscribe"])
async def test_what_is_ended_while_the_app_thinks_stays_ended(world: World, what: str) -> None:
    world.app.gate.clear()
    client, _ = await world.client("7")
    await client.send({"type": "subscribe", "channel": "private-a"})
    await eventually_async(lambda: world.app.asked)
    if what == "disconnect":
        await world.say("disconnect", user="7")
        world.app.gate.set()
        assert (await client.closed())[0] == 3503
    else:
        await world.say("unsubscribe", "private-a", user="7")
        world.app.gate.set()
        assert (await client.recv("error", "private-a"))["code"] == "forbidden"
    subscribed = [frame["channel"] for frame in client.received if frame["type"] == "subscribed"]
    assert not [channel for channel in subscribed if not channel.startswith("#")]


@pytest.mark.parametrize(
    "path",
    [
        PATH,
        f"{PATH}?channel=private-a",
        "/pubsub/%61uthorize",
        "/pubsub/x/../authorize",
        "/pubsub//authorize",
        "/pubsub%2fauthorize",
        "//pubsub/authorize",
        "/pubsub/./authorize",
        "/pubsub\\authorize",
        "/pubsub/lifecycle",
        "/pubsub/lifecycl%65?x=1",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_clients_cannot_request_the_paths_that_only_the_server_asks(world: World, path: str, method: str) -> None:
    server = await world.serve(lifecycle="/pubsub/lifecycle", requests="/*", prefix=world.options["prefix"] + "-c")
    client, _ = await world.client("7", server)
    await client.send({"type": "request", "id": "1", "method": method, "path": path})
    assert (await client.recv("error"))["code"] in ("forbidden", "bad_frame")
    assert world.app.asked == []


async def test_the_visitors_cookies_reach_the_view_and_are_kept_nowhere(
    on_redis: World, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await on_redis.serve()
    client, _ = await on_redis.client("7", server)
    assert (await subscribe(client, "private-a"))["type"] == "subscribed"
    (cookie,) = on_redis.app.cookies
    assert CANARY in cookie
    with redis.Redis(port=redis_server.port) as connection:
        # An answered question is taken out of the queue with the next round of settling.
        eventually(lambda: CANARY.encode() not in everything(connection, on_redis.options["prefix"]))
        assert b"private-a" in everything(connection, on_redis.options["prefix"])
    assert CANARY not in json.dumps(client.received)
    assert CANARY not in caplog.text


def everything(connection: redis.Redis, prefix: str) -> bytes:
    """All keys below `prefix`, with their values as Redis would write them to disk."""
    keys = list(connection.scan_iter(f"{prefix}:*"))
    return b"\n".join([*keys, *(connection.dump(key) or b"" for key in keys)])


async def test_an_answer_within_two_seconds_of_the_servers_start(on_redis: World) -> None:
    began = time.monotonic()
    server = await on_redis.serve()
    client, _ = await on_redis.client("7", server, channels={"private-a": None})
    await client.recv("subscribed", "private-a")
    assert time.monotonic() - began < 5000 * MS
