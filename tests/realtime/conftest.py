"""Serve an ASGI app over real sockets, in the test's own event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn

from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.control import Control
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.uvicorn_server import Server

SECRET = "a secret of thirty-two bytes or more"

OURS = "pubsub_mw.realtime.uvicorn_protocol:WebSocketProtocol"
PLAIN = "websockets-sansio"
"""uvicorn's own class: any ASGI server will do, and this one stands for them."""


class Site:
    """One server. A `Realtime` app is at `realtime`, published to by `publish` through the same broker."""

    def __init__(self, app: Any, port: int, server: uvicorn.Server) -> None:
        self.app = app
        self.port = port
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.ws_url = f"ws://127.0.0.1:{port}"


def delay_look_ups(monkeypatch: pytest.MonkeyPatch, control: Control, seconds: float) -> None:
    """Let a server look up so late what was revoked that a grant can expire in between."""
    look_up = control.look_up

    async def look_up_late(connection: Connection) -> None:
        await asyncio.sleep(seconds)
        await look_up(connection)

    monkeypatch.setattr(control, "look_up", look_up_late)


@pytest.fixture(params=[OURS, PLAIN], ids=["ours", "plain"])
def websocket_class(request: pytest.FixtureRequest) -> str:
    """The WebSocket protocol class of the servers of one test: every promise holds with both."""
    return str(request.param)


@pytest.fixture
def http_class(websocket_class: str) -> str:
    """The class for HTTP that goes with it."""
    return "pubsub_mw.realtime.uvicorn_protocol:HTTPProtocol" if websocket_class == OURS else "auto"


@pytest.fixture
async def serve_app(websocket_class: str, http_class: str) -> AsyncIterator[Callable[..., Awaitable[Site]]]:
    """Start `await serve_app(app, **uvicorn_options)`; it stops with the test."""
    running: list[tuple[Site, asyncio.Task[None]]] = []

    async def serve(app: Any, **options: Any) -> Site:
        options = {
            "lifespan": "auto",
            "log_config": None,
            "timeout_graceful_shutdown": 1,
            "http": http_class,
            "ws": websocket_class,
            **options,
        }
        server = Server(uvicorn.Config(app, **options))
        port = free_port()
        listening = socket.create_server(("127.0.0.1", port))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        site = Site(app, port, server)
        running.append((site, task))
        await eventually_async(lambda: server.started or task.done())
        return site

    yield serve
    for site, _ in running:
        site.server.should_exit = True
    for _, task in running:
        await task


@pytest.fixture
async def serve_realtime(
    serve_app: Callable[..., Awaitable[Site]], prefix: str
) -> AsyncIterator[Callable[..., Awaitable[Site]]]:
    """Start `await serve_realtime(**settings)` over a memory broker that all of one test share."""
    apps: list[Realtime] = []

    async def serve(**settings: Any) -> Site:
        settings = {"prefix": prefix, "secret": SECRET, **settings}
        apps.append(await asyncio.to_thread(Realtime, "memory://", **settings))
        return await serve_app(apps[-1])

    yield serve
    for app in apps:
        await app.stop()


@pytest.fixture
def publisher(prefix: str) -> AsyncPublisher:
    """One that reaches the servers of this test that are on memory."""
    return AsyncPublisher("memory://", prefix=prefix, secret=SECRET)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10_000 * MS, trust_env=False, verify=False) as client:
        yield client
