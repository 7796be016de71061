"""One ASGI app out of two: the realtime endpoint beside a WSGI or an ASGI app, run by a real uvicorn."""

import asyncio
import functools
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from websockets.exceptions import InvalidStatus

from pubsub_mw import PublishError, PubSub, SettingsError
from pubsub_mw.apps import is_asgi
from pubsub_mw.asgi import with_realtime
from pubsub_mw.broker.memory import memory_broker
from pubsub_mw.model import Channel
from pubsub_mw.settings import Settings
from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.uvicorn_server import Server

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
Wsgi = Callable[[Environ, StartResponse], Iterable[bytes]]

ROOM = Channel("room:1")
OK = ("200 OK", [("Content-Type", "text/plain")])


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """Run `app` in a real server, in a thread of this process; yield `host:port`."""
    port = free_port()
    config = uvicorn.Config(
        app,
        port=port,
        log_level="critical",
        log_config=None,
        ws="pubsub_mw.realtime.uvicorn_protocol:WebSocketProtocol",
        timeout_graceful_shutdown=1,
        **options,
    )
    server = Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def together(prefix: str) -> Callable[..., Any]:
    """`with_realtime` on a memory broker of this test's own."""
    return lambda app, **settings: with_realtime(app, url="memory://", prefix=prefix, **settings)


Together = Callable[..., Any]


def data_in(prefix: str, channel: Channel = ROOM) -> list[object]:
    broker = memory_broker(Settings.build("memory://", environ={}, prefix=prefix))
    return [json.loads(item.frame)["data"] for item in broker.read(channel, 0, 1 << 30).publications]


