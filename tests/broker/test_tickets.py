"""What the broker keeps for a ticket. Every test runs against each engine."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from pubsub_mw.broker.engines import load_engine, open_async_broker
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer


@pytest.fixture(params=["memory", "redis"])
def settings(request: pytest.FixtureRequest, prefix: str) -> Settings:
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    return Settings.build(url, environ={}, prefix=prefix)


def run(settings: Settings, use: Callable[[AsyncBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        broker = open_async_broker(settings)
        try:
            await use(broker)
        finally:
            await broker.close()

    load_engine(settings)
    asyncio.run(main())


def test_a_ticket_is_taken_once(settings: Settings) -> None:
    async def use(broker: AsyncBroker) -> None:
        await broker.put_ticket("t1", "one", 60)
        await broker.put_ticket("t2", "two", 60)
        taken = await asyncio.gather(*(broker.take_ticket("t1") for _ in range(20)))
        assert sorted(map(str, taken)) == ["None"] * 19 + ["one"]
        assert await broker.take_ticket("t2") == "two"
        assert await broker.take_ticket("t3") is None

    run(settings, use)


def test_a_ticket_ends_with_its_time(settings: Settings) -> None:
    async def use(broker: AsyncBroker) -> None:
        await broker.put_ticket("t1", "one", 20 * MS)
        await broker.put_ticket("t2", "two", 60)
        await asyncio.sleep(30 * MS)
        await broker.put_ticket("t3", "three", 60)
        assert [await broker.take_ticket(ticket) for ticket in ("t1", "t2", "t3")] == [None, "two", "three"]

    run(settings, use)


def test_redis_knows_no_ticket_by_its_name_and_none_for_ever(redis_server: RedisServer, prefix: str) -> None:
    settings = Settings.build(redis_server.url, environ={}, prefix=prefix)

    async def use(broker: AsyncBroker) -> None:
        await broker.put_ticket("canary", "one", 60)

    run(settings, use)
    with redis.Redis(port=redis_server.port) as client:
        (key,) = client.keys(f"{prefix}:ticket:*")
        assert b"canary" not in key
        assert 0 < client.pttl(key) <= 60_000
        eventually(lambda: client.exists(key))


def test_a_broker_that_does_not_answer_is_said_to_be_away(prefix: str) -> None:
    settings = Settings.build(f"redis://127.0.0.1:{free_port()}", environ={}, prefix=prefix, broker_timeout=200 * MS)

    async def use(broker: AsyncBroker) -> None:
        for call in (broker.put_ticket("t", "one", 1), broker.take_ticket("t")):
            with pytest.raises(BrokerUnavailable):
                await call

    run(settings, use)
