"""One connection's requests: which are let through, in which order, and what is told about those that are not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_mw import protocol
from pubsub_mw.broker.codec import decode_request
from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import AsyncBroker, Broker, RequestQueue, Taken, answer_key
from pubsub_mw.broker.memory import MemoryBroker
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import ErrorCode, FrameError
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Channel, ConnectionId, Handshake, Position, Request
from pubsub_mw.protocol import RequestFrame
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.request_check import RequestCheck
from pubsub_mw.realtime.requests import RequestGate, Requests
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually_async
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

SECRET = "a secret of thirty-two bytes or more"
CONNECTION = ConnectionId("c1")
CHANNEL = Channel("#connection-c1")
HANDSHAKE = Handshake(headers=(("host", "site.example"),), scheme="http", address="")


def frame(id: str = "1", path: str = "/", method: str = "GET", **fields: Any) -> RequestFrame:  # noqa: A002
    return RequestFrame(id=id, method=method, path=path, **({"headers": {}, "body": b""} | fields))


# Paths.


def check(path: str, *patterns: str, **settings: Any) -> Request:
    built = Settings.build(environ={}, requests=patterns or ("/*",), **settings)
    return RequestCheck(built).check(frame(path=path), CONNECTION, None, HANDSHAKE)


def refusal(path: str, *patterns: str, **settings: Any) -> str:
    with pytest.raises(FrameError) as caught:
        check(path, *patterns, **settings)
    assert caught.value.id == "1"
    return caught.value.code


@pytest.mark.parametrize(
    ("path", "seen", "query"),
    [
        ("/", "/", ""),
        ("/rooms/42/", "/rooms/42/", ""),
        ("/rooms/%C3%A4%20b", "/rooms/ä b", ""),
        ("/rooms/100%25", "/rooms/100%", ""),
        ("/rooms/..a/.b/c.", "/rooms/..a/.b/c.", ""),
        ("/rooms/1?next=//x/../%2f&a=1?2", "/rooms/1", "next=//x/../%2f&a=1?2"),
        ("/rooms/a;b=1@:!$&'()*+,", "/rooms/a;b=1@:!$&'()*+,", ""),
    ],
)
def test_a_path_is_decoded_once_and_its_query_stays_as_it_is(path: str, seen: str, query: str) -> None:
    request = check(path)
    assert (request.path, request.query) == (seen, query)


@pytest.mark.parametrize(
    "path", ["/admin", "/", "/ROOMS/1", "/rooms", "/echo/", "/%65cho/x", "/rooms%3f", "/x/rooms/1"]
)
def test_a_path_that_no_pattern_allows_is_forbidden(path: str) -> None:
    assert refusal(path, "/rooms/*", "/echo") == ErrorCode.FORBIDDEN


def test_nothing_may_be_requested_where_nothing_is_allowed() -> None:
    built = Settings.build(environ={})
    with pytest.raises(FrameError, match="PUBSUB_REQUESTS"):
        RequestCheck(built).check(frame(), CONNECTION, None, HANDSHAKE)


@pytest.mark.parametrize("path", ["/pubsub/authorize", "/pubsub/authoriz%65", "/pubsub/lifecycle?x=1"])
def test_what_only_the_server_may_ask_no_client_may(path: str) -> None:
    settings = {"authorize": "/pubsub/authorize", "lifecycle": "/pubsub/lifecycle"}
    assert refusal(path, "/*", **settings) == ErrorCode.FORBIDDEN


BAD_PATHS = [
    "/rooms/../admin",
    "/rooms/..",
    "/rooms/./1",
    "/rooms/%2e%2e/admin",
    "/rooms/.%2E/admin",
    "/rooms/%2e/1",
    "/rooms/%252e%252e/admin",
    "/rooms/..%2fadmin",
    "/rooms/%2Fadmin",
    "/rooms/..%252fadmin",
    "/rooms/%255cadmin",
    "/rooms//admin",
    "//admin",
    "/rooms/1//",
    "/rooms/..\\admin",
    "/rooms/%5c..%5cadmin",
    "/rooms/\x00",
    "/rooms/%00",
    "/rooms/%2500",
    "/rooms/%0d%0aX-Admin:%201",
    "/rooms/\r\nX-Admin: 1",
    "/rooms/%09",
    "/rooms/%7f",
    "/rooms/%",
    "/rooms/%zz",
    "/rooms/%f",
    "/rooms/%ff",
    "/rooms/%c0%ae%c0%ae/admin",
    "/rooms/ä",
    "/rooms/ 1",
    "/rooms/1#x",
    "/rooms/1?a=#x",
    "/rooms/1?a= b",
    "/rooms/1?a=\r\n",
    "/rooms/1?a=ä",
    "/rooms/1?\x00",
    "http://site.example/rooms/1",
    "rooms/1",
    "",
    "*",
    "/rooms/" + "a" * 9_000,
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_two_programs_could_read_differently_is_refused(path: str) -> None:
    assert refusal(path, "/*") == ErrorCode.BAD_FRAME


PIECES = [
    "/",
    "rooms",
    "admin",
    ".",
    "..",
    "%2e",
    "%2E",
    "%2f",
    "%5c",
    "\\",
    "%",
    "25",
    "%00",
    "//",
    "?",
    "#",
    "%C3%A4",
    "ä",
]


@given(path=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_whatever_a_path_is_made_of_it_leads_to_what_the_patterns_allow(path: str) -> None:
    try:
        request = check("/rooms/" + path, "/rooms/*")
    except FrameError:
        return
    assert request.path.startswith("/rooms/")
    for seen in (request.path, unquote(request.path)):  # also by a program that decodes once more
        segments = seen.split("/")[1:]
        assert not {".", ".."} & set(segments)
        assert "" not in segments[:-1]
        assert "\\" not in seen


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "", "GET ", "GET\r\n", "PROPFIND", "get post"])
def test_a_method_that_is_not_one_of_the_seven_is_refused(method: str) -> None:
    checker = RequestCheck(Settings.build(environ={}, requests="/*"))
    with pytest.raises(FrameError, match="must be one of DELETE, GET"):
        checker.check(frame(method=method), CONNECTION, None, HANDSHAKE)


# Order. A gate over the memory broker; the test is the worker, and tells the connection what passed on its channel.


@dataclass(slots=True)
class World:
    settings: Settings
    broker: AsyncBroker
    sync: Broker
    gate: RequestGate
    requests: Requests
    own: Subscription
    send_queue: SendQueue
    sent: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, Taken] = field(default_factory=dict)

    @property
    def queue(self) -> RequestQueue:
        return self.sync.queue("test")

    def put(self, id: str, **fields: Any) -> None:  # noqa: A002
        self.requests.put(frame(id, **fields), None)

    async def taken(self, count: int) -> list[tuple[str, Taken]]:
        """Take requests until there are so many."""
        found: list[Taken] = []

        async def take() -> bool:
            found.extend(await asyncio.to_thread(self.queue.take, 100, 0))
            return len(found) >= count

        await eventually_async(take)
        named = [(decode_request(item.payload, queue_key(SECRET)).id, item) for item in found]
        self.running |= named
        return named

    async def nothing_taken(self) -> bool:
        await self.is_idle()
        return await asyncio.to_thread(self.queue.take, 10, 0) == []

    def publish(self, id: str, *kinds: str) -> list[Position]:  # noqa: A002
        """Publish parts of an answer, which pass: `.` whole, or `>` begin, `-` chunk, `.` end, which settles it."""
        positions = []
        for number, kind in enumerate(kinds):
            head = protocol.response_chunk_head(id, f"{kind}{number}".encode())
            key = answer_key(id) if number == 0 else f"{id}{number}"
            draft = build_answer_draft(self.settings, CHANNEL, head, key, kind + id)
            positions += self.sync.publish([draft])
            self.requests.on_reply(CONNECTION, kind + id)
            if kind == ".":
                self.settle(id)
        return positions

    def settle(self, id: str) -> None:  # noqa: A002
        if id in self.running:
            self.queue.settle([], [self.running.pop(id)])

    def frames(self) -> list[dict[str, Any]]:
        """What was put into the send queue so far."""
        self.sent += [orjson.loads(item) for item in self.send_queue.take_nowait()]
        return self.sent

    async def told(self, count: int = 1) -> list[dict[str, Any]]:
        await eventually_async(lambda: len(self.frames()) >= count)
        return self.frames()

    async def is_idle(self) -> None:
        """Wait until nothing that was begun is under way."""
        await eventually_async(lambda: not len(self.requests._tasks))


Open = Callable[..., World]


@pytest.fixture
async def open_world(prefix: str) -> AsyncIterator[Open]:
    opened: list[World] = []

    def open_one(
        url: str = "memory://",
        *,
        since: Position | None = None,
        joined_at: Position | None = None,
        **overrides: Any,
    ) -> World:
        values: dict[str, Any] = {"prefix": prefix, "secret": SECRET, "requests": "/*"}
        settings = Settings.build(url, environ={}, **(values | overrides))
        broker = open_async_broker(settings)
        sync = open_broker(settings)
        gate = RequestGate(settings, broker, AsyncPublisher(**settings.overrides()), SECRET)
        send_queue = SendQueue(1 << 20, 1 << 18)
        own = Subscription(CHANNEL, CONNECTION, send_queue, since or Position.start())
        own.joined_at = joined_at or Position.start()
        requests = Requests(gate, CONNECTION, HANDSHAKE, send_queue, own)
        opened.append(World(settings, broker, sync, gate, requests, own, send_queue))
        return opened[-1]

    yield open_one
    for world in opened:
        world.requests.close()
        await world.is_idle()
        await world.gate.close()
        await world.gate.publisher.close()
        await world.broker.close()
        world.sync.close()


def names(taken: list[tuple[str, Taken]]) -> list[str]:
    return [name for name, _ in taken]


async def test_one_request_is_in_flight_and_the_next_follows_when_it_is_answered(open_world: Open) -> None:
    world = open_world()
    for id in ("a", "b", "c"):  # noqa: A001
        world.put(id)
    for id in ("a", "b", "c"):  # noqa: A001
        assert names(await world.taken(1)) == [id]
        assert await world.nothing_taken()
        world.publish(id, ".")


async def test_a_stream_is_in_flight_until_its_end(open_world: Open) -> None:
    world = open_world()
    world.put("a")
    world.put("b")
    await world.taken(1)
    world.publish("a", ">", "-")
    await world.is_idle()
    assert await world.nothing_taken()
    world.publish("a", ".")
    assert names(await world.taken(1)) == ["b"]


@pytest.mark.parametrize("in_flight", [2, 3])
async def test_so_many_may_be_in_flight_as_the_setting_says(open_world: Open, in_flight: int) -> None:
    world = open_world(in_flight=in_flight)
    for number in range(5):
        world.put(str(number))
    assert len(await world.taken(in_flight)) == in_flight
    await world.is_idle()
    assert await world.nothing_taken()
    world.publish("0", ".")
    assert names(await world.taken(1)) == [str(in_flight)]


async def test_a_request_beyond_the_backlog_is_refused_as_busy(open_world: Open) -> None:
    world = open_world(request_backlog=2)
    for number in range(4):
        world.put(str(number))
    (refused,) = await world.told()
    assert (refused["code"], refused["id"]) == (ErrorCode.BUSY, "3")
    await world.taken(1)
    world.publish("0", ".")
    world.put("3")
    for id in ("1", "2", "3"):  # noqa: A001
        assert names(await world.taken(1)) == [id]
        world.publish(id, ".")


async def test_a_request_that_finds_the_queue_full_is_refused_and_the_next_one_tried(open_world: Open) -> None:
    world, other = open_world(queue_size=1), open_world(queue_size=1)
    other.put("x")
    await other.is_idle()
    world.put("a")
    world.put("b")
    assert [(item["code"], item["id"]) for item in await world.told(2)] == [("busy", "a"), ("busy", "b")]
    assert names(await world.taken(1)) == ["x"]


async def test_a_request_sent_again_while_it_is_in_flight_or_waits_is_the_same_request(open_world: Open) -> None:
    world = open_world(request_backlog=1)
    world.put("a")
    world.put("b")
    world.put("a")
    world.put("b")
    assert names(await world.taken(1)) == ["a"]
    world.publish("a", ".")
    assert names(await world.taken(1)) == ["b"]
    assert world.frames() == []


# Sent again, after an answer.


async def test_a_request_sent_again_on_the_same_connection_gets_the_stored_answer(open_world: Open) -> None:
    world = open_world()
    world.put("a")
    await world.taken(1)
    world.publish("a", ">", "-", ".")
    world.put("a")
    assert [item["body"] for item in await world.told(3)] == [">0", "-1", ".2"]
    await world.is_idle()
    assert await world.nothing_taken()
    world.put("b")
    assert names(await world.taken(1)) == ["b"]


@pytest.mark.parametrize(
    ("since", "is_sent"),
    [
        (0, False),  # recovery brings all of it
        (1, False),  # ... all but its begin, which the client has
        (2, False),
        (3, True),  # the client had it all: it must have lost it, or it would not ask
    ],
)
async def test_a_resumed_client_gets_an_answer_from_recovery_or_sent_again_but_not_both(
    open_world: Open, since: int, is_sent: bool
) -> None:
    first = open_world()
    first.put("a")
    await first.taken(1)
    positions = [Position.start(), *first.publish("a", ">", "-", ".")]
    first.requests.close()
    resumed = open_world(since=positions[since], joined_at=positions[-1])
    resumed.put("a")
    await resumed.is_idle()
    assert len(resumed.frames()) == (3 if is_sent else 0)
    resumed.put("b")
    assert names(await resumed.taken(1)) == ["b"]


async def test_a_client_whose_recovery_was_cut_short_by_a_gap_gets_its_answer_sent_again(open_world: Open) -> None:
    first = open_world()
    first.put("a")
    await first.taken(1)
    positions = first.publish("a", ".")
    first.requests.close()
    resumed = open_world(since=Position.start(), joined_at=positions[-1])
    resumed.own.since = positions[-1]  # as the hub leaves it
    resumed.put("a")
    assert len(await resumed.told()) == 1


async def test_a_client_of_an_epoch_that_is_over_gets_its_answer_sent_again(open_world: Open) -> None:
    first = open_world()
    first.put("a")
    await first.taken(1)
    positions = first.publish("a", ".")
    first.requests.close()
    resumed = open_world(since=Position("older", 0, "0"), joined_at=positions[-1])
    resumed.put("a")
    assert len(await resumed.told()) == 1


async def test_a_stream_that_goes_on_is_left_to_recovery_and_stays_in_flight(open_world: Open) -> None:
    first = open_world()
    first.put("a")
    await first.taken(1)
    positions = first.publish("a", ">", "-")
    first.requests.close()
    resumed = open_world(since=positions[0], joined_at=positions[-1])
    resumed.put("a")
    resumed.put("b")
    await resumed.is_idle()
    assert resumed.frames() == []
    assert await resumed.nothing_taken()
    resumed.running = first.running
    resumed.publish("a", ".")
    assert names(await resumed.taken(1)) == ["b"]


async def test_an_answer_that_is_no_longer_kept_is_said_to_be_so(open_world: Open) -> None:
    world = open_world(private_history_size=2)
    world.put("a")
    await world.taken(1)
    world.publish("a", ".")
    world.publish("x", ">", "-")
    world.put("a")
    (item,) = await world.told()
    assert (item["code"], item["id"]) == ("expired", "a")


# Cancelling, and time.


@pytest.mark.parametrize("is_stored", [True, False])
async def test_a_request_that_waits_is_cancelled_at_once(open_world: Open, is_stored: bool) -> None:
    world = open_world()
    world.put("a")
    world.put("b")
    world.put("c")
    if is_stored:
        await world.is_idle()
    world.requests.cancel("b")
    (item,) = await world.told()
    assert (item["code"], item["id"]) == ("cancelled", "b")
    await world.taken(1)
    world.publish("a", ".")
    assert names(await world.taken(1)) == ["c"]


async def test_a_cancellation_of_what_runs_reaches_the_worker(open_world: Open) -> None:
    world = open_world()
    world.put("a")
    ((_, taken),) = await world.taken(1)
    request = decode_request(taken.payload, queue_key(SECRET))
    world.requests.cancel("a")
    world.requests.cancel("unknown")
    await eventually_async(lambda: world.queue.cancelled([request]) == [True])
    assert world.frames() == []


async def test_a_request_that_nobody_takes_is_answered_504_on_its_channel_and_the_next_follows(
    open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    world = open_world(request_timeout=50 * MS, request_grace=50 * MS)
    world.put("a")
    (page,) = await eventually_async(lambda: pages(world))
    assert orjson.loads(page.frame)["status"] == 504
    assert page.reply == ".a"
    assert "Is `pubsub-mw worker` running?" in caplog.text
    await eventually_async(lambda: world.gate.timed_out == 1)
    assert (world.gate.accepted, world.gate.answered) == (1, 0)


async def pages(world: World) -> tuple[Any, ...]:
    (page,) = await world.broker.read([(CHANNEL, 0)], page_bytes=1 << 30)
    assert not isinstance(page, Exception)
    return page.publications


async def test_an_answer_that_has_begun_in_time_may_take_as_long_as_it_likes(open_world: Open) -> None:
    world = open_world(request_timeout=400 * MS, request_grace=0)
    world.put("a")
    await world.taken(1)
    await world.is_idle()
    world.publish("a", ">")
    world.put("b")
    other = open_world(request_timeout=400 * MS, request_grace=0)
    other.put("later")  # its deadline comes after that of "a"
    await eventually_async(lambda: pages_of(world, ".later"))
    assert not await pages_of(world, ".a")


async def pages_of(world: World, reply: str) -> list[Any]:
    return [page for page in await pages(world) if page.reply == reply]


async def test_what_waits_behind_a_stream_for_too_long_is_answered_504_and_not_run(open_world: Open) -> None:
    world = open_world(request_timeout=400 * MS, request_grace=50 * MS)
    world.put("a")
    await world.taken(1)
    world.publish("a", ">", "-")
    world.put("b")
    world.put("c")
    await eventually_async(lambda: pages_of(world, ".c"))
    assert await pages_of(world, ".b")
    assert not await pages_of(world, ".a")
    await eventually_async(lambda: not len(world.gate._tasks))
    for reply in (".b", ".c"):
        world.requests.on_reply(CONNECTION, reply)
    world.publish("a", ".")
    assert await world.nothing_taken()
    world.put("b")
    assert (await world.told())[0]["status"] == 504
    assert await world.nothing_taken()


async def test_what_was_stored_runs_though_the_connection_ended_and_its_order_holds_for_the_next(
    open_world: Open,
) -> None:
    world = open_world()
    world.put("a")
    world.put("b")
    await world.taken(1)
    await world.is_idle()
    world.requests.close()
    resumed = open_world()
    resumed.put("b")
    resumed.put("c")
    assert await resumed.nothing_taken()
    world.publish("a", ".")
    assert names(await world.taken(1)) == ["b"]
    assert await resumed.nothing_taken()
    world.publish("b", ".")
    assert names(await resumed.taken(1)) == ["c"]


async def test_a_request_whose_broker_lost_it_is_stored_when_it_is_sent_again(open_world: Open) -> None:
    world = open_world()
    world.put("a")
    world.put("b")
    await world.taken(1)
    await world.is_idle()
    assert isinstance(world.sync, MemoryBroker)
    world.sync.lose()
    world.put("b")
    assert names(await world.taken(1)) == ["b"]


async def test_a_504_that_the_broker_does_not_take_is_published_later(
    redis_server: RedisServer, tcp_proxy: Callable[[int], TcpProxy], open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = tcp_proxy(redis_server.port)
    world = open_world(f"redis://127.0.0.1:{proxy.port}/0", request_timeout=100 * MS, request_grace=0)
    world.put("a")
    await world.is_idle()
    proxy.refuse()
    await eventually_async(lambda: "answered 504 later" in caplog.text, 5_000 * MS)
    proxy.accept()
    (page,) = await eventually_async(lambda: pages(world), 5_000 * MS)
    assert orjson.loads(page.frame)["status"] == 504


async def test_a_request_is_taken_without_a_connection_at_this_server(open_world: Open) -> None:
    world = open_world(request_backlog=1)
    gate = world.gate
    sent = [gate.accept(frame(str(number)), CONNECTION, "7", HANDSHAKE, "sse") for number in range(3)]
    accepted = await asyncio.gather(*sent, return_exceptions=True)
    assert accepted[:2] == [[], []]
    assert isinstance(accepted[2], FrameError)
    assert (accepted[2].code, accepted[2].id) == (ErrorCode.BUSY, "2")
    ((_, taken),) = await world.taken(1)
    request = decode_request(taken.payload, queue_key(SECRET))
    assert (request.user, request.transport, request.reply_to) == ("7", "sse", CHANNEL)
    assert await gate.cancel(CONNECTION, "1")
    assert not await gate.cancel(CONNECTION, "0")
    world.publish("0", ".")
    (answer,) = await gate.accept(frame("0"), CONNECTION, "7", HANDSHAKE, "sse")
    assert answer.reply == ".0"


@pytest.mark.parametrize("engine", ["memory", "redis"])
async def test_an_answer_that_passed_by_another_server_is_followed_by_no_504_and_no_warning(
    engine: str, request: pytest.FixtureRequest, open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    url = "memory://" if engine == "memory" else request.getfixturevalue("redis_server").url
    # The answer is known for longer than any other idempotency key.
    settings = {"request_timeout": 700 * MS, "request_grace": 0, "idempotency_ttl": 600 * MS}
    world, elsewhere = open_world(url, **settings), open_world(url, **settings)
    await world.gate.accept(frame("a"), CONNECTION, None, HANDSHAKE, "sse")
    await elsewhere.taken(1)
    await asyncio.to_thread(elsewhere.publish, "a", ".")
    await world.gate.accept(frame("later"), CONNECTION, None, HANDSHAKE, "sse")
    await eventually_async(lambda: pages_of(world, ".later"))
    await eventually_async(lambda: not len(world.gate._tasks) and not world.gate._timers)
    assert len(await pages_of(world, ".a")) == 1
    assert caplog.text.count("answered 504") == 1


async def test_requests_answered_elsewhere_do_not_count_as_waiting_however_many(
    open_world: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mw.realtime.requests._MOST_EXPECTED", 3)
    world, elsewhere = open_world(queue_size=1), open_world(queue_size=1)
    for number in range(10):
        assert not await world.gate.accept(frame(str(number)), CONNECTION, None, HANDSHAKE, "sse")
        await elsewhere.taken(1)
        elsewhere.publish(str(number), ".")
    assert [id for _, id in world.gate._timers] == ["7", "8", "9"]  # noqa: A001


async def test_requests_that_come_together_are_stored_in_few_round_trips_and_in_order(
    redis_server: RedisServer, tcp_proxy: Callable[[int], TcpProxy], open_world: Open
) -> None:
    proxy = tcp_proxy(redis_server.port)
    proxy.latency(20 * MS)
    world = open_world(f"redis://127.0.0.1:{proxy.port}/0", in_flight=1_000, broker_timeout=30, publish_timeout=30)
    for number in range(600):
        world.put(str(number))
    async with asyncio.timeout(8_000 * MS):  # one after another they would take more than 24,000
        await world.is_idle()
    proxy.latency(0)
    found: list[str] = []
    while len(found) < 600:
        found += names(await world.taken(1))
    assert found == [str(number) for number in range(600)]


def test_requests_are_signed_with_a_key_made_of_the_secret() -> None:
    assert queue_key(SECRET) != queue_key(SECRET + "!")
    assert SECRET.encode() not in queue_key(SECRET)


# What is counted.


async def test_each_request_is_counted_once_as_accepted_or_refused_and_as_answered(open_world: Open) -> None:
    world = open_world(request_backlog=1, requests="/a*")
    gate = world.gate
    for id in ("runs", "waits", "too many"):  # noqa: A001
        world.put(id, path="/a")
    assert (await world.told())[0]["code"] == ErrorCode.BUSY
    with pytest.raises(FrameError):
        world.put("elsewhere", path="/b")
    world.put("runs", path="/a")  # a resend
    await world.is_idle()
    assert (gate.accepted, dict(gate.refused)) == (2, {ErrorCode.BUSY: 1, ErrorCode.FORBIDDEN: 1})
    await world.taken(1)
    world.requests.cancel("waits")
    await eventually_async(lambda: len(world.frames()) == 2)
    assert gate.answered == 0, "what was cancelled before it ran has no answer"
    await asyncio.to_thread(world.publish, "runs", ">", "-", ".")
    assert (gate.answered, gate.timed_out) == (1, 0)
