"""The WSGI door: publishers in the environ, and a response that nobody touched."""

import http.client
import json
import logging
import sys
import threading
import wsgiref.validate
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest

from pubsub_mw import PublishError, PubSub, SettingsError
from pubsub_mw.broker.memory import MemoryBroker, memory_broker
from pubsub_mw.model import Channel, Draft
from pubsub_mw.publisher import Publisher
from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes
from tests.tools.tcp_proxy import TcpProxy

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

ROOM = Channel("room:1")
OK = ("200 OK", [("Content-Type", "text/plain")])


class Server:
    """Call a WSGI app as a server does, and remember what it got to see."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.started: list[tuple[Any, ...]] = []
        self.written: list[bytes] = []
        self.response: Any = None

    def start_response(self, *arguments: Any) -> Callable[[bytes], object]:
        self.started.append(arguments)
        return self.written.append

    def begin(self, **environ: Any) -> Any:
        setup_testing_defaults(environ)
        self.environ = environ
        self.response = self.app(environ, self.start_response)
        return self.response

    def run(self, **environ: Any) -> bytes:
        """Send a request through to the end, and return the body."""
        response = self.begin(**environ)
        try:
            return b"".join(response)
        finally:
            if hasattr(response, "close"):
                response.close()


@pytest.fixture
def broker(prefix: str) -> MemoryBroker:
    broker = memory_broker(Publisher("memory://", prefix=prefix).settings)
    broker.expect_endpoint()
    return broker


@pytest.fixture
def wrap(prefix: str, broker: MemoryBroker) -> Callable[..., PubSub]:  # noqa: ARG001 - it must be there before
    return lambda app, **settings: PubSub(app, "memory://", prefix=prefix, **settings)


def data_in(broker: MemoryBroker, channel: Channel = ROOM) -> list[object]:
    publications = broker.read(channel, 0, 1 << 30).publications
    return [json.loads(item.frame)["data"] for item in publications]


Wrap = Callable[..., PubSub]


# The environ.


def test_a_view_publishes_and_gets_the_position(wrap: Wrap, broker: MemoryBroker) -> None:
    positions = []

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        publish = environ["pubsub.publish"]
        positions.append(publish(ROOM, {"text": "hi"}))
        positions.extend(publish.many([(ROOM, 2), {"channel": ROOM, "data": 3}]))
        positions.append(environ["pubsub.publisher"].publish(ROOM, 4, event="typing"))
        assert environ["pubsub.publisher"].position(ROOM) == positions[-1]
        start_response(*OK)
        return [b"body"]

    assert Server(wrap(app)).run() == b"body"
    assert [position.offset for position in positions] == [1, 2, 3, 4]
    assert data_in(broker) == [{"text": "hi"}, 2, 3, 4]


def test_plain_http_has_no_connection_and_one_that_is_there_is_kept(wrap: Wrap) -> None:
    seen = []

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        seen.append(environ["pubsub.connection"])
        start_response(*OK)
        return []

    Server(wrap(app)).run()
    Server(wrap(app)).run(**{"pubsub.connection": "given"})
    assert seen == [None, "given"]


def test_nothing_else_in_the_environ_is_touched(wrap: Wrap) -> None:
    seen: list[Environ] = []

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        seen.append(environ)
        start_response(*OK)
        return []

    wrapper = object()
    server = Server(wrap(app))
    server.begin(**{"wsgi.file_wrapper": wrapper, "QUERY_STRING": "a=b"})
    assert seen[0] is server.environ
    assert seen[0]["wsgi.file_wrapper"] is wrapper
    ours = {"pubsub.publish", "pubsub.publisher", "pubsub.connection"}
    plain: Environ = {"wsgi.file_wrapper": wrapper, "QUERY_STRING": "a=b"}
    setup_testing_defaults(plain)
    assert seen[0].keys() - ours == plain.keys()
    assert all("." in key for key in ours), "PEP 3333 asks for a dot"


def test_the_wrapped_app_is_still_there(wrap: Wrap) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        return []

    assert wrap(app).app is app


def test_a_wrong_setting_shows_when_the_app_is_wrapped() -> None:
    with pytest.raises(SettingsError):
        PubSub(lambda _environ, _start: [], histroy_size=5)


# The response.


class Body:
    """An iterable that knows what was done to it."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    "response",
    [[b"a", b"b"], (b"a",), [], Body(b"a", b""), FileWrapper(BytesIO(b"file")), iter([b"a"]), {b"a": 1}, b""],
    ids=lambda response: type(response).__name__,
)
def test_the_response_is_the_very_object_that_the_app_returned(wrap: Wrap, response: Iterable[bytes]) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        start_response(*OK)
        return response

    assert Server(wrap(app)).begin() is response
    if isinstance(response, Body):
        assert response.closed == 0, "closing is the server's part"


