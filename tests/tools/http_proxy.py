"""Stand between a page and a server as the proxy of a company does: refuse, hold back, and cut what it does not like.

In:     HTTP requests to `port`, one per connection, whatever the client would like
Out:    the same requests to `target_port`, and the answers, as the rules of the moment allow
Owns:   the rules, per transport; which requests came, per transport
Never:  changes a body
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

__all__ = ["HttpProxy"]

_KINDS = {b"/events": "sse", b"/poll": "longpoll", b"/send": "send"}
_REFUSAL = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass(eq=False)
class _Link:
    kind: str
    task: "asyncio.Task[None]"
    moved_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class HttpProxy:
    """A port in front of `target_port`. Kinds are `websocket`, `sse`, `longpoll`, `send` and `page`.

    Attributes:
        refused: kinds that are answered 403
        held: kinds whose answers are kept back until they are complete
        idle_seconds: after which a connection that carries nothing is cut; None: never
        seen: how many requests came, by kind
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.refused: set[str] = set()
        self.held: set[str] = set()
        self.idle_seconds: float | None = None
        self.seen: Counter[str] = Counter()
        self._frozen: set[_Link] = set()
        self._links: set[_Link] = set()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator["HttpProxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*(link.task for link in self._links), return_exceptions=True)
            await server.wait_closed()

    def refuse(self, *kinds: str) -> None:
        """Refuse these from now on, and no others; end those that are there."""
        self.refused = set(kinds)
        self.cut(*kinds)

    def cut(self, *kinds: str) -> None:
        """End every connection of these kinds; of all, if none is named."""
        for link in self._links:
            if not kinds or link.kind in kinds:
                link.task.cancel()

    def freeze(self) -> None:
        """Carry nothing more on the connections that are there, and keep them open."""
        self._frozen |= self._links

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one of the two is gone, or it was cut
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].partition(b"?")[0]
        is_websocket = b"upgrade: websocket" in head.lower()
        kind = "websocket" if is_websocket else next((k for end, k in _KINDS.items() if path.endswith(end)), "page")
        self.seen[kind] += 1
        if kind in self.refused:
            writer.write(_REFUSAL)
            await writer.drain()
            return
        if not is_websocket:
            head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head[:-4]) + b"\r\nConnection: close\r\n\r\n"
        up, down = await asyncio.open_connection("127.0.0.1", self.target_port)
        down.write(head)
        task = asyncio.current_task()
        assert task is not None
        link = _Link(kind, task)
        self._links.add(link)
        sides = [
            asyncio.create_task(self._pump(link, reader, down)),
            asyncio.create_task(self._pump(link, up, writer, is_held=kind in self.held)),
            asyncio.create_task(self._watch(link)),
        ]
        try:
            await asyncio.wait(sides[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
            down.transport.abort()

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_held: bool = False
    ) -> None:
        kept = b""
        while data := await source.read(65_536):
            if link in self._frozen:
                await asyncio.Event().wait()
            kept += data
            if not is_held:
                link.moved_at = asyncio.get_running_loop().time()
                sink.write(kept)
                await sink.drain()
                kept = b""
        sink.write(kept)

    async def _watch(self, link: _Link) -> None:
        while True:
            await asyncio.sleep(0.02)
            idle = asyncio.get_running_loop().time() - link.moved_at
            if self.idle_seconds is not None and idle > self.idle_seconds:
                return
