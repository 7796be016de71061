"""Be one WebSocket after its handshake: bytes in, bytes out, on the transport itself.

In:     bytes from the transport; frames and batches for the client, as a send queue takes them
Out:    whole messages, one after another, to the connection; WebSocket frames to the transport, at once
Owns:   the closing handshake and its bound; what came of a frame that is not complete yet
Never:  has a task, a timer or a parser of its own while it is idle; reads a frame by rules of its own: they are those
        of `websockets`; waits for a client that does not read

It is the send queue of its connection and has no queue: what is put goes to the kernel, and what that does not take, or
comes behind it, to the transport, whose buffer is what waits. Over TLS all goes to the transport.
Above `low_bytes` in it recovery waits; a live frame that would bring it above `limit_bytes` ends the connection with
SLOW, whose last frames have `_CLOSE_SECONDS` to go out like all others. Then the kernel's buffer is given up too.

Source: RFC 6455; `websockets.protocol.Protocol`.
"""

import asyncio
import contextlib
import logging
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, cast

from websockets.exceptions import PayloadTooBig
from websockets.frames import Close, Frame, Opcode
from websockets.frames import CloseCode as WebSocketCode
from websockets.protocol import OPEN, SERVER
from websockets.protocol import Protocol as Parser

from pubsub_mw import protocol
from pubsub_mw.errors import CloseCode, ErrorCode
from pubsub_mw.realtime.send_queue import Batch, SendQueue, websocket_frame
from pubsub_mw.realtime.wheel import Wheel
from pubsub_mw.settings import Settings

__all__ = ["CLOSE_SECONDS", "USER_TIMEOUT_MS", "Client", "Socket", "Sockets", "farewell", "retry_after"]

log = logging.getLogger("pubsub_mw")

CLOSE_SECONDS = 3.0
"""For the last frames and the close to go out; a client that does not read is left after that."""

_RETRY_SECONDS = {CloseCode.SHUTDOWN: 2.0, CloseCode.BROKER_UNAVAILABLE: 5.0, CloseCode.SERVER_ERROR: 5.0}
"""Upper end of the time after which a client is asked to come back; drawn anew for each, so that they do not come
all at once. Others may come back at once."""

