"""Keep the frames that wait for one client.

In:     frames (UTF-8 JSON) from `hub` and `connection`, in the order they are to arrive; from `hub` as batches
Out:    the same frames, to the transport's write loop; at the end, a close code
Owns:   one deque and its byte counts; the bound is `send_queue_bytes`
Never:  waits in a put; drops a frame silently (a full queue closes the connection with SLOW)

Live frames count against the bound. Recovered ones do not: whoever puts them asks `is_low` first and, if it is not,
leaves a callback with `when_low`, so that recovery goes at the pace of the client.

A batch is handed to everybody who listens, so what can be made of it once is made once: a transport that writes
WebSocket frames itself takes `Batch.websocket` as it is, in a `put_batch` of its own.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from pubsub_mw.errors import CloseCode

__all__ = ["Batch", "SendQueue", "websocket_frame"]

_COSTLY_BYTES = 16_384
"""What takes the kernel about as long as the rest of a delivery."""


class Batch:
    """Publications of one channel that go out together, in offset order. Immutable; one for all who get them.

    Args:
        frames: at least one, each UTF-8 JSON

    Attributes:
        frames: the same
        cost: of one delivery, as a multiple of that of a small batch
        websocket: the frames as a server writes them to a WebSocket: text, whole, unmasked, without extensions. Source:
            RFC 6455 5.2
    """

    __slots__ = ("cost", "frames", "websocket")

    def __init__(self, frames: tuple[bytes, ...]) -> None:
        self.frames = frames
        self.websocket = websocket_frame(frames[0]) if len(frames) == 1 else b"".join(map(websocket_frame, frames))
        self.cost = 1 + len(self.websocket) // _COSTLY_BYTES


def websocket_frame(frame: bytes) -> bytes:
    """Return a frame as a server writes it to a WebSocket. Source: RFC 6455 5.2."""
    size = len(frame)
    if size < 126:
        return b"\x81%c%b" % (size, frame)
    if size < 1 << 16:
        return b"\x81\x7e" + size.to_bytes(2) + frame
    return b"\x81\x7f" + size.to_bytes(8) + frame


class SendQueue:
    """The queue of one connection. All methods belong to one event loop.

    Args:
        limit_bytes: of live frames that may wait
        low_bytes: at or below this recovery may put more
    """

    __slots__ = (
        "_frames",
        "_is_held",
        "_limit_bytes",
        "_live_bytes",
        "_low_bytes",
        "_on_closed",
        "_on_low",
        "_reader",
        "_total_bytes",
        "closed",
        "is_poll",
    )

    def __init__(self, limit_bytes: int, low_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._low_bytes = low_bytes
        self._frames: deque[tuple[bytes, int]] = deque()
        self._live_bytes = 0
        self._total_bytes = 0
        self._is_held = False
        self._reader: asyncio.Future[None] | None = None
        self._on_low: tuple[Callable[[], None], ...] = ()
        self._on_closed: Callable[[], object] | None = None
        self.closed: tuple[CloseCode, str] | None = None
        """Set once, to the close code and reason that end the connection."""
        self.is_poll = False

    def put_nowait(self, frame: bytes) -> None:
        """Append a live frame. At the bound the queue closes with SLOW; after that nothing more is taken."""
        size = len(frame)
        if self.closed is None:
            if self._live_bytes and self._live_bytes + size > self._limit_bytes:
                self.close(CloseCode.SLOW, f"more than {self._limit_bytes} bytes were waiting to be read")
                return
            self._live_bytes += size
            self._append(frame, size, size)

    def put_batch(self, batch: Batch) -> None:
        """Append live publications, as `put_nowait` does one after another. Called once per subscriber: it is the
        innermost step of a fan-out.
        """
        for frame in batch.frames:
            self.put_nowait(frame)

    def put_recovered_nowait(self, frame: bytes) -> None:
        """Append a frame from history; not bounded here but by `is_low`."""
        if self.closed is None:
            self._append(frame, len(frame), 0)

    def put_recovered_batch(self, batch: Batch) -> None:
        """Append publications from history, as `put_recovered_nowait` does one after another."""
        for frame in batch.frames:
            self.put_recovered_nowait(frame)

    def hold(self) -> None:
        """Keep what is put from now on until `release`, or until the queue closes."""
        self._is_held = True

    def put_first(self, frame: bytes) -> None:
        """Put a frame before all that is held."""
        self._total_bytes += len(frame)
        self._frames.appendleft((frame, 0))

    def release(self) -> None:
        """Let frames go out again: all that was held at once."""
        self._is_held = False
        self._wake()

    def _append(self, frame: bytes, size: int, live_size: int) -> None:
        self._total_bytes += size
        self._frames.append((frame, live_size))
        self._wake()

    def close(self, code: CloseCode, reason: str) -> None:
        """Say that the connection is to end; the first call counts. Frames that wait may still be sent."""
        if self.closed is None:
            self.closed = (code, reason)
            self._wake()
            self._tell_low()
            callback, self._on_closed = self._on_closed, None  # it leads back to here
            if callback is not None:
                callback()

    def when_closed(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the queue closes; the transport's way to bound its farewell."""
        self._on_closed = callback

    @property
    def is_low(self) -> bool:
        """Whether recovery may put more frames."""
        return self._total_bytes <= self._low_bytes

    def when_low(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when `is_low` becomes true or the queue closes."""
        self._on_low += (callback,)

    @property
    def waiting_bytes(self) -> int:
        """Bytes put and not yet taken."""
        return self._total_bytes

    def take_nowait(self) -> list[bytes]:
        """Take every frame that waits."""
        frames = [frame for frame, _ in self._frames]
        self._frames.clear()
        self._live_bytes = self._total_bytes = 0
        self._tell_low()
        return frames

    async def take(self) -> bytes:
        """Wait for the next frame and take it; b"" = the queue closed and nothing waits any more."""
        while not self._frames or (self._is_held and self.closed is None):
            if self.closed is not None:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frame, live_size = self._frames.popleft()
        self._total_bytes -= len(frame)
        self._live_bytes -= live_size
        if self._on_low and self.is_low:
            self._tell_low()
        return frame

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _tell_low(self) -> None:
        callbacks, self._on_low = self._on_low, ()
        for callback in callbacks:
            callback()
