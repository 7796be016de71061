"""The endpoint as a whole: where it can be mounted, what it serves, how it starts, stops and refuses."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import InvalidStatus

from pubsub_mw.broker.interface import Key, Listener
from pubsub_mw.broker.memory import AsyncMemoryBroker, MemorySubscriber, memory_broker
from pubsub_mw.errors import CloseCode, SettingsError
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime.app import _Running
from pubsub_mw.realtime.metrics import Metrics
from pubsub_mw.settings import Settings
from tests.realtime.conftest import SECRET, Site
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]


async def hears(client: RawClient, publisher: AsyncPublisher) -> None:
    await client.hello(channels={"room": None})
    await client.recv("subscribed")
    await publisher.publish("room", 1)
    assert (await client.recv("message"))["data"] == 1


@pytest.fixture
def realtime(prefix: str) -> Realtime:
    return Realtime("memory://", prefix=prefix, secret=SECRET)


@pytest.mark.parametrize("path", ["/realtime", "/realtime/"])
async def test_it_can_be_mounted_in_a_starlette_app(
    serve_app: Serve, raw_client: Open, realtime: Realtime, publisher: AsyncPublisher, path: str
) -> None:
    routes = [Mount("/realtime", realtime), WebSocketRoute("/realtime", realtime)]
    site = await serve_app(Starlette(routes=routes))
    await hears(await raw_client(site.ws_url + path), publisher)
    await realtime.stop()


async def test_it_can_be_mounted_inside_a_mount(
    serve_app: Serve, raw_client: Open, realtime: Realtime, publisher: AsyncPublisher
) -> None:
    site = await serve_app(Starlette(routes=[Mount("/a", Starlette(routes=[Mount("/b", realtime)]))]))
    await hears(await raw_client(site.ws_url + "/a/b/"), publisher)
    async with httpx.AsyncClient(base_url=site.url) as http:
        assert (await http.get("/a/b/health")).status_code == 200
        assert "pubsub_broker_up" in (await http.get("/a/b/metrics")).text
        assert "/a/b/health" in (await http.get("/a/b/healthy")).json()["error"]["message"]
    await realtime.stop()


@pytest.mark.parametrize("root_path", ["", "/root"])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/a", None),
        ("/a/", None),
        ("/a/realtime", None),
        ("/a/realtime/", None),
        ("/other", None),
        ("/a/nonsense", 404),
        ("/a/realtime/nonsense", 404),
        ("/a/realtime/realtime", 404),
        ("/a/realtime/events", 404),
        ("/a/realtime//", 404),
    ],
)
async def test_a_websocket_below_the_mount_is_refused(
    serve_app: Serve, realtime: Realtime, path: str, status: int | None, root_path: str
) -> None:
    inner = [Mount("/realtime", realtime), WebSocketRoute("/realtime", realtime), Mount("/", realtime)]
    outer = [Mount("/a", routes=inner), WebSocketRoute("/a", realtime), WebSocketRoute("/other", realtime)]
    site = await serve_app(Starlette(routes=outer), root_path=root_path)
    refused = None
    try:
        async with await RawClient.connect(site.ws_url + path) as client:
            await client.hello()
    except InvalidStatus as refusal:
        refused = refusal.response.status_code
    assert refused == status
    await realtime.stop()


async def test_it_can_be_served_under_a_root_path(
    serve_app: Serve, raw_client: Open, realtime: Realtime, publisher: AsyncPublisher
) -> None:
    site = await serve_app(realtime, root_path="/prefix")
    await hears(await raw_client(site.ws_url + "/"), publisher)


async def test_it_needs_no_lifespan(
    serve_app: Serve, raw_client: Open, realtime: Realtime, publisher: AsyncPublisher
) -> None:
    site = await serve_app(realtime, lifespan="off")
    await hears(await raw_client(site.ws_url), publisher)
    await realtime.stop()


async def test_many_first_clients_start_it_once(serve_app: Serve, raw_client: Open, realtime: Realtime) -> None:
    site = await serve_app(realtime, lifespan="off")
    clients = await asyncio.gather(*(raw_client(site.ws_url) for _ in range(10)))
    await asyncio.gather(*(client.hello() for client in clients))
    assert (await realtime.start()).hub.connection_count == 10
    await realtime.stop()


async def test_it_stops_and_starts_again(serve_app: Serve, raw_client: Open, realtime: Realtime) -> None:
    site = await serve_app(realtime, lifespan="off")
    await (await raw_client(site.ws_url)).hello()
    await realtime.stop()
    await (await raw_client(site.ws_url)).hello()
    await realtime.stop()


def test_it_serves_one_event_loop_after_another(prefix: str) -> None:
    realtime = Realtime("memory://", prefix=prefix, secret=SECRET)

    async def use() -> int:
        running = await realtime.start()
        await eventually_async(lambda: running.hub.is_up)
        await realtime.stop()
        return id(running)

    assert asyncio.run(use()) != 0
    assert asyncio.run(use()) != 0


async def test_other_paths_are_not_found_and_the_mount_says_what_it_is(serve_app: Serve, realtime: Realtime) -> None:
    site = await serve_app(realtime)
    async with httpx.AsyncClient(base_url=site.url) as http:
        answer = await http.get("/nothing")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unsupported")
        assert all(name in answer.json()["error"]["message"] for name in ("/events", "/client.js", "/metrics"))
        hint = await http.get("/")
        assert hint.status_code == 426
        assert "WebSocket" in hint.text


async def test_health_tells_what_is_here(
    serve_app: Serve, raw_client: Open, realtime: Realtime, publisher: AsyncPublisher
) -> None:
    site = await serve_app(realtime)
    async with httpx.AsyncClient(base_url=site.url) as http:
        empty = await http.get("/health")
        assert empty.status_code == 200
        assert empty.headers["cache-control"] == "no-store"
        assert empty.json() == {"status": "ok", "connections": 0, "channels": 0}
        await hears(await raw_client(site.ws_url), publisher)
        assert (await http.get("/health")).json() == {"status": "ok", "connections": 1, "channels": 2}


async def test_health_says_when_redis_is_gone_and_when_it_is_back(
    serve_app: Serve, own_redis: RedisServer, prefix: str
) -> None:
    realtime = await asyncio.to_thread(
        Realtime, own_redis.url, prefix=prefix, secret=SECRET, probe_interval=50 * MS, probe_timeout=300 * MS
    )
    site = await serve_app(realtime)
    async with httpx.AsyncClient(base_url=site.url) as http:

        async def is_healthy() -> bool:
            return (await http.get("/health")).status_code == 200

        async def is_unhealthy() -> bool:
            return not await is_healthy()

        await eventually_async(is_healthy)
        await asyncio.to_thread(own_redis.kill)
        await eventually_async(is_unhealthy)
        await asyncio.to_thread(own_redis.start)
        await eventually_async(is_healthy)


@pytest.mark.parametrize(("path", "media_type"), [("/client.js", "text/javascript"), ("/client.d.ts", "text/plain")])
async def test_the_client_is_served_and_can_be_cached(
    serve_app: Serve, realtime: Realtime, path: str, media_type: str
) -> None:
    site = await serve_app(realtime)
    async with httpx.AsyncClient(base_url=site.url) as http:
        first = await http.get(path)
        assert first.status_code == 200
        assert first.headers["content-type"].startswith(media_type)
        assert first.headers["cache-control"] == "no-cache"
        assert first.headers["access-control-allow-origin"] == "*"
        assert first.headers["x-content-type-options"] == "nosniff"
        for known in (first.headers["etag"], "W/" + first.headers["etag"], f'"other", {first.headers["etag"]}'):
            again = await http.get(path, headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
        assert (await http.get(path, headers={"if-none-match": '"other"'})).status_code == 200
        assert (await http.post(path)).status_code == 405


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        ("gzip", True),
        ("GZIP;q=0.5, br", True),
        ("br, *", True),
        ("*;q=0, gzip", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("br, *;q=0", False),
        ("identity", False),
        ("", False),
    ],
)
async def test_the_client_is_sent_compressed_to_whom_accepts_that(
    serve_app: Serve, realtime: Realtime, accepted: str, *, is_compressed: bool
) -> None:
    site = await serve_app(realtime)
    async with httpx.AsyncClient(base_url=site.url, headers={"accept-encoding": accepted}) as http:
        as_it_is = await http.get("/client.js", headers={"accept-encoding": "identity"})
        answer = await http.get("/client.js")
        assert answer.text == as_it_is.text
        assert (answer.headers["etag"] != as_it_is.headers["etag"]) == is_compressed
        assert answer.headers.get("content-encoding") == ("gzip" if is_compressed else None)
        assert (int(answer.headers["content-length"]) < 6_000) == is_compressed
        head = await http.head("/client.js")
        assert head.content == b""
        names = ("content-length", "content-encoding", "content-type", "etag", "vary", "cache-control")
        assert [head.headers.get(name) for name in names] == [answer.headers.get(name) for name in names]
        again = await http.get("/client.js", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (again.headers["vary"], again.headers["etag"]) == ("accept-encoding", answer.headers["etag"])
        assert "content-encoding" not in again.headers


async def test_an_address_may_have_so_many_connections(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime(max_connections_per_address=2)
    first, _ = await raw_client(site.ws_url), await raw_client(site.ws_url)
    with pytest.raises(InvalidStatus) as refusal:
        await raw_client(site.ws_url)
    assert refusal.value.response.status_code == 429
    await first.close()

    async def is_admitted() -> bool:
        with contextlib.suppress(InvalidStatus):
            await raw_client(site.ws_url)
            return True
        return False

    await eventually_async(is_admitted)


async def test_draining_closes_everybody_over_time_and_admits_nobody(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime()
    clients = [await raw_client(site.ws_url) for _ in range(10)]
    for client in clients:
        await client.hello()
    draining = asyncio.create_task(site.app.drain(1_000 * MS))
    await eventually_async(lambda: any(client.code for client in clients))
    assert not all(client.code for client in clients)
    with pytest.raises(InvalidStatus) as refusal:
        await raw_client(site.ws_url)
    assert refusal.value.response.status_code == 503
    async with httpx.AsyncClient(base_url=site.url) as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
    await draining
    for client in clients:
        disconnect = await client.recv("disconnect")
        assert disconnect["code"] == CloseCode.SHUTDOWN
        assert 0 <= disconnect["retry"] <= 2
        assert (await client.closed())[0] == CloseCode.SHUTDOWN
    retries = {client.received[-1]["retry"] for client in clients}
    assert len(retries) > 1, "they do not all come back at once"


async def test_without_a_secret_and_without_redis_connections_are_refused_until_it_answers(
    serve_app: Serve, raw_client: Open, own_redis: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(own_redis.kill)
    realtime = await asyncio.to_thread(Realtime, own_redis.url, prefix=prefix, broker_timeout=2_000 * MS)
    site = await serve_app(realtime)
    with pytest.raises(InvalidStatus) as refusal:
        await raw_client(site.ws_url)
    assert refusal.value.response.status_code == 503
    await asyncio.to_thread(own_redis.start)
    client = await raw_client(site.ws_url)
    await client.hello()
    assert "PUBSUB_SECRET is not set" in caplog.text


async def test_a_secret_that_redis_lost_is_put_back(serve_app: Serve, own_redis: RedisServer, prefix: str) -> None:
    realtime = await asyncio.to_thread(Realtime, own_redis.url, prefix=prefix, probe_interval=50 * MS)
    await serve_app(realtime)
    await realtime.start()
    secret = own_redis.cli("GET", f"{prefix}:secret")
    assert secret

    async def is_kept() -> bool:
        return bool(own_redis.cli("GET", f"{prefix}:secret") == secret)

    await asyncio.to_thread(own_redis.restart)
    await eventually_async(is_kept)
    own_redis.cli("FLUSHALL")
    await eventually_async(is_kept)


async def test_a_port_with_no_redis_behind_it_refuses_no_process(serve_app: Serve, prefix: str) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    site = await serve_app(
        await asyncio.to_thread(Realtime, url, prefix=prefix, secret=SECRET, broker_timeout=200 * MS)
    )
    async with httpx.AsyncClient(base_url=site.url) as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "broker unavailable")


def test_a_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(SettingsError):
        Realtime("memory://", max_chanels=1)
    with pytest.raises(SettingsError):
        Realtime("memory://", max_channels=0)
    with pytest.raises(SettingsError, match="grant_public_key"):
        Realtime("memory://", grant_public_key="no PEM")


async def test_a_server_stops_though_its_link_to_the_broker_fails_at_that_moment(prefix: str) -> None:
    class Link(MemorySubscriber[Key]):
        """Breaks when it is told to end, once, as a link does when Redis goes away just then."""

        has_failed = False

        async def run(self) -> None:
            try:
                await super().run()
            except asyncio.CancelledError:
                if Link.has_failed:
                    raise
                Link.has_failed = True
                raise ConnectionError("closed by the other side") from None

    class Broker(AsyncMemoryBroker):
        def subscriber(self, listener: Listener[Key]) -> MemorySubscriber[Key]:
            return Link(self._broker, listener)

    settings = Settings.build("memory://", environ={}, prefix=prefix)
    running = _Running(settings, Broker(memory_broker(settings)), SECRET, Metrics())
    await eventually_async(lambda: running.hub.is_up)
    async with asyncio.timeout(5_000 * MS):
        await running.stop()
    assert Link.has_failed
