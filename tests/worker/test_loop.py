"""One worker, its threads, and the application in them."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import Accepted
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Channel, Request
from pubsub_mw.settings import Settings
from pubsub_mw.worker import Worker
from tests.tools.clock import MS, eventually
from tests.tools.redis_server import RedisServer
from tests.worker.requests import offer, request

SECRET = "a secret of thirty-two bytes or more"
CHANNEL = Channel("#connection-c1")
SHORT = {"lease": 400 * MS}
"""For workers that are to run what a dead one has left."""


@dataclass(slots=True)
class Running:
    """A worker in a thread, and the two ends of its queue."""

    settings: Settings
    worker: Worker
    thread: threading.Thread
    errors: list[BaseException] = field(default_factory=list)

    def send(self, *requests: Request, key: bytes = queue_key(SECRET)) -> list[Accepted]:
        async def accept() -> list[Accepted]:
            broker = open_async_broker(self.settings)
            try:
                # Not in order: what is tested is the worker, which gets what may run.
                replies = await broker.accept([offer(item, key, is_ordered=False) for item in requests])
                return [reply for reply in replies if isinstance(reply, Accepted)]
            finally:
                await broker.close()

        return asyncio.run(accept())

    def cancel(self, item: Request) -> None:
        async def cancel() -> None:
            broker = open_async_broker(self.settings)
            await broker.cancel(item.connection, item.id)
            await broker.close()

        asyncio.run(cancel())

    def frames(self) -> list[dict[str, Any]]:
        async def read() -> list[dict[str, Any]]:
            broker = open_async_broker(self.settings)
            (page,) = await broker.read([(CHANNEL, 0)], page_bytes=1 << 30)
            await broker.close()
            assert not isinstance(page, Exception), page
            return [orjson.loads(publication.frame) for publication in page.publications]

        return asyncio.run(read())

    def answers(self, count: int, timeout: float = 10_000 * MS) -> list[dict[str, Any]]:
        """Wait for so many answers to be complete; every frame until then."""

        def are_complete() -> list[dict[str, Any]]:
            frames = self.frames()
            assert sum(frame["type"] in ("response", "response_end") for frame in frames) >= count, frames
            return frames

        return eventually(are_complete, timeout)

    def is_idle(self) -> bool:
        """Whether nothing waits in the queue or is worked on."""
        broker = open_broker(self.settings)
        try:
            if self.settings.url == "memory://":
                return not broker.requests.stored  # type: ignore[attr-defined]
            (length,) = broker.run(lambda _: [("XLEN", Keyspace(self.settings.prefix).requests)])  # type: ignore[attr-defined]
            return not length
        finally:
            broker.close()

    def stop(self) -> None:
        self.worker.stop()
        self.thread.join(10_000 * MS)
        assert not self.thread.is_alive()


Run = Callable[..., Running]


@pytest.fixture
def run(url: str, prefix: str) -> Iterator[Run]:
    """Run a worker on `app`; it ends with the test, which fails if the worker does not end by itself."""
    with contextlib.ExitStack() as stack:

        def start(app: Any, *, threads: int = 2, **settings: Any) -> Running:
            values: dict[str, Any] = {"secret": SECRET, "prefix": prefix, "lease": 10_000 * MS, "drain": 3000 * MS}
            values |= settings
            worker = Worker(app, url, threads=threads, **values)

            def work() -> None:
                try:
                    worker.run()
                except RuntimeError as error:
                    running.errors.append(error)

            running = Running(worker.settings, worker, threading.Thread(target=work))
            running.thread.start()
            stack.callback(running.stop)
            return running

        yield start


class App:
    """A WSGI app made of a function from the environ to its chunks, which remembers each run.

    Attributes:
        runs: message id and delivery count of each
    """

    def __init__(self, view: Callable[[dict[str, Any]], Any]) -> None:
        self._view = view
        self.runs: list[tuple[str, int]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        connection = environ["pubsub.connection"]
        self.runs.append((connection.message_id, connection.delivery_count))
        response = self._view(environ)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return response


def hello(_environ: dict[str, Any]) -> list[bytes]:
    return [b"hello"]


class Gate:
    """A view that waits to be let through; open it before the test ends."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, environ: dict[str, Any]) -> list[bytes]:
        if environ["PATH_INFO"] == "/gate":
            self.entered.release()
            self.opened.wait(15_000 * MS)
        return [environ["PATH_INFO"].encode()]

    def wait(self) -> None:
        assert self.entered.acquire(timeout=10_000 * MS)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def numbered(count: int, **fields: Any) -> list[Request]:
    return [request(id=str(number), **fields) for number in range(count)]


