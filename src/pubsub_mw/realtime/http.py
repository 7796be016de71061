"""Read credentials, channels and places out of an HTTP request, and say in HTTP what is refused.

In:     query strings and headers
Out:    what was asked for; or a `Refusal`, with its status and a sentence
Owns:   which status says what; the CORS headers
Never:  takes a grant or a resume token from a URL; allows a page with `*` to use cookies

Source: Fetch Standard, "CORS protocol"; RFC 6750 2.1 (Bearer).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pubsub_mw import protocol
from pubsub_mw.errors import CloseCode, ErrorCode, FrameError, GrantError
from pubsub_mw.grants import Resume, verify_resume
from pubsub_mw.model import Handshake
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.cursor import Cursor
from pubsub_mw.realtime.origin import names_origin
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.settings import Settings

__all__ = [
    "NO_STORE",
    "Endpoint",
    "Refusal",
    "Wanted",
    "bearer",
    "connect",
    "json_response",
    "read_json",
    "read_query",
    "read_resume",
    "read_wanted",
    "until_gone",
]

NO_STORE = {"cache-control": "no-store, no-transform", "x-content-type-options": "nosniff"}

_STATUS = {
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.BUSY: 503,
    ErrorCode.GRANT_INVALID: 401,
    ErrorCode.GRANT_EXPIRED: 401,
    ErrorCode.REVOKED: 401,
    ErrorCode.TOO_LARGE: 413,
}
"""Everything else was asked for wrongly: 400."""

_CLOSED = {
    CloseCode.GRANT_INVALID: ErrorCode.GRANT_INVALID,
    CloseCode.GRANT_EXPIRED: ErrorCode.GRANT_EXPIRED,
    CloseCode.DISCONNECTED: ErrorCode.REVOKED,
}
"""What ended a connection before it began. Everything else may be tried again: 503."""

_MAX_AGE = "7200"
"""Seconds that a browser remembers a preflight; Chromium keeps none longer."""


class Refusal(Exception):
    """A request is refused.

    Attributes:
        status: of HTTP
        code: for programs
        message: for people
    """

    def __init__(self, status: int, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def response(self) -> Response:
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        elif self.status in (429, 503):
            headers["retry-after"] = "2"
        return json_response({"error": {"code": self.code, "message": self.message}}, self.status, headers)


def _frame_refusal(error: FrameError) -> Refusal:
    """Say in HTTP what would be an `error` frame."""
    subject = f"{error.channel}: " if error.channel else ""
    return Refusal(_STATUS.get(error.code, 400), error.code, f"{subject}{error}")


def _closed_refusal(closed: tuple[CloseCode, str]) -> Refusal:
    """Say in HTTP why a connection ended before it began."""
    code = _CLOSED.get(closed[0], ErrorCode.UNAVAILABLE)
    return Refusal(_STATUS[code], code, closed[1])


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    return Response(body, status, {**NO_STORE, **(headers or {})}, "application/json")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a stream or a poll asks for.

    Attributes:
        channels: in the order asked for -> the position to go on from, or None
        cursor: where the client says it is
    """

    channels: dict[str, str | None]
    cursor: Cursor


def read_query(scope: Mapping[str, Any], max_channels: int) -> dict[str, list[str]]:
    """Return the fields of the query string.

    Raises:
        Refusal: there are too many, or it is none.
    """
    try:
        return parse_qs(
            scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=2 * max_channels + 32
        )
    except ValueError as error:
        raise Refusal(400, ErrorCode.BAD_FRAME, f"the query string: {error}") from None


def read_wanted(query: Mapping[str, list[str]], handshake: Handshake, resume: Resume | None) -> Wanted:
    """Read `channel=`, `position=`, `cursor=` and `Last-Event-ID`; channels that are not named are those of `resume`,
    and of its own, which are listened to in any case, the places.

    Where several tell where a channel was left, the header counts before the cursor and the cursor before the position:
    an EventSource comes back with the header, and with the url that it began with.

    Raises:
        Refusal: one is wrong, or there are none and no connection either.
    """
    names, positions = query.get("channel", []), query.get("position", [])
    if positions and len(positions) != len(names):
        message = "give position= as often as channel=, in the same order; empty = none"
        raise Refusal(400, ErrorCode.BAD_POSITION, message)
    given = dict(zip(names, positions or [""] * len(names), strict=True))
    if not given and resume is None:
        raise Refusal(400, ErrorCode.BAD_CHANNEL, "name what to listen to: ?channel=news&channel=room:42")
    for name, position in resume.channels.items() if resume is not None else ():
        if not names or name.startswith("#"):
            given.setdefault(name, position or "")
    first = next(iter(given), "")
    cursor = Cursor(first)
    for text in (*query.get("cursor", [])[-1:], handshake.first("last-event-id")):
        if text:
            try:
                cursor.add(Cursor.parse(text, first))
            except ValueError:
                message = f"cursor {text!r:.80} is none; give back one that a server sent, unchanged"
                raise Refusal(400, ErrorCode.BAD_POSITION, message) from None
    channels = {name: cursor.at(name) or position or None for name, position in given.items()}
    return Wanted(channels, cursor)


