"""Speak the wire as its specification says, and know nothing else of the project.

In:     frames, as dicts of docs and specification
Out:    what the server sent, in order; how it closed
Owns:   one WebSocket and the one task that reads it
Never:  imports `pubsub_mw`, so that a mistake in it cannot cancel itself out here
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from ssl import SSLContext
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from tests.tools.clock import MS

__all__ = ["Frame", "RawClient"]

Frame = dict[str, Any]


class RawClient:
    """One connection. Use as `async with await RawClient.connect(url) as client`, or through the `raw_client` fixture.

    Attributes:
        received: every frame so far, in order, pings too
        code, reason: of the close, None until it happened
    """

    def __init__(self, websocket: ClientConnection, answer_pings: bool) -> None:
        self.websocket = websocket
        self.answer_pings = answer_pings
        self.received: list[Frame] = []
        self.code: int | None = None
        self.reason: str | None = None
        self._waiting: list[Frame] = []  # received, and not yet returned by `recv`
        self._changed = asyncio.Condition()
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._reader = asyncio.create_task(self._read(), name="raw client")

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        origin: str | None = None,
        headers: Mapping[str, str] | None = None,
        ssl: SSLContext | None = None,
        local_address: str | None = None,
        answer_pings: bool = True,
        timeout: float = 10_000 * MS,
    ) -> "RawClient":
        """Open the WebSocket, and send nothing yet. A refused handshake raises `websockets.InvalidStatus`."""
        websocket = await connect_websocket(
            url,
            origin=None if origin is None else Origin(origin),
            additional_headers=dict(headers or {}),
            ssl=ssl,
            local_addr=(local_address, 0) if local_address else None,
            compression=None,
            ping_interval=None,
            proxy=None,
            open_timeout=timeout,
            close_timeout=1,
            max_size=None,
            max_queue=1,  # so that `pause` soon stops the socket itself
        )
        return cls(websocket, answer_pings)

    async def hello(self, timeout: float = 10_000 * MS, **fields: Any) -> Frame:
        """Send `connect` with `fields` (`grant`, `resume`, `channels`) and return the `connected` frame."""
        await self.send({"type": "connect", **fields})
        return await self.recv("connected", timeout=timeout)

    async def send(self, frame: Frame | str | bytes) -> None:
        """Send a dict as JSON; text and bytes go out as they are, for what no client should send."""
        await self.websocket.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def recv(self, type: str | None = None, channel: str | None = None, timeout: float = 10_000 * MS) -> Frame:  # noqa: A002
        """Return the oldest frame not yet returned that has this type and channel; frames passed over wait their turn.

        Pings are left out. Fails with all that came when nothing fits in time, or when the connection ends first.
        """

        def find() -> Frame | None:
            for frame in self._waiting:
                if type in (None, frame.get("type")) and channel in (None, frame.get("channel")):
                    self._waiting.remove(frame)
                    return frame
            return None

        wanted = " ".join(filter(None, (type or "any frame", channel)))
        try:
            async with asyncio.timeout(timeout), self._changed:
                while (frame := find()) is None:
                    if self.code is not None:
                        raise AssertionError(
                            f"closed with {self.code} {self.reason!r} before {wanted}; {self._story()}"
                        )
                    await self._changed.wait()
                return frame
        except TimeoutError:
            raise AssertionError(f"no {wanted} within {timeout:g} s; {self._story()}") from None

    def messages(self, channel: str) -> list[Any]:
        """The `data` of every message on `channel` so far, in the order in which they came."""
        return [f["data"] for f in self.received if f.get("type") == "message" and f.get("channel") == channel]

    async def closed(self, timeout: float = 10_000 * MS) -> tuple[int, str]:
        """Wait for the connection to end; its code and reason, 1006 when it ended without a close frame."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self.code is not None)
        except TimeoutError:
            raise AssertionError(f"still open after {timeout:g} s; {self._story()}") from None
        return self.code or 0, self.reason or ""

    def pause(self) -> None:
        """Stop reading from the socket, as a client that cannot keep up does."""
        self._may_read.clear()

    def resume(self) -> None:
        self._may_read.set()

    async def close(self) -> None:
        """Close as a tab does, and wait for the reader to end."""
        self._may_read.set()
        await self.websocket.close()
        await self._reader

    def abort(self) -> None:
        """Drop the connection without a word, as a lost network does."""
        self._may_read.set()
        self.websocket.transport.abort()

    async def __aenter__(self) -> "RawClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self) -> None:
        try:
            while True:
                await self._may_read.wait()
                frame: Frame = json.loads(await self.websocket.recv())
                if frame.get("type") == "ping" and self.answer_pings:
                    with contextlib.suppress(ConnectionClosed):  # what came before the close is still to be read
                        await self.send({"type": "pong"})
                async with self._changed:
                    self.received.append(frame)
                    if frame.get("type") != "ping":
                        self._waiting.append(frame)
                    self._changed.notify_all()
        except ConnectionClosed:
            pass
        finally:
            async with self._changed:
                self.code = self.websocket.close_code or 1006
                self.reason = self.websocket.close_reason
                self._changed.notify_all()

    def _story(self) -> str:
        return "received: " + (", ".join(json.dumps(frame)[:300] for frame in self.received[-20:]) or "nothing")
