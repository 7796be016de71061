"""What the application is told of connections that begin and end."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import redis
from starlette.routing import Mount, Router
from starlette.types import ASGIApp

from pubsub_mw.asgi import with_realtime
from pubsub_mw.broker.codec import decode_request
from pubsub_mw.broker.memory import AsyncMemoryBroker, memory_broker
from pubsub_mw.grants import queue_key
from pubsub_mw.model import ConnectionId, Handshake
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime.lifecycle import Lifecycle
from pubsub_mw.settings import Settings
from tests.realtime.serving import Server, Servers
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

SECRET = "a secret of the tests, 32 bytes or more"
PATH = "/pubsub/lifecycle"
CANARY = "a-cookie-that-is-kept-nowhere"
GRACE = 700 * MS
Open = Callable[..., Awaitable[RawClient]]


class World:
    """Servers whose application notes what it is told."""

    def __init__(self, url: str, prefix: str, open_client: Open) -> None:
        self.options: dict[str, Any] = {"url": url, "prefix": prefix, "secret": SECRET, "lifecycle": PATH}
        self.options |= {"lifecycle_grace": GRACE, "presence_ttl": 1_500 * MS}
        self.publisher = Publisher(**self.options)
        self.servers = Servers()
        self._open = open_client
        self.told: list[dict[str, Any]] = []
        self.environs: list[dict[str, Any]] = []
        self.a: Server

    def app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == PATH:
            self.told.append(json.loads(environ["wsgi.input"].read()))
            self.environs.append(environ)
        allow = b'{"user": "7"}'
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(allow)))])
        return [allow]

    async def serve(self, **settings: Any) -> Server:
        return await self.servers.start(lambda: with_realtime(self.app, **{**self.options, **settings}))

    async def client(self, server: Server | None = None, **hello: Any) -> tuple[RawClient, Frame]:
        server = server or self.a
        client = await self._open(server.ws_url, origin=server.url, headers={"Cookie": f"session={CANARY}"})
        return client, await client.hello(**hello)

    def events(self, hello: Frame) -> list[str]:
        return [report["event"] for report in self.told if report["connection"] == hello["connection"]]

    async def events_become(self, hello: Frame, *events: str, timeout: float = 10_000 * MS) -> None:
        await eventually_async(lambda: self.events(hello) == list(events), timeout, f"{self.events(hello)}")

    async def another_comes_and_goes(self, server: Server | None = None) -> None:
        """Wait until what was to be said before has been said: reports of others take the same way."""
        client, hello = await self.client(server)
        await client.close()
        await self.events_become(hello, "connect", "disconnect")


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    url = "memory://"
    if request.param == "redis":
        redis_server: RedisServer = request.getfixturevalue("redis_server")
        url = redis_server.url
    world = World(url, prefix, raw_client)
    async with world.servers:
        world.a = await world.serve()
        yield world
    world.publisher.close()


@pytest.fixture
async def on_redis(redis_server: RedisServer, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    world = World(redis_server.url, prefix, raw_client)
    async with world.servers:
        yield world
    world.publisher.close()


async def test_a_connections_begin_and_end_are_posted_once_each(world: World) -> None:
    client, hello = await world.client(grant=world.publisher.grant("8"))
    await world.events_become(hello, "connect")
    await client.close()
    await world.events_become(hello, "connect", "disconnect")
    await world.another_comes_and_goes()
    assert world.told[:2] == [
        {"event": event, "connection": hello["connection"], "user": "8"} for event in ("connect", "disconnect")
    ]
    for environ in world.environs:
        assert (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("POST", PATH)
        assert environ["CONTENT_TYPE"] == "application/json"
        assert "HTTP_COOKIE" not in environ
    assert world.environs[0]["pubsub.connection"].id == hello["connection"]


async def test_a_connection_that_is_cut_or_ended_by_the_application_is_reported_like_one_that_is_closed(
    world: World,
) -> None:
    cut, cut_hello = await world.client()
    _, ended_hello = await world.client()
    cut.abort()
    await asyncio.to_thread(world.publisher.disconnect, connection=ended_hello["connection"])
    for hello in (cut_hello, ended_hello):
        await world.events_become(hello, "connect", "disconnect")


async def test_a_connection_that_never_said_connect_is_not_reported(world: World) -> None:
    client = await world._open(world.a.ws_url)
    await client.close()
    await world.another_comes_and_goes()
    assert len(world.told) == 2


async def test_resumes_within_the_grace_are_not_reported(world: World) -> None:
    client, hello = await world.client()
    for _ in range(4):
        client.abort()
        client, again = await world.client(resume=hello["resume"])
        assert again["connection"] == hello["connection"]
    await world.another_comes_and_goes()
    assert world.events(hello) == ["connect"]
    await client.close()
    await world.events_become(hello, "connect", "disconnect")


async def test_a_resume_after_the_grace_is_a_new_begin(world: World) -> None:
    client, hello = await world.client()
    await client.close()
    await world.events_become(hello, "connect", "disconnect")
    await world.client(resume=hello["resume"])
    await world.events_become(hello, "connect", "disconnect", "connect")


async def test_a_connection_that_is_taken_over_in_the_same_process_has_not_ended(world: World) -> None:
    older, hello = await world.client()
    newer, _ = await world.client(resume=hello["resume"])
    await older.closed()
    await world.another_comes_and_goes()
    assert world.events(hello) == ["connect"]
    await newer.close()
    await world.events_become(hello, "connect", "disconnect")


async def test_without_grace_short_connections_are_reported_in_order(world: World) -> None:
    server = await world.serve(lifecycle_grace=0, prefix=world.options["prefix"] + "-b")
    hellos = []
    for _ in range(20):
        client, hello = await world.client(server)
        client.abort()
        hellos.append(hello)
    await eventually_async(lambda: len(world.told) == 40)
    for hello in hellos:
        assert sorted(world.events(hello)) == ["connect", "disconnect"]


async def test_the_user_whom_the_app_names_is_in_the_report_of_the_end(world: World) -> None:
    server = await world.serve(authorize="/pubsub/authorize", prefix=world.options["prefix"] + "-b")
    client, hello = await world.client(server, channels={"private-a": None})
    await client.recv("subscribed", "private-a")
    await client.close()
    await world.events_become(hello, "connect", "disconnect")
    assert [report["user"] for report in world.told] == [None, "7"]


async def test_moving_to_another_server_is_not_reported(on_redis: World) -> None:
    a, b = await asyncio.gather(on_redis.serve(), on_redis.serve())
    client, hello = await on_redis.client(a)
    for server in (b, a, b):
        client.abort()
        client, _ = await on_redis.client(server, resume=hello["resume"])
    # Taken over while it is open, too: the older one is closed.
    older = client
    client, _ = await on_redis.client(a, resume=hello["resume"])
    assert (await older.closed())[0] == 3502
    await on_redis.another_comes_and_goes(a)
    await on_redis.another_comes_and_goes(b)
    assert on_redis.events(hello) == ["connect"]
    await client.close()
    await on_redis.events_become(hello, "connect", "disconnect")


async def test_a_server_that_stops_leaves_the_report_to_another_one_and_resumed_connections_have_not_ended(
    on_redis: World,
) -> None:
    a, b = await asyncio.gather(on_redis.serve(), on_redis.serve())
    stays, stays_hello = await on_redis.client(a)
    leaves, leaves_hello = await on_redis.client(a)
    await eventually_async(lambda: len(on_redis.told) == 2)
    await asyncio.to_thread(a.stop)
    await asyncio.gather(stays.closed(), leaves.closed())
    await on_redis.client(b, resume=stays_hello["resume"])
    await on_redis.events_become(leaves_hello, "connect", "disconnect")
    await on_redis.another_comes_and_goes(b)
    assert on_redis.events(stays_hello) == ["connect"]


async def test_a_server_cut_off_from_redis_reports_its_connections_anew_when_it_is_back(
    on_redis: World, redis_server: RedisServer, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)
    quick = {"probe_interval": 0.1, "probe_timeout": 0.5, "broker_timeout": 1.0}
    await on_redis.serve()
    cut_off = await on_redis.serve(url=f"redis://{proxy.address}/0", **quick)
    client, hello = await on_redis.client(cut_off)
    await on_redis.events_become(hello, "connect")
    proxy.refuse()
    proxy.reset()
    await on_redis.events_become(hello, "connect", "disconnect")
    proxy.accept()
    await on_redis.events_become(hello, "connect", "disconnect", "connect")
    await client.close()
    await on_redis.events_become(hello, "connect", "disconnect", "connect", "disconnect")


async def test_reports_hold_no_cookies(on_redis: World, redis_server: RedisServer) -> None:
    server = await on_redis.serve()
    _, hello = await on_redis.client(server)
    await on_redis.events_become(hello, "connect")
    with redis.Redis(port=redis_server.port) as connection:
        keys = list(connection.scan_iter(f"{on_redis.options['prefix']}:*"))
        dump = b"\n".join(connection.dump(key) or b"" for key in keys)
        assert [key for key in keys if b":held:" in key], "the report of its end is kept"
    assert CANARY.encode() not in dump


async def test_a_report_is_never_too_late(on_redis: World) -> None:
    """With the worker away for longer than a request may wait."""

    def build() -> ASGIApp:
        realtime = Realtime(**on_redis.options)
        return Router(routes=[Mount("/realtime", realtime)], lifespan=realtime.router.lifespan_context)

    alone = await on_redis.servers.start(build)
    client, hello = await on_redis.client(alone)
    await client.close()
    began = asyncio.get_running_loop().time()
    await eventually_async(lambda: asyncio.get_running_loop().time() > began + 2 * GRACE)
    await on_redis.serve(request_timeout=0.1)
    await on_redis.events_become(hello, "connect", "disconnect")


class SlowBegin(AsyncMemoryBroker):
    """A broker to which the report of a begin is long on its way."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(memory_broker(settings))
        self.may_arrive = asyncio.Event()

    async def report_begin(self, *args: Any, **options: Any) -> None:
        await self.may_arrive.wait()
        await super().report_begin(*args, **options)


async def test_an_end_waits_for_the_report_of_its_begin(prefix: str) -> None:
    settings = Settings.build("memory://", environ={}, prefix=prefix, lifecycle=PATH, lifecycle_grace=0)
    broker = SlowBegin(settings)
    lifecycle = Lifecycle(broker, settings, SECRET)
    connection = ConnectionId("c")
    for _ in range(2):
        lifecycle.begin(connection, "7", "websocket", Handshake(headers=(), scheme="http", address=""))
        lifecycle.end(connection)
        is_over = asyncio.Event()
        asyncio.get_running_loop().call_later(0, is_over.set)  # after the grace, which is as long
        await is_over.wait()
    broker.may_arrive.set()
    queue = memory_broker(settings).queue("worker")
    events: list[str] = []

    async def are_told() -> bool:
        taken = queue.take(10, 0)
        events.extend(json.loads(decode_request(item.payload, queue_key(SECRET)).body)["event"] for item in taken)
        return len(events) >= 4

    await eventually_async(are_told)
    assert events == ["connect", "disconnect"] * 2
