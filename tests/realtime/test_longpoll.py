"""Long-polling: each poll by itself, at whichever server, and together a stream without a gap."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import flask
import httpx
import pytest
import redis
from starlette.routing import Mount, Router
from starlette.types import ASGIApp

from pubsub_mw.asgi import with_realtime
from pubsub_mw.errors import CloseCode
from pubsub_mw.publisher import AsyncPublisher, Publisher
from pubsub_mw.realtime import Realtime
from tests.realtime.conftest import SECRET, Site, delay_look_ups
from tests.realtime.serving import Servers
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=20_000 * MS, trust_env=False, verify=False) as client:
        yield client


class Poller:
    """Polls one server after another, with the cursor of the answer before."""

    def __init__(self, http: httpx.AsyncClient, *urls: str, resume: str | None = None) -> None:
        self.http = http
        self.urls = [f"{url}/poll" for url in urls]
        self.headers = {"Authorization": f"Bearer {resume}"} if resume else {}
        self.cursor = ""
        self.frames: list[Frame] = []
        self.seconds = 0.0

    async def get(self, *channels: str, wait: float = 0, **query: str) -> httpx.Response:
        params: list[tuple[str, str]] = [("channel", channel) for channel in channels]
        params += [("wait", str(wait)), *query.items()]
        if self.cursor:
            params.append(("cursor", self.cursor))
        self.urls.append(self.urls.pop(0))
        return await self.http.get(self.urls[-1], params=tuple(params), headers=self.headers)

    async def poll(self, *channels: str, wait: float = 0, **query: str) -> list[Frame]:
        began = asyncio.get_running_loop().time()
        response = await self.get(*channels, wait=wait, **query)
        self.seconds = asyncio.get_running_loop().time() - began
        assert response.status_code == 200, response.text
        answer = response.json()
        assert set(answer) == {"frames", "cursor"}
        self.cursor = answer["cursor"]
        frames: list[Frame] = answer["frames"]
        self.frames += frames
        return frames


async def resume_of(site: Site, **hello: Any) -> Frame:
    """The `connected` frame of a connection that began as a WebSocket and is gone."""
    async with await RawClient.connect(site.ws_url + "/") as client:
        return await client.hello(**hello)


async def test_polls_at_any_server_make_a_stream(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    here, there = await serve_realtime(), await serve_realtime()
    poller = Poller(http, here.url, there.url)
    first = await poller.poll("a", "b", wait=20)
    assert sorted((frame["type"], frame["channel"], frame["recovered"]) for frame in first) == [
        ("subscribed", "a", None),
        ("subscribed", "b", None),
    ]
    expected = []
    for number in range(20):
        for channel in "ab":
            await publisher.publish(channel, f"{channel}{number}")
            expected.append(f"{channel}{number}")
        frames = await poller.poll("b", "a", wait=20)
        assert sorted(frame["data"] for frame in frames) == sorted(expected[-2:])
    assert await poller.poll("a", "b") == []


async def test_the_cursor_of_one_channel_is_its_position(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    poller = Poller(http, (await serve_realtime()).url)
    position = await publisher.publish("a", 1)
    await poller.poll("a")
    assert poller.cursor == str(position)
    later = await publisher.publish("a", 2)
    params = [("channel", "b"), ("position", ""), ("channel", "a"), ("position", str(position)), ("wait", "5")]
    frames = (await http.get(poller.urls[0], params=tuple(params))).json()["frames"]
    recovered = {frame["channel"]: frame["recovered"] for frame in frames if frame["type"] == "subscribed"}
    assert recovered == {"a": True, "b": None}
    assert [frame["position"] for frame in frames if frame["type"] == "message"] == [str(later)]


async def test_it_waits_until_there_is_something(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    poller = Poller(http, (await serve_realtime()).url)
    await poller.poll("a")
    waiting = asyncio.create_task(poller.poll("a", wait=20))
    await eventually_async(lambda: poller is not None and not waiting.done())
    await asyncio.sleep(50 * MS)
    await publisher.publish("a", "now")
    assert [frame["data"] for frame in await waiting] == ["now"]
    assert await poller.poll("a", wait=100 * MS) == []
    assert poller.seconds >= 100 * MS


async def test_it_waits_no_longer_than_the_bound(serve_realtime: Serve, http: httpx.AsyncClient) -> None:
    poller = Poller(http, (await serve_realtime(max_poll_wait=50 * MS)).url)
    await poller.poll("a")
    assert await poller.poll("a", wait=1_000) == []
    assert 50 * MS <= poller.seconds < 5


async def test_what_does_not_fit_comes_with_the_next(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    poller = Poller(http, (await serve_realtime(max_poll_bytes=2_500)).url)
    await poller.poll("a")
    for number in range(10):
        await publisher.publish("a", f"{number}" + "x" * 1_000)
    sizes = []
    while frames := await poller.poll("a"):
        sizes.append(len(frames))
    assert sizes == [3, 3, 3, 1]
    assert [frame["data"][0] for frame in poller.frames if frame["type"] == "message"] == list("0123456789")


async def test_a_publication_larger_than_the_bound_comes_alone(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    poller = Poller(http, (await serve_realtime(max_poll_bytes=1_000)).url)
    await poller.poll("a")
    for _ in range(2):
        await publisher.publish("a", "x" * 1_000_000)
    assert [len(await poller.poll("a")) for _ in range(3)] == [1, 1, 0]


async def test_lost_continuity_is_told(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    poller = Poller(http, (await serve_realtime()).url)
    await poller.poll("a")
    for number in range(5):
        await publisher.publish("a", number, history=2)
    (told,) = await poller.poll("a", wait=20)
    assert (told["type"], told["recovered"]) == ("subscribed", False)
    assert await poller.poll("a") == []
    await publisher.publish("a", "next")
    assert [frame["data"] for frame in await poller.poll("a")] == ["next"]


async def test_a_refused_channel_is_told_once_and_heard_when_it_is_allowed(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    poller = Poller(http, site.url)
    frames = await poller.poll("private-a", "b", wait=20)
    assert {frame["channel"]: frame["type"] for frame in frames} == {"private-a": "error", "b": "subscribed"}
    assert await poller.poll("private-a", "b") == []
    grant = await publisher.grant(channels=["private-a"])
    poller.headers = {"Authorization": f"Bearer {(await resume_of(site, grant=grant))['resume']}"}
    assert "private-a" in [frame["channel"] for frame in await poller.poll("private-a", "b", wait=20)]
    await publisher.publish("private-a", "at last")
    assert [frame["data"] for frame in await poller.poll("private-a", "b", wait=20)] == ["at last"]


async def test_a_channel_that_is_refused_for_now_is_told_once_and_asked_for_again_after_a_while(
    http: httpx.AsyncClient, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mw.realtime.longpoll._REFUSED_SECONDS", 300 * MS)
    app, asked, status = flask.Flask("deciding"), list[float](), 200

    @app.get("/authorize")
    def authorize() -> Any:
        asked.append(time.monotonic())
        return "", status

    async with Servers() as servers:
        options: dict[str, Any] = {"url": "memory://", "prefix": prefix, "secret": SECRET, "authorize": "/authorize"}
        server = await servers.start(lambda: with_realtime(app, **options))
        publisher = AsyncPublisher(**options)
        poller = Poller(http, server.url + "/realtime")
        await poller.poll("private-a", "b", wait=20)
        await publisher.publish("private-a", 1)
        status = 500
        assert [frame["code"] for frame in await poller.poll("private-a", "b", wait=20)] == ["unavailable"]
        assert [await poller.poll("private-a", "b", wait=20) for _ in range(3)] == [[], [], []]
        assert min(later - before for before, later in pairwise(asked[-3:])) >= 300 * MS
        await publisher.publish("b", 2)
        assert [frame["data"] for frame in await poller.poll("private-a", "b", wait=20)] == [2]
        status = 200
        while not (frames := await poller.poll("private-a", "b", wait=20)):
            pass
        assert [(frame["type"], frame.get("data")) for frame in frames] == [("subscribed", None), ("message", 1)]


async def test_nobody_has_no_connection(serve_realtime: Serve, http: httpx.AsyncClient) -> None:
    site = await serve_realtime()
    poller = Poller(http, site.url)
    frames = await poller.poll("a", wait=20)
    assert [frame["type"] for frame in frames] == ["subscribed"]
    hub = site.app._running.hub
    assert not [name for name in hub._channels if name.startswith("#connection-")]


class TestConnections:
    async def test_its_own_channels_come_with_it(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        here, there = await serve_realtime(), await serve_realtime()
        connected = await resume_of(here, grant=await publisher.grant(user="7", channels=["private-*"]))
        own = [f"#connection-{connected['connection']}", "#user-7"]
        poller = Poller(http, here.url, there.url, resume=connected["resume"])
        frames = await poller.poll("private-a", wait=20)
        assert {frame["type"] for frame in frames} == {"subscribed"}
        for number in range(5):
            for channel in (*own, "private-a"):
                await publisher.publish(channel, f"{number} to {channel}")
            await publisher.publish("private-a", "not to it", exclude=connected["connection"])
            frames = await poller.poll("private-a", wait=20)
            assert sorted(frame["data"] for frame in frames) == sorted(
                f"{number} to {channel}" for channel in (*own, "private-a")
            )
        assert await poller.poll("private-a") == []

    async def test_the_channel_of_a_user_whom_nobody_has_named_is_not_waited_for(
        self, serve_realtime: Serve, http: httpx.AsyncClient
    ) -> None:
        site = await serve_realtime()
        connected = await resume_of(site)
        poller = Poller(http, site.url, resume=connected["resume"])
        frames = await poller.poll("#user-7", "a", wait=20)
        assert [frame["channel"] for frame in frames] == [f"#connection-{connected['connection']}", "a"]
        assert poller.seconds < 5

    async def test_a_poll_takes_over_from_a_websocket_and_is_taken_over_by_one(
        self, serve_realtime: Serve, http: httpx.AsyncClient
    ) -> None:
        here, there = await serve_realtime(), await serve_realtime()
        websocket = await RawClient.connect(here.ws_url + "/")
        connected = await websocket.hello(channels={"a": None})
        poller = Poller(http, there.url, resume=connected["resume"])
        await poller.poll("a", wait=20)
        assert (await websocket.closed())[0] == CloseCode.REPLACED
        waiting = asyncio.create_task(poller.poll("a", wait=20))
        hub = there.app._running.hub
        await eventually_async(lambda: hub.connection_count == 1)
        async with await RawClient.connect(here.ws_url + "/") as again:
            assert (await again.hello(resume=connected["resume"]))["connection"] == connected["connection"]
            (disconnect,) = await waiting
            assert (disconnect["code"], disconnect["retry"]) == (CloseCode.REPLACED, None)

    async def test_a_poll_is_not_ended_by_the_word_of_the_one_before_that_comes_late(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = await serve_realtime(), await serve_realtime()
        connected = await resume_of(here)
        poller = Poller(http, here.url, there.url, resume=connected["resume"])
        control, heard = there.app._running.shared.control, list[tuple[Any, ...]]()
        hear = control._hear
        monkeypatch.setattr(control, "_hear", lambda *news: heard.append(news))
        await poller.poll("a", wait=20)
        await eventually_async(lambda: heard)
        waiting = asyncio.create_task(poller.poll("a", wait=20))
        await eventually_async(lambda: there.app._running.hub.connection_count == 1)
        hear(*heard[0])
        await publisher.publish("a", "x")
        assert [frame["type"] for frame in await waiting] == ["message"]

    async def test_who_was_disconnected_is_told_within_two_seconds_and_refused_after_that(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher, prefix: str
    ) -> None:
        site = await serve_realtime()
        connected = await resume_of(site, grant=await publisher.grant(user="7", channels=["private-*"]))
        poller = Poller(http, site.url, resume=connected["resume"])
        await poller.poll("private-a", "private-b", wait=20)
        end = Publisher("memory://", prefix=prefix, secret=SECRET)
        waiting = asyncio.create_task(poller.poll("private-a", "private-b", wait=20))
        hub = site.app._running.hub
        await eventually_async(lambda: hub.connection_count == 1)
        await asyncio.to_thread(end.unsubscribe, "private-a", user="7")
        (unsubscribed,) = await asyncio.wait_for(waiting, 2000 * MS)
        assert (unsubscribed["type"], unsubscribed["code"]) == ("unsubscribed", "revoked")
        (error,) = await poller.poll("private-a", "private-b")
        assert (error["code"], error["channel"]) == ("forbidden", "private-a")
        waiting = asyncio.create_task(poller.poll("private-a", "private-b", wait=20))
        await eventually_async(lambda: hub.connection_count == 1)
        await asyncio.to_thread(end.disconnect, user="7")
        (disconnect,) = await asyncio.wait_for(waiting, 2000 * MS)
        assert disconnect["code"] == CloseCode.DISCONNECTED
        refused = await poller.get("private-b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "revoked")

    async def test_a_grant_that_expires_while_the_poll_begins_is_refused_as_one_that_had_expired(
        self,
        serve_realtime: Serve,
        http: httpx.AsyncClient,
        publisher: AsyncPublisher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        site = await serve_realtime()
        connected = await resume_of(site, grant=await publisher.grant(user="7", channels=["*"], expires=1000 * MS))
        poller = Poller(http, site.url, resume=connected["resume"])
        (told,) = [frame for frame in await poller.poll("presence-a", wait=20) if "members" in frame]
        assert [member["user"] for member in told["members"]] == ["7"]
        delay_look_ups(monkeypatch, site.app._running.shared.control, 1000 * MS)
        refused = await poller.get("presence-a", "private-b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "grant_expired")
        assert await publisher.presence("presence-a")

    @pytest.mark.parametrize("shown", ["x.y.z", ""])
    async def test_a_token_that_is_not_ours_is_refused(
        self, serve_realtime: Serve, http: httpx.AsyncClient, shown: str
    ) -> None:
        poller = Poller(http, (await serve_realtime()).url)
        poller.headers = {"Authorization": f"Bearer {shown}".strip()}
        assert (await poller.get("a")).status_code == 401

    async def test_who_polls_on_has_not_gone_and_who_stops_has(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        here, there = [await serve_realtime(presence_grace=800 * MS) for _ in range(2)]
        watcher = await RawClient.connect(here.ws_url + "/")
        await watcher.hello(grant=await publisher.grant(user="w", channels=["*"]), channels={"presence-a": None})
        await watcher.recv("subscribed", "presence-a")
        connected = await resume_of(here, grant=await publisher.grant(user="7", channels=["*"]))
        poller = Poller(http, here.url, there.url, resume=connected["resume"])
        (told,) = [frame for frame in await poller.poll("presence-a", wait=20) if "members" in frame]
        assert {member["user"] for member in told["members"]} == {"w", "7"}
        await watcher.recv("join")
        for _ in range(20):
            assert await poller.poll("presence-a", wait=50 * MS) == []
        assert not [frame for frame in watcher.received if frame["type"] == "leave"]
        assert (await watcher.recv("leave"))["member"]["user"] == "7"
        await watcher.close()

    async def test_who_comes_and_goes_is_told_once_also_between_two_polls(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime(presence_grace=0)
        connected = await resume_of(site, grant=await publisher.grant(user="7", channels=["*"]))
        poller = Poller(http, site.url, resume=connected["resume"])
        await poller.poll("presence-a", wait=20)
        grant = await publisher.grant(user="w", channels=["*"])
        async with await RawClient.connect(site.ws_url + "/") as other:
            await other.hello(grant=grant, channels={"presence-a": None})
            await other.recv("subscribed", "presence-a")
            (told,) = await poller.poll("presence-a", wait=20)
            assert {member["user"] for member in told["members"]} == {"w", "7"}
            assert await poller.poll("presence-a", wait=100 * MS) == []
            waiting = asyncio.create_task(poller.poll("presence-a", wait=20))
            await eventually_async(lambda: site.app._running.hub.connection_count == 2)
            await asyncio.sleep(50 * MS)
        (leave,) = await waiting
        assert (leave["type"], leave["member"]["user"]) == ("leave", "w")
        assert await poller.poll("presence-a", wait=100 * MS) == []


async def test_the_app_is_asked_at_each_poll(http: httpx.AsyncClient, prefix: str) -> None:
    app, asked, may_listen = flask.Flask("deciding"), list[str](), True

    @app.get("/authorize")
    def authorize() -> Any:
        asked.append(flask.request.cookies["session"])
        return ({"user": "7"}, 200) if may_listen else ("", 403)

    async with Servers() as servers:
        options: dict[str, Any] = {"url": "memory://", "prefix": prefix, "secret": SECRET, "authorize": "/authorize"}
        server = await servers.start(lambda: with_realtime(app, **options))
        publisher = Publisher(**options)
        poller = Poller(http, server.url + "/realtime")
        poller.headers = {"Cookie": "session=abc"}
        first = await poller.poll("private-a", wait=20)
        assert {frame["channel"] for frame in first} >= {"private-a"}
        await poller.poll("private-a", wait=200 * MS)
        await asyncio.to_thread(publisher.publish, "#user-7", "to the user")
        await asyncio.to_thread(publisher.publish, "private-a", "to the channel")
        heard: list[Any] = []
        while len(heard) < 2:
            heard += [frame["data"] for frame in await poller.poll("private-a", wait=20)]
        assert sorted(heard) == ["to the channel", "to the user"]
        may_listen = False
        assert [frame["code"] for frame in await poller.poll("private-a")] == ["forbidden"]
        assert set(asked) == {"abc"}
        assert len(asked) >= 4


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("channel=a&wait=x", 400),
        ("channel=a&wait=-1", 400),
        ("channel=a&wait=nan", 400),
        ("channel=a&cursor=!", 400),
        ("channel=a&position=&position=", 400),
        ("channel=a&wait=inf", 200),
    ],
)
async def test_what_cannot_be_is_refused(
    serve_realtime: Serve, http: httpx.AsyncClient, query: str, status: int
) -> None:
    site = await serve_realtime()
    response = await http.get(f"{site.url}/poll?{query}")
    assert response.status_code == status
    assert response.headers["cache-control"] == "no-store, no-transform"


async def test_a_draining_server_answers_who_waits_and_lets_nobody_in(
    serve_realtime: Serve, http: httpx.AsyncClient
) -> None:
    site = await serve_realtime()
    poller = Poller(http, site.url)
    await poller.poll("a")
    waiting = asyncio.create_task(poller.poll("a", wait=20))
    await eventually_async(lambda: site.app._running.hub.connection_count == 1)
    await site.app.drain(0)
    (disconnect,) = await waiting
    assert disconnect["code"] == CloseCode.SHUTDOWN
    assert 0 <= disconnect["retry"] <= 2
    refused = await poller.get("a")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")


async def test_a_client_that_is_gone_is_not_waited_for(serve_realtime: Serve, http: httpx.AsyncClient) -> None:
    site = await serve_realtime()
    poller = Poller(http, site.url)
    await poller.poll("a")
    waiting = asyncio.create_task(poller.poll("a", wait=20))
    await eventually_async(lambda: site.app._running.hub.connection_count == 1)
    waiting.cancel()
    await eventually_async(lambda: site.app._running.hub.connection_count == 0)


async def test_redis_is_not_asked_to_follow_a_channel_anew_for_each_poll(
    http: httpx.AsyncClient, own_redis: RedisServer, prefix: str
) -> None:
    options: dict[str, Any] = {"url": own_redis.url, "prefix": prefix, "secret": SECRET, "channel_linger": 1_000 * MS}

    def build() -> ASGIApp:
        realtime = Realtime(**options)
        return Router(routes=[Mount("/realtime", realtime)], lifespan=realtime.router.lifespan_context)

    def counts() -> tuple[int, int]:
        with redis.Redis(port=own_redis.port) as client:
            (_, listeners), *_ = client.pubsub_numsub(f"{prefix}:{{a}}:p")
            return client.info("commandstats").get("cmdstat_subscribe", {}).get("calls", 0), listeners

    async with Servers() as servers:
        server = await servers.start(build)
        poller = Poller(http, server.url + "/realtime")
        await poller.poll("a", wait=20)
        before, listeners = await asyncio.to_thread(counts)
        assert listeners == 1
        publisher = AsyncPublisher(**options)
        for number in range(20):
            await publisher.publish("a", number)
            assert [frame["data"] for frame in await poller.poll("a", wait=20)] == [number]
        assert await asyncio.to_thread(counts) == (before, 1)
        # And it is not followed for ever.
        await eventually_async(lambda: counts()[1] == 0)
        await publisher.close()
