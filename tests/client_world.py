"""Give a client something to talk to: a real endpoint, and one that says what a test says.

In:     settings; frames
Out:    urls
Owns:   a uvicorn on the test's own event loop; or a WebSocket server without a mind of its own
Never:  leaves a task behind
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Self

import uvicorn
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import pubsub_mw.broker.redis.reader  # noqa: F401 - otherwise imported, and its files read, on the event loop
from pubsub_mw.asgi import with_realtime
from pubsub_mw.publisher import AsyncPublisher, Publisher
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.uvicorn_server import Server

__all__ = ["Endpoint", "ScriptedServer"]


async def _no_app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001 - the ASGI signature
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Endpoint:
    """A realtime endpoint on a port that stays the same; `async with Endpoint(...)` starts it.

    Args:
        url: the broker
        app: what is served beside it
        settings: any of `Settings`
    """

    def __init__(self, url: str, *, app: Any = _no_app, **settings: Any) -> None:
        self._beside = app
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/realtime"
        self.publisher = AsyncPublisher(url, **settings)
        self._arguments = {"url": url, **settings}
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        # In a thread: it reads files.
        app = await asyncio.to_thread(lambda: with_realtime(self._beside, **self._arguments))
        config = uvicorn.Config(
            app,
            port=self.port,
            log_level="critical",
            log_config=None,
            ws="pubsub_mw.realtime.uvicorn_protocol:WebSocketProtocol",
            ws_ping_interval=None,
            lifespan="off",
            timeout_graceful_shutdown=1,  # else it waits for streams to end by themselves
        )
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self._app, self._server = app, Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        await eventually_async(lambda: self._server is not None and self._server.started)

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
            # What a lifespan would do.
            await self._app._stop_worker()  # type: ignore[attr-defined]
            await self._app.realtime.stop()  # type: ignore[attr-defined]
            self._server = self._task = None

    async def grant(self, **rights: Any) -> str:
        publisher = Publisher(**self._arguments)
        return await asyncio.to_thread(lambda: publisher.grant(**rights))

    async def disconnect(self, *, user: str) -> None:
        publisher = Publisher(**self._arguments)
        await asyncio.to_thread(lambda: publisher.disconnect(user=user))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self.publisher.close()


class ScriptedServer:
    """A server that says nothing by itself; for what a real one does only by bad luck.

    `accept` returns the next connection that came; `hear` and `say` are one frame each on the last one accepted.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}/realtime"
        self._accepted: asyncio.Queue[ServerConnection] = asyncio.Queue()
        self._socket: ServerConnection | None = None
        self._count = 0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator["ScriptedServer"]:
        async def handle(socket: ServerConnection) -> None:
            self._accepted.put_nowait(socket)
            await socket.wait_closed()

        async with serve(handle, "127.0.0.1", self.port, ping_interval=None, close_timeout=0.1):
            yield self

    @property
    def socket(self) -> ServerConnection:
        assert self._socket is not None
        return self._socket

    async def accept(self) -> dict[str, Any]:
        """Wait for a connection; its `connect` frame."""
        async with asyncio.timeout(10_000 * MS):
            self._socket = await self._accepted.get()
        return await self.hear()

    async def welcome(self, ping: float = 25.0) -> dict[str, Any]:
        """Accept a connection and say `connected`; its `connect` frame."""
        frame = await self.accept()
        await self.say("connected", connection="c1", resume="token", user=None, ping=ping)
        return frame

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(10_000 * MS):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
        return frame

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def say_subscribed(self, channel: str, position: str = "e.0.a", *, recovered: bool | None = None) -> None:
        await self.say("subscribed", channel=channel, position=position, recovered=recovered)

    async def say_message(self, channel: str, data: object, offset: int) -> None:
        await self.say("message", channel=channel, event="message", data=data, position=f"e.{offset}.a")

    async def hears_nothing(self) -> None:
        """Show that nothing was sent so far: what is answered to a ping is the first thing that comes."""
        await self.say("ping")
        assert await self.hear() == {"type": "pong"}

    async def drop(self) -> None:
        """End the link without a word."""
        with contextlib.suppress(ConnectionClosed):
            self.socket.transport.abort()
            await self.socket.wait_closed()
