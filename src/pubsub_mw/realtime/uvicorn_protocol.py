"""Let uvicorn hand a WebSocket over to the app, whole, after its handshake.

In:     what uvicorn gives a protocol class: `uvicorn --ws pubsub_mw.realtime.uvicorn_protocol:WebSocketProtocol`
Out:    ASGI as uvicorn's own class speaks it, for every app; and in the scope, under `extensions`,
        `pubsub_mw.websocket`: `{"take_over": ...}`
Owns:   the handshake until somebody takes the connection over, or begins to answer it as ASGI says
Never:  lets a query string into the log: there may be a ticket in it; waits for a request's head for ever

An app that calls `take_over(sockets)`, instead of receiving and sending, gets a `Socket`: the handshake is accepted,
and from then on there is no task, no queue and no parsed header. For every other app uvicorn's own class does the work
from the first `receive` or `send` on, as if the handshake had come then.
"""

import asyncio
import base64
import binascii
import logging
import re
from typing import Any, cast
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected, get_local_addr, get_remote_addr, is_ssl
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.utils import accept_key

from pubsub_mw.realtime.socket import Socket, Sockets

__all__ = ["EXTENSION", "HTTPProtocol", "WebSocketProtocol", "WithoutQuery"]

log = logging.getLogger("pubsub_mw")

EXTENSION = "pubsub_mw.websocket"
"""Under `extensions` of a scope: what the server offers beyond ASGI."""

_HEAD_SECONDS = 10.0
"""For a request's head to arrive; whoever is slower is cut off."""

_CONNECTION = re.compile(rb"[A-Za-z-]+(?:, *[A-Za-z-]+)*\Z")
_SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "

_Headers = list[tuple[bytes, bytes]]


