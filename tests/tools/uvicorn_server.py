"""Run uvicorn within the test's process.

In:     uvicorn's configuration
Out:    `Server`, as uvicorn's own; `should_exit` ends it
Owns:   nothing
Never:  takes the signals, which are for whoever runs the tests; keeps a test waiting for the next tenth of a second
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn

from tests.tools.clock import eventually_async

__all__ = ["Server"]


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        """Do what uvicorn does once, and wait; uvicorn looks ten times in a second, and there are many tests."""
        await self.on_tick(0)
        await eventually_async(lambda: self.should_exit, math.inf)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Do what uvicorn does, which rests for a tenth of a second also where nothing is left to wait for."""
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        limit = self.config.timeout_graceful_shutdown
        try:
            async with asyncio.timeout(limit):
                await eventually_async(lambda: not state.connections and not state.tasks, math.inf)
                for server in self.servers:
                    await server.wait_closed()
        except TimeoutError:
            for task in state.tasks:
                task.cancel(msg="Task cancelled, timeout graceful shutdown exceeded")
        await self.lifespan.shutdown()
