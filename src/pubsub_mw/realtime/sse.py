"""Stream to one client by server-sent events, and nothing more.

In:     what the url asks for; the connection's send queue
Out:    with `frames=1` each frame as on a WebSocket; else `event`, `data` and `id`, which need no library
Owns:   the response: its first bytes, the heartbeats' form, the farewell
Never:  lets data or the name of an event end a line: neither can add a field; lets a stuck client keep the server's
        tasks (closing has a bound)

A plain stream has all of its channels or ends: an EventSource comes back by itself and is told by the status. An
EventSource that is answered by anything but 200 gives up for ever, so to one of them "not now" is said by an empty
stream. Source: HTML Standard 9.2, "Server-sent events".
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pubsub_mw import protocol
from pubsub_mw.errors import BrokerUnavailable, CloseCode, ErrorCode
from pubsub_mw.grants import Resume
from pubsub_mw.model import Handshake, channel_of_connection
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.cursor import Cursor
from pubsub_mw.realtime.http import NO_STORE, Refusal, bearer, connect, read_query, read_resume, read_wanted, until_gone
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.realtime.socket import CLOSE_SECONDS, retry_after

__all__ = ["refuse_events", "serve_events"]

_HEADERS = {**NO_STORE, "x-accel-buffering": "no"}
_PADDING = b":" + b" " * 2_048 + b"\n\n"
"""What makes a proxy or a browser that waits for a first piece of some size pass it on."""
_RETRY_SECONDS = (1.0, 3.0)
"""Between these a client whose stream breaks without a word is asked to wait; drawn for each, so that they do not come
all at once."""


_ANSWERED_SECONDS, _ANSWERED_BYTES = 2.0, 65_536
"""After which a stream begins before all its channels are listened to: the broker, the application or the client is
slow."""


class _Form(Protocol):
    """How frames look in a stream."""

    is_over: bool
    """Whether the stream is to end after what was rendered."""

    def render(self, frame: bytes) -> bytes: ...

    def farewell(self, code: CloseCode, reason: str) -> bytes: ...


class _Framed:
    """Each frame as it is on a WebSocket."""

    def __init__(self, cursor: Cursor, own: str) -> None:
        self._cursor = cursor
        self._own = own
        self.is_over = False

    def render(self, frame: bytes) -> bytes:
        if b'"position":"' not in frame:
            return b"data: %b\n\n" % frame
        self._cursor.follow(frame, self._own)
        return b"data: %b\nid: %b\n\n" % (frame, str(self._cursor).encode())

    def farewell(self, code: CloseCode, reason: str) -> bytes:
        return b"data: %b\n\n" % protocol.disconnect(code, reason, retry_after(code))


class _Plain:
    """Each publication as an event; of all else what somebody without a library can use."""

    def __init__(self, cursor: Cursor, own: str) -> None:
        self._cursor = cursor
        self._own = own
        self.is_over = False

    def render(self, frame: bytes) -> bytes:
        if frame == protocol.PING:
            return b":\n\n"
        event = _message(frame)
        if event:
            return event + self._id(frame)
        told = orjson.loads(frame)
        kind = told["type"]
        if kind in ("connected", "error"):
            self.is_over = "channel" in told
            return b""
        if kind == "subscribed":
            if told["recovered"] is False:
                return _event(b"gap", frame) + self._id(frame)
            # An id alone fires nothing and is remembered: a stream that breaks before its first event goes on from it.
            return (_event(b"subscribed", frame) if "members" in told else b"") + self._id(frame)
        self.is_over = kind == "unsubscribed"
        return _event(kind.encode(), frame) + (self._id(frame) if "position" in told else b"\n")

    def _id(self, frame: bytes) -> bytes:
        self._cursor.follow(frame, self._own)
        return b"id: %b\n\n" % str(self._cursor).encode()

    def farewell(self, code: CloseCode, reason: str) -> bytes:
        return b": %b\nretry: %d\n\n" % (_one_line(reason.encode(), b" "), 1_000 * max(0.1, retry_after(code)))


@lru_cache(maxsize=16)
def _message(frame: bytes) -> bytes:
    """Return a publication's `event` and `data` lines; b"" = it is another frame.

    Remembered, because all of a channel's streams are sent it within a moment.
    """
    message = protocol.split_message(frame)
    if message is None:
        return b""
    data = bytes(message.data)
    if data.startswith(b'"'):
        # Not orjson: half of a surrogate pair is JSON, and has no UTF-8.
        data = json.loads(data).encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return _event(json.loads(b'"%b"' % message.event).encode(), data)


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n" % (_one_line(name, b" "), _one_line(data, b"\ndata: "))


def _one_line(text: bytes, joint: bytes) -> bytes:
    """Put `joint` where a reader would see the end of a line. Source: HTML 9.2.5: CRLF, LF or CR, and nothing else."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", joint)


