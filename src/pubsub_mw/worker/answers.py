"""Turn what the application says into publications on the client's own channel.

In:     an answer's head, its chunks, its end
Out:    drafts, in order, each with an idempotency key; and whether the answer is complete
Owns:   which headers go to a client, and whether an answer goes out whole or in parts
Never:  lets Set-Cookie, or any header that is not listed, near a script or into history

An answer that is short and complete is one `response`. Otherwise it is `response_start`, a `response_chunk` per chunk
of the application, `response_end`. Chunks are counted under one key, so a view that is run again after its worker died
goes on where the first run broke off, as far as it says the same again. A short answer to a request whose first run had
begun to stream goes out in parts too: the client waits for their end.
"""

import logging
from collections.abc import Sequence

from pubsub_mw import protocol
from pubsub_mw.broker.interface import answer_key, end_key, part_key
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.model import Draft, Request
from pubsub_mw.settings import Settings

__all__ = ["Answer"]

log = logging.getLogger("pubsub_mw")

_HEADERS = frozenset(
    "allow cache-control content-disposition content-language content-type etag expires last-modified link location "
    "retry-after vary www-authenticate x-request-id".split()
)
"""Response headers that a client gets."""

_CHUNK_BYTES = 1 << 16
"""A longer chunk is cut into several."""


class Answer:
    """One request's answer while it is made.

    Args:
        request: what it answers
        settings: of the worker
        has_begun: an earlier run has published the begin of an answer
    """

    def __init__(self, request: Request, settings: Settings, *, has_begun: bool = False) -> None:
        self.request = request
        self._settings = settings
        self.status = 500
        self.headers: dict[str, str] = {}
        self._held: bytes | None = None  # the first chunk, while it may still be the only one
        self._parts = 0
        self.is_started = has_begun
        self.is_complete = False

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Take the status line and headers; nothing goes out yet."""
        self.status = status
        self.headers = {}
        for name, value in headers:
            name = name.lower()
            if name in _HEADERS:
                self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
            elif name == "set-cookie":
                log.error(
                    "%s %s set a cookie on a request that came through a connection; it was dropped: "
                    "a script could read it. Set cookies over HTTP",
                    self.request.method,
                    self.request.path,
                )

    def whole(self, body: bytes) -> list[Draft]:
        """Finish with `body`, all of it."""
        if not self.is_started and len(body) <= _CHUNK_BYTES:
            head = protocol.response_head(self.request.id, self.status, self.headers, body)
            self.is_complete = True
            return [self._draft(head, answer_key(self.request.id), ".")]
        return [*self.start(), *self.chunk(body), *self.end(None)]

    def refuse(self, status: int, reason: str) -> list[Draft]:
        """Finish in the place of the application; an answer that has begun can only be broken off."""
        if self.is_started:
            return self.end(reason)
        self.head(status, [("content-type", "text/plain; charset=utf-8")])
        return self.whole(f"{reason}\n".encode())

    def chunk(self, body: bytes) -> list[Draft]:
        """Take a chunk. The first one is held until the next, the end, or `start`."""
        if not self.is_started:
            if self._held is None:
                self._held = body
                return []
            return [*self.start(), *self.chunk(body)]
        return [
            self._part(protocol.response_chunk_head(self.request.id, body[begin : begin + _CHUNK_BYTES]))
            for begin in range(0, len(body), _CHUNK_BYTES)
        ]

    def start(self) -> list[Draft]:
        """Begin to answer in parts, with what is held."""
        if self.is_started or self.is_complete:
            return []
        head = protocol.response_start_head(self.request.id, self.status, self.headers)
        self.is_started = True
        held, self._held = self._held, None
        drafts = [self._draft(head, answer_key(self.request.id), ">")]
        return drafts + (self.chunk(held) if held else [])

    def end(self, problem: str | None) -> list[Draft]:
        """Finish. A problem before anything went out is a plain 500."""
        if self.is_complete:
            return []
        if not self.is_started:
            held, self._held = self._held, None
            return self.whole(held or b"") if problem is None else self.refuse(500, "Internal Server Error")
        self.is_complete = True
        head = protocol.response_end_head(self.request.id, problem)
        return [self._draft(head, end_key(self.request.id), ".")]

    def _part(self, head: bytes) -> Draft:
        self._parts += 1
        return self._draft(head, part_key(self.request.id), "-", self._parts)

    def _draft(self, head: bytes, key: str, mark: str, part: int = 0) -> Draft:
        return build_answer_draft(self._settings, self.request.reply_to, head, key, mark + self.request.id, part)
