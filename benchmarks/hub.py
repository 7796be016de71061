"""Measure the way of a publication through one process, without sockets: what Python costs per delivery.

    python -m benchmarks.hub [--rounds 5]

A publisher in a process of its own publishes through Redis; here the hub reads them and hands them to send queues that
only count. What is printed is the time of this process' core, divided by deliveries or publications; of the publisher's
core for `publish`; and bytes per connection that listens to its own channel and to a common one.
"""

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.drafts import build_draft
from pubsub_mw.model import Channel, ConnectionId, Position, channel_of_connection
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import Batch, SendQueue, websocket_frame
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.tools.redis_server import RedisServer

_DATA = {"text": "x" * 100}
_SCENARIOS = {
    # name: subscribers, channels, publications per round trip, round trips per round
    "one at a time to 1,000": (1_000, 1, 1, 300),
    "64 waiting for 1,000": (1_000, 1, 64, 60),
    "1,000 channels x 1": (1_000, 1_000, 1_000, 20),
}
_CONNECTIONS = 5_000
_OURS, _THEIRS = 0, 1  # cores: of what is measured, of what drives it


class CountingQueue(SendQueue):
    """A send queue without a socket."""

    __slots__ = ()
    delivered = 0
    expected = 0
    arrived = asyncio.Event()

    def put_nowait(self, frame: bytes) -> None:
        self._count(1, websocket_frame(frame))

    def put_batch(self, batch: Batch) -> None:
        self._count(len(batch.frames), batch.websocket)

    def _count(self, frames: int, websocket: bytes) -> None:
        CountingQueue.delivered += frames
        if websocket and CountingQueue.delivered >= CountingQueue.expected:
            CountingQueue.arrived.set()


class ForgetfulQueue(SendQueue):
    """A send queue that keeps nothing, so that only others' memory is counted."""

    __slots__ = ()

    def put_nowait(self, frame: bytes) -> None:
        """Forget it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what Python costs per delivery.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds == 0:
        publish_as_told()
        return
    os.sched_setaffinity(0, {_THEIRS})
    with RedisServer() as server:
        os.sched_setaffinity(0, {_OURS})
        for name, scenario in _SCENARIOS.items():
            print(name, asyncio.run(measure(server.url, *scenario, options.rounds)), flush=True)
        print("publish:", measure_publishing(server.url, options.rounds), flush=True)
        print("idle:", asyncio.run(measure_memory(server.url)), flush=True)


async def measure(url: str, subscribers: int, channels: int, together: int, trips: int, rounds: int) -> str:
    CountingQueue.arrived = asyncio.Event()
    settings = Settings.build(url, environ={}, check_interval=3_600)
    broker = open_async_broker(settings)
    hub = Hub(broker, settings)
    running = asyncio.create_task(hub.run())
    names = [Channel(f"room:{number}") for number in range(channels)]
    settled = []
    for number in range(subscribers):
        settled.append(asyncio.get_running_loop().create_future())
        queue = CountingQueue(1 << 20, 1 << 18)
        name = names[number % channels]
        hub.subscribe(Subscription(name, ConnectionId(f"c{number}"), queue, None, settled=settled[-1]))
    await asyncio.gather(*settled)
    per_trip = together * subscribers // channels
    with driver(url, channels, together) as publisher:
        assert publisher.stdin is not None
        costs, walls = [], []
        for _ in range(rounds + 1):
            began, wall = time.process_time(), time.perf_counter()
            for _ in range(trips):
                CountingQueue.arrived.clear()
                CountingQueue.expected = CountingQueue.delivered + per_trip
                publisher.stdin.write(b"\n")
                await CountingQueue.arrived.wait()
            costs.append(time.process_time() - began)
            walls.append(time.perf_counter() - wall)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await broker.close()
    cost, wall = statistics.median(costs[1:]) / trips, statistics.median(walls[1:]) / trips
    return (
        f"{1e6 * cost / per_trip:.2f} us per delivery, {1e6 * cost / together:.1f} us per publication"
        f" (wall clock {1e6 * wall / per_trip:.2f} us per delivery)"
    )


def driver(url: str, channels: int, together: int) -> "subprocess.Popen[bytes]":
    command = ["taskset", "-c", str(_THEIRS), sys.executable, "-m", "benchmarks.hub", "--rounds", "0"]
    env = {**os.environ, "DRIVE": f"{url} {channels} {together}"}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, bufsize=0)


def publish_as_told() -> None:
    """Publish, in one round trip, for each line that comes."""
    url, channels, together = os.environ["DRIVE"].split()
    publisher = Publisher(url)
    names = [f"room:{number}" for number in range(int(channels))]
    drafts = [
        build_draft(publisher.settings, names[number % len(names)], _DATA, history=1) for number in range(int(together))
    ]
    for _ in sys.stdin.buffer:
        publisher.publish_drafts(drafts)


def measure_publishing(url: str, rounds: int) -> str:
    publisher = Publisher(url)
    count = 3_000

    def each(publish: Callable[[str, object], object]) -> float:
        costs = []
        for _ in range(rounds):
            began = time.process_time()
            for _ in range(count):
                publish("room:1", _DATA)
            costs.append(time.process_time() - began)
        return 1e6 * statistics.median(costs) / count

    def many() -> float:
        began = time.process_time()
        for _ in range(30):
            publisher.many([("room:1", _DATA)] * 100)
        return 1e6 * (time.process_time() - began) / 3_000

    return f"{each(publisher.publish):.1f} us of CPU per publication, {many():.1f} us in many of 100"


async def measure_memory(url: str) -> str:
    settings = Settings.build(url, environ={}, check_interval=3_600)
    broker = open_async_broker(settings)
    hub = Hub(broker, settings)
    running = asyncio.create_task(hub.run())
    queues = [ForgetfulQueue(1 << 20, 1 << 18) for _ in range(_CONNECTIONS)]
    ids = [ConnectionId(f"abcdefghijklmnop{number:06}") for number in range(_CONNECTIONS)]
    common = Channel("room:1")
    gc.collect()
    tracemalloc.start()
    kept, settled = [], []
    for connection, queue in zip(ids, queues, strict=True):
        for channel, position, is_fresh in (
            (channel_of_connection(connection), Position.start(), True),
            (common, None, False),
        ):
            future = asyncio.get_running_loop().create_future()
            subscription = Subscription(channel, connection, queue, position, is_fresh=is_fresh, settled=future)
            hub.subscribe(subscription)
            kept.append(subscription)
            settled.append(future)
        hub.open(connection, queue)
    while settled:
        await settled.pop()
    del future
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await broker.close()
    return f"{size / _CONNECTIONS:.0f} bytes per connection in hub and subscriber"


if __name__ == "__main__":
    main()
