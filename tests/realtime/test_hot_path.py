"""What a delivery costs, in calls and in bytes: numbers that are the same on every machine, so that none creeps up.

A number here is what is needed today and a little more. Whoever has to raise one says why.
"""

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import hiredis
import pytest

from pubsub_mw.broker.codec import encode
from pubsub_mw.broker.redis.reader import AsyncRedisBroker
from pubsub_mw.broker.redis.subscriber import RedisSubscriber
from pubsub_mw.drafts import build_draft
from pubsub_mw.model import Channel, ConnectionId, Position, channel_of_connection
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import Batch, SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

SETTINGS = Settings.build("redis://nowhere", environ={})


class CountingQueue(SendQueue):
    """A send queue that makes no call and no object of its own."""

    __slots__ = ()
    puts = 0
    last: Batch | None = None

    def put_nowait(self, frame: bytes) -> None:  # noqa: ARG002 - it is counted, not kept
        CountingQueue.puts += 1

    def put_batch(self, batch: Batch) -> None:
        CountingQueue.puts += 1
        CountingQueue.last = batch


class World:
    """A hub with `channels` channels of `subscribers` each, fed with what Redis would send."""

    def __init__(self, *, channels: int, subscribers: int) -> None:
        self.hub = Hub(AsyncRedisBroker(SETTINGS), SETTINGS)
        assert isinstance(self.hub._subscriber, RedisSubscriber)
        self.link = self.hub._subscriber
        self.channels = [Channel(f"room:{number}") for number in range(channels)]
        self.places = dict.fromkeys(self.channels, Position("epoch", 0, "0"))
        for channel in self.channels:
            for number in range(subscribers):
                queue = CountingQueue(1 << 20, 1 << 18)
                subscription = Subscription(channel, ConnectionId(f"c{number}"), queue, Position.start(), is_fresh=True)
                self.hub.subscribe(subscription)
            self.hub.on_subscribed(self.hub._channels[channel])
        self.arrive(self.publish())  # once for what is made once

    def publish(self, times: int = 1) -> hiredis.Reader:
        """Publish on every channel, and return what has come from Redis."""
        reader = hiredis.Reader()
        for _ in range(times):
            for channel in self.channels:
                draft = build_draft(SETTINGS, channel, {"text": "x" * 100})
                before = self.places[channel]
                self.places[channel] = after = Position(before.epoch, before.offset + 1, draft.tag)
                message = (b"message", b"pubsub:{%b}:p" % channel.encode(), encode(draft, after, before))
                reader.feed(hiredis.pack_command(message))  # type: ignore[arg-type] # its stub knows no more
        return reader

    def arrive(self, reader: hiredis.Reader) -> None:
        self.link._receive(iter(reader.gets, False))


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count calls: of Python's functions, and of C's."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what earlier tests left behind is not to be finalized, and so called, in here
    sys.setprofile(profile)
    try:
        yield lambda: count
    finally:
        sys.setprofile(None)
        gc.enable()


def cost(world: World, times: int = 1) -> tuple[int, int]:
    """Return the calls, and the most bytes held at a time, that it takes to deliver a publication on every channel."""
    reader = world.publish(times)
    tracemalloc.start()
    world.arrive(reader)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    CountingQueue.puts = 0
    reader = world.publish(times)
    with counting() as calls:
        world.arrive(reader)
        count = calls()
    return count, peak


async def test_a_publication_costs_one_call_for_each_of_a_thousand_subscribers_and_no_object() -> None:
    calls, peak = cost(World(channels=1, subscribers=1_000))
    assert CountingQueue.puts == 1_000
    assert calls <= 1_000 + 35
    assert peak <= 1_000 * 8 + 2_500, "one reference for each, in the list of those who get it"


async def test_sixty_four_that_wait_cost_no_more_calls_per_subscriber_than_one() -> None:
    calls, peak = cost(World(channels=1, subscribers=1_000), times=64)
    assert CountingQueue.puts == 1_000
    assert CountingQueue.last is not None
    assert len(CountingQueue.last.frames) == 64
    assert calls <= 1_000 + 64 * 14 + 35, "the header of its WebSocket frame included"
    assert peak <= 1_000 * 8 + 64 * 1_100 + 2_500


