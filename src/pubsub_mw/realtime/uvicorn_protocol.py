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
import logging
import re
from typing import Any, cast
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected, is_ssl
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

_PLAIN_BYTES = 4_096
"""A longer head is read by uvicorn's parser."""
_PLAIN_HEAD = re.compile(rb"GET (/[!-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)+)\r\n")
_HEADER = re.compile(rb"([^:]+):([^\r]*)\r\n")
_CONNECTION = re.compile(rb"(?:[a-z-]+, *)*upgrade(?:, *[a-z-]+)*\Z", re.IGNORECASE)
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==\Z")
"""16 bytes in Base64."""
_SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "

_BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

_Headers = list[tuple[bytes, bytes]]


class WebSocketProtocol(asyncio.Protocol):
    """One connection from its upgrade until it is clear who serves it."""

    __slots__ = ("_app_state", "_config", "_ordinary", "_scope", "_state", "_target", "_task", "_transport")

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._target = b""
        self._ordinary: _Ordinary | None = None
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None  # None once it is given away
        self._scope: dict[str, Any] = {}

    # What uvicorn and the transport call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        read = None if self._target or self._ordinary else _read_head(data)
        if read is not None and _is_plain(*read):
            self.begin(*read)
        else:
            self._fall_back().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fall_back().connection_lost(exc)

    def shutdown(self) -> None:
        self._fall_back().shutdown()

    def begin(self, target: bytes, headers: _Headers) -> None:
        """Run the app on a handshake that nobody has answered yet, and that has nothing odd."""
        assert self._transport is not None
        self._target = target
        config, transport = self._config, self._transport
        raw_path, _, query_string = target.partition(b"?")
        self._scope = {
            "type": "websocket",
            "asgi": {"version": config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "wss" if is_ssl(transport) else "ws",
            "server": _server(transport.get_extra_info("sockname")),
            "client": _client(transport.get_extra_info("peername")),
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
        problem = None if task.cancelled() else task.exception()
        if self._transport is not None:
            self._fall_back()  # which says what is to be said of an app that failed, or did not answer
        elif problem is not None:
            log.error("an app failed after it took a WebSocket over", exc_info=problem)

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
                lines = [b"%b: %b\r\n" % header for header in self._scope["headers"]]
                ordinary.data_received(b"GET %b HTTP/1.1\r\n%b\r\n" % (self._target, b"".join(lines)))
        return self._ordinary

    async def _wait_for_app(self, *_: Any) -> None:
        """Be the app for uvicorn's class: the one that runs already."""
        assert self._task is not None
        await self._task


class _Ordinary(WebSocketsSansIOProtocol):
    """uvicorn's class, but for what it logs, and for a handshake that its parser does not take."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.close_sent:
            # uvicorn would wait for ever: for this there is no event. The parser has an answer ready, or none.
            answer = b"".join(self.conn.data_to_send()) or _BAD_REQUEST
            self.transport.write(answer)
            self.close_sent = self.disconnected = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
            self.transport.close()

    async def send(self, message: Any) -> None:
        if not self.close_sent and self.scope["query_string"]:
            self.scope = {**self.scope, "query_string": b""}
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # else uvicorn logs an error, though the app has answered


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's class for HTTP, with a bound on the time in which a request's head comes, and a short way in.

    A connection that opens with a plain WebSocket handshake, whole in its first bytes, goes to `WebSocketProtocol` at
    once. For all others this is uvicorn's class, which is set up when it is clear that it is needed.
    """

    _deadline: asyncio.TimerHandle | None = None
    _is_set_up = False

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Not `super().__init__` yet: its parser, flow control and loggers cost as much as the whole handshake.
        self.config, self.server_state, self.app_state = config, server_state, app_state
        self.loop = _loop or asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.server_state.connections.add(self)
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        if not self._is_set_up:
            head, end, rest = data.partition(b"\r\n\r\n")
            read = _read_head(head + end)
            if read is not None and self._upgrade(*read):
                if rest:  # of a client that did not wait for the answer
                    self.transport.get_protocol().data_received(rest)  # type: ignore[attr-defined]
                return
            self._set_up()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        if self._is_set_up:
            super().connection_lost(exc)
        else:
            self.server_state.connections.discard(self)

    def shutdown(self) -> None:
        if self._is_set_up:
            super().shutdown()
        else:
            self.transport.close()

    def _set_up(self) -> None:
        self._is_set_up = True
        transport = self.transport
        super().__init__(self.config, self.server_state, self.app_state, self.loop)
        super().connection_made(transport)

    def _upgrade(self, target: bytes, headers: _Headers) -> bool:
        """Hand a plain handshake over; False = it is for uvicorn to see to."""
        if self.config.ws_protocol_class is not WebSocketProtocol or not _is_plain(target, headers):
            return False
        protocol = WebSocketProtocol(self.config, self.server_state, self.app_state)
        protocol.connection_made(self.transport)
        protocol.begin(target, headers)
        self._stop_deadline()
        self.server_state.connections.discard(self)
        self.transport.set_protocol(protocol)
        return True

    def handle_websocket_upgrade(self) -> None:
        # As uvicorn does, but what has been parsed is not written and parsed again.
        if self.scope["method"] != "GET" or not self._upgrade(self.url, self.headers):
            super().handle_websocket_upgrade()

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


def _read_head(head: bytes) -> tuple[bytes, _Headers] | None:
    """Return target and headers of a request that is a head without anything odd, and nothing else.

    Whatever else there is, or may be meant otherwise by somebody, is for a parser of HTTP. Source: RFC 9112 3 to 5.
    """
    matched = _PLAIN_HEAD.fullmatch(head) if len(head) <= _PLAIN_BYTES else None
    if matched is None:
        return None
    return matched[1], [(name.lower(), value.lstrip(b" \t")) for name, value in _HEADER.findall(matched[2])]


def _is_plain(target: bytes, headers: _Headers) -> bool:
    """Whether a handshake has all it must, and nothing odd that needs a closer look. Source: RFC 6455 4.2.1."""
    found = dict(headers)
    return (
        target.startswith(b"/")
        and target.isascii()
        and found.get(b"upgrade", b"").lower() == b"websocket"
        and found.get(b"sec-websocket-version") == b"13"
        and _KEY.match(found.get(b"sec-websocket-key", b"")) is not None
        and _CONNECTION.match(found.get(b"connection", b"")) is not None
        and _WITH_BODY.isdisjoint(found)
        and (len(found) == len(headers) or sum(name in _ONCE for name, _ in headers) == len(_ONCE.intersection(found)))
    )


_WITH_BODY = frozenset({b"content-length", b"expect", b"transfer-encoding"})
_ONCE = frozenset({b"connection", b"origin", b"sec-websocket-key", b"sec-websocket-version", b"upgrade"})


def _server(found: Any) -> tuple[str, int | None] | None:
    """Return an address as a scope has it: host and port, or the path of a UNIX socket."""
    return (found, None) if isinstance(found, str) and found else _client(found)


def _client(found: Any) -> tuple[str, int] | None:
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None


def _subprotocols(headers: _Headers) -> list[str]:
    values = [value for name, value in headers if name == b"sec-websocket-protocol"]
    return [name.strip() for value in values for name in value.decode("latin-1").split(",")]