USER_TIMEOUT_MS = 10_000
"""After which the kernel gives up a client that acknowledges nothing of what was sent to it."""
_CONTROLS = frozenset({Opcode.CLOSE, Opcode.PING, Opcode.PONG})
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing drops what the kernel still holds, instead of keeping it for a client that does not read."""


def retry_after(code: CloseCode) -> float:
    """Return after how many seconds a client is asked to come back."""
    return random.uniform(0, _RETRY_SECONDS.get(code, 0.0))


def farewell(code: CloseCode, reason: str) -> bytes:
    """Return the `disconnect` frame that a connection ends with."""
    return protocol.disconnect(code, reason, retry_after(code))


class Client(Protocol):
    """What a socket needs of its connection."""

    def take(self, text: str) -> Awaitable[None] | None:
        """Take one frame; what is returned ends before the next one is given."""

    def refuse(self, code: ErrorCode, message: str) -> None:
        """Answer what could not be taken as a frame."""

    def close(self) -> None:
        """The client is gone, or will be in a moment. Idempotent."""


class Sockets:
    """What the sockets of an event loop share.

    A parser is lent to a socket while a frame or a message of its client is incomplete. Between messages one parser is
    like another, so that one is enough for all who are there.
    """

    def __init__(self, settings: Settings, wheel: Wheel) -> None:
        self.loop = asyncio.get_running_loop()
        self.wheel = wheel
        self.limit_bytes = settings.send_queue_bytes
        self.low_bytes = settings.send_queue_bytes // 4
        self.max_frame_bytes = settings.max_frame_bytes
        self._spare: Parser | None = None
        self._is_bounded = not hasattr(socket, "TCP_USER_TIMEOUT")

    def bound(self, transport: asyncio.Transport) -> None:
        """Let `USER_TIMEOUT_MS` count for a connection. Where the listener has said so, it does for all of them."""
        found = None if self._is_bounded else transport.get_extra_info("socket")
        if found is not None:
            with contextlib.suppress(OSError):  # closed already, or not TCP
                self._is_bounded = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS
                if not self._is_bounded:
                    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)

    def lend(self) -> Parser:
        parser, self._spare = self._spare, None
        return parser or Parser(SERVER, state=OPEN, max_size=self.max_frame_bytes)

    def give_back(self, parser: Parser) -> None:
        """Take a parser that is between two messages of an open connection."""
        self._spare = parser


class Socket(SendQueue, asyncio.Protocol):
    """One WebSocket.

    Args:
        sockets: of this event loop
        transport: which has sent the handshake's answer
        peers: the server's set of its connections
    """

    __slots__ = (
        "_client",
        "_frames_left",
        "_has_ended",
        "_held",
        "_is_clear",
        "_is_direct",
        "_is_paused",
        "_is_text",
        "_is_within",
        "_message",
        "_on_lost",
        "_parser",
        "_partial_bytes",
        "_peers",
        "_raw",
        "_recovered_bytes",
        "_sockets",
        "_transport",
        "due",
    )

    def __init__(self, sockets: Sockets, transport: asyncio.Transport, peers: "set[Socket]") -> None:
        # Not `super().__init__`: of a queue without a queue only this is needed, and an idle connection pays for all.
        self._limit_bytes = sockets.limit_bytes
        self._reader, self._on_low, self._on_closed, self.closed = None, (), None, None
        self._sockets = sockets
        self._transport = transport
        self._peers = peers
        self._client: Client | None = None
        self._on_lost: Callable[[], None] | None = None
        self.due = 0
        # Out.
        self._raw = _raw_socket(transport)
        self._is_direct = True  # what is put goes to the transport
        # Nothing waits there, so what is put can go to the kernel past it: a third of a microsecond less for each.
        self._is_clear = self._raw is not None and not transport.get_write_buffer_size()
        self._is_paused = False  # more than `low_bytes` are in the transport's buffer
        self._held: list[bytes] | None = None
        self._recovered_bytes = 0  # of what is in the transport's buffer, those that the bound does not count
        self._has_ended = False  # a close frame went out, or the transport is lost
        # In.
        self._parser: Parser | None = None  # while a frame or a message is incomplete, and from the close on
        self._partial_bytes = 0  # that came of the frame that is not complete yet
        self._is_within = False  # the last frame was not the end of its message
        self._message: bytearray | None = None  # what came of a message in several frames
        self._is_text = True
        self._frames_left: list[Frame] | None = None  # until the connection has taken what came before
        transport.set_write_buffer_limits(high=sockets.low_bytes, low=sockets.low_bytes // 2)
        sockets.bound(transport)
        peers.add(self)
        transport.set_protocol(self)

    def serve(self, client: Client, on_lost: Callable[[], None] | None = None) -> None:
        """Give the connection what comes from now on; `on_lost` is called when the socket is gone."""
        self._client = client
        self._on_lost = on_lost

    # Out.

    def put_nowait(self, frame: bytes) -> None:
        self._put(websocket_frame(frame))

    def put_batch(self, batch: Batch) -> None:
        self._put(batch.websocket)

    def put_recovered_nowait(self, frame: bytes) -> None:
        self._put_recovered(websocket_frame(frame))

    def put_recovered_batch(self, batch: Batch) -> None:
        self._put_recovered(batch.websocket)

    def hold(self) -> None:
        self._is_direct, self._is_clear, self._held = False, False, []

    def put_first(self, frame: bytes) -> None:
        self._held = [websocket_frame(frame), *(self._held or ())]

    def release(self) -> None:
        held, self._held = self._held or [], None
        if not self._has_ended:
            self._is_direct = True
            self._append_bytes(b"".join(held))
            if not self._is_paused:
                self.resume_writing()

    def _put(self, data: bytes) -> None:
        """Give the kernel what it takes at once, and the transport the rest."""
        if self._is_clear and self._raw is not None:
            try:
                sent = self._raw.send(data)
            except OSError:
                sent = 0  # it is full; or gone, which the transport finds out
            if sent == len(data):
                return
            data = data[sent:]
        if not self._is_direct or self._is_paused:
            waiting = self.waiting_bytes
            if waiting and waiting - self._recovered_bytes + len(data) > self._limit_bytes:
                self.close(CloseCode.SLOW, f"more than {self._limit_bytes} bytes were waiting to be read")
        self._append_bytes(data)

    def _put_recovered(self, data: bytes) -> None:
        if not self._is_paused and self._held is None:
            self._recovered_bytes = 0  # what is left of earlier ones is less than `low_bytes`
        self._recovered_bytes += len(data)
        self._append_bytes(data)

    def _append_bytes(self, data: bytes) -> None:
        if self._is_direct:
            self._transport.write(data)
            self._is_clear = self._raw is not None and not self._transport.get_write_buffer_size()
        elif self._held is not None:
            self._held.append(data)

    @property
    def is_low(self) -> bool:
        return not self._is_paused and (not self._held or sum(map(len, self._held)) <= self._sockets.low_bytes)

    @property
    def waiting_bytes(self) -> int:
        waiting = 0 if self._has_ended else self._transport.get_write_buffer_size()
        return waiting + sum(map(len, self._held or ()))

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused, self._recovered_bytes = False, 0
        self._tell_low()

    # The end.

    def close(self, code: CloseCode, reason: str) -> None:
        if self.closed is None:
            super().close(code, reason)
            if not self._has_ended:
                held, self._held = self._held or [], None
                self._end([*held, websocket_frame(farewell(code, reason)), _close_frame(code, reason)])

    def shutdown(self) -> None:
        """End because the server does, which left no time to drain."""
        self.close(CloseCode.SHUTDOWN, "this server is going away; another one takes over")
        self._transport.close()

    def _end(self, last: Iterable[bytes]) -> None:
        """Write what the socket ends with; the client has a while to read it and to end its side."""
        self._is_direct, self._is_clear, self._has_ended = False, False, True
        self._transport.write(b"".join(last))
        self._sockets.wheel.set(self, self._sockets.loop.time() + CLOSE_SECONDS)
        # Not now: the connection may be in the middle of something.
        self._sockets.loop.call_soon(self._leave)

    def _leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def on_due(self) -> None:
        """Give up a client that has not ended its side."""
        found = self._transport.get_extra_info("socket")
        if found is not None:
            with contextlib.suppress(OSError):  # closed already
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._is_direct, self._is_clear, self._has_ended = False, False, True
        self._held, self._parser, self._message = None, None, None
        if self._raw is not None:
            self._raw.detach()  # the transport closes it
        self._sockets.wheel.discard(self)
        self._peers.discard(self)
        self._leave()
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()

    # In.

    def data_received(self, data: bytes) -> None:
        parser = self._parser or self._sockets.lend()
        partial_bytes = self._partial_bytes + len(data)
        parser.receive_data(data)
        frames = cast(list[Frame], parser.events_received())
        for frame in frames:
            size = len(frame.data)
            partial_bytes -= 6 + size + (0 if size < 126 else 2 if size < 65_536 else 8)
            if frame.opcode not in _CONTROLS:
                self._is_within = not frame.fin
        self._partial_bytes = partial_bytes
        answers = parser.data_to_send()
        if parser.state is not OPEN or partial_bytes or self._is_within:
            self._parser = parser
        else:
            # Every byte that came belongs to a frame that is complete (one that says its length in more bytes than it
            # needs only makes this socket keep its parser), and every frame to a message that is.
            self._parser = None
            self._sockets.give_back(parser)
        if self._frames_left is None:
            self._take(frames)
        else:
            self._frames_left += frames
            self._transport.pause_reading()
        if parser.parser_exc is not None:
            self._fail(parser)
        elif answers and parser.state is OPEN:
            self._put(b"".join(answers))  # pongs

    def _fail(self, parser: Parser) -> None:
        """End because of what the client sent. What comes from now on is thrown away by the parser."""
        if not self._has_ended:
            if isinstance(parser.parser_exc, PayloadTooBig):
                self.close(CloseCode.MESSAGE_TOO_BIG, f"a frame may have {self._sockets.max_frame_bytes} bytes")
            elif parser.close_sent is not None:
                self._end([_close_frame(parser.close_sent.code, parser.close_sent.reason)])
            self._end_writing()

    def _end_writing(self) -> None:
        """Show the client the end; what it still sends is taken until then, so that no reset overtakes the reason."""
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _take(self, frames: list[Frame]) -> None:
        """Give the connection one message after another; the rest waits while it is busy with one."""
        for index, frame in enumerate(frames):
            rest = self._take_frame(frame)
            if rest is not None:
                self._frames_left = frames[index + 1 :]
                asyncio.ensure_future(rest).add_done_callback(self._on_taken)
                return

    def _on_taken(self, taken: "asyncio.Future[None]") -> None:
        frames, self._frames_left = self._frames_left or [], None
        if not taken.cancelled() and taken.exception() is not None:
            self._on_fault(taken.exception())
        self._take(frames)
        transport = self._transport
        if self._frames_left is None and not transport.is_closing() and not transport.is_reading():
            transport.resume_reading()

    def _take_frame(self, frame: Frame) -> Awaitable[None] | None:
        opcode, data = frame.opcode, cast(bytes, frame.data)
        if opcode is Opcode.CLOSE:
            if not self._has_ended:
                self._end([Frame(Opcode.CLOSE, data).serialize(mask=False)])
            self._transport.close()
        if opcode in _CONTROLS or self._has_ended or self._client is None:
            return None
        if opcode is Opcode.CONT and self._message is not None:
            self._message += data
        else:
            self._is_text = opcode is Opcode.TEXT
            self._message = None if frame.fin else bytearray(data)
        if not frame.fin:
            return None
        if self._message is not None:
            data, self._message = bytes(self._message), None
        if not self._is_text:
            self._client.refuse(ErrorCode.BAD_FRAME, "a frame is text, not bytes")
            return None
        try:
            return self._client.take(data.decode())
        except UnicodeDecodeError as error:
            self._end([_close_frame(WebSocketCode.INVALID_DATA, f"{error.reason} at position {error.start}")])
            self._end_writing()
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this connection and no other
            self._on_fault(error)
        return None

    def _on_fault(self, error: BaseException | None) -> None:
        log.error("a connection ended by a fault of the server", exc_info=error)
        self.close(CloseCode.SERVER_ERROR, "a fault of the server; it is in the server's log")


def _raw_socket(transport: asyncio.Transport) -> socket.socket | None:
    """Return the transport's socket, to send through; None where something stands in between, like TLS.

    It is the transport's own, which closes it after `connection_lost`.
    """
    found = transport.get_extra_info("socket")
    if found is None or transport.get_extra_info("sslcontext") is not None:
        return None
    raw = socket.socket(found.family, found.type, found.proto, found.fileno())
    raw.setblocking(False)  # whatever `socket.setdefaulttimeout` says
    return raw


def _close_frame(code: int, reason: str) -> bytes:
    return Frame(Opcode.CLOSE, Close(code, reason).serialize()).serialize(mask=False)
