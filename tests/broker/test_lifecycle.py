"""Which server holds which connection, and what is reported of it. Where one process is all, against both engines."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import pubsub_mw.broker.redis.reader  # noqa: F401 - it reads files, which the event loop must not wait for
from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.model import ConnectionId
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually_async
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio
C = ConnectionId("c")
LEASE = 500 * MS


class World:
    """A broker, and the reports that it has queued."""

    def __init__(self, settings: Settings) -> None:
        self.broker: AsyncBroker = open_async_broker(settings)
        self._queue = open_broker(settings).queue("worker")

    async def begin(self, server: str, connection: ConnectionId = C, *, takes_over: bool = True) -> None:
        begin, end = f"begin {connection} by {server}".encode(), f"end {connection} by {server}".encode()
        await self.broker.report_begin(server, connection, begin, end, takes_over=takes_over)

    async def end(self, server: str, connection: ConnectionId = C) -> None:
        await self.broker.report_end(server, connection)

    async def keep(self, server: str, lease: float = 60.0) -> bool:
        return await self.broker.keep_lease(server, lease)

    async def reports(self, limit: int = 100_000) -> list[str]:
        """What came into the queue since the last look."""
        taken = await asyncio.to_thread(self._queue.take, limit, 0.01)
        await asyncio.to_thread(self._queue.settle, [], taken)
        return [item.payload.decode() for item in taken]


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, prefix: str) -> AsyncIterator[World]:
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    world = World(Settings.build(url, environ={}, prefix=prefix))
    yield world
    await world.broker.close()


@pytest.fixture
async def servers(redis_server: RedisServer, prefix: str) -> AsyncIterator[World]:
    """As `world`, for what needs several servers."""
    world = World(Settings.build(redis_server.url, environ={}, prefix=prefix, presence_ttl=60))
    yield world
    await world.broker.close()


async def test_begin_and_end_are_reported_once_each(world: World) -> None:
    await world.begin("a")
    assert await world.reports() == ["begin c by a"]
    await world.begin("a")
    assert await world.reports() == []
    await world.end("a")
    await world.end("a")
    assert await world.reports() == ["end c by a"]


async def test_a_connection_that_comes_back_after_its_end_begins_anew(world: World) -> None:
    for _ in range(2):
        await world.begin("a")
        await world.end("a")
    assert await world.reports() == ["begin c by a", "end c by a"] * 2


async def test_the_end_of_what_never_began_is_not_reported(world: World) -> None:
    await world.end("a")
    assert await world.reports() == []


async def test_a_server_that_took_over_reports_the_end_and_the_older_one_does_not(servers: World) -> None:
    await servers.begin("a")
    await servers.begin("b")
    await servers.end("a")
    assert await servers.reports() == ["begin c by a"]
    await servers.end("b")
    assert await servers.reports() == ["end c by b"]


async def test_who_enters_again_does_not_take_over(servers: World) -> None:
    await servers.begin("a")
    await servers.begin("b")
    await servers.begin("a", takes_over=False)
    await servers.end("a")
    assert await servers.reports() == ["begin c by a"]
    await servers.end("b")
    await servers.begin("a", takes_over=False)
    assert await servers.reports() == ["end c by b", "begin c by a"]


async def test_a_dead_servers_connections_are_reported_by_another_one_once(servers: World) -> None:
    await servers.keep("a", LEASE)
    for name in "xyz":
        await servers.begin("a", ConnectionId(name))
    await servers.begin("b", ConnectionId("z"))
    await servers.reports()
    await servers.keep("b")
    reports: list[str] = []

    async def reported() -> bool:
        await servers.keep("b")
        reports.extend(await servers.reports())
        return len(reports) >= 2

    await eventually_async(reported)
    await servers.keep("b")
    await servers.keep("c")
    assert sorted(reports + await servers.reports()) == ["end x by a", "end y by a"]


async def test_a_server_that_has_not_kept_its_lease_yet_is_taken_for_dead_too(
    redis_server: RedisServer, prefix: str
) -> None:
    world = World(Settings.build(redis_server.url, environ={}, prefix=prefix, presence_ttl=LEASE))
    await world.begin("killed at its start")
    await world.keep("b")

    async def is_reported() -> bool:
        await world.keep("b")
        return "end c by killed at its start" in await world.reports()

    await eventually_async(is_reported)
    await world.broker.close()


async def test_a_server_is_told_that_its_lease_had_run_out(servers: World) -> None:
    assert not await servers.keep("a", LEASE)
    assert await servers.keep("a", LEASE)
    await servers.begin("a")
    await servers.keep("b")

    async def is_reaped() -> bool:
        await servers.keep("b")
        return "end c by a" in await servers.reports()

    await eventually_async(is_reaped)
    assert not await servers.keep("a")
    assert await servers.keep("a")


async def test_when_redis_was_away_no_server_is_taken_for_dead(servers: World) -> None:
    for name in "ab":
        await servers.begin(name, ConnectionId(name))
    for name in "ab":
        await servers.keep(name, LEASE)
    began = asyncio.get_running_loop().time()
    await eventually_async(lambda: asyncio.get_running_loop().time() > began + 1.5 * LEASE)
    await servers.reports()
    assert not await servers.keep("a")
    assert await servers.keep("b")
    assert await servers.reports() == []


@pytest.mark.timeout(60_000 * MS)
async def test_twelve_thousand_connections_of_a_dead_server_are_all_reported(servers: World) -> None:
    await servers.keep("b")
    await servers.keep("a", LEASE)
    names = [f"c{number}" for number in range(12_000)]

    async def begin(some: list[str]) -> None:
        for name in some:
            await servers.begin("a", ConnectionId(name))

    await asyncio.gather(*(begin(names[start::20]) for start in range(20)))
    began = await servers.reports()
    assert len(began) == len(names)
    ended: list[str] = []

    async def all_reported() -> bool:
        await servers.keep("b")
        ended.extend(await servers.reports())
        return len(ended) >= len(names)

    await eventually_async(all_reported, 10_000 * MS)
    assert sorted(ended) == sorted(f"end {name} by a" for name in names)