def refuse_events(refusal: Refusal, scope: Scope, handshake: Handshake) -> Response:
    """Say that there is no stream, in the way that the client understands."""
    accepts = handshake.first("accept") or ""
    if refusal.status in (429, 503) and "text/event-stream" in accepts and b"frames=1" not in scope["query_string"]:
        text = f": {refusal.message}\nretry: {random.uniform(2_000, 5_000):.0f}\n\n"
        return Response(text, 200, _HEADERS, "text/event-stream")
    return refusal.response()


async def serve_events(scope: Scope, receive: Receive, send: Send, shared: Shared, handshake: Handshake) -> None:
    """Serve an admitted client until either side ends it.

    Raises:
        Refusal: there is no stream.
    """
    connection = Connection(shared, handshake, "sse")
    loop = asyncio.get_running_loop()
    reader = asyncio.create_task(until_gone(receive))
    writer = asyncio.create_task(_stream(scope, send, shared, connection, handshake))
    giving_up: asyncio.TimerHandle | None = None

    def give_up_soon() -> None:
        """A client that does not read keeps the writer waiting, also with the farewell."""
        nonlocal giving_up
        giving_up = loop.call_later(CLOSE_SECONDS, writer.cancel)

    connection.send_queue.when_closed(give_up_soon)
    try:
        await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
        if writer.done() and not writer.cancelled():
            writer.result()
    finally:
        connection.close()
        if giving_up is not None:
            giving_up.cancel()
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


async def _stream(scope: Scope, send: Send, shared: Shared, connection: Connection, handshake: Handshake) -> None:
    query = read_query(scope, shared.settings.max_channels)
    is_plain = query.get("frames", [""])[-1] != "1"
    resume = read_resume(shared, bearer(handshake)) or await _redeemed(shared, query.get("ticket", []))
    wanted = read_wanted(query, handshake, resume)
    await connect(connection, wanted, resume, needs_all=is_plain)
    assert connection.id is not None
    first = await _until_answered(connection, wanted.channels)
    form: _Form = (_Plain if is_plain else _Framed)(wanted.cursor, channel_of_connection(connection.id))
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    headers += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    retry = b"retry: %d\n\n" % (1_000 * random.uniform(*_RETRY_SECONDS))
    await _write(send, connection, form, _PADDING + retry, first)


async def _redeemed(shared: Shared, tickets: Sequence[str]) -> Resume | None:
    """Return what a ticket stands for; None = none is shown.

    Raises:
        Refusal: it was used, or is too old; or the broker does not answer.
    """
    if not tickets:
        return None
    try:
        token = await shared.broker.take_ticket(tickets[-1])
    except BrokerUnavailable as error:
        raise Refusal(503, ErrorCode.UNAVAILABLE, "the broker does not answer; come back in a moment") from error
    if token is None:
        ttl = shared.settings.ticket_ttl
        raise Refusal(401, ErrorCode.GRANT_EXPIRED, f"the ticket was used, or is older than {ttl:g} s; get another one")
    return read_resume(shared, token, use="ticket")


async def _until_answered(connection: Connection, channels: Collection[str]) -> list[bytes]:
    """Take frames until each of `channels` is listened to or refused, so that "open" means that nothing is missed.

    Not for longer than `_ANSWERED_SECONDS`, and not when there is much already of what was missed.
    """
    # Its own channels need not be answered, and of a name that is too long the beginning is.
    waiting = {name[:200] for name in channels if not name.startswith("#")}
    queue, frames, size = connection.send_queue, list[bytes](), 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ANSWERED_SECONDS):
            while waiting and size < _ANSWERED_BYTES and (frame := await queue.take()):
                frames.append(frame)
                size += len(frame)
                if protocol.split_message(frame) is None:
                    waiting.discard(orjson.loads(frame).get("channel"))
    return frames


async def _write(send: Send, connection: Connection, form: _Form, start: bytes, frames: list[bytes]) -> None:
    """Write until the send queue closes or the stream is over; then end it."""
    queue, pieces = connection.send_queue, [start]
    while True:
        for frame in frames:
            if frame and not form.is_over:
                pieces.append(form.render(frame))
        await _send(send, pieces)
        if queue.closed is not None or form.is_over:
            break
        frames = [await queue.take(), *queue.take_nowait()]
    if queue.closed is not None:
        code, reason = queue.closed
        # SLOW: what waits will not be read, and recovery brings it. Otherwise errors and answers still go out.
        pieces += [form.render(frame) for frame in queue.take_nowait()] if code is not CloseCode.SLOW else []
        pieces.append(form.farewell(code, reason))
    await _send(send, pieces)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, pieces: list[bytes]) -> None:
    message: dict[str, Any] = {"type": "http.response.body", "body": b"".join(pieces), "more_body": True}
    pieces.clear()
    if message["body"]:
        await send(message)
