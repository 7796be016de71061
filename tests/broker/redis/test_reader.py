"""The asynchronous door to Redis: one caller's trouble stays its own."""

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial

import pytest
import uvloop
from redis.asyncio import Connection

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.broker.redis.reader import AsyncRedisBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, HistoryPage
from pubsub_mw.settings import Settings
from tests.broker.follow import draft
from tests.tools.clock import MS
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio


def build(url: str, prefix: str, **overrides: float) -> Settings:
    return Settings.build(url, environ={}, **{"prefix": prefix, **overrides})


async def test_cancelled_reads_leave_no_reply_for_another_caller(
    redis_server: RedisServer, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)
    settings = build(f"redis://{proxy.address}/0", prefix, broker_timeout=60, publish_timeout=60)
    broker = open_async_broker(settings)
    names = [Channel(f"room:{number}") for number in range(50)]
    for count, name in enumerate(names, start=1):
        await broker.publish([draft(settings, name) for _ in range(count)])
    proxy.latency(3 * MS)
    dice = random.Random(7)

    async def read(number: int) -> int:
        (page,) = await broker.read([(names[number], None)], page_bytes=1)
        assert isinstance(page, HistoryPage)
        return page.top.offset

    crossed = cancelled = 0
    for _ in range(8):
        tasks = {asyncio.create_task(read(number)): number for number in range(50)}
        loop = asyncio.get_running_loop()
        for task in tasks:
            if dice.random() < 0.5:
                loop.call_later(dice.random() * 20 * MS, task.cancel)
        await asyncio.wait(tasks)
        cancelled += sum(task.cancelled() for task in tasks)
        crossed += sum(task.result() != number + 1 for task, number in tasks.items() if not task.cancelled())
    assert crossed == 0
    assert cancelled > 40
    await broker.close()


async def test_a_publication_is_cancelled_whenever_its_caller_is(redis_server: RedisServer, prefix: str) -> None:
    settings = build(redis_server.url, prefix)
    for turns in range(25):
        broker = open_async_broker(settings)
        for _ in range(2):  # on a new connection, and on a used one
            task = asyncio.create_task(broker.publish([draft(settings, "room:1")]))
            for _ in range(turns):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled(), f"a cancellation was swallowed after {turns} turns"
        await broker.publish([draft(settings, "room:1")])
        await broker.close()


async def test_one_channel_that_cannot_be_read_leaves_the_others_readable(
    redis_server: RedisServer, prefix: str
) -> None:
    settings = build(redis_server.url, prefix)
    broker = open_async_broker(settings)
    good = Channel("good")
    await broker.publish([draft(settings, good)])
    redis_server.cli("HSET", f"{prefix}:{{wrong}}", "a", "hash")
    redis_server.cli("SET", f"{prefix}:{{odd}}", "e.1.t")
    redis_server.cli("RPUSH", f"{prefix}:{{odd}}:h", "foreign bytes")
    wrong, odd, page = await broker.read([(Channel("wrong"), 0), (Channel("odd"), 0), (good, 0)], page_bytes=1 << 20)
    assert isinstance(wrong, BrokerUnavailable)
    assert isinstance(odd, BrokerUnavailable)
    assert isinstance(page, HistoryPage)
    assert page.top.offset == 1
    await broker.close()


async def test_a_read_ends_within_its_time_and_the_next_one_works(
    redis_server: RedisServer, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)
    settings = build(f"redis://{proxy.address}/0", prefix, broker_timeout=1_500 * MS)
    broker = open_async_broker(settings)
    wanted = [(Channel("room:1"), None)]
    await asyncio.gather(*(broker.read(wanted, page_bytes=1) for _ in range(20)))
    proxy.blackhole()
    began = time.monotonic()
    results = await asyncio.gather(*(broker.read(wanted, page_bytes=1) for _ in range(100)), return_exceptions=True)
    assert time.monotonic() - began < 10_000 * MS, "all at once: one after another it would be 150 s"
    assert all(isinstance(result, BrokerUnavailable) for result in results)
    assert f"no answer within {1_500 * MS:g} s" in str(results[0])
    proxy.pass_through()
    (page,) = await broker.read(wanted, page_bytes=1)
    assert isinstance(page, HistoryPage)
    await broker.close()


async def close_as_if_by_redis(connection: Connection) -> bool:
    """What stands for a look at a connection, which Redis closes right after it."""
    assert connection._writer is not None
    connection._writer.transport.abort()
    for _ in range(3):
        await asyncio.sleep(0)
    return False


def test_a_connection_that_closes_right_after_it_was_looked_at_is_like_a_lost_one(
    redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On uvloop, whose transport then raises a RuntimeError."""

    async def main() -> None:
        broker = open_async_broker(build(redis_server.url, prefix))
        assert isinstance(broker, AsyncRedisBroker)
        wanted = [(Channel("room:1"), None)]
        await asyncio.gather(*(broker.read(wanted, page_bytes=1) for _ in range(2)))
        for connection in broker._idle:
            monkeypatch.setattr(connection, "can_read", partial(close_as_if_by_redis, connection))
        with pytest.raises(BrokerUnavailable):
            await broker.read(wanted, page_bytes=1)
        (page,) = await broker.read(wanted, page_bytes=1)
        assert isinstance(page, HistoryPage)
        await broker.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_an_event_loop_opens_no_more_connections_than_it_needs(
    redis_server: RedisServer, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)
    broker = open_async_broker(build(f"redis://{proxy.address}/0", prefix))
    wanted = [(Channel("room:1"), None)]
    for _ in range(20):
        await broker.read(wanted, page_bytes=1)
    assert proxy.accepted == 1
    await asyncio.gather(*(broker.read(wanted, page_bytes=1) for _ in range(200)))
    assert proxy.accepted <= 40
    await broker.close()
