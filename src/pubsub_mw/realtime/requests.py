"""Carry one connection's requests to the queue, in order.

In:     `request` and `cancel` frames; news of answers that passed on the connection's own channel
Out:    signed requests into the broker's queue; an `error` frame where one is refused
Owns:   which requests of this connection are in flight (at most `in_flight`), and which wait (`request_backlog`)
Never:  lets through a path that no pattern allows, or a header that only a proxy or the handshake may set; takes a
        request for accepted before the broker has stored it

The answer does not come back through here: the worker publishes it to the connection's own channel, where it takes
the way of every publication. A request whose answer has not begun `request_timeout` after it was stored is answered
504 from here, under the same idempotency key that the worker would use, so that one of the two shows.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from urllib.parse import unquote_to_bytes

from pubsub_mw import protocol
from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import Acceptance, AsyncBroker, answer_key
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import BrokerUnavailable, ErrorCode, FrameError, PublishError
from pubsub_mw.grants import queue_key
from pubsub_mw.model import (
    ConnectionId,
    Handshake,
    Position,
    Publication,
    Request,
    channel_of_connection,
    compile_patterns,
)
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["RequestCheck", "RequestGate", "Requests"]

log = logging.getLogger("pubsub_mw")

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_HEADERS = frozenset(
    "accept accept-language content-language content-type idempotency-key if-match if-modified-since if-none-match "
    "if-unmodified-since prefer x-csrf-token x-csrftoken x-requested-with x-request-id hx-request hx-target hx-trigger "
    "hx-trigger-name hx-current-url hx-boosted hx-prompt".split()
)
"""Headers that a client may send with a request; `request_headers` adds to them."""
_NEVER = re.compile(
    r"(?:.*_.*|cookie|host|origin|referer|user-agent|proxy|proxy-.*|forwarded|x-forwarded.*|x-real-ip|via|te|trailer|"
    r"connection|keep-alive|upgrade|transfer-encoding|content-length|sec-.*|x-http-method.*)\Z"
)
"""Not even `request_headers` lets these through: they say what only the handshake or a proxy can know."""
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]+\Z")  # RFC 9110 5.6.2, without the underscore
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_QUERY = re.compile(r"[!-\"$-~]*\Z")


class RequestCheck:
    """What clients may request, and with which headers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._is_allowed = compile_patterns(settings.requests)
        self._headers = _HEADERS | {name.lower() for name in settings.request_headers}

    def check(
        self, frame: protocol.RequestFrame, connection: ConnectionId, user: str | None, handshake: Handshake
    ) -> Request:
        """Return the request for the queue.

        Raises:
            FrameError: a part of it is not allowed.
        """

        def refused(code: ErrorCode, message: str) -> FrameError:
            return FrameError(code, message, id=frame.id)

        method = frame.method.upper()
        if method not in _METHODS:
            raise refused(
                ErrorCode.BAD_FRAME, f"method {frame.method!r:.40} must be one of {', '.join(sorted(_METHODS))}"
            )
        raw_path, _, query = frame.path.partition("?")
        path = _normal(raw_path)
        if path is None or not _QUERY.match(query):
            raise refused(
                ErrorCode.BAD_FRAME,
                "path must begin with one /, be percent-encoded, and hold no . or .. segment, no %2f and no backslash",
            )
        if not self._is_allowed(path) or path in (self.settings.authorize, self.settings.lifecycle):
            raise refused(
                ErrorCode.FORBIDDEN, f"{path!r:.100} may not be requested over a connection (PUBSUB_REQUESTS)"
            )
        return Request(
            connection=connection,
            user=user,
            transport="websocket",
            id=frame.id,
            method=method,
            path=path,
            query=query,
            headers=tuple(self._checked_headers(frame, refused)),
            body=frame.body,
            handshake=handshake,
            reply_to=channel_of_connection(connection),
        )

    def _checked_headers(
        self, frame: protocol.RequestFrame, refused: "Callable[[ErrorCode, str], FrameError]"
    ) -> "Iterator[tuple[str, str]]":
        seen = set()
        for name, value in frame.headers.items():
            lower = name.lower()
            if not _TOKEN.match(name) or lower in seen:
                raise refused(ErrorCode.BAD_FRAME, f"header name {name!r:.60} is not one, or comes twice")
            seen.add(lower)
            try:
                value.encode("latin-1")
            except UnicodeEncodeError:
                raise refused(ErrorCode.BAD_FRAME, f"header {lower} holds a character beyond latin-1") from None
            if _CONTROLS.search(value):
                raise refused(ErrorCode.BAD_FRAME, f"header {lower} holds a control character")
            if lower in self._headers and not _NEVER.match(lower):
                yield lower, value.strip(" \t")


