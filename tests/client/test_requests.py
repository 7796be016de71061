"""Requests of the Python client: in order, each answered once, over whatever breaks."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from flask import Flask, Response, request

from pubsub_mw.client import Connection, connect
from pubsub_mw.client.requests import Requests, is_newer
from pubsub_mw.errors import ConnectionClosed, PubSubError, RequestFailed, RequestTimeout
from tests.client_world import Endpoint, ScriptedServer
from tests.tools.clock import MS, eventually_async
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio


class Site(Endpoint):
    """An endpoint with an app whose stream goes as far as a test lets it."""

    def __init__(self, prefix: str, **settings: Any) -> None:
        self.allowed = threading.Semaphore(0)
        self.closed = threading.Event()
        self.runs: list[str] = []
        super().__init__("memory://", app=self._flask_app(), prefix=prefix, secret="s" * 32, **settings)

    def _flask_app(self) -> Flask:
        app = Flask(__name__)

        @app.route("/echo", methods=["GET", "POST", "PUT"])
        def echo() -> Any:
            self.runs.append(request.args.get("n", ""))
            return {
                "method": request.method,
                "args": request.args.to_dict(flat=False),
                "type": request.content_type,
                "body": list(request.get_data()),
                "cookie": request.cookies.get("session"),
                "tag": request.headers.get("X-Request-ID"),
            }, {"X-Request-ID": "from the app"}

        @app.get("/latin")
        def latin() -> Response:
            return Response("äöü".encode("latin-1"), 404, content_type="text/plain; charset=latin-1")

        @app.get("/stream/<int:count>")
        def stream(count: int) -> Response:
            def parts() -> Iterator[bytes]:
                try:
                    for number in range(count):
                        if not self.allowed.acquire(timeout=20):
                            return
                        yield f"{number},".encode()
                finally:
                    self.closed.set()

            self.runs.append("stream")
            return Response(parts())

        return app

    def allow(self, count: int) -> None:
        self.allowed.release(count)


@pytest.fixture
async def site(prefix: str) -> AsyncIterator[Site]:
    async with Site(prefix) as site:
        yield site


@pytest.fixture
async def script() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer().run() as script:
        yield script


@pytest.fixture
async def scripted(script: ScriptedServer) -> AsyncIterator[Connection]:
    """A client that is connected to the script, and comes back at once whenever that drops it."""
    opening = asyncio.create_task(
        connect(script.url, transports=["websocket"], max_pending=3, max_frame_bytes=1_000).__aenter__()
    )
    await script.welcome()
    connection = await opening
    yield connection
    await connection.close()


async def failure_of(fetching: "asyncio.Task[Any]") -> str:
    """With which code a request was rejected."""
    async with asyncio.timeout(10_000 * MS):
        with pytest.raises(RequestFailed) as caught:
            await fetching
    return caught.value.code


async def begun(connection: Connection, script: ScriptedServer, path: str = "/a") -> "tuple[asyncio.Task[Any], Any]":
    """Send a request; the frame that the server got."""
    fetching = asyncio.create_task(connection.fetch(path))
    return fetching, await script.hear()


async def say_answer(script: ScriptedServer, id: str, offset: int, body: str = "", epoch: str = "e") -> None:  # noqa: A002
    await script.say("response", id=id, status=200, headers={}, body=body, position=f"{epoch}.{offset}.a")


# What a view gets, and what comes back.


async def test_a_request_runs_the_view_and_its_answer_is_a_response(site: Site) -> None:
    headers = {"Cookie": "session=7", "Origin": f"http://127.0.0.1:{site.port}"}
    async with connect(site.url, headers=headers) as connection:
        response = await connection.fetch("/echo", json={"text": "日本"}, headers={"X-Request-ID": "mine"})
        told = await response.json()

    assert (response.status, response.ok) == (200, True)
    assert response.headers["x-request-id"] == response.headers["X-Request-ID"] == "from the app"
    assert response.headers["content-type"] == "application/json"
    assert told["method"] == "POST"
    assert told["type"] == "application/json"
    assert bytes(told["body"]).decode() == '{"text": "\\u65e5\\u672c"}'
    assert (told["cookie"], told["tag"]) == ("7", "mine")
    assert response.raise_for_status() is response


async def test_a_request_carries_bytes_text_methods_and_queries_as_they_are(site: Site) -> None:
    async with connect(site.url) as connection:
        content = bytes(range(256))
        raw = await (await connection.fetch("/echo", method="PUT", body=content)).json()
        text = await (await connection.fetch("/echo?a=ä b", body="é", params={"b": ["1", "&"]})).json()
        nothing = await (await connection.fetch("/echo")).json()

    assert (raw["method"], bytes(raw["body"])) == ("PUT", content)
    assert (text["method"], bytes(text["body"]).decode()) == ("POST", "é")
    assert text["args"] == {"a": ["ä b"], "b": ["1", "&"]}
    assert (nothing["method"], nothing["body"], nothing["type"]) == ("GET", [], None)


async def test_an_answer_is_read_in_its_own_charset_and_may_be_an_error(site: Site) -> None:
    async with connect(site.url) as connection:
        response = await connection.fetch("/latin")
        assert (response.status, response.ok, await response.text()) == (404, False, "äöü")
        assert await response.read() == await response.read() == "äöü".encode("latin-1")
        with pytest.raises(RequestFailed, match="404") as caught:
            response.raise_for_status()
    assert caught.value.code == "status"


async def test_requests_are_run_in_the_order_of_the_calls(site: Site) -> None:
    async with connect(site.url) as connection:
        await asyncio.gather(*(connection.fetch(f"/echo?n={number}") for number in range(50)))
    assert site.runs == [str(number) for number in range(50)]


async def test_a_stream_is_read_part_by_part_and_goes_on_after_a_cut(
    site: Site, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(site.port)
    async with connect(f"http://{proxy.address}/realtime") as connection:
        site.allow(2)
        parts = aiter(await connection.fetch("/stream/6"))
        assert [await anext(parts), await anext(parts)] == [b"0,", b"1,"]
        proxy.reset()
        site.allow(4)
        assert b"".join([part async for part in parts]) == b"2,3,4,5,"
    assert site.runs == ["stream"]


@pytest.mark.parametrize("how", ["the task is cancelled", "the response is closed", "the time is over"])
async def test_a_stream_that_nobody_wants_any_more_is_closed_in_the_app(site: Site, how: str) -> None:
    async with connect(site.url) as connection:
        if how == "the response is closed":
            site.allow(1)
        fetching = asyncio.create_task(
            connection.fetch("/stream/100000", timeout=0.3 if how == "the time is over" else None)
        )
        await eventually_async(lambda: site.runs == ["stream"])
        if how == "the task is cancelled":
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
        elif how == "the time is over":
            with pytest.raises(RequestTimeout) as caught:
                await fetching
            assert isinstance(caught.value, TimeoutError)
            assert isinstance(caught.value, PubSubError)
        else:
            async with await fetching as response:
                assert await anext(aiter(response)) == b"0,"
            assert [part async for part in response] == []

        def is_closed() -> bool:
            site.allow(1)  # the worker looks between two parts
            return site.closed.is_set()

        await eventually_async(is_closed)
        assert (await connection.fetch("/echo")).ok


async def test_a_request_waits_for_a_connection(site: Site) -> None:
    async with connect(site.url) as connection:
        await site.stop()
        await eventually_async(lambda: connection.state != "connected")
        fetching = asyncio.create_task(connection.fetch("/echo?n=late"))
        with pytest.raises(RequestFailed, match="not_connected"):
            await connection.fetch("/echo", wait=False)
        await site.start()
        assert (await fetching).ok
    assert site.runs == ["late"]


async def test_a_path_that_may_not_be_requested_is_refused_and_the_rest_goes_on(site: Site) -> None:
    async with connect(site.url) as connection:
        with pytest.raises(RequestFailed) as caught:
            await connection.fetch("/a/../b")
        assert caught.value.code == "bad_frame"
        assert (await connection.fetch("/echo")).ok


async def test_wrong_use_of_fetch_raises_at_once(scripted: Connection) -> None:
    with pytest.raises(ValueError, match="path"):
        await scripted.fetch("http://elsewhere.example/")
    with pytest.raises(TypeError, match="bytes-like"):
        await scripted.fetch("/rooms", body={"text": "hi"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        await scripted.fetch("/", body="a", json={})
    with pytest.raises(ValueError, match="JSON"):
        await scripted.fetch("/", json=float("nan"))
    with pytest.raises(RequestFailed, match="too_large"):
        await scripted.fetch("/", body=b"\xff" * 1_000)
    await scripted.close()
    with pytest.raises(ConnectionClosed):
        await scripted.fetch("/")
    with pytest.raises(RuntimeError, match="async with"):
        await connect("ws://127.0.0.1:1/").fetch("/")


# What breaks.


async def test_what_was_not_answered_is_sent_again_under_its_id_before_what_is_newer(
    scripted: Connection, script: ScriptedServer
) -> None:
    first, sent = await begun(scripted, script)
    assert sent == {"type": "request", "id": "1", "method": "GET", "path": "/a", "headers": {}}
    await script.drop()
    second = asyncio.create_task(scripted.fetch("/b"))
    await script.welcome()
    assert await script.hear() == sent
    assert (await script.hear())["path"] == "/b"
    await say_answer(script, "2", 1, "b")
    await say_answer(script, "1", 2, "a")
    assert [await (await task).text() for task in (first, second)] == ["a", "b"]


async def test_no_more_than_the_bound_wait_for_a_connection(scripted: Connection, script: ScriptedServer) -> None:
    await script.drop()
    await eventually_async(lambda: scripted.state != "connected")
    waiting = [asyncio.create_task(scripted.fetch(f"/{number}")) for number in range(4)]
    assert await failure_of(waiting[3]) == "not_connected"
    waiting[0].cancel()
    await script.welcome()
    assert [(await script.hear())["path"] for _ in range(2)] == ["/1", "/2"]
    for offset, (number, task) in enumerate(zip("23", waiting[1:3], strict=True)):
        await say_answer(script, number, offset + 1)
        assert (await task).ok
    await script.hears_nothing()


async def test_parts_that_come_twice_are_taken_once(scripted: Connection, script: ScriptedServer) -> None:
    """What recovery brings, and the answer to the request that was sent again, whole and mixed with it."""
    fetching, _ = await begun(scripted, script)
    await script.drop()
    await script.welcome()
    await script.hear()

    async def say(kind: str, offset: int, **fields: Any) -> None:
        await script.say(f"response_{kind}", id="1", position=f"e.{offset}.a", **fields)

    head = {"status": 200, "headers": {}}
    await say("start", 1, **head)
    await say("chunk", 2, body="a")
    await say("start", 1, **head)
    await say("chunk", 3, body="b")
    await say("chunk", 2, body="a")
    await say("chunk", 3, body="b")
    await say("chunk", 10, body="/w==", encoding="base64")
    await say("end", 11)
    await say("chunk", 10, body="c")
    await say("end", 11)
    assert await (await fetching).read() == b"ab\xff"
    await script.hears_nothing()
    assert (await reconnect(script))["channels"] == {"#connection-c1": "e.11.a"}


async def reconnect(script: ScriptedServer) -> dict[str, Any]:
    await script.drop()
    return await script.welcome()


async def test_an_answer_that_meets_its_cancellation_is_nobodys() -> None:
    sent: list[dict[str, Any]] = []

    async def send(frame: dict[str, Any]) -> None:
        sent.append(frame)

    requests = Requests(send, sent.append, 1)
    await requests.begin()
    fetching = asyncio.create_task(requests.fetch({"type": "request"}, None, wait=True))
    await eventually_async(lambda: bool(sent))
    fetching.cancel()
    answer = {"type": "response", "id": "1", "status": 200, "headers": {}, "body": "late", "position": "e.1.a"}
    await requests.receive(answer)
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert sent[1:] == [{"type": "cancel", "id": "1"}]


async def test_an_old_answer_that_is_sent_again_moves_no_position_back(
    scripted: Connection, script: ScriptedServer
) -> None:
    fetching, _ = await begun(scripted, script)
    await script.say_message("#connection-c1", None, 9)
    await say_answer(script, "1", 4)
    assert (await fetching).ok
    assert (await reconnect(script))["channels"] == {"#connection-c1": "e.9.a"}
    fetching, _ = await begun(scripted, script)
    await say_answer(script, "2", 1, epoch="f")
    assert (await fetching).ok
    assert (await reconnect(script))["channels"] == {"#connection-c1": "f.1.a"}


async def test_a_body_in_the_middle_is_not_requested_again_and_may_break_off(
    scripted: Connection, script: ScriptedServer
) -> None:
    fetching, _ = await begun(scripted, script)
    await script.say("response_start", id="1", status=200, headers={}, position="e.1.a")
    await reconnect(script)
    await script.hears_nothing()
    await script.say("response_end", id="1", error="the view raised", position="e.2.a")
    with pytest.raises(RequestFailed, match="the view raised") as caught:
        await (await fetching).read()
    assert caught.value.code == "broken_off"


async def test_what_the_broker_could_not_take_is_sent_again_in_order(
    scripted: Connection, script: ScriptedServer
) -> None:
    first, _ = await begun(scripted, script)
    await script.say("error", id="1", code="unavailable", message="the broker is away")
    await script.hears_nothing()
    second = asyncio.create_task(scripted.fetch("/b"))
    assert [(await script.hear())["path"] for _ in range(2)] == ["/a", "/b"]
    await script.say("error", id="2", code="busy", message="the queue is full")
    await say_answer(script, "1", 1)
    assert (await first).ok
    assert await failure_of(second) == "busy"
    await script.hears_nothing()


async def test_as_another_connection_what_was_sent_is_rejected_and_the_rest_is_sent(
    scripted: Connection, script: ScriptedServer
) -> None:
    sent, _ = await begun(scripted, script)
    streaming, _ = await begun(scripted, script)
    await script.say("response_start", id="2", status=200, headers={}, position="e.1.a")
    body = asyncio.create_task((await streaming).read())
    await script.drop()
    await script.accept()
    never_sent = asyncio.create_task(scripted.fetch("/late"))
    await script.say("connected", connection="c2", resume="other", user=None, ping=25)
    assert await failure_of(sent) == "connection_lost"
    assert await failure_of(body) == "connection_lost"
    assert (await script.hear())["path"] == "/late"
    await script.say("gap", channel="#connection-c2", position="e.7.a", reason="trimmed")
    assert await failure_of(never_sent) == "connection_lost"


@pytest.mark.parametrize("how", ["closed here", "ended by the server", "too big for the server"])
async def test_what_will_not_be_answered_is_rejected(scripted: Connection, script: ScriptedServer, how: str) -> None:
    sent, _ = await begun(scripted, script)
    if how == "closed here":
        await scripted.close()
    elif how == "ended by the server":
        await script.socket.close(3503, "sent away")
    else:
        await script.socket.close(1009, "over max_frame_bytes")
    assert await failure_of(sent) == "connection_lost"


async def test_closing_rejects_what_was_never_sent_as_such(scripted: Connection, script: ScriptedServer) -> None:
    await script.drop()
    await eventually_async(lambda: scripted.state != "connected")
    waiting = asyncio.create_task(scripted.fetch("/"))
    await asyncio.sleep(0)
    await scripted.close()
    assert await failure_of(waiting) == "not_connected"


@pytest.mark.parametrize(
    ("position", "than", "is_so"),
    [("e.2.a", "e.1.b", True), ("e.10.a", "e.9.b", True), ("e.1.a", "e.1.a", False), ("e.1.a", "e.2.b", False),
     ("f.1.a", "e.2.b", True), ("e.1.a", None, True)],
)  # fmt: skip
def test_a_position_is_newer_by_its_offset_within_its_epoch(position: str, than: str | None, is_so: bool) -> None:
    assert is_newer(position, than) is is_so