def test_status_headers_and_exc_info_arrive_as_they_were_given(wrap: Wrap) -> None:
    headers = [("X-A", "1"), ("X-A", "2"), ("x-a", "é")]

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        start_response("200 OK", headers)
        try:
            raise LookupError
        except LookupError:
            start_response("404 Not here", headers, sys.exc_info())
        return [b""]

    server = Server(wrap(app))
    server.begin()
    first, second = server.started
    assert first == ("200 OK", headers)
    assert first[1] is headers
    assert second[0] == "404 Not here"
    assert second[1] is headers
    assert second[2][0] is LookupError


def test_write_is_the_servers_own(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        write = start_response(*OK)
        write(b"written")
        return [b"returned"]

    server = Server(wrap(app))
    assert server.run() == b"returned"
    assert server.written == [b"written"]
    assert data_in(broker) == [1]


def test_an_exception_of_the_app_or_the_server_comes_through(wrap: Wrap) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        Server(wrap(app)).begin()

    def restarting(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        start_response(*OK)
        return []

    def start_response(*_: object) -> Callable[[bytes], object]:
        raise ConnectionError("the server's")

    with pytest.raises(ConnectionError, match="the server's"):
        wrap(restarting)({}, start_response)


def test_a_stream_stays_lazy(wrap: Wrap) -> None:
    made = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:  # noqa: ARG001
        start_response(*OK)

        def stream() -> Iterator[bytes]:
            for number in range(3):
                made.append(number)
                yield b"%d" % number

        return stream()

    response = Server(wrap(app)).begin()
    chunks = iter(response)
    assert made == []
    assert next(chunks) == b"0"
    assert made == [0]


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def strict(app: Any) -> Any:
    """Check what the middleware gets from a server, and what a server gets from it."""
    return wsgiref.validate.validator(app)


def list_app(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["pubsub.publish"].on_success(ROOM, 1)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"bo", b"dy"]


def generator_app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    environ["pubsub.publish"].on_success(ROOM, 1)
    start_response(*OK)
    yield b"bo"
    yield b"dy"


def write_app(environ: Environ, start_response: StartResponse) -> list[bytes]:
    environ["pubsub.publish"].on_success(ROOM, 1)
    start_response(*OK)(b"bo")
    return [b"dy"]


@pytest.mark.parametrize("app", [list_app, generator_app, write_app])
def test_a_strict_validator_on_both_sides_finds_nothing(app: App, wrap: Wrap, broker: MemoryBroker) -> None:
    class Threadless(WSGIServer):
        def handle_error(self, *_: object) -> None:
            errors.append(sys.exc_info()[1])

    errors: list[BaseException | None] = []
    with make_server("127.0.0.1", 0, strict(wrap(strict(app))), Threadless, Quiet) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)) as client:
            client.request("GET", "/path?query")
            assert client.getresponse().read() == b"body"
        thread.join()
    assert errors == []
    assert data_in(broker) == [1]


# On success.