def bearer(handshake: Handshake) -> str | None:
    """Return what `Authorization: Bearer` shows, or None if nothing is shown.

    Raises:
        Refusal: it shows something else.
    """
    header = handshake.first("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(401, ErrorCode.GRANT_INVALID, "Authorization must be: Bearer, a blank, and the token")
    return token.strip()


def read_resume(shared: Shared, token: str | None, use: str = "resume") -> Resume | None:
    """Return what a resume token restores; None = none is shown.

    Raises:
        Refusal: it is not one of ours, or too old.
    """
    if token is None:
        return None
    try:
        return verify_resume(shared.secret, token, now=time.time(), use=use)
    except GrantError as error:
        raise Refusal(401, error.code, f"{error}; connect anew") from error


async def until_gone(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def connect(
    connection: Connection,
    wanted: Wanted,
    resume: Resume | None,
    *,
    needs_all: bool = False,
    takes_over: bool = True,
) -> None:
    """Begin a connection over HTTP; see `Connection.connect`.

    Raises:
        Refusal: it cannot be.
    """
    command = protocol.Connect(grant=None, resume=None, channels=wanted.channels)
    try:
        await connection.connect(command, resume, recall=wanted.cursor.at, needs_all=needs_all, takes_over=takes_over)
    except FrameError as error:
        raise _frame_refusal(error) from error
    if connection.send_queue.closed is not None:
        raise _closed_refusal(connection.send_queue.closed)
    if resume is not None and connection.id != resume.connection:
        raise _closed_refusal((CloseCode.DISCONNECTED, "the application ended this connection; connect anew"))


async def read_json(receive: Receive, handshake: Handshake, limit_bytes: int, seconds: float) -> Any:
    """Return what a POST says. What a form could send is not JSON.

    Raises:
        Refusal: of another kind, too large, too slow, or not JSON.
    """
    kind = (handshake.first("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, ErrorCode.UNSUPPORTED, "send application/json")
    too_large = Refusal(413, ErrorCode.TOO_LARGE, f"a body may have {limit_bytes} bytes")
    declared = handshake.first("content-length") or ""
    # As long a number as Python does not read is too large in any case.
    if declared.isdecimal() and (len(declared) > 100 or int(declared) > limit_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            more_body = True
            while more_body:
                message = await receive()
                body += message.get("body", b"")
                more_body = message.get("more_body", False)
                if len(body) > limit_bytes:
                    raise too_large
        return protocol.read_json(body)
    except TimeoutError:
        raise Refusal(408, ErrorCode.BAD_FRAME, f"the body did not come within {seconds:g} s") from None
    except orjson.JSONDecodeError as error:
        raise Refusal(400, ErrorCode.BAD_FRAME, f"the body is not JSON: {error}") from None


class Endpoint:
    """One route that transports use: its method, the refusals, and what a browser asks before a page of another origin.

    Args:
        method: the one that it serves
        serve: answers, or raises a `Refusal`
        refuse: answers then
    """

    def __init__(
        self,
        settings: Settings,
        method: str,
        serve: "Serve",
        refuse: Callable[[Refusal, Scope, Handshake], Response] = lambda refusal, _scope, _handshake: (
            refusal.response()
        ),
    ) -> None:
        self._settings = settings
        self._method = method
        self._serve = serve
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handshake = Handshake.from_scope(scope)
        cors = _cors_headers(handshake, self._settings.origins)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *cors]
            await send(message)

        if scope["method"] == self._method:
            try:
                await self._serve(scope, receive, send_with_cors, handshake)
            except Refusal as refusal:
                await self._refuse(refusal, scope, handshake)(scope, receive, send_with_cors)
        else:
            await self._other(scope["method"])(scope, receive, send_with_cors)

    def _other(self, method: str) -> Response:
        headers = {"allow": f"{self._method}, OPTIONS"}
        if method != "OPTIONS":
            return Response(status_code=405, headers=headers)
        headers |= {
            "access-control-allow-methods": self._method,
            "access-control-allow-headers": "authorization, cache-control, content-type, last-event-id",
            "access-control-max-age": _MAX_AGE,
        }
        return Response(status_code=204, headers=headers)


Serve = Callable[[Scope, Receive, Send, Handshake], Awaitable[None]]


def _cors_headers(handshake: Handshake, origins: tuple[str, ...]) -> list[tuple[bytes, bytes]]:
    """Return the headers by which a browser lets an allowed page of another origin read the answer.

    A page that is allowed by name may use cookies. One that is allowed by `*` may not.
    """
    headers, origin = [(b"vary", b"origin")], handshake.first("origin")
    if origin is not None and names_origin(origins, origin):
        headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
        headers.append((b"access-control-allow-credentials", b"true"))
    elif "*" in origins:
        headers.append((b"access-control-allow-origin", b"*"))
    return headers