class RequestGate(RequestCheck):
    """What all connections of a process have in common: what may be requested, and where it goes."""

    def __init__(self, settings: Settings, broker: AsyncBroker, publisher: AsyncPublisher, secret: str) -> None:
        super().__init__(settings)
        self.broker = broker
        self.publisher = publisher
        self.key = queue_key(secret)


def _normal(raw: str) -> str | None:
    """Return the decoded path, or None if two programs could read it differently, also one that decodes it twice."""
    if not raw.startswith("/") or "//" in raw or "#" in raw or not raw.isascii() or len(raw) > 8_000:
        return None
    if re.search(r"%(?![0-9A-Fa-f]{2})|[\x00-\x20\x7f]", raw):
        return None
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        return None
    if raw.count("/") != path.count("/") or re.search(r"(?i)[\x00-\x1f\x7f\\]|%(?:2e|2f|5c|0|1)", path):
        return None
    return None if any(segment in (".", "..") for segment in path.split("/")) else path


class Requests:
    """The requests of one connection.

    Args:
        gate: of this process
        connection: its id
        handshake: cookies and more for each request
        send_queue: for refusals, and for answers that are sent again
        own: the subscription on the connection's own channel
    """

    def __init__(
        self,
        gate: RequestGate,
        connection: ConnectionId,
        handshake: Handshake,
        send_queue: SendQueue,
        own: Subscription,
    ) -> None:
        self._gate = gate
        self._connection = connection
        self._handshake = handshake
        self._send_queue = send_queue
        self._own = own
        self._backlog: deque[Request] = deque()
        self._in_flight: dict[str, asyncio.TimerHandle | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, frame: protocol.RequestFrame, user: str | None) -> None:
        """Take a request: it goes to the queue now, or when those before it are answered.

        Raises:
            FrameError: it is not allowed, or too many wait already.
        """
        if frame.id in self._in_flight or any(waiting.id == frame.id for waiting in self._backlog):
            return  # on its way already
        request = self._gate.check(frame, self._connection, user, self._handshake)
        limit = self._gate.settings.request_backlog
        if len(self._in_flight) < self._gate.settings.in_flight:
            self._submit(request)
        elif len(self._backlog) < limit:
            self._backlog.append(request)
        else:
            raise FrameError(ErrorCode.BUSY, f"{limit} requests of this connection wait already", id=frame.id)

    def cancel(self, request_id: str) -> None:
        """Drop a request that waits, or have the worker that runs it told; it may be one from before a reconnect."""
        for waiting in self._backlog:
            if waiting.id == request_id:
                self._backlog.remove(waiting)
                self._refuse(ErrorCode.CANCELLED, "cancelled before it was begun", request_id)
                return
        self._spawn(self._cancel(request_id))

    def on_reply(self, reply: str) -> None:
        """Note that a part of an answer passed on the connection's own channel."""
        mark, request_id = reply[0], reply[1:]
        if request_id in self._in_flight:
            self._stop_timer(request_id)
            if mark == ".":
                self._finish(request_id)

    def close(self) -> None:
        """Forget everything that was not stored yet: its client sends it again on its next connection."""
        for request_id in self._in_flight:
            self._stop_timer(request_id)
        for task in self._tasks:
            task.cancel()
        self._backlog.clear()
        self._in_flight.clear()

    def _submit(self, request: Request) -> None:
        self._in_flight[request.id] = None
        self._spawn(self._accept(request))

    def _spawn(self, coroutine: "Coroutine[None, None, None]") -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request was dropped by a fault of the server", exc_info=task.exception())

    async def _accept(self, request: Request) -> None:
        gate = self._gate
        payload = encode_request(request, gate.key)
        try:
            accepted = await gate.broker.accept(request.connection, request.id, payload, request.reply_to)
            if accepted.answered_at is not None and request.id in self._in_flight:
                await self._answer_again(request, accepted.answered_at)
                return
        except BrokerUnavailable as error:
            log.warning("a request was not stored: %s", error)
            self._refuse(ErrorCode.UNAVAILABLE, "the broker does not answer; send it again", request.id)
            return
        if accepted.acceptance is Acceptance.FULL:
            self._refuse(ErrorCode.BUSY, f"{gate.settings.queue_size} requests wait for the application", request.id)
        elif request.id in self._in_flight:  # else answered in the meantime
            loop = asyncio.get_running_loop()
            delay = gate.settings.request_timeout + gate.settings.request_grace
            self._in_flight[request.id] = loop.call_later(delay, lambda: self._spawn(self._time_out(request)))

    async def _answer_again(self, request: Request, position: Position) -> None:
        """Send the answer of a request that was answered before, unless recovery brings it, or the rest of it."""
        offset, parts, is_complete = position.offset - 1, list[Publication](), False
        while not is_complete:
            (page,) = await self._gate.broker.read(
                [(request.reply_to, offset)], page_bytes=self._gate.settings.recovery_page_bytes
            )
            if isinstance(page, Exception):
                self._refuse(ErrorCode.UNAVAILABLE, "its answer could not be read; send it again", request.id)
                return
            parts += [item for item in page.publications if item.reply[1:] == request.id]
            if not parts or parts[0].position != position:
                self._refuse(ErrorCode.EXPIRED, "it was answered, and the answer is no longer kept", request.id)
                return
            is_complete = parts[-1].reply[0] == "."
            if page.is_complete:
                break
            offset = page.publications[-1].position.offset
        if is_complete and request.id in self._in_flight:
            if not self._is_told(position, parts[-1].position):
                for part in parts:
                    self._send_queue.put_recovered_nowait(part.frame)
            self._finish(request.id)

    def _is_told(self, begin: Position, end: Position) -> bool:
        """Whether a resumed client gets an answer, or had its begin and gets the rest, without being sent it again.

        It gets what comes after `since`; up to `joined_at` from history, which it may be about to read.
        """
        since, joined = self._own.since, self._own.joined_at
        if since is None or not (since.is_start or since.epoch == end.epoch):
            return False
        return end.offset > since.offset and (joined is None or begin.offset <= joined.offset)

    async def _cancel(self, request_id: str) -> None:
        try:
            await self._gate.broker.cancel(self._connection, request_id)
        except BrokerUnavailable as error:
            log.warning("a request was not cancelled: %s", error)

    async def _time_out(self, request: Request) -> None:
        body = b"no worker has begun to answer in time\n"
        headers = {"content-type": "text/plain; charset=utf-8"}
        head = protocol.response_head(request.id, 504, headers, body)
        key, reply = answer_key(request.id), "." + request.id
        try:
            draft = build_answer_draft(self._gate.settings, request.reply_to, head, key, reply)
            await self._gate.publisher.publish_drafts([draft])
        except PublishError as error:
            log.warning("a request was not answered 504: %s", error)
            self._refuse(ErrorCode.UNAVAILABLE, "its answer did not come; send it again", request.id)

    def _refuse(self, code: ErrorCode, message: str, request_id: str) -> None:
        self._send_queue.put_nowait(protocol.error(code, message, id=request_id))
        self._finish(request_id)

    def _finish(self, request_id: str) -> None:
        self._stop_timer(request_id)
        self._in_flight.pop(request_id, None)
        while self._backlog and len(self._in_flight) < self._gate.settings.in_flight:
            self._submit(self._backlog.popleft())

    def _stop_timer(self, request_id: str) -> None:
        timer = self._in_flight.get(request_id)
        if timer is not None:
            timer.cancel()
            self._in_flight[request_id] = None