def raw(address: str, request: bytes) -> bytes:
    """Send bytes as they are, and return everything that comes back."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(65_536):
            answer += data
    return answer


# WSGI.


def test_a_wsgi_app_is_served_beside_the_realtime_endpoint(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response(*OK)
        return [environ["SCRIPT_NAME"].encode() + b"|" + environ["PATH_INFO"].encode("latin-1")]

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.get("/").text == "|/"
        assert client.get("/realtimes").text == "|/realtimes"
        assert client.get("/a/realtime").text == "|/a/realtime"
        assert client.get("/caf%C3%A9").text == "|/café"
        health = client.get("/realtime/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert client.get("/realtime/client.js").headers["content-type"].startswith("text/javascript")
        assert [client.get(path).status_code for path in ("/realtime", "/realtime/")] == [426, 426]
        assert client.get("/realtime/nothing").status_code == 404


def test_what_a_wsgi_view_publishes_reaches_a_browser(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"](ROOM, "now")
        environ["pubsub.publish"].on_success(ROOM, "then")
        start_response(*OK)
        return [b""]

    async def scenario(address: str, path: str) -> None:
        async with await RawClient.connect(f"ws://{address}{path}") as client:
            await client.send({"type": "connect", "channels": {ROOM: None}})
            await client.recv("subscribed", ROOM)
            async with httpx.AsyncClient() as browser:
                assert (await browser.get(f"http://{address}/")).status_code == 200
            assert [(await client.recv("message", ROOM))["data"] for _ in range(2)] == ["now", "then"]

    with serving(together(app)) as address:
        for path in ("/realtime", "/realtime/"):
            asyncio.run(scenario(address, path))


def test_method_body_query_and_headers_arrive(together: Together) -> None:
    seen: list[Environ] = []

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        seen.append({**environ, "body": environ["wsgi.input"].read()})
        start_response("201 Created", [("X-A", "1"), ("X-A", "2"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
        return [b"made"]

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        response = client.post("/p?q=1&q=%20", content=b"x" * 200_000, headers={"X-Thing": "a", "Content-Type": "t/x"})
        assert (response.status_code, response.text) == (201, "made")
        assert response.headers.get_list("x-a") == ["1", "2"]
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    (environ,) = seen
    assert environ["REQUEST_METHOD"] == "POST"
    assert environ["QUERY_STRING"] == "q=1&q=%20"
    assert environ["body"] == b"x" * 200_000
    assert (environ["CONTENT_LENGTH"], environ["CONTENT_TYPE"]) == ("200000", "t/x")
    assert (environ["HTTP_X_THING"], environ["wsgi.url_scheme"]) == ("a", "http")
    assert (environ["SERVER_NAME"], environ["REMOTE_ADDR"]) == ("127.0.0.1", "127.0.0.1")
    assert environ["SERVER_PORT"] == address.partition(":")[2]
    assert environ["wsgi.multithread"]


def test_cookies_are_joined_and_underscores_dropped(together: Together) -> None:
    seen: list[Environ] = []

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        seen.append(environ)
        start_response(*OK)
        return []

    request = (
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
        b"Cookie: a=1\r\nCookie: b=2; c=3\r\n"
        b"X_Forwarded_For: forged\r\nX-Forwarded_Host: forged\r\n"
        b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: 192.0.2.2\r\nX-Name: caf\xe9\r\n\r\n"
    )
    with serving(together(app)) as address:
        assert raw(address, request).startswith(b"HTTP/1.1 200")
    (environ,) = seen
    assert environ["HTTP_COOKIE"] == "a=1; b=2; c=3"
    assert environ["HTTP_X_FORWARDED_FOR"] == "192.0.2.1,192.0.2.2"
    assert "HTTP_X_FORWARDED_HOST" not in environ
    assert environ["HTTP_X_NAME"] == "café"
    assert not any("forged" in str(value) for value in environ.values())


def test_a_header_that_latin_1_can_say_gets_out(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        start_response("200 OK", [("X-Name", "café"), ("Content-Length", "2")])
        return [b"ok"]

    with serving(together(app)) as address:
        answer = raw(address, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert b"x-name: caf\xe9\r\n" in answer.lower()
    assert answer.endswith(b"\r\n\r\nok")


class Body:
    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.closed = threading.Event()
        self.closes = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        self.closes += 1
        self.closed.set()


@pytest.mark.parametrize("headers", [[], [("Content-Length", "2")], [("Content-Length", "1")]])
def test_a_response_is_closed_once(together: Together, headers: list[tuple[str, str]]) -> None:
    body = Body(b"a", b"b")

    def app(environ: Environ, start_response: StartResponse) -> Body:  # noqa: ARG001
        start_response("200 OK", headers)
        return body

    with serving(together(app)) as address:
        assert httpx.get(f"http://{address}/").text == ("a" if headers == [("Content-Length", "1")] else "ab")
        assert body.closed.wait(5_000 * MS)
    assert body.closes == 1


def test_a_response_is_closed_when_it_fails_halfway(together: Together) -> None:
    class Failing(Body):
        def __iter__(self) -> Iterator[bytes]:
            yield b"a"
            raise LookupError

    body = Failing()

    def app(environ: Environ, start_response: StartResponse) -> Body:  # noqa: ARG001
        start_response(*OK)
        return body

    with serving(together(app)) as address, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{address}/")
    assert body.closes == 1


def test_write_and_exc_info_work(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        if environ["PATH_INFO"] == "/write":
            write = start_response(*OK)
            write(b"wri")
            write(b"tten")
            return [b" and returned"]
        start_response(*OK)
        try:
            raise LookupError
        except LookupError:
            start_response("500 No", [], sys.exc_info())
        return [b"failed"]

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.get("/write").text == "written and returned"
        response = client.get("/exc_info")
        assert (response.status_code, response.text) == (500, "failed")


def test_an_app_that_raises_is_a_500_and_the_server_goes_on(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        if environ["PATH_INFO"] == "/bad":
            raise LookupError
        start_response(*OK)
        return [b"good"]

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.get("/bad").status_code == 500
        assert client.get("/good").text == "good"


def test_requests_follow_each_other_on_one_connection(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        body = environ["wsgi.input"].read()
        start_response(*OK)
        yield b"%d " % len(body)
        yield b"again"

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        for size in (0, 1, 0, 100_000, 0, 300_000, 1, 0):
            for _ in range(5):
                assert client.post("/", content=b"x" * size).text == f"{size} again"
                assert client.get("/").text == "0 again"


def test_a_request_that_comes_before_the_last_one_is_quite_over_is_served(together: Together) -> None:
    class Lingering(Body):
        def close(self) -> None:
            threading.Event().wait(50 * MS)  # the client has all of the response, and asks again meanwhile
            super().close()

    def app(environ: Environ, start_response: StartResponse) -> Body:
        start_response("200 OK", [("Content-Length", "2")])
        return Body(b"ok") if environ["PATH_INFO"] == "/next" else Lingering(b"ok")

    with serving(together(app)) as address:
        host, _, port = address.partition(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=5)) as client:
            for path in ("/", "/next", "/", "/", "/next"):
                client.request("GET", path)
                response = client.getresponse()
                assert (response.status, response.read()) == (200, b"ok")


def test_requests_that_wait_for_each_other_both_finish(together: Together) -> None:
    meeting = threading.Barrier(8)

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        meeting.wait(5_000 * MS)
        start_response(*OK)
        return [b"met"]

    async def ask(address: str) -> list[str]:
        async with httpx.AsyncClient() as client:
            answers = await asyncio.gather(*(client.get(f"http://{address}/") for _ in range(8)))
        return [answer.text for answer in answers]

    with serving(together(app)) as address:
        assert asyncio.run(ask(address)) == ["met"] * 8


def test_a_waiting_view_holds_up_neither_health_nor_sockets(together: Together) -> None:
    go_on = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        go_on.wait(10_000 * MS)
        start_response(*OK)
        return [b""]

    async def scenario(address: str) -> None:
        async with httpx.AsyncClient() as client:
            waiting = [asyncio.create_task(client.get(f"http://{address}/", timeout=10)) for _ in range(20)]
            async with await RawClient.connect(f"ws://{address}/realtime") as browser:
                await browser.send({"type": "connect"})
                await browser.recv("connected", timeout=5_000 * MS)
            assert (await client.get(f"http://{address}/realtime/health")).status_code == 200
            assert not any(task.done() for task in waiting)
            go_on.set()
            await asyncio.gather(*waiting)

    with serving(together(app)) as address:
        asyncio.run(scenario(address))


def test_chunks_arrive_as_they_are_made(together: Together) -> None:
    go_on = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:  # noqa: ARG001
        start_response(*OK)
        yield b"first"
        assert go_on.wait(5_000 * MS)
        yield b"second"

    with serving(together(app)) as address, httpx.stream("GET", f"http://{address}/") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"first"
        go_on.set()
        assert b"".join(chunks) == b"second"


def test_an_endless_response_ends_when_its_client_is_gone(together: Together) -> None:
    ended = threading.Event()

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:  # noqa: ARG001
        start_response(*OK)
        pause = threading.Event()
        try:
            while True:
                yield b"x" * 1_000
                pause.wait(1 * MS)
        finally:
            ended.set()

    with serving(together(app)) as address:
        host, _, port = address.partition(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=5)) as client:
            client.request("GET", "/")
            assert client.getresponse().read(5_000)
            assert not ended.is_set()
        assert ended.wait(5_000 * MS)


def test_a_pubsub_that_is_there_already_serves_the_views(together: Together, prefix: str) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"](ROOM, 1)
        start_response(*OK)
        return []

    with serving(together(PubSub(app, "memory://", prefix=prefix))) as address:
        httpx.get(f"http://{address}/")
    assert data_in(prefix) == [1]


def test_a_flask_app_is_served(together: Together, prefix: str) -> None:
    import flask

    app = flask.Flask(__name__)

    @app.post("/say/<text>")
    def say(text: str) -> str:
        flask.request.environ["pubsub.publish"].on_success(ROOM, {"text": text})
        return f"said {text}"

    @app.get("/stream")
    def stream() -> flask.Response:
        return flask.Response(str(number) for number in range(3))

    with serving(together(app)) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.post("/say/hi").text == "said hi"
        assert client.post("/say/hé").text == "said hé"
        assert client.get("/stream").text == "012"
        assert client.get("/nothing").status_code == 404
    assert data_in(prefix) == [{"text": "hi"}, {"text": "hé"}]


@pytest.mark.parametrize("chunks", [[], [b"a", b"bc"], [b"x" * 1_000] * 200])
def test_a_body_that_comes_in_chunks_reaches_a_flask_app(together: Together, chunks: list[bytes]) -> None:
    import flask

    app = flask.Flask(__name__)

    @app.post("/")
    def take() -> dict[str, Any]:
        environ = flask.request.environ
        body = flask.request.get_data(as_text=True)
        return {"body": body, "length": environ["CONTENT_LENGTH"], "is_chunked": "HTTP_TRANSFER_ENCODING" in environ}

    with serving(together(app)) as address:
        answer = httpx.post(f"http://{address}/", content=iter(chunks))
    body = b"".join(chunks)
    assert answer.json() == {"body": body.decode(), "length": str(len(body)), "is_chunked": False}


def test_a_websocket_elsewhere_is_refused(together: Together) -> None:
    with serving(together(wsgi_function)) as address:
        with pytest.raises(InvalidStatus) as caught:
            asyncio.run(RawClient.connect(f"ws://{address}/elsewhere"))
        assert caught.value.response.status_code == 403


# ASGI.


def test_an_asgi_app_publishes_from_its_scope(together: Together, prefix: str) -> None:
    async def say(request: Request) -> Response:
        publish = request.scope["pubsub.publish"]
        position = await publish(ROOM, "now", event="typing")
        await publish.many([(ROOM, "many")])
        publish.on_success(ROOM, "then")
        assert (await request.scope["pubsub.publisher"].position(ROOM)).offset == position.offset + 1
        assert request.scope["pubsub.connection"] is None
        return PlainTextResponse("said")

    with serving(together(Starlette(routes=[Route("/", say)]))) as address:
        assert httpx.get(f"http://{address}/realtime/health").status_code == 200
        assert httpx.get(f"http://{address}/").text == "said"
    assert data_in(prefix) == ["now", "many", "then"]


@pytest.mark.parametrize(("status", "expected"), [(200, [1]), (404, [1]), (500, []), (503, [])])
def test_on_success_of_an_asgi_app_publishes_below_500(
    status: int, expected: list[int], together: Together, prefix: str
) -> None:
    async def view(request: Request) -> Response:
        request.scope["pubsub.publish"].on_success(ROOM, 1)
        return PlainTextResponse("", status)

    with serving(together(Starlette(routes=[Route("/", view)]))) as address:
        assert httpx.get(f"http://{address}/").status_code == status
    assert data_in(prefix) == expected


def test_on_success_of_an_asgi_app_that_raises_is_dropped(together: Together, prefix: str) -> None:
    async def view(request: Request) -> Response:
        request.scope["pubsub.publish"].on_success(ROOM, 1)
        raise LookupError

    with serving(together(Starlette(routes=[Route("/", view)]))) as address:
        assert httpx.get(f"http://{address}/").status_code == 500
    assert data_in(prefix) == []


def test_on_success_after_an_asgi_response_has_started_is_told_apart(together: Together, prefix: str) -> None:
    async def view(request: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            with pytest.raises(RuntimeError, match="await publish"):
                request.scope["pubsub.publish"].on_success(ROOM, 1)
            await request.scope["pubsub.publish"](ROOM, "awaited")
            yield "x"

        return StreamingResponse(stream())

    with serving(together(Starlette(routes=[Route("/", view)]))) as address:
        assert httpx.get(f"http://{address}/").text == "x"
    assert data_in(prefix) == ["awaited"]


def test_an_asgi_response_goes_out_though_the_broker_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def view(request: Request) -> Response:
        with pytest.raises(PublishError):
            await request.scope["pubsub.publish"](ROOM, 1)
        request.scope["pubsub.publish"].on_success(ROOM, 1)
        return PlainTextResponse("out")

    app = with_realtime(Starlette(routes=[Route("/", view)]), url=f"redis://127.0.0.1:{free_port()}/0")
    with serving(app) as address:
        assert httpx.get(f"http://{address}/").text == "out"
        assert httpx.get(f"http://{address}/realtime/health").status_code == 503
    assert any(ROOM in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


def test_an_asgi_apps_own_lifespan_runs_around_its_requests(together: Together) -> None:
    told: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, str]]:
        told.append("started")
        yield {"state": "kept"}
        told.append("stopped")

    async def view(request: Request) -> Response:
        told.append(request.state.state)
        return PlainTextResponse("")

    with serving(together(Starlette(routes=[Route("/", view)], lifespan=lifespan)), lifespan="on") as address:
        httpx.get(f"http://{address}/")
        assert httpx.get(f"http://{address}/realtime/health").status_code == 200
    assert told == ["started", "kept", "stopped"]


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_a_wsgi_app_needs_no_lifespan_and_does_not_mind_one(together: Together, lifespan: str) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
        start_response(*OK)
        return [b"ok"]

    with serving(together(app), lifespan=lifespan) as address:
        assert httpx.get(f"http://{address}/").text == "ok"
        assert eventually(lambda: httpx.get(f"http://{address}/realtime/health").status_code == 200)


def test_it_works_below_a_mount(together: Together) -> None:
    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response(*OK)
        return [f"{environ['SCRIPT_NAME']}|{environ['PATH_INFO']}".encode()]

    outer = Starlette(routes=[Mount("/below", together(app))])
    with serving(outer) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.get("/below/a").text == "/below|/a"
        assert eventually(lambda: client.get("/below/realtime/health").status_code == 200)
        assert client.get("/below/realtime").status_code == 426


@pytest.mark.parametrize("mount", ["", "/below"])
def test_a_websocket_goes_to_the_endpoint_and_to_nothing_below_it(together: Together, mount: str) -> None:
    def app(_environ: Environ, start_response: StartResponse) -> list[bytes]:
        start_response(*OK)
        return [b""]

    async def refusals(address: str) -> list[int | None]:
        statuses: list[int | None] = []
        for path in ("", "/", "/nonsense", "/events", "/realtime"):
            try:
                async with await RawClient.connect(f"ws://{address}{mount}/realtime{path}") as client:
                    await client.hello()
                statuses.append(None)
            except InvalidStatus as refusal:
                statuses.append(refusal.response.status_code)
        return statuses

    with serving(Starlette(routes=[Mount(mount, together(app))]) if mount else together(app)) as address:
        assert asyncio.run(refusals(address)) == [None, None, 404, 404, 404]


# The memory broker's warning.


@pytest.mark.parametrize("lifespan", ["on", "off"])
@pytest.mark.parametrize("is_async", [False, True])
def test_publishing_beside_an_endpoint_is_no_mistake(
    together: Together, prefix: str, caplog: pytest.LogCaptureFixture, lifespan: str, *, is_async: bool
) -> None:
    async def view(request: Request) -> Response:
        await request.scope["pubsub.publish"](ROOM, 1)
        return PlainTextResponse("")

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        environ["pubsub.publish"](ROOM, 1)
        start_response(*OK)
        return []

    with serving(together(Starlette(routes=[Route("/", view)]) if is_async else app), lifespan=lifespan) as address:
        for _ in range(2):
            assert httpx.get(f"http://{address}/").status_code == 200
    assert data_in(prefix) == [1, 1]
    assert not [record for record in caplog.records if "nothing in this process listens" in record.getMessage()]


# Telling them apart, and the app of the environment.


class AsgiObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class WsgiObject:
    def __call__(self, environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG002
        return []


async def asgi_function(scope: Any, receive: Any, send: Any) -> None: ...


def asgi_returning(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    return asgi_function(scope, receive, send)


def wsgi_function(environ: Environ, start_response: StartResponse) -> list[bytes]:  # noqa: ARG001
    return []


def wsgi_of_any(*arguments: Any) -> list[bytes]:  # noqa: ARG001
    return []


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (AsgiObject(), True),
        (asgi_function, True),
        (asgi_returning, True),
        (functools.partial(asgi_function), True),
        (functools.partial(AsgiObject()), True),
        (Starlette(), True),
        (WsgiObject(), False),
        (wsgi_function, False),
        (wsgi_of_any, False),
        (functools.partial(wsgi_function), False),
        (PubSub(wsgi_function), False),
    ],
)
def test_wsgi_and_asgi_apps_are_told_apart(app: object, *, expected: bool) -> None:
    assert is_asgi(app) is expected


@pytest.mark.parametrize("app", [None, 5, "module:app", []])
def test_what_cannot_be_called_is_no_app(app: Any) -> None:
    with pytest.raises(TypeError, match="neither a WSGI nor an ASGI app"):
        with_realtime(app)


def test_wrong_settings_show_at_once() -> None:
    for settings in ({"histroy": 1}, {"url": "nowhere://"}, {"url": "redis://h:port"}):
        with pytest.raises(SettingsError):
            with_realtime(wsgi_function, **settings)


def test_the_app_of_the_environment_is_built_when_it_is_asked_for(prefix: str) -> None:
    program = "import pubsub_mw.asgi; print('imported'); print(pubsub_mw.asgi.app.realtime.settings.prefix)"

    def run(**env: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)

    assert run(PUBSUB_PREFIX=prefix).stdout.split() == ["imported", prefix]
    wrong = run(PUBSUB_HISTORY_SIZE="many")
    assert wrong.stdout.split() == ["imported"]
    assert "SettingsError: PUBSUB_HISTORY_SIZE='many' is not a number" in wrong.stderr


def test_the_app_of_the_environment_serves_realtime_alone(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    import pubsub_mw.asgi

    monkeypatch.setenv("PUBSUB_PREFIX", prefix)
    app = pubsub_mw.asgi.app
    monkeypatch.delitem(vars(pubsub_mw.asgi), "app")
    with serving(app) as address, httpx.Client(base_url=f"http://{address}") as client:
        assert client.get("/realtime/health").status_code == 200
        missing = client.get("/")
        assert missing.status_code == 404
        assert "/realtime" in missing.text
