"""Serve ASGI apps inside the test's process, each in a thread and on an event loop of its own.

In:     an app
Out:    `Server`: its urls; stopped at the end
Owns:   the threads. Two servers share nothing but what the app shares: they meet in Redis only
Never:  starts a process: what a server does when it is killed is for `Processes`
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

import pubsub_mw.broker.redis.reader  # noqa: F401 - it reads files, which the event loop must not wait for
from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port
from tests.tools.uvicorn_server import Server as UvicornServer

__all__ = ["Server", "Servers"]


class Server:
    """One uvicorn in a thread."""

    def __init__(self, build: Callable[[], ASGIApp]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{self.port}/realtime/"
        config = uvicorn.Config(
            build(),
            port=self.port,
            log_config=None,
            ws="pubsub_mw.realtime.uvicorn_protocol:WebSocketProtocol",
            ws_ping_interval=None,
            lifespan="on",
        )
        config.timeout_graceful_shutdown = 1
        self._server = UvicornServer(config)
        self._thread = threading.Thread(target=self._server.run, name=f"server-{self.port}", daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started, 10_000 * MS, "the server does not start")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10_000 * MS)
        assert not self._thread.is_alive(), "the server does not stop"


class Servers:
    """The servers of one test."""

    def __init__(self) -> None:
        self._started: list[Server] = []

    async def start(self, build: Callable[[], ASGIApp]) -> Server:
        """Serve what `build` makes, in a thread, where it may read files."""
        server = await asyncio.to_thread(Server, build)
        self._started.append(server)
        return server

    async def close(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self._started))

    async def __aenter__(self) -> "Servers":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()
