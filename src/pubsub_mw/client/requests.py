"""Keep each request of the application until it is answered.

In:     requests; the frames of their answers; news of the link
Out:    `request` and `cancel` frames, in the order of the calls; responses, whose bodies may still be on their way
Owns:   every request that is not answered, in order; at most `max_pending` while not connected
Never:  takes a part of an answer twice; sends again what began to be answered, or what may have run for another
        connection
"""

import asyncio
import json
import string
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message as HeaderParser
from typing import Any, Self
from urllib.parse import quote, urlencode

from websockets.datastructures import Headers

from pubsub_mw.client.arrivals import Arrivals
from pubsub_mw.errors import ErrorCode, RequestFailed, RequestTimeout
from pubsub_mw.protocol import decode_body, encode_body

__all__ = ["Params", "Requests", "Response", "build_request", "is_newer"]

_MAX_PARTS = 1_000
"""Of one body, waiting to be read; beyond it nothing is read from the connection."""

Frame = dict[str, Any]
Params = Mapping[str, Any] | Sequence[tuple[str, Any]]


class Response:
    """The app's answer. It is there at the head of the answer; the body may still be on its way.

    Read the body, iterate over its parts, or `close` it: a body that nobody reads holds up the connection in the end.

    Attributes:
        status: 200, 404, ...
        headers: the app's, by names of any case
    """

    def __init__(self, status: int, headers: Mapping[str, str], cancel: Callable[[], None]) -> None:
        self.status = status
        self.headers = Headers(headers)
        self._arrivals = Arrivals[bytes](_MAX_PARTS)
        self._cancel = cancel
        self._body: bytes | None = None

    @property
    def ok(self) -> bool:
        """Whether the status is 200 to 299."""
        return 200 <= self.status < 300

    def raise_for_status(self) -> Self:
        """Return the response itself.

        Raises:
            RequestFailed: with code `status`: it is 400 or more.
        """
        if self.status >= 400:
            raise RequestFailed("status", f"the app answered {self.status}")
        return self

    async def read(self) -> bytes:
        """Return the body, or what was not iterated over.

        Raises:
            RequestFailed: it broke off.
        """
        if self._body is None:
            self._body = b"".join([part async for part in self])
        return self._body

    async def text(self) -> str:
        """Return the body as text, in the charset of its content type, by default UTF-8."""
        parser = HeaderParser()
        parser["content-type"] = self.headers.get("content-type", "text/plain")
        return (await self.read()).decode(parser.get_content_charset("utf-8"), errors="replace")

    async def json(self) -> Any:
        """Return the JSON of the body."""
        return json.loads(await self.read())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body as the app yields them, also over a reconnect.

        Raises:
            RequestFailed: it broke off.
        """
        while (part := await self._arrivals.take()) is not None:
            yield part

    async def close(self) -> None:
        """Want no more of it: if the view still streams, its iterator is closed. Idempotent."""
        self._arrivals.clear()
        self._arrivals.close()
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@dataclass(slots=True)
class _Pending:
    frame: Frame
    sent_on: int | None = None  # which link; None: never; 0: to be sent again
    position: str | None = None  # of the last part of the answer
    answered: "asyncio.Future[Response]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    response: Response | None = None


class Requests:
    """The requests of one connection.

    Args:
        send: a frame to the server; what the link loses, it loses silently
        tell: the same, beside what runs
        max_pending: requests that may wait while there is no connection
    """

    def __init__(
        self, send: Callable[[Frame], Awaitable[None]], tell: Callable[[Frame], object], max_pending: int
    ) -> None:
        self._send = send
        self._tell = tell
        self._max_pending = max_pending
        self._pending: dict[str, _Pending] = {}
        self._count = 0
        self._link = 0  # which one
        self._is_open = False

    async def fetch(self, frame: Frame, timeout: float | None, wait: bool) -> Response:
        """Return the answer to the request in `frame`, which gets its id here."""
        if not self._is_open and len(self._pending) >= (self._max_pending if wait else 0):
            reason = f"{len(self._pending)} requests wait for a connection already" if wait else "not connected now"
            raise RequestFailed("not_connected", reason)
        self._count += 1
        request_id = str(self._count)
        pending = self._pending[request_id] = _Pending(frame | {"id": request_id})
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
                return await pending.answered
        except TimeoutError:
            self._cancel(request_id)
            raise RequestTimeout(f"no answer within {timeout:g} s; it may still run") from None
        except BaseException:
            self._cancel(request_id)
            raise

    async def begin(self) -> None:
        """Send everything that did not begin to be answered: a new link stands."""
        self._link += 1
        await self.go_on()

    def pause(self) -> None:
        """Send nothing: the link is gone, or the server asked to wait."""
        self._is_open = False

    async def go_on(self) -> None:
        """Send again after `pause`."""
        self._is_open = True
        await self.flush()

    async def flush(self) -> None:
        """Send, in order, what this link has not carried yet."""
        for request_id, pending in list(self._pending.items()):
            if not self._is_open:
                return
            if request_id in self._pending and pending.response is None and pending.sent_on != self._link:
                pending.sent_on = self._link
                await self._send(pending.frame)

    async def receive(self, frame: Frame) -> None:
        """Take an answer, or a part of one."""
        request_id, kind, position = frame["id"], frame["type"], frame["position"]
        pending = self._pending.get(request_id)
        # After a reconnect the server may send a part that came before: once by recovery, once for the request that
        # was sent again.
        if pending is None or not is_newer(position, pending.position):
            return
        # It may have been cancelled a moment ago, and `fetch` did not run since.
        if pending.response is None and kind in ("response", "response_start") and not pending.answered.done():
            pending.response = Response(frame["status"], frame["headers"], lambda: self._cancel(request_id))
            pending.answered.set_result(pending.response)
        if pending.response is not None:
            if frame.get("body"):
                await pending.response._arrivals.put(decode_body(frame))
            if kind in ("response", "response_end"):
                problem = frame.get("error")
                self._finish(request_id, problem and RequestFailed("broken_off", problem))
        pending.position = position

    def refuse(self, frame: Frame) -> str | None:
        """Take an `error` that names a request; return its code if the request is to be sent again later."""
        pending = self._pending.get(frame["id"])
        if pending is not None and frame["code"] == ErrorCode.UNAVAILABLE:
            pending.sent_on = 0
            self.pause()  # all wait, to keep their order
            return ErrorCode.UNAVAILABLE
        self._finish(frame["id"], RequestFailed(frame["code"], frame["message"]))
        return None

    def abandon(self, reason: str, *, is_over: bool = False) -> None:
        """Give up what was sent, for it may have run and its answer is lost; if `is_over`, all."""
        for request_id, pending in list(self._pending.items()):
            if pending.sent_on is not None:
                self._finish(request_id, RequestFailed("connection_lost", f"it may have run; {reason}"))
            elif is_over:
                self._finish(request_id, RequestFailed("not_connected", f"it was not sent; {reason}"))

    def _cancel(self, request_id: str) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            if self._is_open and pending.sent_on is not None:
                self._tell({"type": "cancel", "id": request_id})
            self._finish(request_id, RequestFailed(ErrorCode.CANCELLED, "cancelled here"))

    def _finish(self, request_id: str, error: RequestFailed | None = None) -> None:
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        if pending.response is not None:
            pending.response._arrivals.close(error)
        if not pending.answered.done() and error is not None:
            pending.answered.set_exception(error)
            pending.answered.exception()  # whoever still waits gets it; nobody has to


def build_request(
    path: str,
    method: str | None,
    params: Params | None,
    headers: Mapping[str, str] | None,
    body: bytes | str | None,
    json_value: object,
    max_bytes: int,
) -> Frame:
    """Return the `request` frame of a call, without its id.

    Raises:
        ValueError: `path` does not begin with `/`, or there are both a body and JSON.
        TypeError, ValueError: `json_value` is not JSON, or `body` neither text nor bytes.
        RequestFailed: it is over `max_bytes`.
    """
    if not path.startswith("/"):
        raise ValueError(f"path={path!r:.100} must be a path of the app, such as /rooms/42/messages")
    if params:
        path += ("&" if "?" in path else "?") + urlencode(params, doseq=True)
    fields = dict(headers or {})
    if json_value is not None:
        if body is not None:
            raise ValueError("give body or json, not both")
        body = json.dumps(json_value, allow_nan=False)
        if not any(name.lower() == "content-type" for name in fields):
            fields["Content-Type"] = "application/json"
    frame: Frame = {
        "type": "request",
        "method": method or ("GET" if body is None else "POST"),
        "path": quote(path, safe=string.punctuation),
        "headers": fields,
    }
    if body is not None:
        frame |= encode_body(body.encode() if isinstance(body, str) else bytes(memoryview(body)))
    size_bytes = len(json.dumps(frame).encode()) + 100  # its id comes yet
    if size_bytes > max_bytes:
        raise RequestFailed(
            ErrorCode.TOO_LARGE, f"the request is {size_bytes} bytes as a frame, over {max_bytes}; send it by HTTP"
        )
    return frame


def is_newer(position: str, than: str | None) -> bool:
    """Whether `position` is one to advance to. Positions of different epochs are always."""
    epoch, _, rest = position.partition(".")
    last_epoch, _, last_rest = (than or "").partition(".")
    return epoch != last_epoch or int(rest.partition(".")[0]) > int(last_rest.partition(".")[0])