@pytest.mark.parametrize(
    ("status", "is_published"),
    [
        ("200 OK", True),
        ("204 No Content", True),
        ("302 Found", True),
        ("404 Not Found", True),
        ("499 ?", True),
        ("500 No", False),
        ("503 No", False),
    ],
)
@pytest.mark.parametrize("is_generator", [False, True])
def test_on_success_publishes_below_500(
    status: str, wrap: Wrap, broker: MemoryBroker, *, is_published: bool, is_generator: bool
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        assert data_in(broker) == []
        start_response(status, [])
        return [b"body"]

    def lazy(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        yield from app(environ, start_response)

    assert Server(wrap(lazy if is_generator else app)).run() == b"body"
    assert data_in(broker) == ([1] if is_published else [])


def test_on_success_is_dropped_when_the_app_raises(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        start_response(*OK)
        raise LookupError

    with pytest.raises(LookupError):
        Server(wrap(app)).run()
    assert data_in(broker) == []


@pytest.mark.parametrize("has_started", [False, True])
def test_on_success_is_dropped_when_a_generator_raises_before_its_first_chunk(
    wrap: Wrap, broker: MemoryBroker, *, has_started: bool
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        if has_started:
            start_response(*OK)
        yield from failing()

    def failing() -> Iterator[bytes]:
        raise LookupError

    with pytest.raises(LookupError):
        Server(wrap(app)).run()
    assert data_in(broker) == []


def test_the_last_status_counts(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        start_response(*OK)
        try:
            raise LookupError
        except LookupError:
            start_response("500 No", [], sys.exc_info())
        return []

    Server(wrap(app)).run()
    assert data_in(broker) == []


def test_on_success_is_sent_before_the_first_byte(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        start_response(*OK)
        return [b"body"]

    Server(wrap(app)).begin()
    assert data_in(broker) == [1]


def test_on_success_of_a_generator_is_sent_before_its_first_chunk_leaves(wrap: Wrap, broker: MemoryBroker) -> None:
    chunks = iter(Server(wrap(generator_app)).begin())
    assert data_in(broker) == []
    assert next(chunks) == b"bo"
    assert data_in(broker) == [1]
    assert list(chunks) == [b"dy"]
    assert data_in(broker) == [1]


def test_a_generator_without_a_chunk_publishes_at_its_end(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        environ["pubsub.publish"].on_success(ROOM, 1)
        start_response("204 No Content", [])
        yield from ()

    assert Server(wrap(app)).run() == b""
    assert data_in(broker) == [1]


def test_a_generator_is_closed_as_it_would_be_without_us(wrap: Wrap) -> None:
    ends = []

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:  # noqa: ARG001
        start_response(*OK)
        try:
            yield b"1"
            yield b"2"
        finally:
            ends.append("closed")

    response = Server(wrap(app)).begin()
    assert next(iter(response)) == b"1"
    response.close()
    assert ends == ["closed"]


def test_a_late_start_without_close_is_no_error(wrap: Wrap) -> None:
    class Late:
        def __init__(self, start_response: StartResponse) -> None:
            self.start_response = start_response

        def __iter__(self) -> Iterator[bytes]:
            self.start_response(*OK)
            return iter([b"late"])

    assert Server(wrap(lambda _environ, start_response: Late(start_response))).run() == b"late"


def test_while_streaming_on_success_publishes_at_once(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        publish = environ["pubsub.publish"]
        publish.on_success(ROOM, "before")
        start_response(*OK)

        def stream() -> Iterator[bytes]:
            for number in range(2):
                publish.on_success(ROOM, number)
                assert data_in(broker)[-1] == number
                yield b"."

        return stream()

    assert Server(wrap(app)).run() == b".."
    assert data_in(broker) == ["before", 0, 1]


def test_while_a_failure_is_streaming_on_success_publishes_nothing(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("500 No", [])

        def stream() -> Iterator[bytes]:
            environ["pubsub.publish"].on_success(ROOM, 1)
            yield b"."

        return stream()

    Server(wrap(app)).run()
    assert data_in(broker) == []


def test_on_success_takes_the_data_as_it_is_now(wrap: Wrap, broker: MemoryBroker) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        data = {"n": 1}
        environ["pubsub.publish"].on_success(ROOM, data)
        data["n"] = 2
        start_response(*OK)
        return []

    Server(wrap(app)).run()
    assert data_in(broker) == [{"n": 1}]


def test_on_success_refuses_wrong_arguments_where_they_are_given(wrap: Wrap) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        on_success = environ["pubsub.publish"].on_success
        wrong: list[dict[str, Any]] = [
            {"channel": "a b", "data": 1},
            {"channel": "a", "data": object()},
            {"channel": "a", "data": 1, "event": ""},
            {"channel": "a", "data": 1, "idempotency_key": "\ud800"},
        ]
        for arguments in wrong:
            with pytest.raises((ValueError, TypeError)):
                on_success(**arguments)
        start_response(*OK)
        return [b"still here"]

    assert Server(wrap(app)).run() == b"still here"


def test_requests_do_not_see_each_others_publications(wrap: Wrap, broker: MemoryBroker) -> None:
    start = threading.Barrier(8)

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        number = environ["number"]
        environ["pubsub.publish"].on_success(Channel(f"room:{number}"), number)
        start.wait()
        start_response("500 No" if number % 2 else "200 OK", [])
        return []

    wrapped = wrap(app)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: Server(wrapped).run(number=number), range(8)))
    assert [data_in(broker, Channel(f"room:{number}")) for number in range(8)] == [[0], [], [2], [], [4], [], [6], []]


def test_all_of_a_request_goes_out_in_one_round_trip(
    redis_server: RedisServer, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        for number in range(20):
            environ["pubsub.publish"].on_success(f"room:{number % 3}", number)
        start_response(*OK)
        return []

    wrapped = PubSub(app, f"redis://{proxy.address}/0", prefix=prefix)
    Server(wrapped).run()
    proxy.latency(250 * MS)
    began = redis_server.cli("TIME")
    Server(wrapped).run()
    ended = redis_server.cli("TIME")
    took = int(ended[0]) - int(began[0]) + (int(ended[1]) - int(began[1])) / 1e6
    assert 500 * MS <= took < 1_000 * MS, "one way there and one back"
    assert sum(wrapped.publisher.position(f"room:{number}").offset for number in range(3)) == 40
    wrapped.publisher.close()


# A broker that fails.


@pytest.mark.parametrize("app", [list_app, generator_app, write_app])
def test_the_response_goes_out_though_the_broker_failed(app: App, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[tuple[PublishError, list[Draft]]] = []

    def on_publish_error(error: PublishError, drafts: list[Draft]) -> None:
        failures.append((error, drafts))

    url = f"redis://127.0.0.1:{free_port()}/0"
    server = Server(PubSub(app, url, on_publish_error=on_publish_error))
    body = server.run()
    assert b"".join(server.written) + body == b"body"
    assert server.started[0][0] == "200 OK"
    ((error, (draft,)),) = failures
    assert error.channels == (ROOM,)
    assert draft.channel == ROOM
    assert b'"data":1' in draft.head
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ROOM in record.getMessage()


def test_a_publication_that_failed_can_be_published_later(prefix: str, redis_server: RedisServer) -> None:
    later = Publisher(redis_server.url, prefix=prefix)
    failed: list[Draft] = []
    url = f"redis://127.0.0.1:{free_port()}/0"
    Server(PubSub(list_app, url, on_publish_error=lambda _error, drafts: failed.extend(drafts))).run()
    assert later.publish_drafts(failed)[0].offset == 1
    later.close()


def test_an_exception_in_on_publish_error_is_logged_and_the_response_goes_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def on_publish_error(_error: PublishError, _drafts: list[Draft]) -> None:
        raise LookupError("in the handler")

    url = f"redis://127.0.0.1:{free_port()}/0"
    assert Server(PubSub(list_app, url, on_publish_error=on_publish_error)).run() == b"body"
    assert "in the handler" in caplog.text


def test_publishing_at_once_raises_where_the_view_can_see_it() -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        with pytest.raises(PublishError):
            environ["pubsub.publish"](ROOM, 1)
        start_response(*OK)
        return [b"handled"]

    assert Server(PubSub(app, f"redis://127.0.0.1:{free_port()}/0")).run() == b"handled"


# A real server.


def test_workers_forked_from_a_preloaded_app_publish_without_a_hole(
    redis_server: RedisServer, prefix: str, processes: Processes
) -> None:
    env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix}
    server = processes.gunicorn("tests.apps.preloaded:app", "--threads", "4", workers=3, preload=True, env=env)

    def ask(_: int) -> dict[str, int]:
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as client:
            client.request("GET", "/")
            answer: dict[str, int] = json.loads(client.getresponse().read())
            return answer

    answers: list[dict[str, int]] = []

    def have_two_workers_answered() -> bool:
        answers.extend(pool.map(ask, range(40)))
        return len({answer["pid"] for answer in answers}) > 1

    with ThreadPoolExecutor(12) as pool:
        eventually(have_two_workers_answered)
    assert sorted(answer["offset"] for answer in answers) == list(range(2, len(answers) + 2))
    assert server.pid not in {answer["pid"] for answer in answers}
