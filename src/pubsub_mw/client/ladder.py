"""Choose the transport: the best one that truly delivers.

In:     how links begin and end; which of them carried a ping
Out:    the next link
Owns:   the transports that may be used, the best first, and which of them is used now
Never:  leaves a transport that has delivered, for having broken
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from pubsub_mw.client.http import HttpLink, open_http
from pubsub_mw.client.websocket import LinkLost, WebSocketLink, open_websocket

__all__ = ["TRANSPORTS", "Ladder", "backoff"]

TRANSPORTS = ("websocket", "sse", "longpoll")

_BASE_SECONDS, _CAP_SECONDS = 0.5, 20.0
_CLIMB_PATIENCE = 40.0
"""Times the longest back-off: until a better transport is tried."""


def backoff(attempt: int, chance: float) -> float:
    """Return how many seconds to wait before attempt `attempt` (from 0), with full jitter; `chance` is 0 to 1."""
    return chance * min(_CAP_SECONDS, _BASE_SECONDS * 2.0 ** min(attempt, 16))


class Ladder:
    """The transports of one connection."""

    def __init__(self, url: str, headers: Mapping[str, str], transports: tuple[str, ...]) -> None:
        self.transports = transports
        self._url = url
        self._headers = headers
        self._level = 0
        self._climbs = 0
        # A ping came, so the link stands idle time, and nobody keeps back what comes.
        self._has_delivered = False

    @property
    def transport(self) -> str:
        return self.transports[self._level]

    @property
    def is_on_top(self) -> bool:
        return self._level == 0

    def open(
        self, timeout: float, positions: Callable[[], Mapping[str, str | None]]
    ) -> AbstractAsyncContextManager[WebSocketLink | HttpLink]:
        """Return a link by the transport of now, to be entered."""
        self._has_delivered = False
        if self.transport == "websocket":
            return open_websocket(self._url, self._headers, timeout)
        return open_http(self._url, self._headers, self.transport, positions)

    def delivered(self) -> None:
        """Note that a ping came."""
        self._has_delivered = True
        if self.is_on_top:
            self._climbs = 0

    def fall(self) -> None:
        """Go to the next transport, unless this one has shown that it delivers."""
        if not self._has_delivered:
            self._level = (self._level + 1) % len(self.transports)

    async def climb(self, timeout: float) -> None:
        """Return when a better transport is to be used, which is then the one of now.

        A WebSocket is tried beside what there is; a stream would take the place of the polls in any case.
        """
        while True:
            await asyncio.sleep(_CLIMB_PATIENCE * backoff(self._climbs, 1.0))
            self._climbs += 1
            better = self._level - 1
            if self.transports[0] == "websocket":
                try:
                    async with open_websocket(self._url, self._headers, timeout):
                        better = 0
                except LinkLost:
                    if better == 0:
                        continue
            self._level, self._has_delivered = better, True
            return
