"""What the request queue promises. Every test runs against each engine."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from redis.crc import key_slot

import pubsub_mw.broker.redis.reader  # noqa: F401 - they read their scripts from files, which no event loop should
from pubsub_mw import protocol
from pubsub_mw.broker.codec import decode_request, encode_request
from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import (
    Acceptance,
    Accepted,
    AsyncBroker,
    Broker,
    Progress,
    RequestQueue,
    Taken,
    answer_key,
    end_key,
    part_key,
)
from pubsub_mw.broker.memory import memory_broker
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.drafts import build_answer_draft, build_draft
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, ConnectionId, Draft, Handshake, Request
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.redis_server import RedisServer
from tests.worker.requests import offer, request

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]

NOW = 0.001
LEASE = 300 * MS
LONG_LEASE = 60_000 * MS
KEY = b"k" * 32
CHANNEL = Channel("#connection-c1")
CONNECTION = ConnectionId("c1")


@pytest.fixture(params=["memory", "redis"])
def engine(request: pytest.FixtureRequest) -> str:
    param: str = request.param
    return param


@pytest.fixture
def lease() -> float:
    """Of a worker: none runs out by itself, however slow the machine is."""
    return LONG_LEASE


leases_run_out = pytest.mark.parametrize("lease", [LEASE], ids=["short"])
"""For tests that wait until one has."""


@pytest.fixture
def make(engine: str, request: pytest.FixtureRequest, prefix: str, lease: float) -> Make:
    """Make settings of an engine, all of whose brokers in one test meet."""
    url = "memory://"
    if engine == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    return lambda **overrides: Settings.build(url, environ={}, prefix=prefix, **({"lease": lease} | overrides))


@dataclass(frozen=True, slots=True)
class World:
    settings: Settings
    broker: AsyncBroker
    sync: Broker

    def queue(self, name: str = "worker") -> RequestQueue:
        return self.sync.queue(name)

    async def accept(self, id: str, *, is_ordered: bool = False, **fields: Any) -> Acceptance:  # noqa: A002
        (accepted,) = await self.accept_all(request(id=id, **fields), is_ordered=is_ordered)
        return accepted.acceptance

    async def accept_all(self, *items: Request, is_ordered: bool = False) -> list[Accepted]:
        replies = await self.broker.accept([offer(item, KEY, is_ordered=is_ordered) for item in items])
        assert all(isinstance(reply, Accepted) for reply in replies), replies
        return [reply for reply in replies if isinstance(reply, Accepted)]

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
    assert {accepted.acceptance for accepted in await world.accept_all(*sent)} == {Acceptance.STORED}
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
    assert (await world.accept_all(request(id="1")))[0].answered_at is None
    await asyncio.to_thread(queue.settle, [world.answer("1")], [taken])
    (accepted,) = await world.accept_all(request(id="1"))
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
    await asyncio.to_thread(queue.settle, [], [taken[0]])
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
    async with asyncio.timeout(5_000 * MS):
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


@leases_run_out
async def test_a_request_whose_worker_gives_no_sign_of_life_is_taken_by_another_and_counted(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    (first,) = await take(one)
    for count in (2, 3):
        (again,) = await take_again(other)
        assert (again.entry, again.payload, again.delivery_count) == (first.entry, first.payload, count)
        assert again.age >= (count - 1) * LEASE * 0.9


@leases_run_out
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


async def test_a_request_that_is_given_back_is_taken_by_another_as_if_it_were_new(
    open_world: Callable[..., World],
) -> None:
    world = open_world()
    one, other = world.queue("one"), world.queue("other")
    for number in range(4):
        await world.accept(str(number))
    taken = await take(one)
    await asyncio.to_thread(one.give_back, taken[1:3])
    again = await take_again(other)
    assert again == [dataclasses.replace(item, age=new.age) for item, new in zip(taken[1:3], again, strict=True)]
    assert await take(other) == await take(one) == []
    await world.broker.close()


async def test_a_worker_takes_all_that_it_gave_back_itself_as_fast_as_it_has_room(
    open_world: Callable[..., World],
) -> None:
    world = open_world()
    queue = world.queue()
    for number in range(4):
        await world.accept(str(number))
    await asyncio.to_thread(queue.give_back, await take(queue))
    await asyncio.to_thread(queue.give_back, await take(queue))
    await world.accept("new")
    assert [ids(await take(queue, 1)) for _ in range(5)] == [["0"], ["1"], ["2"], ["3"], ["new"]]
    await world.broker.close()


@leases_run_out
async def test_what_another_worker_has_or_has_answered_cannot_be_given_back(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    first = await take(one)
    again = await take_again(other)
    assert [item.delivery_count for item in again] == [2, 2]
    await asyncio.to_thread(other.settle, [], again[:1])
    # As one does that does not know yet.
    await asyncio.to_thread(one.renew, {again[1].entry: request(id="2")})
    await asyncio.to_thread(one.give_back, first)
    assert await take(other) == []
    (last,) = await take_again(world.queue("third"))
    assert (last.entry, last.delivery_count) == (again[1].entry, 3)


@leases_run_out
async def test_a_worker_that_wakes_up_learns_what_was_answered_without_it(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    answered, running = await take(one)
    again = await take_again(other)
    await asyncio.to_thread(other.settle, [world.answer("1")], [answered])
    items = {answered.entry: request(id="1"), running.entry: request(id="2")}
    assert await asyncio.to_thread(one.renew, items) == [answered.entry]
    assert ids(again) == ["1", "2"]


async def test_a_request_that_runs_long_stays_known_and_so_does_its_answer(
    open_world: Callable[..., World],
) -> None:
    world = open_world(idempotency_ttl=800 * MS, request_timeout=50 * MS, request_grace=0)
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
    (accepted,) = await world.accept_all(request(id="1"))
    assert accepted.acceptance is Acceptance.KNOWN
    assert accepted.answered_at is not None
    assert ids([other]) == ["2"]
    await world.broker.close()


# Answering.


@leases_run_out
async def test_an_answer_is_published_and_its_request_gone_in_one_step(world: World) -> None:
    queue = world.queue()
    await world.accept("1")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.settle, [world.answer("1", b"done")], [taken])
    assert [frame["body"] for frame in await world.frames()] == ["done"]
    await until_leases_are_over(world)
    assert await take(world.queue("other")) == []


async def until_leases_are_over(world: World) -> None:
    """Wait until a request that was taken after everything else has come back."""
    await world.accept("last")
    queue = world.queue("last")
    (taken,) = await take(queue)
    assert [item.entry for item in await take_again(queue)] == [taken.entry]
    await asyncio.to_thread(queue.settle, [], [taken])


@leases_run_out
async def test_two_workers_that_answer_the_same_request_are_heard_once(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    (taken,) = await take(one)
    await take_again(other)
    await asyncio.to_thread(other.settle, [world.answer("1", b"of the other")], [taken])
    await asyncio.to_thread(one.settle, [world.answer("1", b"of the dead")], [taken])
    assert [frame["body"] for frame in await world.frames()] == ["of the other"]


async def test_a_worker_can_ask_how_much_of_an_answer_was_published(world: World) -> None:
    queue = world.queue()

    async def progress(id: str) -> Progress:  # noqa: A002
        return await asyncio.to_thread(queue.progress, request(id=id))

    assert await progress("1") is Progress.NOTHING
    await asyncio.to_thread(queue.settle, [world.answer("1", kind=">")], [])
    assert await progress("1") is Progress.BEGUN
    end = build_answer_draft(world.settings, CHANNEL, protocol.response_end_head("1", None), end_key("1"), ".1")
    await asyncio.to_thread(queue.settle, [end], [])
    assert await progress("1") is Progress.COMPLETE
    assert await progress("2") is Progress.NOTHING
    await asyncio.to_thread(queue.settle, [world.answer("2")], [])
    assert await progress("2") is Progress.COMPLETE


async def test_a_long_stream_whose_begin_is_no_longer_kept_has_begun(open_world: Callable[..., World]) -> None:
    world = open_world(private_history_size=2)
    queue = world.queue()
    more = [
        build_answer_draft(world.settings, CHANNEL, protocol.response_chunk_head("1", b""), part_key("1"), "-1", number)
        for number in (1, 2)
    ]
    await asyncio.to_thread(queue.settle, [world.answer("1", kind=">"), *more], [])
    assert await asyncio.to_thread(queue.progress, request(id="1")) is Progress.BEGUN
    await world.broker.close()


def part(world: World, number: int, text: bytes) -> Draft:
    head = protocol.response_chunk_head("1", text)
    return build_answer_draft(world.settings, CHANNEL, head, part_key("1"), "-1", number)


async def test_the_parts_of_an_answer_show_once_whoever_says_them_again_and_how_often(world: World) -> None:
    dead, other = world.queue("dead"), world.queue("other")
    first = [world.answer("1", kind=">"), part(world, 1, b"a"), part(world, 2, b"b")]
    await asyncio.to_thread(dead.settle, first, [])
    await asyncio.to_thread(dead.settle, first, [])
    await asyncio.to_thread(
        other.settle, [part(world, number, b"abc"[number - 1 : number]) for number in (1, 2, 3)], []
    )
    await asyncio.to_thread(dead.settle, [part(world, 3, b"of the dead"), part(world, 4, b"d")], [])
    frames = await world.frames()
    assert [frame["body"] for frame in frames if frame["type"] == "response_chunk"] == ["a", "b", "c", "d"]


async def test_how_far_a_stream_has_come_is_known_for_as_long_as_it_is_worked_on(
    open_world: Callable[..., World],
) -> None:
    world = open_world(idempotency_ttl=200 * MS, request_timeout=50 * MS, request_grace=0)
    queue = world.queue()
    await world.accept("1")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.settle, [world.answer("1", kind=">"), part(world, 1, b"a")], [])
    await asyncio.to_thread(queue.settle, [world.answer("2", b"first")], [])

    async def other_is_forgotten() -> bool:
        await asyncio.to_thread(queue.renew, {taken.entry: request(id="1")})
        await asyncio.to_thread(queue.settle, [world.answer("2", b"again")], [])
        return bool((await world.frames())[-1]["body"] == "again")

    await eventually_async(other_is_forgotten)
    await asyncio.to_thread(queue.settle, [part(world, 1, b"a"), part(world, 2, b"b")], [])
    frames = await world.frames()
    assert [frame["body"] for frame in frames if frame["type"] == "response_chunk"] == ["a", "b"]
    await world.broker.close()


async def test_an_answer_is_known_for_as_long_as_its_request_and_longer_than_other_keys(
    open_world: Callable[..., World],
) -> None:
    world = open_world(idempotency_ttl=50 * MS, request_timeout=1_000 * MS, request_grace=0)
    queue = world.queue()
    await world.accept("1")
    await asyncio.to_thread(queue.settle, [world.answer("1", b"of the worker")], await take(queue))
    plain = build_draft(world.settings, CHANNEL, "other", idempotency_key="other")
    before = await asyncio.to_thread(world.sync.publish, [plain])

    async def is_forgotten() -> bool:
        return await asyncio.to_thread(world.sync.publish, [plain]) != before

    await eventually_async(is_forgotten)
    (accepted,) = await world.accept_all(request(id="1"))
    assert accepted.answered_at is not None
    await asyncio.to_thread(queue.settle, [world.answer("1", b"for want of one")], [])
    assert [frame["body"] for frame in await world.frames() if frame["type"] == "response"] == ["of the worker"]
    await world.broker.close()


@leases_run_out
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


@leases_run_out
async def test_a_worker_that_leaves_takes_nothing_with_it(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await world.accept("1")
    await world.accept("2")
    taken = await take(one)
    await asyncio.to_thread(one.settle, [], [taken[0]])
    await asyncio.to_thread(one.leave)
    assert ids(await take_again(other)) == ["2"]


# Lanes: the order of one connection.


OTHER = ConnectionId("c2")


async def send(world: World, *ids: str, **fields: Any) -> list[Acceptance]:
    return [await world.accept(id, is_ordered=True, **fields) for id in ids]  # noqa: A001


async def settle(queue: RequestQueue, *taken: Taken) -> None:
    await asyncio.to_thread(queue.settle, [], taken)


async def test_the_next_request_of_a_connection_is_let_in_when_the_one_before_is_settled(world: World) -> None:
    queue = world.queue()
    assert set(await send(world, "1", "2", "3")) == {Acceptance.STORED}
    for id in ("1", "2", "3"):  # noqa: A001
        taken = await take(queue)
        assert ids(taken) == [id]
        assert await take(queue) == []
        await settle(queue, *taken)
    assert await take(queue) == []
    assert await send(world, "4") == [Acceptance.STORED]
    assert ids(await take(queue)) == ["4"]


async def test_requests_of_other_connections_and_those_in_no_lane_do_not_wait(world: World) -> None:
    queue = world.queue()
    await send(world, "1", "2")
    await send(world, "1", connection=OTHER)
    await world.accept("question")
    assert ids(await take(queue)) == ["1", "1", "question"]


@pytest.mark.parametrize("in_flight", [2, 5])
async def test_so_many_requests_of_a_connection_are_let_in_as_the_setting_says(
    open_world: Callable[..., World], in_flight: int
) -> None:
    world = open_world(in_flight=in_flight)
    queue = world.queue()
    await send(world, *map(str, range(10)))
    first = await take(queue)
    assert ids(first) == [str(number) for number in range(in_flight)]
    await settle(queue, first[1])
    assert ids(await take(queue)) == [str(in_flight)]
    await settle(queue, first[0])
    assert ids(await take(queue)) == [str(in_flight + 1)]
    await world.broker.close()


async def test_a_connection_whose_backlog_is_full_is_refused_and_others_are_not(
    open_world: Callable[..., World],
) -> None:
    world = open_world(request_backlog=2)
    queue = world.queue()
    assert await send(world, "1", "2", "3", "4") == [*[Acceptance.STORED] * 3, Acceptance.BUSY]
    assert await send(world, "3", "4") == [Acceptance.KNOWN, Acceptance.BUSY]
    assert await send(world, "1", connection=OTHER) == [Acceptance.STORED]
    await settle(queue, *await take(queue))
    assert await send(world, "4") == [Acceptance.STORED]
    await world.broker.close()


async def test_without_a_backlog_a_second_request_is_refused(open_world: Callable[..., World]) -> None:
    world = open_world(request_backlog=0)
    assert await send(world, "1", "2") == [Acceptance.STORED, Acceptance.BUSY]
    await settle(world.queue(), *await take(world.queue()))
    assert await send(world, "2") == [Acceptance.STORED]
    await world.broker.close()


async def test_what_waits_in_lanes_counts_for_the_bound_of_the_queue(open_world: Callable[..., World]) -> None:
    world = open_world(queue_size=3)
    queue = world.queue()
    assert await send(world, "1", "2", "3", "4") == [*[Acceptance.STORED] * 3, Acceptance.FULL]
    assert await world.accept("question") is Acceptance.FULL
    await settle(queue, *await take(queue))
    assert await send(world, "4", "5") == [Acceptance.STORED, Acceptance.FULL]
    await world.broker.close()


@leases_run_out
async def test_the_age_of_a_request_counts_from_when_it_was_accepted(world: World) -> None:
    queue = world.queue()
    await send(world, "1", "2")
    taken = await take(queue)
    began_at = asyncio.get_running_loop().time()
    (again,) = await take_again(queue)
    await settle(queue, again)
    waited = asyncio.get_running_loop().time() - began_at
    (waiting,) = await take(queue)
    assert ids([*taken, waiting]) == ["1", "2"]
    assert waiting.age >= waited * 0.9


@leases_run_out
async def test_a_worker_that_dies_keeps_the_lane_until_another_has_settled_its_request(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await send(world, "1", "2")
    (dead,) = await take(one)
    (again,) = await take_again(other)
    assert again.entry == dead.entry
    assert await take(other) == []
    await settle(other, again)
    assert ids(await take(other)) == ["2"]


@leases_run_out
async def test_a_worker_that_settles_what_another_has_settled_lets_nothing_in(world: World) -> None:
    one, other = world.queue("one"), world.queue("other")
    await send(world, "1", "2", "3")
    (dead,) = await take(one)
    (again,) = await take_again(other)
    await settle(other, again)
    running = await take(other)
    await settle(one, dead, dead)
    assert ids(running) == ["2"]
    assert await take(one) == []
    await settle(other, *running)
    assert ids(await take(one)) == ["3"]


async def test_a_request_that_is_set_aside_lets_the_next_one_in(world: World) -> None:
    queue = world.queue()
    await send(world, "1", "2")
    (taken,) = await take(queue)
    await asyncio.to_thread(queue.set_aside, taken)
    assert ids(await take(queue)) == ["2"]


async def test_a_request_that_waits_is_cancelled_and_may_be_sent_again(world: World) -> None:
    queue = world.queue()
    await send(world, "1", "2", "3")
    assert await world.broker.cancel(CONNECTION, "2")
    assert not await world.broker.cancel(CONNECTION, "2")
    assert not await world.broker.cancel(CONNECTION, "1")
    assert await send(world, "2") == [Acceptance.STORED]
    found = []
    while taken := await take(queue):
        found += ids(taken)
        await settle(queue, *taken)
    assert found == ["1", "3", "2"]


async def test_a_request_answered_while_it_waits_is_withdrawn_and_stays_known(world: World) -> None:
    queue = world.queue()
    await send(world, "1", "2", "3")
    await world.broker.withdraw(CONNECTION, "2")
    await world.broker.withdraw(CONNECTION, "1")
    taken = await take(queue)
    assert await asyncio.to_thread(queue.cancelled, [request(id="1"), request(id="2")]) == [False, False]
    await settle(queue, *taken)
    assert ids([*taken, *await take(queue)]) == ["1", "3"]
    assert await send(world, "2") == [Acceptance.KNOWN]


class Model(RuleBasedStateMachine):
    """Whatever is done in whatever order, of each connection requests come in order, once, and so many at a time."""

    IN_FLIGHT = 2

    def __init__(self) -> None:
        super().__init__()
        settings = Settings.build(
            "memory://",
            environ={},
            prefix=secrets.token_hex(8),
            in_flight=self.IN_FLIGHT,
            request_backlog=3,
            queue_size=8,
            lease=1_000,
        )
        self.broker = memory_broker(settings)
        self.queue = self.broker.queue("model")
        self.waiting: dict[str, list[str]] = {"c1": [], "c2": []}  # accepted and not taken
        self.running: dict[str, list[Taken]] = {"c1": [], "c2": []}
        self.old: list[Taken] = []
        self.count = 0

    @rule(connection=st.sampled_from(["c1", "c2"]))
    def send(self, connection: str) -> None:
        self.count += 1
        item = request(id=str(self.count), connection=ConnectionId(connection))
        (accepted,) = self.broker.accept([offer(item, KEY)])
        stored = sum(map(len, self.waiting.values())) + sum(map(len, self.running.values()))
        ahead = len(self.waiting[connection]) + len(self.running[connection])
        expected = Acceptance.FULL if stored >= 8 else Acceptance.BUSY if ahead >= 5 else Acceptance.STORED
        assert accepted.acceptance is expected
        if expected is Acceptance.STORED:
            self.waiting[connection].append(item.id)

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        for item in self.queue.take(limit, 0):
            taken = decode_request(item.payload, KEY)
            assert self.waiting[taken.connection].pop(0) == taken.id
            self.running[taken.connection].append(item)
            assert len(self.running[taken.connection]) <= self.IN_FLIGHT

    @rule(connection=st.sampled_from(["c1", "c2"]), index=st.integers(0, 1), twice=st.booleans())
    def settle(self, connection: str, index: int, twice: bool) -> None:
        if len(self.running[connection]) > index:
            item = self.running[connection].pop(index)
            self.old.append(item)
            self.queue.settle([], [item, item] if twice else [item])

    @rule(connection=st.sampled_from(["c1", "c2"]), index=st.integers(0, 1), twice=st.booleans())
    def give_back(self, connection: str, index: int, twice: bool) -> None:
        if len(self.running[connection]) > index:
            item = self.running[connection].pop(index)
            self.waiting[connection].append(decode_request(item.payload, KEY).id)
            self.waiting[connection].sort(key=int)
            self.queue.give_back([item, item] if twice else [item])

    @rule(index=st.integers(0, 50))
    def settle_what_is_settled(self, index: int) -> None:
        if index < len(self.old):
            self.queue.settle([], [self.old[index]])

    @rule(connection=st.sampled_from(["c1", "c2"]), index=st.integers(0, 4))
    def cancel(self, connection: str, index: int) -> None:
        free = max(0, self.IN_FLIGHT - len(self.running[connection]))
        waiting = self.waiting[connection]
        if index < len(waiting):
            is_in_lane = index >= free
            assert self.broker.cancel(ConnectionId(connection), waiting[index]) is is_in_lane
            if is_in_lane:
                del waiting[index]

    @invariant()
    def whatever_may_run_can_be_taken(self) -> None:
        for connection, waiting in self.waiting.items():
            free = max(0, self.IN_FLIGHT - len(self.running[connection]))
            lane = self.broker.requests.lanes.get(connection)
            assert len(lane.waiting if lane else ()) == max(0, len(waiting) - free)


TestLanes = Model.TestCase


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
async def redis_world(redis_server: RedisServer, prefix: str, lease: float) -> AsyncIterator[World]:
    settings = Settings.build(redis_server.url, environ={}, prefix=prefix, lease=lease)
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
    await asyncio.to_thread(queue.settle, [world.answer("0")], taken[:2])
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
    await asyncio.to_thread(queue.settle, [], [taken])
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


# Lanes in a Redis that loses keys.


Lose = Callable[[World, RedisServer], None]


def lose(*names: str) -> Lose:
    """Delete the keys of the request queue whose names end so."""

    def delete(world: World, server: RedisServer) -> None:
        for name in names:
            assert server.cli("DEL", f"{world.settings.prefix}:{{requests}}:{name}") == 1

    return delete


async def drain(queue: RequestQueue, expected: Sequence[str]) -> None:
    """Take and settle, one after another, until all of these came, in this order."""
    found: list[str] = []

    async def work() -> bool:
        taken = await take(queue)
        found.extend(ids(taken))
        await settle(queue, *taken)
        return len(found) >= len(expected)

    await eventually_async(work, LEASE + 3_000 * MS)
    assert found == list(expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q"], "23"),  # what ran is lost, and the worker that had it says nothing more
        (["lane:c1:running"], "23"),
        (["lanes"], "123"),
        (["waiting"], "1"),
        (["lane:c1:waiting"], "1"),
        (["q", "lane:c1:running"], "23"),
        (["q", "waiting"], ""),
        (["q", "lane:c1:waiting"], ""),
    ],
)
@leases_run_out
async def test_whatever_key_is_lost_the_lane_goes_on_within_a_lease_and_a_second(
    redis_world: World, redis_server: RedisServer, names: list[str], expected: str
) -> None:
    world, queue = redis_world, redis_world.queue()
    await send(world, "1", "2", "3")
    taken = await take(queue)
    assert ids(taken) == ["1"]
    lose(*names)(world, redis_server)
    if "q" not in names:
        await settle(queue, *taken)
        expected = expected.replace("1", "")
    await drain(queue, expected)
    assert await send(world, "4") == [Acceptance.STORED]
    await drain(queue, ["4"])


@leases_run_out
async def test_a_connection_whose_running_request_was_lost_does_not_wait_for_it(
    redis_world: World, redis_server: RedisServer
) -> None:
    world, queue = redis_world, redis_world.queue()
    await send(world, "1")
    await take(queue)
    lose("q")(world, redis_server)
    await send(world, "2", "3")
    await drain(queue, ["2", "3"])


async def test_what_waits_in_a_lane_that_was_lost_does_not_fill_the_queue_for_ever(
    redis_server: RedisServer, prefix: str
) -> None:
    ttl = {"idempotency_ttl": 100 * MS, "request_timeout": 50 * MS, "request_grace": 0}
    settings = Settings.build(redis_server.url, environ={}, prefix=prefix, lease=LEASE, queue_size=3, **ttl)
    world = World(settings, open_async_broker(settings), open_broker(settings))
    assert await send(world, "1", "2", "3") == [Acceptance.STORED] * 3
    lose("lane:c1:waiting")(world, redis_server)

    async def is_there_room() -> bool:
        return await world.accept("more", connection=OTHER) is Acceptance.STORED

    await eventually_async(is_there_room)
    await world.broker.close()
    world.sync.close()


async def test_a_lane_is_kept_while_what_runs_is_renewed_and_forgotten_when_nothing_happens(
    redis_server: RedisServer, prefix: str
) -> None:
    ttl = {"idempotency_ttl": 200 * MS, "request_timeout": 50 * MS, "request_grace": 0}
    settings = Settings.build(redis_server.url, environ={}, prefix=prefix, lease=LEASE, **ttl)
    world = World(settings, open_async_broker(settings), open_broker(settings))
    queue, keyspace = world.queue(), Keyspace(prefix)
    await send(world, "1", "2")
    await send(world, "1", connection=OTHER)
    mine, others = await take(queue)
    assert ids([mine, others]) == ["1", "1"]

    def is_the_other_forgotten() -> bool:
        queue.renew({mine.entry: request(id="1")})
        return not redis_server.cli("EXISTS", keyspace.lane(OTHER)[0])

    await asyncio.to_thread(eventually, is_the_other_forgotten)
    assert redis_server.cli("EXISTS", *keyspace.lane(CONNECTION)) == 2
    await eventually_async(lambda: redis_server.cli("EXISTS", *keyspace.lane(CONNECTION)) == 0)
    await world.broker.close()
    world.sync.close()


@leases_run_out
async def test_a_lane_that_is_done_leaves_nothing_behind(redis_world: World, redis_server: RedisServer) -> None:
    world, queue = redis_world, redis_world.queue()
    await send(world, "1", "2", "3")
    await drain(queue, ["1", "2", "3"])

    def left() -> list[str]:
        queue.take(1, NOW)
        keys: list[str] = redis_server.cli("KEYS", f"{world.settings.prefix}:{{requests}}:*")
        return [key for key in keys if "claim" not in key and not key.endswith((":q", ":waiting"))]

    await asyncio.to_thread(eventually, lambda: not left(), LEASE + 3_000 * MS)
    assert redis_server.cli("XLEN", f"{world.settings.prefix}:{{requests}}:waiting") == 0


async def test_all_that_the_queue_has_is_in_one_slot_of_a_cluster() -> None:
    keyspace = Keyspace("p")
    keys = [*keyspace.lanes, *keyspace.lane(CONNECTION), keyspace.claim(CONNECTION, "1"), keyspace.dead]
    assert {key_slot(key.encode()) for key in keys} == {key_slot(b"requests")}


@leases_run_out
async def test_lanes_that_many_connections_wait_in_are_all_found(redis_world: World, redis_server: RedisServer) -> None:
    world, queue = redis_world, redis_world.queue()
    connections = [ConnectionId(f"c{number}") for number in range(1_100)]  # more than one look takes
    for connection in connections:
        await world.accept_all(
            *(request(id=id, connection=connection) for id in ("1", "2")),  # noqa: A001
            is_ordered=True,
        )
    redis_server.cli("DEL", Keyspace(world.settings.prefix).requests)
    found: list[Taken] = []

    def all_came() -> bool:
        found.extend(queue.take(2_000, NOW))
        return len(found) >= len(connections)

    await asyncio.to_thread(eventually, all_came, LEASE + 3_000 * MS)
    assert {decode_request(item.payload, KEY).connection for item in found} == set(connections)
    assert set(ids(found)) == {"2"}


async def test_it_tells_how_many_are_ready_run_and_wait(world: World) -> None:
    async def counts() -> tuple[int, int, int]:
        told = await world.broker.queue_counts()
        return told["ready"], told["running"], told["waiting"]

    assert await counts() == (0, 0, 0), "before there was any worker"
    for number in range(3):
        await world.accept(f"{number}", is_ordered=True)
    await world.accept("beside them")
    assert await counts() == (2, 0, 2)
    queue = world.queue()
    taken = await asyncio.to_thread(queue.take, 10, NOW)
    assert await counts() == (0, 2, 2)
    for item in taken:
        if item.lane:
            await asyncio.to_thread(queue.settle, [], [item])
    assert await counts() == (1, 1, 1)
