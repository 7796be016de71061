"""Stand between a client and a server, and bend the network.

In:     connections to `port`
Out:    the same bytes to and from `target_port`, as the current mode allows
Owns:   one thread with one event loop, so that tests, event loops and other processes can all go through it
Never:  delivers a stream with a hole in it. TCP does not: a connection that lost bytes stays dark until it is closed
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from tests.tools.ports import free_port

__all__ = ["Mode", "TcpProxy"]

T = TypeVar("T")

_CHUNK_BYTES = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Mode(Enum):
    """What happens to bytes that come in from either side."""

    PASS = auto()
    FREEZE = auto()  # not read, so they wait in the sender's kernel; they arrive after `pass_through`
    BLACKHOLE = auto()  # read and dropped, so the sender believes they arrived


@dataclass(eq=False)
class _Link:
    """One client and its way to the server."""

    client: socket.socket
    server: socket.socket | None = None
    is_dark: bool = False  # it lost bytes
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class TcpProxy:
    """A port in front of `target_port`. Every method may be called from any thread, while connections are open."""

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.target = (target_host, target_port)
        self.port = free_port()
        self.accepted = 0
        self.bytes_up = 0  # client to server, forwarded
        self.bytes_down = 0
        self._mode = Mode.PASS
        self._latency_seconds = 0.0
        self._cut_after: int | None = None
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._open_gate = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)

    def start(self) -> "TcpProxy":
        self._thread.start()
        self.accept()
        self.pass_through()
        return self

    @property
    def address(self) -> str:
        """`host:port`, to be put into a Redis URL or an HTTP one."""
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many are open now."""
        return self._call(lambda: len(self._links))

    def pass_through(self) -> None:
        """Forward again. What was frozen arrives; what a black hole took does not, and its connections stay dark."""
        self._set(Mode.PASS)

    def freeze(self) -> None:
        """Read nothing, keep everything open. At most one chunk per direction is already in hand, and kept."""
        self._set(Mode.FREEZE)

    def blackhole(self) -> None:
        """Take bytes and connections, pass nothing on."""
        self._set(Mode.BLACKHOLE)

    def latency(self, seconds: float) -> None:
        """Hold every chunk back for at least so long, in each direction."""
        self._call(lambda: setattr(self, "_latency_seconds", seconds))

    def cut_after(self, count: int | None) -> None:
        """Pass exactly `count` more bytes down from the server, then reset that connection, once. `None`: never."""
        self._call(lambda: setattr(self, "_cut_after", count))

    def reset(self) -> None:
        """Reset (RST) all open connections; new ones are served as before."""
        self._run(self._drop_all)

    def refuse(self) -> None:
        """Close the port: a new connection is refused at once, open ones go on."""
        self._run(self._stop_listening)

    def accept(self) -> None:
        """Take new connections again after `refuse`."""
        self._run(self._start_listening)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._stop_listening)
            self._run(self._drop_all)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()

    def __enter__(self) -> "TcpProxy":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # From here on down everything runs in the proxy's own thread.

    def _run(self, function: Callable[[], Coroutine[None, None, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(15)

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._run(call)

    def _set(self, mode: Mode) -> None:
        def change() -> None:
            self._mode = mode
            if mode is Mode.FREEZE:
                self._open_gate.clear()
            else:
                self._open_gate.set()

        self._call(change)

    async def _start_listening(self) -> None:
        if self._listener is not None:
            return
        listener = self._listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(1024)
        listener.setblocking(False)
        # Not a task that waits for the next one: cancelled when one has just come, it would leave that one open.
        self._loop.add_reader(listener, self._take_client, listener)

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _take_client(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # it is gone already
        self.accepted += 1
        link = _Link(client)
        self._links.add(link)
        link.task = self._loop.create_task(self._serve(link))

    async def _drop_all(self) -> None:
        links = {link for link in self._links if link.task}  # who comes while these end is not among them
        tasks = [link.task for link in links if link.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for link in links & self._links:  # whose task was cancelled before it had begun
            self._end(link, [link.client], is_orderly=False)

    async def _serve(self, link: _Link) -> None:
        """Carry one connection both ways. Ended by both sides in order it closes; ended otherwise it resets."""
        link.client.setblocking(False)
        ends = [link.client]
        is_orderly = False
        try:
            await self._open_gate.wait()
            link.is_dark = self._mode is Mode.BLACKHOLE
            link.server = socket.socket()
            link.server.setblocking(False)
            ends.append(link.server)
            if not link.is_dark:
                await self._loop.sock_connect(link.server, self.target)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link, link.client, link.server))
                if not link.is_dark:
                    both.create_task(self._pump(link, link.server, link.client))
            is_orderly = True
        except* OSError:
            pass  # either end reset, refused, or was cut
        finally:
            self._end(link, ends, is_orderly=is_orderly)

    def _end(self, link: _Link, ends: list[socket.socket], *, is_orderly: bool) -> None:
        self._links.discard(link)
        for end in ends:
            if not is_orderly:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.close()

    async def _pump(self, link: _Link, source: socket.socket, sink: socket.socket) -> None:
        is_down = source is link.server
        while data := await self._receive(source):
            if self._mode is Mode.BLACKHOLE:
                link.is_dark = True
            if link.is_dark:
                continue
            if is_down and self._cut_after is not None:
                data, left = data[: self._cut_after], max(0, self._cut_after - len(data))
                self._cut_after = left
            await self._loop.sock_sendall(sink, data)
            if is_down:
                self.bytes_down += len(data)
                if self._cut_after == 0:
                    self._cut_after = None
                    raise ConnectionResetError("cut as asked")
            else:
                self.bytes_up += len(data)
        if not link.is_dark:
            sink.shutdown(socket.SHUT_WR)

    async def _receive(self, source: socket.socket) -> bytes:
        await self._open_gate.wait()
        data = await self._loop.sock_recv(source, _CHUNK_BYTES)
        await self._open_gate.wait()
        if self._latency_seconds and self._mode is Mode.PASS:
            await asyncio.sleep(self._latency_seconds)
            await self._open_gate.wait()
        return data
