"""uvicorn with our WebSocket class: every app works under it as under uvicorn's own, and ours gets the transport."""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httptools
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol

from pubsub_mw.errors import CloseCode
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime import uvicorn_protocol as module
from pubsub_mw.realtime.socket import Socket
from tests.realtime.conftest import OURS, PLAIN, SECRET, Site
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import RawClient

pytestmark = pytest.mark.anyio

ServeApp = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]

HTTP = "pubsub_mw.realtime.uvicorn_protocol:HTTPProtocol"

HANDSHAKE = (
    b"GET %b HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n%b"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
"""With a path, and with more lines or none."""

seen: list[Any] = []


@pytest.fixture(
    params=[(OURS, HTTP), (OURS, "auto"), (OURS, "h11"), (PLAIN, "auto")], ids=lambda pair: "-".join(pair)[-20:]
)
def classes(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Our classes; ours behind each of uvicorn's for HTTP; and uvicorn's alone."""
    return request.param[0], request.param[1]


@pytest.fixture
def websocket_class(classes: tuple[str, str]) -> str:
    return classes[0]


@pytest.fixture
def http_class(classes: tuple[str, str]) -> str:
    return classes[1]


async def echo(websocket: WebSocket) -> None:
    await websocket.accept(subprotocol=next(iter(websocket.scope["subprotocols"]), None), headers=[(b"x-a", b"1")])
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                seen.append((message["code"], message.get("reason")))
                return
            if message.get("text") == "close":
                await websocket.close(4321, "enough")
                return
            if message.get("text") == "fail":
                raise LookupError("on purpose")
            await websocket.send({**message, "type": "websocket.send"})
    except WebSocketDisconnect:
        pass


async def refuse(websocket: WebSocket) -> None:
    await websocket.close()


async def deny(websocket: WebSocket) -> None:
    await websocket.send_denial_response(PlainTextResponse("not today", 418, {"x-why": "tea"}))


async def fail(_websocket: WebSocket) -> None:
    raise LookupError("on purpose")


async def say_nothing(_websocket: WebSocket) -> None:
    pass


async def look(websocket: WebSocket) -> None:
    """Send back what the scope says."""
    await websocket.accept()
    scope = websocket.scope
    headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
    names = ("path", "root_path", "scheme", "http_version", "subprotocols")
    found = {"headers": headers, "query": scope["query_string"].decode(), **{name: scope[name] for name in names}}
    found["raw_path"] = scope["raw_path"].decode()
    await websocket.send_json(found)
    await websocket.close()


@pytest.fixture
async def app(prefix: str) -> Any:
    realtime = await asyncio.to_thread(Realtime, "memory://", prefix=prefix, secret=SECRET, origins="*")
    endpoints = (echo, refuse, deny, fail, say_nothing, look)
    routes: list[Any] = [WebSocketRoute(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints]
    return Starlette(routes=[*routes, WebSocketRoute("/ä/look", look), Mount("/realtime", realtime)])


async def test_an_app_echoes_text_and_bytes_with_its_subprotocol_and_headers(serve_app: ServeApp, app: Any) -> None:
    site = await serve_app(app)
    url = site.ws_url + "/echo"
    async with connect(url, subprotocols=[Subprotocol("chat.v2"), Subprotocol("chat")], proxy=None) as client:
        assert client.subprotocol == "chat.v2"
        assert client.response is not None
        assert client.response.headers["x-a"] == "1"
        for message in ("text", "", "ä" * 70_000, b"bytes", b"", b"\xff" * 70_000):
            await client.send(message)
            assert await client.recv() == message
        await client.send(iter(["in ", "parts"]))
        assert await client.recv() == "in parts"
        await (await client.ping(b"hello"))


async def test_compression_is_spoken_where_it_is_on(serve_app: ServeApp, app: Any) -> None:
    site = await serve_app(app, ws_per_message_deflate=True)
    async with connect(site.ws_url + "/echo", proxy=None) as client:
        assert [extension.name for extension in client.protocol.extensions] == ["permessage-deflate"]
        await client.send("x" * 10_000)
        assert await client.recv() == "x" * 10_000


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param("close", (4321, "enough"), id="the app closes"),
        pytest.param("fail", (1006, ""), id="the app fails"),
    ],
)
async def test_an_app_ends_its_connection(
    serve_app: ServeApp, app: Any, message: str, expected: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    site = await serve_app(app)
    async with connect(site.ws_url + "/echo", proxy=None) as client:
        await client.send(message)
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert (client.close_code, client.close_reason) == expected
    await eventually_async(lambda: not site.server.server_state.connections)


async def test_an_app_is_told_how_its_client_went(serve_app: ServeApp, app: Any) -> None:
    seen.clear()
    site = await serve_app(app)
    async with connect(site.ws_url + "/echo", proxy=None) as client:
        await client.close(3210, "bye")
    async with connect(site.ws_url + "/echo", proxy=None) as client:
        client.transport.abort()
    await eventually_async(lambda: len(seen) == 2)
    assert seen[0] == (3210, "bye")
    assert seen[1][0] in (1005, 1006)
    await eventually_async(lambda: not site.server.server_state.tasks)


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        pytest.param("/refuse", 403, b"", id="refused"),
        pytest.param("/deny", 418, b"not today", id="denied with a response"),
        pytest.param("/fail", 500, b"Internal Server Error", id="failed"),
        pytest.param("/say_nothing", 500, b"Internal Server Error", id="returned without a word"),
        pytest.param("/nowhere", 403, b"", id="no route"),
    ],
)
async def test_an_app_refuses_a_handshake(
    serve_app: ServeApp, app: Any, path: str, status: int, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    site = await serve_app(app)
    with pytest.raises(InvalidStatus) as refusal:
        await connect(site.ws_url + path, proxy=None)
    response = refusal.value.response
    assert (response.status_code, bytes(response.body or b"").strip()) == (status, body)
    if path == "/deny":
        assert response.headers["x-why"] == "tea"
    await eventually_async(lambda: not site.server.server_state.connections | site.server.server_state.tasks)


async def test_a_refusal_is_no_error(
    serve_app: ServeApp, app: Any, caplog: pytest.LogCaptureFixture, websocket_class: str
) -> None:
    if websocket_class != OURS:
        return  # uvicorn's own class says that the app did not answer
    caplog.set_level(logging.INFO, "uvicorn.error")
    site = await serve_app(app)
    with pytest.raises(InvalidStatus):
        await connect(site.ws_url + "/deny", proxy=None)
    await eventually_async(lambda: not site.server.server_state.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(b"Content-Length: 5", id="a body"),
        pytest.param(b"Transfer-Encoding: chunked", id="a body of unknown length"),
        pytest.param(b"Cookie: a=" + b"c" * 9_000, id="a line that is too long"),
        pytest.param(b"\r\n".join(b"X-%d: 1" % number for number in range(140)), id="too many lines"),
    ],
)
async def test_a_handshake_that_the_parser_does_not_take_is_answered(
    serve_app: ServeApp, app: Any, odd: bytes, websocket_class: str
) -> None:
    if websocket_class != OURS:
        return  # uvicorn's own class never answers
    site = await serve_app(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(HANDSHAKE % (b"/deny", odd + b"\r\n"))
    async with asyncio.timeout(5_000 * MS):
        answer = await reader.read()  # to its end: it is closed too
    assert answer.startswith(b"HTTP/1.1 4")
    writer.close()
    await eventually_async(lambda: not site.server.server_state.connections | site.server.server_state.tasks)


async def test_the_scope_is_the_one_that_uvicorn_makes(serve_app: ServeApp, app: Any, websocket_class: str) -> None:
    found = []
    for ws in (websocket_class, "websockets-sansio"):
        site = await serve_app(app, ws=ws, root_path="/root")
        headers = [("X-Name", "caf\xe9"), ("x-empty", ""), ("cookie", "a=b"), ("cookie", "c=d")]
        async with connect(
            f"{site.ws_url}/%C3%A4/look?x=%20&y",
            additional_headers=headers,
            subprotocols=[Subprotocol("a"), Subprotocol("b")],
            proxy=None,
        ) as client:
            scope = json.loads(await client.recv())
        scope["headers"] = [item for item in scope["headers"] if item[0] not in ("host", "sec-websocket-key")]
        found.append(scope)
    assert found[0] == found[1]
    assert ["x-empty", ""] in found[0]["headers"]
    assert found[0]["subprotocols"] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param((b"Version: 13", b"Version: 12"), b"400", id="version"),
        pytest.param((b"Sec-WebSocket-Version: 13\r\n", b""), b"400", id="no version"),
        pytest.param((b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25j"), b"400", id="short key"),
        pytest.param((b"dGhlIHNhbXBsZSBub25jZQ==", b"!"), b"400", id="no base64"),
        pytest.param((b"Host", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nHost"), b"400", id="two keys"),
        pytest.param((b"Host", b"Sec-WebSocket-Version: 13\r\nHost"), b"400", id="two versions"),
        pytest.param((b"GET", b"POST"), b"405", id="POST"),
        pytest.param((b"keep-alive, Upgrade", b"keep-alive"), b"404", id="no upgrade"),
        pytest.param((b"keep-alive, Upgrade", b"upgrade-not"), b"404", id="another upgrade"),
    ],
)
async def test_a_handshake_that_is_none_is_refused(
    serve_app: ServeApp, app: Any, change: tuple[bytes, bytes], status: bytes
) -> None:
    site = await serve_app(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write((HANDSHAKE % (b"/echo", b"")).replace(*change))
    assert (await reader.readline())[9:12] == status
    writer.close()
    await eventually_async(lambda: not site.server.server_state.connections)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((b"Host: a", b"HOST:a \t"), id="another spelling"),
        pytest.param((b"Host: a", b"Host: a\r\nX-Long: " + b"x" * 5_000), id="a long line"),
        pytest.param(
            (b"Host: a", b"Host: a\r\n" + b"X-Many: %b\r\n" % (b"x" * 100) * 80 + b"X-Last:"), id="many lines"
        ),
        pytest.param((b"HTTP/1.1", b"HTTP/1.1"), id="plain"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_handshake_is_read_whatever_its_form(
    serve_app: ServeApp, app: Any, change: tuple[bytes, bytes], pieces: int
) -> None:
    site = await serve_app(app)
    request = HANDSHAKE % (b"/realtime/", b"")
    request = request.replace(b": websocket", b": WebSocket").replace(b", Upgrade", b", upgrade").replace(*change)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    for index in range(pieces):
        writer.write(request[len(request) * index // pieces : len(request) * (index + 1) // pieces])
        await asyncio.sleep(20 * MS)
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
    writer.close()
    await eventually_async(lambda: not site.server.server_state.connections)


async def test_a_client_that_does_not_wait_for_the_answer_is_heard(
    serve_app: ServeApp, app: Any, websocket_class: str, http_class: str
) -> None:
    if (websocket_class, http_class) != (OURS, HTTP):
        return  # uvicorn's own class for HTTP drops what comes with the head
    site = await serve_app(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    connect_frame = Frame(Opcode.TEXT, b'{"type":"connect"}').serialize(mask=True)
    writer.write(HANDSHAKE % (b"/realtime/", b"") + connect_frame)
    async with asyncio.timeout(5_000 * MS):
        await reader.readuntil(b'"type":"connected"')
    writer.close()


class Parsed:
    """What uvicorn's parser of HTTP makes of a head."""

    def __init__(self, head: bytes) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser = httptools.HttpRequestParser(self)
            parser.feed_data(head)
        self.method, self.version = parser.get_method(), parser.get_http_version()

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_complete = True


PARTS = [
    b"GET ",
    b"/",
    b" HTTP/1.1",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b": ",
    b"Host",
    b"upgrade",
    b"\0",
    b"\xe4",
    b"x",
    b"?",
]


@given(
    st.one_of(
        st.lists(st.sampled_from(PARTS) | st.binary(max_size=3), max_size=30).map(b"".join),
        st.lists(
            st.tuples(st.sampled_from([b"Host", b"X-a", b"x_b", b"!"]), st.text("a :,\t\xe4\r\n\x00", max_size=8)),
            min_size=1,
        ).map(lambda lines: b"".join(b"%b:%b\r\n" % (name, value.encode("latin-1")) for name, value in lines)),
    )
)
def test_what_is_read_of_a_head_is_what_a_parser_of_http_reads(rest: bytes) -> None:
    for head in (rest, b"GET /a?b HTTP/1.1\r\n" + rest, b"GET /a?b HTTP/1.1\r\n" + rest + b"\r\n"):
        read = module._read_head(head)
        if read is not None:
            parsed = Parsed(head)
            assert parsed.is_complete
            assert (parsed.method, parsed.version) == (b"GET", "1.1")
            assert read == (parsed.target, parsed.headers)


async def test_ours_gets_the_transport_and_apps_beside_it_do_not(
    serve_app: ServeApp, app: Any, raw_client: Open, websocket_class: str
) -> None:
    site = await serve_app(app)
    await (await raw_client(site.ws_url + "/realtime/")).hello()
    async with connect(site.ws_url + "/echo", proxy=None) as client:
        await client.send("x")
        await client.recv()
        sockets = [peer for peer in site.server.server_state.connections if isinstance(peer, Socket)]
        assert len(sockets) == (1 if websocket_class == OURS else 0)
        assert len(site.server.server_state.connections) == 2


async def test_no_query_string_is_logged(
    serve_app: ServeApp, app: Any, raw_client: Open, caplog: pytest.LogCaptureFixture, websocket_class: str
) -> None:
    if websocket_class != OURS:
        return  # uvicorn's own class logs it
    caplog.set_level(logging.INFO, "uvicorn.error")
    site = await serve_app(app)
    await (await raw_client(site.ws_url + "/realtime/?ticket=canary")).hello()
    async with connect(site.ws_url + "/look?ticket=canary", proxy=None) as client:
        assert "canary" in str(await client.recv()), "the app sees it"
    for path in ("/refuse", "/deny"):
        with pytest.raises(InvalidStatus):
            await connect(site.ws_url + path + "?ticket=canary", proxy=None)
    assert "/look" in caplog.text
    assert "canary" not in caplog.text


async def test_a_head_that_comes_too_slowly_is_cut_off(
    serve_app: ServeApp, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAD_SECONDS", 600 * MS)
    site = await serve_app(app, http=HTTP)
    silent = await asyncio.open_connection("127.0.0.1", site.port)
    slow = await asyncio.open_connection("127.0.0.1", site.port)
    again = await asyncio.open_connection("127.0.0.1", site.port)
    again[1].write(b"GET /realtime/health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await again[0].readline()).startswith(b"HTTP/1.1 ")
    again[1].write(b"GET /")
    for byte in b"GET /realtime/ HTTP/1.1\r\nHost: a":
        slow[1].write(bytes([byte]))
        await asyncio.sleep(30 * MS)
    for reader, writer in (silent, slow, again):
        with contextlib.suppress(ConnectionError):  # an end or a reset
            async with asyncio.timeout(5_000 * MS):
                await reader.read()
        writer.close()
    await eventually_async(lambda: not site.server.server_state.connections)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Files with a certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (tmp_path / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


async def test_over_tls_it_is_the_same(
    serve_app: ServeApp, app: Any, certificate: tuple[str, str], prefix: str
) -> None:
    site = await serve_app(app, ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    url = f"wss://127.0.0.1:{site.port}"
    async with connect(url + "/look", ssl=context, proxy=None) as client:
        assert json.loads(await client.recv())["scheme"] == "wss"
    async with connect(url + "/realtime/", ssl=context, proxy=None) as client:
        await client.send('{"type":"connect","channels":{"room":null}}')
        while json.loads(await client.recv())["type"] != "subscribed":
            pass
        text = "x" * 500_000
        await AsyncPublisher("memory://", prefix=prefix, secret=SECRET).publish("room", text)
        assert json.loads(await client.recv())["data"] == text
        await client.send("x" * 100_000)
        assert json.loads(await client.recv())["code"] == CloseCode.MESSAGE_TOO_BIG
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == CloseCode.MESSAGE_TOO_BIG
    await eventually_async(lambda: not site.server.server_state.connections)
