"""Carry frames over a WebSocket.

In:     frames to send
Out:    frames as they arrive; how the link ended
Owns:   one WebSocket
Never:  connects again
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

__all__ = ["LinkLost", "WebSocketLink", "open_websocket", "websocket_url"]

_CLOSE_SECONDS = 2.0
_MAX_FRAME_BYTES = 64 << 20


class LinkLost(Exception):
    """A link ended, or did not come about.

    Attributes:
        code: the close code, if the server said one
    """

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.code = code


class WebSocketLink:
    """Frames both ways."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def send(self, frame: Mapping[str, Any]) -> None:
        """Send a frame; on a link that just broke it is lost without a word."""
        try:
            await self._socket.send(json.dumps(frame, allow_nan=False))
        except ConnectionClosed:
            pass  # what still counts is sent on the next link

    async def receive(self) -> dict[str, Any]:
        """Return the next frame.

        Raises:
            LinkLost: there will be no more.
        """
        try:
            frame: dict[str, Any] = json.loads(await self._socket.recv())
        except ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd is not None else (None, str(closed))
            raise LinkLost(reason, code) from None
        return frame

    def abort(self) -> None:
        """Drop the link without waiting for the other side's goodbye."""
        self._socket.transport.abort()


@asynccontextmanager
async def open_websocket(url: str, headers: Mapping[str, str], timeout: float) -> AsyncIterator[WebSocketLink]:
    """Open a link.

    Raises:
        LinkLost: it did not come about.
    """
    opening = connect(
        url,
        additional_headers=headers,
        max_size=_MAX_FRAME_BYTES,
        ping_interval=None,
        compression=None,
        open_timeout=timeout,
        close_timeout=_CLOSE_SECONDS,
    )
    try:
        socket = await opening
    except (OSError, TimeoutError, WebSocketException) as error:
        body: bytes = getattr(getattr(error, "response", None), "body", None) or b""  # says why it was refused
        raise LinkLost(f"{str(error) or type(error).__name__} {body[:200].decode(errors='replace')}".strip()) from error
    try:
        yield WebSocketLink(socket)
    finally:
        await socket.close()


def websocket_url(url: str) -> str:
    """Return where the WebSocket of an endpoint is.

    Raises:
        ValueError: `url` is none.
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise ValueError(f"{url!r} must be the ws://, wss://, http:// or https:// url of a realtime endpoint")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/", parts.query, ""))
