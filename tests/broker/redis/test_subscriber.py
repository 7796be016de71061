"""The pub/sub link: it says when it breaks, proves that it delivers, and ends when told to."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import pytest

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.model import Channel
from pubsub_mw.settings import Settings
from tests.broker.follow import Recorder, draft, following
from tests.tools.clock import MS, eventually_async
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

ROOM, NEWS = Channel("room:1"), Channel("news")
PROBE_TIMEOUT = 400 * MS


def build(port: int, **overrides: float) -> Settings:
    timing = {"probe_interval": 50 * MS, "probe_timeout": 2_000 * MS, "broker_timeout": 2_000 * MS}
    return Settings.build(f"redis://127.0.0.1:{port}/0", environ={}, **{**timing, **overrides})


async def publish(settings: Settings, channel: str, data: object) -> None:
    broker: AsyncBroker = open_async_broker(settings)
    await broker.publish([draft(settings, channel, data)])
    await broker.close()


async def test_a_killed_link_is_told_and_made_anew(own_redis: RedisServer) -> None:
    settings = build(own_redis.port)
    async with following(settings, ROOM, NEWS) as recorder:
        for number in range(3):
            recorder.told.clear()
            own_redis.cli("CLIENT", "KILL", "TYPE", "pubsub")
            await eventually_async(lambda: "lost" in recorder.told)
            await recorder.confirmed(ROOM, NEWS)
            assert recorder.told[0] == "lost"
            assert sorted(recorder.told[1:]) == sorted([ROOM, NEWS]), "each is confirmed once"
            await publish(settings, ROOM, number)
            await eventually_async(lambda: len(recorder.publications) == 1)
            assert recorder.data(ROOM) == [number]
            recorder.publications.clear()


async def test_a_redis_that_was_restarted_is_found_again(own_redis: RedisServer) -> None:
    settings = build(own_redis.port)
    async with following(settings, ROOM) as recorder:
        own_redis.kill()
        await eventually_async(lambda: "lost" in recorder.told)
        assert not recorder.subscriber.is_up
        own_redis.start()
        await recorder.confirmed(ROOM)
        await eventually_async(lambda: recorder.subscriber.is_up)
        await publish(settings, ROOM, "back")
        await eventually_async(lambda: recorder.data(ROOM) == ["back"])


@pytest.mark.parametrize("fault", ["black hole", "frozen", "stopped"])
async def test_a_link_that_delivers_nothing_is_given_up_in_time(
    fault: str, own_redis: RedisServer, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(own_redis.port)
    begin, end = {
        "black hole": (proxy.blackhole, proxy.pass_through),
        "frozen": (proxy.freeze, proxy.pass_through),
        "stopped": (own_redis.pause, own_redis.resume),
    }[fault]
    async with following(build(proxy.port, probe_timeout=PROBE_TIMEOUT), ROOM) as recorder:
        await eventually_async(lambda: recorder.subscriber.is_up)
        began = time.monotonic()
        begin()
        await eventually_async(lambda: "lost" in recorder.told)
        # The bound is the timeout and one interval; the rest is for a busy machine. Without probes nothing would tell.
        assert time.monotonic() - began < 5 * PROBE_TIMEOUT
        end()
        await recorder.confirmed(ROOM)
        await eventually_async(lambda: recorder.subscriber.is_up)
        await publish(build(own_redis.port), ROOM, "after")
        await eventually_async(lambda: "after" in recorder.data(ROOM))


async def test_a_handshake_that_is_never_answered_is_given_up_too(
    own_redis: RedisServer, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(own_redis.port)
    proxy.blackhole()
    settings = Settings.build(
        f"redis://{proxy.address}/5", environ={}, broker_timeout=PROBE_TIMEOUT, probe_timeout=PROBE_TIMEOUT
    )
    broker = open_async_broker(settings)
    recorder = Recorder()
    subscriber = broker.subscriber(recorder)
    subscriber.subscribe(ROOM, ROOM)
    task = asyncio.create_task(subscriber.run())
    await eventually_async(lambda: proxy.accepted >= 2)
    proxy.pass_through()
    await recorder.confirmed(ROOM)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await broker.close()


async def test_a_slow_link_is_no_lost_one(own_redis: RedisServer, tcp_proxy: Callable[[int], TcpProxy]) -> None:
    proxy = tcp_proxy(own_redis.port)
    timeout = 1_200 * MS
    proxy.latency(timeout / 8)
    async with following(build(proxy.port, probe_timeout=timeout), ROOM) as recorder:
        await eventually_async(lambda: recorder.subscriber.is_up)
        until = time.monotonic() + 1.5 * timeout
        await eventually_async(lambda: time.monotonic() > until)
        assert recorder.told == [ROOM]


async def test_wishes_made_while_the_link_is_down_count_when_it_is_back(
    own_redis: RedisServer, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(own_redis.port)
    async with following(build(proxy.port), ROOM, NEWS) as recorder:
        proxy.refuse()
        proxy.reset()
        await eventually_async(lambda: "lost" in recorder.told)
        recorder.subscriber.unsubscribe(ROOM)
        recorder.subscriber.subscribe(Channel("third"), "third")
        proxy.accept()
        await recorder.confirmed(NEWS, "third")
        names = own_redis.cli("PUBSUB", "CHANNELS", "pubsub:{*")
        assert sorted(names) == ["pubsub:{news}:p", "pubsub:{third}:p"]


async def test_foreign_bytes_do_no_harm_to_the_link_and_are_the_listeners_to_judge(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = build(own_redis.port)
    live = f"pubsub:{{{ROOM}}}:p"
    foreign = [b"", b"\n", b"\xff\xfe\x00", b"e.1.t", b'{"json":1}', b"x" * 100_000, b"\x80\x04K\x01."]
    notices = [b"!", b"! \n", b"!e 1 + \xff\n{}"]
    async with following(settings, ROOM) as recorder:
        recorder.foreign = foreign
        for payload in (*foreign, *notices):
            own_redis.cli("PUBLISH", live, payload)
        await publish(settings, ROOM, "ours")
        await eventually_async(lambda: recorder.publications)
        assert recorder.data(ROOM) == ["ours"]
        assert "lost" not in recorder.told
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == len(notices)
    assert all(len(record.getMessage()) < 300 for record in errors)


async def test_what_comes_while_the_link_is_paused_arrives_afterwards_in_order(own_redis: RedisServer) -> None:
    settings = build(own_redis.port, probe_timeout=PROBE_TIMEOUT)
    async with following(settings, ROOM) as recorder:
        await eventually_async(lambda: recorder.subscriber.is_up)
        recorder.subscriber.pause()
        for number in range(100):
            await publish(settings, ROOM, number)
        until = time.monotonic() + 2 * PROBE_TIMEOUT
        await eventually_async(lambda: time.monotonic() > until)
        assert len(recorder.publications) < 100
        recorder.subscriber.resume()
        await eventually_async(lambda: len(recorder.publications) == 100)
        assert recorder.data(ROOM) == list(range(100))
        assert recorder.told == [ROOM], "a silence of our own making is no loss"


async def test_publications_that_arrive_at_once_are_handed_on_at_once(own_redis: RedisServer) -> None:
    settings = build(own_redis.port)
    async with following(settings, ROOM, NEWS) as recorder:
        recorder.subscriber.pause()
        for number in range(10):
            await publish(settings, ROOM, number)
            await publish(settings, NEWS, -number)
        calls = recorder.calls
        recorder.subscriber.resume()
        await eventually_async(lambda: len(recorder.publications) == 20)
        assert recorder.calls == calls + 1
        assert recorder.data(ROOM) == list(range(10))
        assert recorder.data(NEWS) == [-number for number in range(10)]


async def test_a_user_who_may_not_subscribe_is_no_end_of_the_link(own_redis: RedisServer) -> None:
    own_redis.cli("ACL", "SETUSER", "deaf", "on", ">sesame", "~*", "&elsewhere", "+@all")
    settings = Settings.build(
        f"redis://deaf:sesame@127.0.0.1:{own_redis.port}/0", environ={}, broker_timeout=2_000 * MS
    )
    broker = open_async_broker(settings)
    recorder = Recorder()
    subscriber = broker.subscriber(recorder)
    subscriber.subscribe(ROOM, ROOM)
    task = asyncio.create_task(subscriber.run())
    await eventually_async(lambda: recorder.told.count("lost") >= 2)
    assert not subscriber.is_up
    own_redis.cli("ACL", "SETUSER", "deaf", "&*")
    await recorder.confirmed(ROOM)
    await eventually_async(lambda: subscriber.is_up)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await broker.close()


async def test_many_channels_are_subscribed_and_none_by_pattern(own_redis: RedisServer) -> None:
    channels = [f"room:{number}" for number in range(2_500)]
    async with following(build(own_redis.port), *channels) as recorder:
        assert sorted(recorder.told) == sorted(channels)
        assert own_redis.cli("PUBSUB", "NUMPAT") == 0
        for channel in channels:
            recorder.subscriber.unsubscribe(Channel(channel))
        await eventually_async(lambda: own_redis.cli("PUBSUB", "CHANNELS", "pubsub:{*") == [])


@pytest.mark.parametrize("is_breaking", [False, True])
async def test_a_subscriber_ends_whenever_it_is_cancelled(own_redis: RedisServer, *, is_breaking: bool) -> None:
    settings = build(own_redis.port, probe_interval=10 * MS)
    for turns in range(60):
        broker = open_async_broker(settings)
        subscriber = broker.subscriber(Recorder())
        subscriber.subscribe(ROOM, ROOM)
        task = asyncio.create_task(subscriber.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        if is_breaking:
            await eventually_async(partial(getattr, subscriber, "is_up"))
            own_redis.cli("CLIENT", "KILL", "TYPE", "pubsub")
            for _ in range(turns % 12):
                await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5_000 * MS)
        assert done, f"cancelled after {turns} turns of the event loop, it goes on"
        assert task.cancelled()
        await broker.close()
