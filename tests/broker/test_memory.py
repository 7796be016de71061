"""The engine of one process: who shares it, what it forgets, what it warns of."""

import asyncio
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pubsub_mw.broker.memory import AsyncMemoryBroker, MemoryBroker, memory_broker
from pubsub_mw.model import Channel
from pubsub_mw.settings import Settings
from tests.broker.follow import Recorder, draft, following
from tests.tools.clock import MS, eventually, eventually_async

ROOM = Channel("room:1")


def build(prefix: str, url: str = "memory://", **overrides: float) -> Settings:
    return Settings.build(url, environ={}, **{"prefix": prefix, **overrides})


def test_a_process_has_one_broker_for_each_url_and_prefix(prefix: str) -> None:
    broker = memory_broker(build(prefix))
    assert memory_broker(build(prefix)) is broker
    assert memory_broker(build(prefix, history_size=7)) is broker
    assert memory_broker(build(prefix + "-2")) is not broker
    assert memory_broker(build(prefix, "memory://2")) is not broker


def test_threads_that_ask_at_once_get_the_same_broker(prefix: str) -> None:
    start = threading.Barrier(16)

    def ask(_: int) -> MemoryBroker:
        start.wait()
        return memory_broker(build(prefix))

    with ThreadPoolExecutor(16) as pool:
        assert len({id(broker) for broker in pool.map(ask, range(16))}) == 1


def test_publishing_where_nothing_listens_is_warned_of_once(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = build(prefix)
    for _ in range(3):
        memory_broker(settings).publish([draft(settings, ROOM)])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nothing in this process listens" in record.message
    assert "PUBSUB_URL=redis://" in record.message


@pytest.mark.anyio
async def test_publishing_where_something_listens_is_not_warned_of(
    prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = build(prefix)
    async with following(settings, ROOM):
        memory_broker(settings).publish([draft(settings, ROOM)])
    assert not caplog.records


def test_expired_channels_and_keys_are_swept(prefix: str) -> None:
    settings = build(prefix, history_ttl=200 * MS, position_ttl=200 * MS, idempotency_ttl=200 * MS)
    broker = memory_broker(settings)
    broker.publish([draft(settings, f"room:{number}", idempotency_key="k") for number in range(900)])
    assert len(broker._histories) == len(broker._keys) == 900

    def are_gone() -> bool:
        broker.publish([draft(settings, ROOM)] * 100)
        return len(broker._histories) == 1 and not broker._keys

    eventually(are_gone)


@pytest.mark.anyio
async def test_losing_everything_starts_new_epochs_and_tells_who_listens(prefix: str) -> None:
    settings = build(prefix)
    broker = memory_broker(settings)
    async with following(settings, ROOM) as recorder:
        (before,) = broker.publish([draft(settings, ROOM, 1)])
        await eventually_async(lambda: recorder.publications)
        broker.lose()
        await eventually_async(lambda: recorder.told[-2:] == ["lost", ROOM])
        (after,) = broker.publish([draft(settings, ROOM, 2)])
        assert after.offset == 1
        assert after.epoch != before.epoch
        await eventually_async(lambda: recorder.data(ROOM) == [1, 2])


def test_a_listener_that_is_gone_without_a_word_stops_nobody(prefix: str) -> None:
    settings = build(prefix)
    broker = memory_broker(settings)
    loop = asyncio.new_event_loop()

    async def attach() -> None:
        subscriber = AsyncMemoryBroker(broker).subscriber(Recorder())
        subscriber.subscribe(ROOM, ROOM)
        broker.attach(subscriber)

    loop.run_until_complete(attach())
    loop.close()
    assert broker.publish([draft(settings, ROOM)])[0].offset == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_fork_amid_publishing_threads_leaves_the_child_able_to_publish(prefix: str) -> None:
    settings = build(prefix)
    broker = memory_broker(settings)
    is_over = threading.Event()

    def keep_publishing() -> None:
        batch = [draft(settings, ROOM)] * 5_000  # the lock is held nearly all of the time
        while not is_over.is_set():
            broker.publish(batch)

    thread = threading.Thread(target=keep_publishing)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                memory_broker(settings).publish([draft(settings, ROOM)])
                os._exit(0)
            assert _exit_status(child) == 0
    finally:
        is_over.set()
        thread.join()


def _exit_status(child: int) -> int:
    """Wait for a process to end, and kill it if it does not."""
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.extend([status] if pid else [])
        return bool(pid)

    try:
        eventually(has_ended)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return ended[0]
