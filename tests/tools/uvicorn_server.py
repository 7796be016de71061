"""Run uvicorn within the test's process.

In:     uvicorn's configuration
Out:    `Server`, as uvicorn's own; `should_exit` ends it
Owns:   nothing
Never:  takes the signals, which are for whoever runs the tests; keeps a test waiting for the next tenth of a second
"""

import contextlib
import math
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
