"""Decide what clients may request of the application, and with which headers.

In:     `request` frames, and who sent them
Out:    requests for the queue; or `FrameError`, which says what is not allowed
Owns:   the patterns of paths; the list of headers
Never:  lets through a path that no pattern allows, or that two programs could read differently, or a header that only
        a proxy or the handshake may set
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import unquote_to_bytes

from pubsub_mw import protocol
from pubsub_mw.errors import ErrorCode, FrameError
from pubsub_mw.model import ConnectionId, Handshake, Request, channel_of_connection, compile_patterns
from pubsub_mw.settings import Settings

__all__ = ["RequestCheck"]

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
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+._^`|~-]+\Z")  # RFC 9110 5.6.2
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_QUERY = re.compile(r"[!-\"$-~]*\Z")


class RequestCheck:
    """What clients may request, and with which headers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._is_allowed = compile_patterns(settings.requests)
        self.refused: Counter[ErrorCode] = Counter()  # for `metrics`
        self._headers = _HEADERS | {name.lower() for name in settings.request_headers}

    def check(
        self,
        frame: protocol.RequestFrame,
        connection: ConnectionId,
        user: str | None,
        handshake: Handshake,
        transport: str = "websocket",
    ) -> Request:
        """Return the request for the queue.

        Raises:
            FrameError: a part of it is not allowed.
        """

        def refused(code: ErrorCode, message: str) -> FrameError:
            self.refused[code] += 1
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
            transport=transport,
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