class WebSocketProtocol(asyncio.Protocol):
    """One connection from its upgrade until it is clear who serves it."""

    __slots__ = ("_app_state", "_config", "_head", "_ordinary", "_scope", "_state", "_task", "_transport")

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._head = b""
        self._ordinary: _Ordinary | None = None
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None  # None once it is given away
        self._scope: dict[str, Any] = {}

    # What uvicorn and the transport call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        headers = None if self._head or self._ordinary else _plain_handshake(data)
        if headers is None:
            self._fall_back().data_received(data)
        else:
            self._begin(data, headers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fall_back().connection_lost(exc)

    def shutdown(self) -> None:
        self._fall_back().shutdown()

    def _begin(self, head: bytes, headers: _Headers) -> None:
        """Run the app on a handshake that nobody has answered yet."""
        assert self._transport is not None
        self._head = head
        config, transport = self._config, self._transport
        raw_path, _, query_string = head[4 : head.index(b" HTTP/1.1\r\n")].partition(b"?")
        self._scope = {
            "type": "websocket",
            "asgi": {"version": config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "wss" if is_ssl(transport) else "ws",
            "server": get_local_addr(transport),
            "client": get_remote_addr(transport),
            "root_path": config.root_path,
            "path": config.root_path + unquote(raw_path.decode("ascii")),
            "raw_path": config.root_path.encode("ascii") + raw_path,
            "query_string": query_string,
            "headers": headers,
            "subprotocols": _subprotocols(headers),
            "state": self._app_state.copy(),
            "extensions": {"websocket.http.response": {}, EXTENSION: {"take_over": self._take_over}},
        }
        app = config.loaded_app(self._scope, self._receive, self._send)
        self._task = asyncio.get_running_loop().create_task(app)
        self._state.tasks.add(self._task)
        self._task.add_done_callback(self._on_app_done)

    def _on_app_done(self, task: "asyncio.Task[None]") -> None:
        self._state.tasks.discard(task)
        self._scope["extensions"].pop(EXTENSION, None)  # it leads back to here
        if self._transport is not None:
            self._fall_back()  # which says what is to be said of an app that failed, or did not answer
        elif not task.cancelled() and task.exception() is not None:
            log.error("an app failed after it took a WebSocket over", exc_info=task.exception())

    # The app takes it over.

    def _take_over(self, sockets: Sockets) -> Socket | None:
        """Accept the WebSocket and give it away; None if something else has happened to it already."""
        transport = self._transport
        if self._ordinary is not None or transport is None or transport.is_closing():
            return None
        key = next(value for name, value in self._scope["headers"] if name == b"sec-websocket-key")
        answer = [_SWITCHING, accept_key(key.decode("ascii")).encode("ascii"), b"\r\n"]
        for name, value in self._state.default_headers:
            answer += (name, b": ", value, b"\r\n")
        transport.write(b"".join([*answer, b"\r\n"]))
        self._transport = None
        self._state.connections.discard(self)
        return Socket(sockets, transport, self._state.connections)  # type: ignore[arg-type]

    # The app answers as ASGI says.

    async def _receive(self) -> Any:
        return await self._fall_back().receive()

    async def _send(self, message: Any) -> None:
        await self._fall_back().send(message)

    def _fall_back(self) -> "_Ordinary":
        """Let uvicorn's class see the handshake, as if it had come now."""
        if self._ordinary is None:
            if self._transport is None:
                raise ClientDisconnected
            self._ordinary = ordinary = _Ordinary(self._config, self._state, self._app_state)
            self._state.connections.discard(self)
            ordinary.connection_made(self._transport)
            # Not now: uvicorn's HTTP class, if it is what called, sets this one in a moment.
            asyncio.get_running_loop().call_soon(self._transport.set_protocol, ordinary)
            if self._task is not None:
                ordinary.app = self._wait_for_app
                ordinary.data_received(self._head)
        return self._ordinary

    async def _wait_for_app(self, *_: Any) -> None:
        """Be the app for uvicorn's class: the one that runs already."""
        assert self._task is not None
        await self._task


class _Ordinary(WebSocketsSansIOProtocol):
    """uvicorn's class, but for what it logs."""

    async def send(self, message: Any) -> None:
        if self.scope["query_string"]:
            self.scope = {**self.scope, "query_string": b""}
        await super().send(message)


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's class for HTTP, with a bound on the time in which a request's head comes."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._start_deadline()

    def on_headers_complete(self) -> None:
        self._stop_deadline()
        super().on_headers_complete()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class WithoutQuery(logging.Filter):
    """Cut query strings out of uvicorn's access log: there may be a ticket in one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                value.partition("?")[0] if isinstance(value, str) and value.startswith("/") else value
                for value in record.args
            )
        return True


def _plain_handshake(head: bytes) -> _Headers | None:
    """Return the headers of a handshake that has all it must and nothing odd; None = let uvicorn's class look at it.

    What arrives here was read and written anew by uvicorn's HTTP parser.
    """
    first, *lines, end, after = head.split(b"\r\n")
    if end or after or not first.startswith(b"GET /") or not first.endswith(b" HTTP/1.1"):
        return None
    headers = []
    once: dict[bytes, bytes] = {}
    for line in lines:
        name, separator, value = line.partition(b": ")
        headers.append((name, value))
        if not separator or (name in _ONCE and once.setdefault(name, value) is not value):
            return None
    try:
        key = base64.b64decode(once.get(b"sec-websocket-key", b""), validate=True)
    except binascii.Error:
        return None
    is_plain = (
        len(key) == 16
        and once.get(b"sec-websocket-version") == b"13"
        and once.get(b"upgrade", b"").lower() == b"websocket"
        and _CONNECTION.match(once.get(b"connection", b"")) is not None
    )
    return headers if is_plain else None


_ONCE = frozenset({b"connection", b"origin", b"sec-websocket-key", b"sec-websocket-version", b"upgrade"})


def _subprotocols(headers: _Headers) -> list[str]:
    values = [value.decode("latin-1") for name, value in headers if name == b"sec-websocket-protocol"]
    return [name.strip() for value in values for name in value.split(",")]