# Answering.


def test_requests_are_run_answered_and_forgotten(run: Run) -> None:
    app = App(hello)
    running = run(app)
    running.send(*numbered(20))
    frames = running.answers(20)
    assert sorted(frame["id"] for frame in frames) == sorted(str(number) for number in range(20))
    assert {(frame["type"], frame["status"], frame["body"]) for frame in frames} == {("response", 200, "hello")}
    assert sorted(app.runs) == sorted((str(number), 1) for number in range(20))
    eventually(running.is_idle)


def test_one_thread_runs_requests_in_the_order_in_which_they_were_stored(run: Run) -> None:
    app = App(hello)
    running = run(app, threads=1)
    running.send(*numbered(50))
    running.answers(50)
    assert [message_id for message_id, _ in app.runs] == [str(number) for number in range(50)]


def test_a_request_that_is_sent_again_is_not_run_again(run: Run) -> None:
    app = App(hello)
    running = run(app)
    running.send(request())
    running.answers(1)
    (accepted,) = running.send(request())
    assert accepted.answered_at is not None
    eventually(running.is_idle)
    assert app.runs == [("1", 1)]
    assert len(running.frames()) == 1


def test_a_generator_streams_as_it_goes(run: Run) -> None:
    go_on = threading.Event()

    def view(_environ: dict[str, Any]) -> Iterator[bytes]:
        yield b"a"
        go_on.wait(10_000 * MS)
        yield b"b"

    running = run(App(view))
    running.send(request())
    eventually(lambda: [frame["type"] for frame in running.frames()] == ["response_start", "response_chunk"])
    go_on.set()
    frames = running.answers(1)
    assert [frame["type"] for frame in frames] == [
        "response_start",
        "response_chunk",
        "response_chunk",
        "response_end",
    ]
    assert [frame.get("body") for frame in frames] == [None, "a", "b", None]
    assert len({frame["position"] for frame in frames}) == 4


def test_a_fast_generator_waits_for_the_broker_and_loses_nothing(run: Run) -> None:
    running = run(App(lambda _environ: (b"%d," % number for number in range(6_000))), private_history_size=10_000)
    running.send(request())
    frames = running.answers(1, 15_000 * MS)
    text = "".join(frame.get("body", "") for frame in frames)
    assert text == "".join(f"{number}," for number in range(6_000))


@pytest.mark.parametrize(
    ("view", "status"),
    [
        (lambda _environ: 1 / 0, 500),
        (lambda _environ: exit(3), 500),
        (lambda _environ: ["text"], 500),
        (lambda _environ: iter(["text"]), 500),
        (lambda _environ: None, 500),
    ],
)
def test_a_view_that_goes_wrong_is_answered_and_the_worker_goes_on(
    run: Run, view: Callable[[dict[str, Any]], Any], status: int
) -> None:
    running = run(App(lambda environ: view(environ) if environ["PATH_INFO"] == "/bad" else [b"good"]), threads=1)
    running.send(request(id="bad", path="/bad"), request(id="good"))
    frames = {frame["id"]: frame for frame in running.answers(2)}
    assert frames["bad"]["status"] == status
    assert frames["good"]["body"] == "good"
    assert not running.errors