async def test_a_thousand_channels_cost_so_many_calls_each() -> None:
    calls, peak = cost(World(channels=1_000, subscribers=1))
    assert CountingQueue.puts == 1_000
    assert calls <= 1_000 * 7 + 50, "without the header of its WebSocket frame, which its socket makes"
    assert peak <= 1_000 * 740 + 2_500, "what one read has brought, and the frames made of it"


async def test_what_a_websocket_gets_is_made_once_for_all() -> None:
    world = World(channels=1, subscribers=1_000)
    reader = world.publish()
    world.arrive(reader)
    batch = CountingQueue.last
    assert batch is not None
    assert batch.websocket is batch.websocket


async def test_an_idle_subscribed_connection_costs_the_hub_and_the_link_so_many_bytes() -> None:
    world = World(channels=1, subscribers=1)
    ids = [ConnectionId(f"abcdefghijklmnop{number:06}") for number in range(2_000)]
    queues = [CountingQueue(1 << 20, 1 << 18) for _ in ids]
    kept = []
    tracemalloc.start()
    for connection, queue in zip(ids, queues, strict=True):
        own = Subscription(
            channel_of_connection(connection), connection, queue, Position.start(), is_announced=False, is_fresh=True
        )
        common = Subscription(world.channels[0], connection, queue, None, is_announced=False)
        kept += [own, common]
        for subscription in (own, common):
            world.hub.subscribe(subscription)
        world.hub.open(connection, queue)
        world.hub.on_subscribed(world.hub._channels[own.channel])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(subscription.joined_at is not None for subscription in kept)
    assert size / len(ids) <= 1_200


PUBLISH = """
import sys
from pubsub_mw import Publisher
publisher, count = Publisher(sys.argv[1], prefix=sys.argv[2]), 0
def profile(frame, event, argument):
    global count
    count += event in ("call", "c_call")
for _ in range(3):
    publisher.publish("room:1", {"text": "x" * 100})
sys.setprofile(profile)
publisher.publish("room:1", {"text": "x" * 100})
sys.setprofile(None)
print(count)
"""


def test_publishing_costs_so_many_calls(redis_server: RedisServer, prefix: str) -> None:
    # In a process of its own: here every call that could block an event loop is watched, which costs calls.
    command = [sys.executable, "-c", PUBLISH, redis_server.url, prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 115


CONNECT = """
import asyncio, sys
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from pubsub_mw.realtime.app import Realtime
from pubsub_mw.realtime.uvicorn_protocol import HTTPProtocol, WebSocketProtocol

HANDSHAKE = (
    b"GET / HTTP/1.1\\r\\nHost: a\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Version: 13\\r\\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n"
)
HELLO = Frame(Opcode.TEXT, b'{"type":"connect","channels":{"room":null}}').serialize(mask=True)
ADDRESSES = {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 12_345)}

class Line(asyncio.Transport):
    def __init__(self): self.written, self.is_answered = b"", asyncio.Event()
    def get_extra_info(self, name, default=None): return ADDRESSES.get(name, default)
    def get_write_buffer_size(self): return 0
    def is_closing(self): return False
    def is_reading(self): return True
    def set_write_buffer_limits(self, high, low): pass
    def set_protocol(self, protocol): self.protocol = protocol
    def write(self, data):
        self.written += data
        if b'"subscribed"' in data: self.is_answered.set()

count = 0
def profile(frame, event, argument):
    global count
    count += event in ("call", "c_call")

async def connect(config, lines):
    for line in lines:
        line.protocol = HTTPProtocol(config, ServerState(), {})
        line.protocol.connection_made(line)
        line.protocol.data_received(HANDSHAKE)
    while b" 101 " not in lines[-1].written:
        await asyncio.sleep(0)
    for line in lines:
        line.protocol.data_received(HELLO)
    await lines[-1].is_answered.wait()

async def main():
    app = Realtime(sys.argv[1], prefix=sys.argv[2], secret="s" * 32)
    config = Config(app, http=HTTPProtocol, ws=WebSocketProtocol, log_config=None)
    config.load()
    await connect(config, [Line()])
    sys.setprofile(profile)
    await connect(config, [Line() for _ in range(100)])
    sys.setprofile(None)
    print(count // 100)
    await app.stop()

asyncio.run(main())
"""


def test_to_connect_and_subscribe_costs_so_many_calls(redis_server: RedisServer, prefix: str) -> None:
    command = [sys.executable, "-c", CONNECT, redis_server.url, prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert int(done.stdout) <= 500
