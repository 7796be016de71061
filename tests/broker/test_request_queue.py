"""What the request queue promises. Every test runs against each engine."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

import pubsub_mw.broker.redis.reader  # noqa: F401 - they read their scripts from files, which no event loop should
from pubsub_mw import protocol
from pubsub_mw.broker.codec import decode_request, encode_request
from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import Acceptance, AsyncBroker, Broker, RequestQueue, Taken, answer_key
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, ConnectionId, Draft, Handshake
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.redis_server import RedisServer
from tests.worker.requests import request

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]

NOW = 0.001
LEASE = 150 * MS
KEY = b"k" * 32
CHANNEL = Channel("#connection-c1")
CONNECTION = ConnectionId("c1")


@pytest.fixture(params=["memory", "redis"])
def engine(request: pytest.FixtureRequest) -> str:
    param: str = request.param
    return param


@pytest.fixture
def make(engine: str, request: pytest.FixtureRequest, prefix: str) -> Make:
    """Make settings of an engine, all of whose brokers in one test meet."""
    url = "memory://"
    if engine == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    return lambda **overrides: Settings.build(url, environ={}, prefix=prefix, **({"lease": LEASE} | overrides))


@dataclass(frozen=True, slots=True)
class World:
    settings: Settings
    broker: AsyncBroker
    sync: Broker

    def queue(self, name: str = "worker") -> RequestQueue:
        return self.sync.queue(name)

    async def accept(self, id: str, **fields: Any) -> Acceptance:  # noqa: A002
        item = request(id=id, **fields)
        return (await self.broker.accept(item.connection, id, encode_request(item, KEY), CHANNEL)).acceptance

    def answer(self, id: str, text: bytes = b"", *, kind: str = ".") -> Draft:  # noqa: A002
        head = protocol.response_head(id, 200, {}, text)
        return build_answer_draft(self.settings, CHANNEL, head, answer_key(id), kind + id)

    async def frames(self) -> list[dict[str, Any]]:
        (page,) = await self.broker.read([(CHANNEL, 0)], page_bytes=1 << 30)
        assert not isinstance(page, Exception)
        return [orjson.loads(publication.frame) for publication in page.publications]


@pytest.fixture
def open_world(make: Make) -> Iterator[Callable[..., World]]:
    opened: list[World] = []

    def open_one(**overrides: Any) -> World:
        settings = make(**overrides)
        opened.append(World(settings, open_async_broker(settings), open_broker(settings)))
        return opened[-1]

    yield open_one
    for world in opened:
        world.sync.close()


@pytest.fixture
async def world(open_world: Callable[..., World]) -> AsyncIterator[World]:
    world = open_world()
    yield world
    await world.broker.close()


def ids(taken: Sequence[Taken]) -> list[str]:
    return [decode_request(item.payload, KEY).id for item in taken]


async def take(queue: RequestQueue, limit: int = 10, wait: float = NOW) -> list[Taken]:
    return await asyncio.to_thread(queue.take, limit, wait)


async def take_again(queue: RequestQueue) -> list[Taken]:
    """Wait for a request that another worker left behind."""
    return await eventually_async(lambda: take(queue))


# Accepting.


async def test_requests_are_taken_in_order_as_they_were_stored_and_once(world: World) -> None:
    queue = world.queue()
    sent = [request(id=str(number), body=bytes([number]), query="ä=%20") for number in range(5)]
    for item in sent:
        payload = encode_request(item, KEY)
        assert (await world.broker.accept(CONNECTION, item.id, payload, CHANNEL)).acceptance is Acceptance.STORED
    first, rest = await take(queue, 2), await take(queue)
    assert [decode_request(item.payload, KEY) for item in [*first, *rest]] == sent
    assert {item.delivery_count for item in [*first, *rest]} == {1}
    assert all(0 <= item.age < 5 for item in [*first, *rest])
    assert await take(queue) == []


async def test_a_request_that_is_sent_again_is_known_and_stored_once(world: World) -> None:
    assert await world.accept("1") is Acceptance.STORED
    assert await world.accept("1") is Acceptance.KNOWN
    assert ids(await take(world.queue())) == ["1"]
    assert await world.accept("1") is Acceptance.KNOWN


async def test_the_same_id_of_another_connection_is_another_request(world: World) -> None:
    assert await world.accept("1") is Acceptance.STORED
    assert await world.accept("1", connection=ConnectionId("c2")) is Acceptance.STORED


async def test_a_request_that_was_answered_is_known_with_the_place_of_its_answer(world: World) -> None:
    queue = world.queue()
    await world.accept("1")
    (taken,) = await take(queue)
    assert (await world.broker.accept(CONNECTION, "1", b"", CHANNEL)).answered_at is None
    await asyncio.to_thread(queue.settle, [world.answer("1")], [taken.entry])
    accepted = await world.broker.accept(CONNECTION, "1", b"", CHANNEL)
    assert accepted.acceptance is Acceptance.KNOWN
    assert str(accepted.answered_at) == (await world.frames())[0]["position"]
    assert await take(queue) == []


async def test_a_full_queue_stores_nothing_and_takes_more_when_there_is_room(
    open_world: Callable[..., World],
) -> None:
    world = open_world(queue_size=2)
    queue = world.queue()
    assert [await world.accept(id) for id in ("1", "2", "3")] == [  # noqa: A001
        Acceptance.STORED,
        Acceptance.STORED,
        Acceptance.FULL,
    ]
    taken = await take(queue)
    assert ids(taken) == ["1", "2"]
    assert await world.accept("3") is Acceptance.FULL  # what is worked on counts too
    await asyncio.to_thread(queue.settle, [], [taken[0].entry])
    assert await world.accept("3") is Acceptance.STORED
    await world.broker.close()


async def test_a_known_request_is_known_also_where_the_queue_is_full(open_world: Callable[..., World]) -> None:
    world = open_world(queue_size=1)
    await world.accept("1")
    assert await world.accept("1") is Acceptance.KNOWN
    await world.broker.close()


# Taking.


async def test_a_worker_that_waits_gets_a_request_as_soon_as_it_comes(world: World) -> None:
    waiting = asyncio.create_task(take(world.queue(), wait=10_000 * MS))
    await asyncio.to_thread(take_nothing, world.queue("other"))
    await world.accept("1")
    async with asyncio.timeout(2000 * MS):
        assert ids(await waiting) == ["1"]


def take_nothing(queue: RequestQueue) -> None:
    assert queue.take(1, NOW) == []


async def test_two_workers_share_the_requests(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    for number in range(20):
        await world.accept(str(number))
    found: list[str] = []

    def work(queue: RequestQueue) -> None:
        while taken := queue.take(1, NOW):
            found.extend(ids(taken))

    await asyncio.gather(asyncio.to_thread(work, one), asyncio.to_thread(work, other))
    assert sorted(found, key=int) == [str(number) for number in range(20)]


async def test_a_request_whose_worker_gives_no_sign_of_life_is_taken_by_another_and_counted(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    (first,) = await take(one)
    for count in (2, 3):
        (again,) = await take_again(other)
        assert (again.entry, again.payload, again.delivery_count) == (first.entry, first.payload, count)
        assert again.age >= (count - 1) * LEASE * 0.9


async def test_a_request_that_is_renewed_stays_with_its_worker(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    kept, left = await take(one)

    def renew_until_the_other_is_taken() -> list[Taken]:
        assert one.renew({kept.entry: request(id="1")}) == []
        return other.take(10, NOW)

    assert ids(await asyncio.to_thread(eventually, renew_until_the_other_is_taken)) == ["2"]
    assert ids([left]) == ["2"]
    assert "1" in ids(await take_again(other))


async def test_a_worker_that_wakes_up_learns_what_was_answered_without_it(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    answered, running = await take(one)
    again = await take_again(other)
    await asyncio.to_thread(other.settle, [world.answer("1")], [answered.entry])
    items = {answered.entry: request(id="1"), running.entry: request(id="2")}
    assert await asyncio.to_thread(one.renew, items) == [answered.entry]
    assert ids(again) == ["1", "2"]


async def test_a_request_that_runs_long_stays_known_and_so_does_its_answer(
    open_world: Callable[..., World],
) -> None:
    world = open_world(idempotency_ttl=200 * MS, request_timeout=50 * MS, request_grace=0)
    queue = world.queue()
    await world.accept("1")
    await world.accept("2")
    taken, other = await take(queue)
    start = world.answer("1", kind=">")
    await asyncio.to_thread(queue.settle, [start], [])
    items = {taken.entry: request(id="1")}

    async def other_is_forgotten() -> bool:
        await asyncio.to_thread(queue.renew, items)
        return await world.accept("2") is Acceptance.STORED

    await eventually_async(other_is_forgotten)
    accepted = await world.broker.accept(CONNECTION, "1", b"", CHANNEL)
    assert accepted.acceptance is Acceptance.KNOWN
    assert accepted.answered_at is not None
    assert ids([other]) == ["2"]
    await world.broker.close()


# Answering.


async def test_an_answer_is_published_and_its_request_gone_in_one_step(world: World) -> None:
    queue = world.queue()
    await world.accept("1")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.settle, [world.answer("1", b"done")], [taken.entry])
    assert [frame["body"] for frame in await world.frames()] == ["done"]
    await until_leases_are_over(world)
    assert await take(world.queue("other")) == []


async def until_leases_are_over(world: World) -> None:
    """Wait until a request that was taken after everything else has come back."""
    await world.accept("last")
    queue = world.queue("last")
    (taken,) = await take(queue)
    assert [item.entry for item in await take_again(queue)] == [taken.entry]
    await asyncio.to_thread(queue.settle, [], [taken.entry])


async def test_two_workers_that_answer_the_same_request_are_heard_once(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    (taken,) = await take(one)
    await take_again(other)
    await asyncio.to_thread(other.settle, [world.answer("1", b"of the other")], [taken.entry])
    await asyncio.to_thread(one.settle, [world.answer("1", b"of the dead")], [taken.entry])
    assert [frame["body"] for frame in await world.frames()] == ["of the other"]


async def test_a_worker_can_ask_whether_an_answer_was_begun(world: World) -> None:
    queue = world.queue()
    assert not await asyncio.to_thread(queue.has_begun, request(id="1"))
    await asyncio.to_thread(queue.settle, [world.answer("1", kind=">")], [])
    assert await asyncio.to_thread(queue.has_begun, request(id="1"))
    assert not await asyncio.to_thread(queue.has_begun, request(id="2"))


async def test_a_request_that_was_set_aside_does_not_come_back(world: World) -> None:
    queue = world.queue()
    await world.accept("1")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.set_aside, taken)
    await until_leases_are_over(world)
    assert await take(world.queue("other")) == []


async def test_a_cancellation_is_seen_for_that_request_alone(world: World) -> None:
    queue = world.queue()
    items = [request(id="1"), request(id="2"), request(id="1", connection=ConnectionId("c2"))]
    assert await asyncio.to_thread(queue.cancelled, items) == [False, False, False]
    await world.broker.cancel(CONNECTION, "1")
    assert await asyncio.to_thread(queue.cancelled, items) == [True, False, False]
    assert await asyncio.to_thread(queue.cancelled, []) == []


async def test_a_worker_that_leaves_takes_nothing_with_it(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    taken = await take(one)
    await asyncio.to_thread(one.settle, [], [taken[0].entry])
    await asyncio.to_thread(one.leave)
    assert ids(await take_again(other)) == ["2"]


# Signatures.


def test_a_request_comes_out_of_its_bytes_as_it_went_in() -> None:
    handshake = Handshake(headers=(("cookie", "a=b"), ("cookie", "ä")), scheme="https", address="::1")
    item = request(user=None, headers=(("accept", "ü"),), body=bytes(range(256)), handshake=handshake)
    assert decode_request(encode_request(item, KEY), KEY) == item


def test_no_header_of_a_handshake_that_the_application_does_not_see_is_stored() -> None:
    headers = (("host", "a"), ("authorization", "Basic canary"), ("sec-websocket-key", "canary"), ("origin", "b"))
    stored = encode_request(request(handshake=Handshake(headers=headers, scheme="http", address="")), KEY)
    assert b"canary" not in stored
    assert decode_request(stored, KEY).handshake.headers == (("host", "a"), ("origin", "b"))


@pytest.mark.parametrize("place", [0, 31, 32, 60, -1])
def test_a_request_that_was_altered_anywhere_is_refused(place: int) -> None:
    signed = bytearray(encode_request(request(), KEY))
    signed[place] ^= 1
    with pytest.raises(ValueError, match="not signed"):
        decode_request(bytes(signed), KEY)


@pytest.mark.parametrize("payload", [b"", b"{}", b"x" * 32, encode_request(request(), b"other" * 8)])
def test_a_request_without_our_signature_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not signed"):
        decode_request(payload, KEY)


# Redis alone.


@pytest.fixture
async def redis_world(redis_server: RedisServer, prefix: str) -> AsyncIterator[World]:
    settings = Settings.build(redis_server.url, environ={}, prefix=prefix, lease=LEASE)
    world = World(settings, open_async_broker(settings), open_broker(settings))
    yield world
    await world.broker.close()
    world.sync.close()


async def test_what_was_answered_or_set_aside_leaves_no_payload_in_redis(
    redis_world: World, redis_server: RedisServer
) -> None:
    world, queue = redis_world, redis_world.queue()
    handshake = Handshake(headers=(("cookie", "session=canary"),), scheme="http", address="")
    for number in range(4):
        await world.accept(str(number), handshake=handshake)
    assert dump(redis_server, world.settings.prefix).count(b"canary") == 4
    taken = await take(queue)
    await asyncio.to_thread(queue.settle, [world.answer("0")], [taken[0].entry, taken[1].entry])
    for item in taken[2:]:
        await asyncio.to_thread(queue.set_aside, item)
    assert b"canary" not in dump(redis_server, world.settings.prefix)
    key = Keyspace(world.settings.prefix).dead
    assert redis_server.cli("XLEN", key) == 2


def dump(server: RedisServer, prefix: str) -> bytes:
    """Everything that is stored below a prefix, as Redis would write it to its file, uncompressed."""
    import redis

    with redis.Redis(port=server.port) as client:
        client.config_set("rdbcompression", "no")
        return b"".join(client.dump(key) or b"" for key in client.keys(f"{prefix}*"))


async def test_a_worker_that_settled_everything_is_forgotten_when_it_leaves(
    redis_world: World, redis_server: RedisServer
) -> None:
    world, queue = redis_world, redis_world.queue("one")
    stream = Keyspace(world.settings.prefix).requests
    await asyncio.to_thread(queue.leave)  # before anybody has worked
    await world.accept("1")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.leave)
    assert len(redis_server.cli("XINFO", "CONSUMERS", stream, "workers")) == 1
    await asyncio.to_thread(queue.settle, [], [taken.entry])
    await asyncio.to_thread(queue.leave)
    assert redis_server.cli("XINFO", "CONSUMERS", stream, "workers") == []


async def test_a_queue_that_redis_lost_is_begun_anew(redis_world: World, redis_server: RedisServer) -> None:
    world, queue = redis_world, redis_world.queue()
    await world.accept("1")
    await take(queue)
    redis_server.cli("DEL", Keyspace(world.settings.prefix).requests)
    assert await world.accept("2") is Acceptance.STORED
    assert ids(await take(queue)) == ["2"]


async def test_requests_stored_before_the_first_worker_ever_are_taken(redis_world: World) -> None:
    await redis_world.accept("1")
    queues = [redis_world.queue(str(number)) for number in range(4)]
    found = await asyncio.gather(*(take(queue) for queue in queues), return_exceptions=True)
    taken = [item for items in found if isinstance(items, list) for item in items]
    assert all(isinstance(items, (list, BrokerUnavailable)) for items in found)
    assert ids(taken) == ["1"]