@pytest.mark.parametrize("value", ["\udc80", "snow ☃", 7])
def test_a_header_that_cannot_be_sent_ends_neither_the_worker_nor_the_request(run: Run, value: Any) -> None:
    def app(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Disposition", value)])
        return [b"body"]

    running = run(app)
    running.send(request())
    (frame,) = running.answers(1)
    assert frame["status"] == (500 if value == "\udc80" else 200)
    assert not running.errors


# Sharing with other workers.


def test_while_all_threads_are_busy_for_long_another_worker_runs_what_comes(run: Run, gate: Gate) -> None:
    app = App(gate)
    stuck = run(app, threads=2)
    stuck.send(*numbered(40))
    stuck.answers(40)  # so fast that the worker takes more than it has threads
    stuck.send(*(request(id=f"slow{number}", path="/gate") for number in range(2)))
    gate.wait()
    gate.wait()
    stuck.send(*(request(id=f"early{number}") for number in range(30)))
    other = run(app)
    other.answers(70)
    other.send(*(request(id=f"late{number}") for number in range(30)))
    other.answers(100)
    gate.opened.set()
    other.answers(102)
    eventually(other.is_idle)
    assert len(app.runs) == 102
    assert {count for _, count in app.runs} == {1}


def test_a_worker_whose_threads_are_busy_for_long_takes_no_more(run: Run, gate: Gate) -> None:
    running = run(App(gate), threads=2)
    running.send(*numbered(40))
    running.answers(40)
    running.send(request(id="slow0", path="/gate"), request(id="slow1", path="/gate"))
    gate.wait()
    gate.wait()
    assert running.worker._seconds_per_request < 0.02
    eventually(lambda: running.worker._ahead() == 0)
    gate.opened.set()
    running.answers(42)


def test_a_worker_that_is_alone_runs_what_it_gave_back_as_soon_as_it_can(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1)
    running.send(*numbered(40))
    running.answers(40)
    running.send(request(id="slow", path="/gate"), *(request(id=f"behind{number}") for number in range(20)))
    gate.wait()
    eventually(lambda: [job.request.id for job in running.worker._running.values()] == ["slow"])
    gate.opened.set()
    running.answers(61)
    assert app.runs[-20:] == [(f"behind{number}", 1) for number in range(20)]
    assert len(app.runs) == 61


# What is not run.


@pytest.mark.parametrize("key", [b"another key" * 3, b""])
def test_a_request_that_is_not_signed_with_our_secret_is_set_aside(run: Run, key: bytes) -> None:
    app = App(hello)
    running = run(app)
    running.send(request(id="forged"), key=key)
    running.send(request(id="good"))
    (frame,) = running.answers(1)
    assert frame["id"] == "good"
    eventually(running.is_idle)
    assert app.runs == [("good", 1)]


def test_bytes_that_are_no_request_end_nothing(run: Run) -> None:
    running = run(App(hello))

    async def accept() -> None:
        broker = open_async_broker(running.settings)
        for number, payload in enumerate([b"", b"\x00" * 100, b"{}", b"[]" * 50]):
            junk = offer(request(id=f"junk{number}"), b"", is_ordered=number % 2 == 0)
            await broker.accept([dataclasses.replace(junk, payload=payload)])
        await broker.close()

    asyncio.run(accept())
    running.send(request())
    running.answers(1)
    eventually(running.is_idle)


def test_a_request_past_its_deadline_is_answered_504_and_not_run(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1, request_timeout=200 * MS)
    running.worker.stop()
    running.thread.join()
    running.send(request(id="late"))
    sent_at = time.monotonic()
    eventually(lambda: time.monotonic() > sent_at + 250 * MS)
    again = run(app, threads=1, request_timeout=200 * MS)
    (frame,) = again.answers(1)
    assert (frame["id"], frame["status"]) == ("late", 504)
    assert app.runs == []


def test_a_request_that_was_taken_ahead_and_waited_too_long_is_not_run(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1, request_timeout=500 * MS)
    running.send(*numbered(40))
    running.answers(40)  # so fast that the worker takes more than it has threads
    running.send(request(id="slow", path="/gate"), request(id="behind"))
    gate.wait()
    running.thread.join(10_000 * MS)  # its only thread hangs, and so it ends
    frames = {frame["id"]: frame for frame in run(app, request_timeout=500 * MS).answers(42)}
    assert (frames["slow"]["status"], frames["behind"]["status"]) == (504, 504)
    assert ("behind", 1) not in app.runs


# Cancelling.


def test_a_cancelled_stream_is_closed_and_ended(run: Run) -> None:
    closed = threading.Event()

    class Endless:
        def __iter__(self) -> Iterator[bytes]:
            while True:
                yield b"tick"
                time.sleep(5 * MS)

        def close(self) -> None:
            closed.set()

    running = run(App(lambda environ: Endless() if environ["PATH_INFO"] == "/ticks" else [b""]), threads=1)
    running.send(request(id="ticks", path="/ticks"))
    eventually(running.frames)
    running.cancel(request(id="ticks"))
    assert closed.wait(10_000 * MS)
    assert running.answers(1)[-1]["error"] == "cancelled"
    running.send(request(id="next"))
    running.answers(2)


def test_a_request_that_was_cancelled_before_a_thread_was_free_is_not_run(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1)
    running.send(*numbered(40))
    running.answers(40)
    running.send(request(id="slow", path="/gate"), request(id="behind"))
    gate.wait()
    running.cancel(request(id="behind"))
    sent_at = time.monotonic()
    eventually(lambda: len(running.worker._running) == 1 and time.monotonic() > sent_at + 0.3)  # it was given back
    gate.opened.set()
    running.answers(42)
    assert ("behind", 1) not in app.runs


def test_a_request_that_was_cancelled_before_a_worker_took_it_is_not_run(run: Run) -> None:
    app = App(hello)
    running = run(app)
    running.stop()
    running.send(*numbered(3))
    running.cancel(request(id="1"))
    sent_at = time.monotonic()
    eventually(lambda: time.monotonic() > sent_at + 0.3)  # such as is longer than the worker's looks are apart
    again = run(app)
    again.answers(3)
    eventually(again.is_idle)
    assert sorted(app.runs) == [("0", 1), ("2", 1)]


# Hanging.


def test_a_view_that_hangs_is_answered_504_and_its_thread_replaced(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=2, request_timeout=300 * MS)
    running.send(request(id="hangs", path="/gate"))
    gate.wait()
    (frame,) = running.answers(1)
    assert (frame["id"], frame["status"]) == ("hangs", 504)
    running.send(*numbered(10))
    running.answers(11)
    assert running.worker._hung == 1
    before = view_threads()
    gate.opened.set()
    eventually(lambda: running.worker._hung == 0)
    eventually(lambda: view_threads() == before - 1)
    assert len(running.frames()) == 11  # what the view said in the end is nobody's any more
    assert not running.errors


def view_threads() -> int:
    return sum(thread.name == "views" for thread in threading.enumerate())


def test_a_worker_all_of_whose_threads_hang_finishes_what_it_can_and_ends(run: Run, gate: Gate) -> None:
    running = run(App(gate), threads=2, request_timeout=300 * MS)
    running.send(request(id="a", path="/gate"), request(id="b", path="/gate"))
    gate.wait()
    gate.wait()
    running.thread.join(10_000 * MS)
    assert not running.thread.is_alive()
    assert len(running.errors) == 1
    assert [frame["status"] for frame in running.frames()] == [504, 504]
    running.send(*numbered(3))
    run(App(hello))
    assert len(running.answers(5)) == 5


# Dying and stopping.


def test_a_request_whose_worker_died_is_run_again_and_says_so(run: Run) -> None:
    app = App(hello)
    running = run(app, threads=1, **SHORT)
    running.stop()
    running.send(request())
    dead = open_broker(running.settings)
    assert len(dead.queue("dead").take(1, 1.0)) == 1
    again = run(app, **SHORT)
    assert len(again.answers(1)) == 1
    assert app.runs == [("1", 2)]
    dead.close()


@pytest.mark.parametrize("request_timeout", [pytest.param(30.0, id="young"), pytest.param(0.1, id="older than that")])
def test_a_stream_whose_worker_died_goes_on_where_it_broke_off(run: Run, request_timeout: float) -> None:
    from pubsub_mw.worker.answers import Answer

    app = App(lambda _environ: iter([b"a", b"b", b"c"]))
    running = run(app, **SHORT)
    running.stop()
    running.send(request())
    dead = open_broker(running.settings)
    (taken,) = dead.queue("dead").take(1, 1.0)
    answer = Answer(request(), running.settings)
    answer.head(200, [])
    dead.queue("dead").settle([*answer.chunk(b"a"), *answer.chunk(b"b")], [])
    again = run(app, request_timeout=request_timeout, **SHORT)
    frames = again.answers(1)
    assert [frame["type"] for frame in frames] == ["response_start", *["response_chunk"] * 3, "response_end"]
    assert "".join(frame.get("body", "") for frame in frames) == "abc"
    assert taken.delivery_count == 1
    dead.close()


def test_a_request_whose_worker_died_after_its_answer_was_published_is_not_run_again(run: Run) -> None:
    from pubsub_mw.worker.answers import Answer

    app = App(hello)
    running = run(app, **SHORT)
    running.stop()
    running.send(request())
    dead = open_broker(running.settings)
    assert dead.queue("dead").take(1, 1.0)
    answer = Answer(request(), running.settings)
    answer.head(200, [])
    dead.queue("dead").settle(answer.whole(b"whole"), [])
    again = run(app, **SHORT)
    eventually(again.is_idle)
    assert [(frame["type"], frame["body"]) for frame in again.frames()] == [("response", "whole")]
    assert app.runs == []
    dead.close()


def test_a_request_that_no_worker_survives_is_answered_500_and_set_aside(run: Run) -> None:
    app = App(hello)
    running = run(app, max_deliveries=2, **SHORT)
    running.stop()
    running.send(request())
    dead = open_broker(running.settings)
    queue = dead.queue("dead")
    for _ in range(2):
        eventually(lambda: queue.take(1, 0.001))
    again = run(app, max_deliveries=2, **SHORT)
    (frame,) = again.answers(1)
    assert frame["status"] == 500
    eventually(again.is_idle)
    assert app.runs == []
    dead.close()


def test_a_long_request_stays_with_its_worker(run: Run, gate: Gate) -> None:
    app = App(gate)
    first, second = run(app, lease=1_000 * MS), run(app, lease=1_000 * MS)
    first.send(request(path="/gate"))
    gate.wait()
    began_at = time.monotonic()
    eventually(lambda: time.monotonic() > began_at + 2_500 * MS)
    gate.opened.set()
    assert len(second.answers(1)) == 1
    eventually(second.is_idle)
    assert app.runs == [("1", 1)]


def test_a_worker_that_is_told_to_stop_finishes_what_runs_and_takes_no_more(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1)
    running.send(request(id="runs", path="/gate"))
    gate.wait()
    running.worker.stop()
    running.send(request(id="waits"))
    assert running.thread.is_alive()
    gate.opened.set()
    running.thread.join(10_000 * MS)
    assert [frame["id"] for frame in running.frames()] == ["runs"]
    again = run(app)
    assert [frame["id"] for frame in again.answers(2)] == ["runs", "waits"]
    assert app.runs == [("runs", 1), ("waits", 1)]


def test_a_worker_that_cannot_finish_in_time_leaves_it_to_another(run: Run, gate: Gate) -> None:
    app = App(gate)
    running = run(app, threads=1, drain=100 * MS, **SHORT)
    running.send(request(path="/gate"))
    gate.wait()
    running.stop()
    again = run(app, **SHORT)
    gate.wait()
    gate.opened.set()
    assert len(again.answers(1)) == 1
    assert app.runs == [("1", 1), ("1", 2)]


# ASGI.


def asgi_app(view: Callable[[dict[str, Any], Any], Any]) -> Any:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["pool"] = "open"
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await view(scope, send)

    return app


def test_an_asgi_app_is_started_run_and_stopped(run: Run) -> None:
    async def view(scope: dict[str, Any], send: Any) -> None:
        text = f"{scope['state']['pool']} {scope['pubsub.connection'].message_id}"
        await send({"type": "http.response.body", "body": text.encode()})

    running = run(asgi_app(view))
    running.send(*numbered(20))
    frames = running.answers(20)
    assert {frame["body"] for frame in frames} == {f"open {number}" for number in range(20)}
    eventually(running.is_idle)


def test_an_asgi_view_that_hangs_is_answered_504_and_cancelled(run: Run) -> None:
    ended = threading.Event()

    async def view(_scope: dict[str, Any], _send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    running = run(asgi_app(view), threads=1, request_timeout=300 * MS)
    running.send(*numbered(2))
    frames = running.answers(2)
    assert [frame["status"] for frame in frames] == [504, 504]
    assert ended.wait(10_000 * MS)
    assert not running.errors


def test_an_asgi_stream_that_is_cancelled_ends(run: Run) -> None:
    ended = threading.Event()

    async def view(_scope: dict[str, Any], send: Any) -> None:
        try:
            while True:
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
                await asyncio.sleep(5 * MS)
        finally:
            ended.set()

    running = run(asgi_app(view))
    running.send(request())
    eventually(running.frames)
    running.cancel(request())
    assert ended.wait(10_000 * MS)
    assert running.answers(1)[-1]["error"] == "cancelled"


# Redis alone: what happens to the link.


def redis_run(server: RedisServer, prefix: str, app: Any, **settings: Any) -> Running:
    values: dict[str, Any] = {"secret": SECRET, "prefix": prefix, "lease": 10_000 * MS, "publish_timeout": 300 * MS}
    worker = Worker(app, server.url, **(values | settings))
    running = Running(worker.settings, worker, threading.Thread(target=worker.run))
    running.thread.start()
    return running


def test_answers_wait_for_a_redis_that_does_not_answer_and_are_published_once(
    own_redis: RedisServer, prefix: str, gate: Gate
) -> None:
    app = App(gate)
    running = redis_run(own_redis, prefix, app)
    running.send(request(path="/gate"))
    gate.wait()
    own_redis.pause()
    gate.opened.set()
    paused_at = time.monotonic()
    eventually(lambda: time.monotonic() > paused_at + 700 * MS)
    own_redis.resume()
    assert len(running.answers(1)) == 1
    eventually(running.is_idle)
    assert app.runs == [("1", 1)]
    running.stop()


def test_a_worker_ends_also_while_redis_is_away(own_redis: RedisServer, prefix: str, gate: Gate) -> None:
    running = redis_run(own_redis, prefix, App(gate), drain=300 * MS)
    running.send(request(path="/gate"))
    gate.wait()
    own_redis.kill()
    gate.opened.set()
    running.stop()


def test_a_worker_goes_on_with_a_redis_that_was_restarted_empty(own_redis: RedisServer, prefix: str) -> None:
    app = App(hello)
    running = redis_run(own_redis, prefix, app)
    running.send(request(id="before"))
    running.answers(1)
    own_redis.kill()
    own_redis.start()
    running.send(request(id="after"))
    assert [frame["id"] for frame in running.answers(1)] == ["after"]
    running.stop()


def test_a_secret_that_is_made_in_redis_signs_for_both_ends(own_redis: RedisServer, prefix: str) -> None:
    running = redis_run(own_redis, prefix, App(hello), secret=None)
    broker = open_broker(running.settings)
    running.send(request(), key=queue_key(broker.secret()))
    assert running.answers(1)[0]["status"] == 200
    running.stop()
    broker.close()
