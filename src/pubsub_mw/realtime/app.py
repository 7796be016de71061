"""Route requests to transports, and start and stop what they share.

In:     ASGI scopes below the mount
Out:    WebSockets, streams and polls served; what is sent and published by POST; `client.js`, `client.d.ts`,
        `openapi.json`, `health`, `metrics`
Owns:   the broker, the hub and the task that runs it, per event loop; the drain, also on SIGTERM where the server
        gives a lifespan
Never:  needs a lifespan: a mounted app gets none, so everything starts on first use
"""

import asyncio
import contextlib
import logging
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.resources import files
from types import FrameType
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from pubsub_mw.broker.engines import expect_endpoint, load_engine, open_async_broker
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import BrokerUnavailable, CloseCode, ErrorCode
from pubsub_mw.grants import GrantVerifier
from pubsub_mw.model import Handshake
from pubsub_mw.publisher import AsyncPublisher, warn_of_secret
from pubsub_mw.realtime.http import Endpoint, Refusal, json_response
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.longpoll import answer_poll
from pubsub_mw.realtime.metrics import BOUND_SECONDS, Metrics
from pubsub_mw.realtime.origin import refuse_origin
from pubsub_mw.realtime.publish import DESCRIPTION, answer_publish
from pubsub_mw.realtime.script import Static, slim
from pubsub_mw.realtime.send import answer_frames
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.realtime.sse import refuse_events, serve_events
from pubsub_mw.realtime.websocket import deny, serve_websocket, take_over
from pubsub_mw.settings import Settings

__all__ = ["Realtime"]

log = logging.getLogger("pubsub_mw")

_RESTART_SECONDS = 1.0
"""Between the death of the hub, which is a fault of ours, and its next start."""


class Realtime(Starlette):
    """The realtime endpoint. Mount it, or serve it through `pubsub_mw.asgi:app`.

    Args:
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        self.settings = Settings.build(url, **settings)
        load_engine(self.settings)
        GrantVerifier("", self.settings.grant_public_key)  # a wrong key shows now
        expect_endpoint(self.settings)
        self._running: _Running | None = None
        self._starting = asyncio.Lock()
        self._is_draining = False
        self._drain_task: asyncio.Task[None] | None = None
        self._per_address: Counter[str] = Counter()
        self._metrics = Metrics()
        static = files("pubsub_mw").joinpath("static")
        script = slim(static.joinpath("client.js").read_text()).encode()
        types = static.joinpath("client.d.ts").read_bytes()
        super().__init__(
            routes=[
                Route("/", _hint),
                Route("/health", self._health),
                Route("/metrics", self._tell_metrics),
                Route("/send", Endpoint(self.settings, "POST", self._send)),
                Route("/publish", Endpoint(self.settings, "POST", self._publish)),
                Route("/openapi.json", _describe),
                Route("/poll", Endpoint(self.settings, "GET", self._poll)),
                Route("/events", Endpoint(self.settings, "GET", self._events, refuse_events)),
                Route("/client.js", Static(script, "text/javascript"), methods=["GET"]),
                Route("/client.d.ts", Static(types, "text/plain"), methods=["GET"]),
            ],
            exception_handlers={404: _not_found},
            lifespan=self._lifespan,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # A `Mount` passes on only what comes below its closing slash, so who wants the mount itself too adds
            # `WebSocketRoute("/realtime", realtime)`. By that, as by other routers, any path may lead here.
            await self._websocket(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def start(self) -> "_Running":
        """Start what connections share, once per event loop; later calls return at once.

        Raises:
            BrokerUnavailable: no `secret` is set and the one in the broker could not be read.
        """
        running, loop = self._running, asyncio.get_running_loop()
        if running is not None and running.loop is loop:
            return running
        if running is not None:
            self._running, self._starting = None, asyncio.Lock()  # left behind by a loop that is over
        async with self._starting:
            if self._running is None:
                self._running = await _Running.start(self.settings, self._metrics)
            return self._running

    async def open(self) -> None:
        """Begin as a server's lifespan does: start, if the broker answers, and drain when SIGTERM comes."""
        try:
            await self.start()
        except BrokerUnavailable as error:
            log.error("%s; connections are refused until it answers", error)
        self._drain_on_sigterm()

    async def stop(self) -> None:
        """End the hub and give the broker's connections back."""
        running, self._running = self._running, None
        if running is not None and running.loop is asyncio.get_running_loop():
            await running.stop()

    async def drain(self, seconds: float | None = None) -> None:
        """Admit nobody any more, and close every connection, spread over `seconds` (default: the setting).

        Each is asked to come back, at its own time, to another server or to the next one.
        """
        self._is_draining = True
        running = self._running
        if running is None:
            return
        queues = running.hub.send_queues()
        random.shuffle(queues)
        window = self.settings.drain if seconds is None else seconds
        began = running.loop.time()
        for index, queue in enumerate(queues):
            await asyncio.sleep(max(0.0, began + window * index / len(queues) - running.loop.time()))
            queue.close(CloseCode.SHUTDOWN, "this server is going away; another one takes over")
        # Those that were connecting meanwhile.
        for queue in running.hub.send_queues():
            queue.close(CloseCode.SHUTDOWN, "this server is going away; another one takes over")

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        await self.open()
        try:
            yield
        finally:
            await self.stop()

    def _drain_on_sigterm(self) -> None:
        """Put a drain before what the server does on SIGTERM: uvicorn closes all sockets at once, with no reason."""
        server = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(server):
            return
        loop = asyncio.get_running_loop()

        def on_sigterm(number: int, frame: FrameType | None) -> None:
            if self._is_draining:
                server(number, frame)  # a second signal: somebody is in a hurry
            else:
                self._is_draining = True
                loop.call_soon_threadsafe(begin)

        def begin() -> None:
            # A drain that fails must not keep the server from stopping.
            self._drain_task = loop.create_task(self.drain())
            self._drain_task.add_done_callback(lambda _: server(signal.SIGTERM, None))

        signal.signal(signal.SIGTERM, on_sigterm)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        handshake = Handshake.from_scope(scope, is_whole=False)
        try:
            if scope.get("endpoint") is self and isinstance(scope.get("route"), Mount):
                above, _, below = scope["path"].partition(scope["root_path"] + "/")
                if below and not above:
                    raise Refusal(404, ErrorCode.UNSUPPORTED, "nothing is here; WebSockets go to the mount itself")
            shared = await self._checked(handshake)
            leave = self._admit(handshake)
        except Refusal as refusal:
            await deny(WebSocket(scope, receive, send), refusal.status, refusal.message)
            return
        if not take_over(scope, shared, handshake, leave):
            try:
                await serve_websocket(WebSocket(scope, receive, send), shared, handshake)
            finally:
                leave()

    async def _events(self, scope: Scope, receive: Receive, send: Send, handshake: Handshake) -> None:
        shared = await self._checked(handshake, may_lack_origin=True)
        leave = self._admit(handshake)
        try:
            await serve_events(scope, receive, send, shared, handshake)
        finally:
            leave()

    async def _poll(self, scope: Scope, receive: Receive, send: Send, handshake: Handshake) -> None:
        shared = await self._checked(handshake, may_lack_origin=True)
        leave = self._admit(handshake)
        try:
            answer = await answer_poll(scope, receive, shared, handshake)
        finally:
            leave()
        await json_response(answer)(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send, handshake: Handshake) -> None:
        shared = await self._checked(handshake)
        await json_response(await answer_frames(receive, shared, handshake))(scope, receive, send)

    async def _publish(self, scope: Scope, receive: Receive, send: Send, handshake: Handshake) -> None:
        shared = await self._checked(handshake, may_lack_origin=True)
        await json_response(await answer_publish(receive, shared, handshake))(scope, receive, send)

    def _admit(self, handshake: Handshake) -> Callable[[], None]:
        """Admit who may stay for a while, and count it until what is returned is called.

        Raises:
            Refusal: not now, or not one more.
        """
        if self._is_draining:
            raise self._refused(503, ErrorCode.UNAVAILABLE, "this server is going away; try again")
        limit, address = self.settings.max_connections_per_address, handshake.address
        if not limit:
            return lambda: None
        if self._per_address[address] >= limit:
            raise self._refused(429, ErrorCode.BUSY, f"an address may have {limit} connections")
        self._per_address[address] += 1
        return partial(self._forget, address)

    def _forget(self, address: str) -> None:
        self._per_address[address] -= 1
        if not self._per_address[address]:
            del self._per_address[address]

    async def _checked(self, handshake: Handshake, *, may_lack_origin: bool = False) -> Shared:
        """Return what connections share, for who may ask.

        Raises:
            Refusal: not from there, or not now.
        """
        refusal = refuse_origin(handshake, self.settings.origins, may_lack_origin=may_lack_origin)
        if refusal is not None:
            raise self._refused(403, ErrorCode.FORBIDDEN, refusal)
        try:
            return (await self.start()).shared
        except BrokerUnavailable as error:
            log.error("connection refused: %s", error)
            message = "the broker does not answer; try again in a few seconds"
            raise self._refused(503, ErrorCode.UNAVAILABLE, message) from error

    def _refused(self, status: int, code: ErrorCode, message: str) -> Refusal:
        self._metrics.refused[code] += 1
        return Refusal(status, code, message)

    async def _health(self, _request: Request) -> Response:
        """200 while publications arrive and new connections are admitted, else 503."""
        try:
            hub = (await self.start()).hub
        except BrokerUnavailable:
            hub = None
        is_up = hub is not None and hub.is_up
        status = "draining" if self._is_draining else "ok" if is_up else "broker unavailable"
        body = {
            "status": status,
            "connections": hub.connection_count if hub else 0,
            "channels": hub.channel_count if hub else 0,
        }
        return JSONResponse(body, 200 if status == "ok" else 503, {"cache-control": "no-store"})

    async def _tell_metrics(self, request: Request) -> Response:
        """What is known; within a bound also when the broker does not answer."""
        shared = None
        with contextlib.suppress(BrokerUnavailable, TimeoutError):
            async with asyncio.timeout(BOUND_SECONDS):
                shared = (await self.start()).shared
        body, media_type = await self._metrics.tell(request.headers.get("accept", ""), shared)
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})


class _Running:
    """What the connections of one event loop share."""

    def __init__(self, settings: Settings, broker: AsyncBroker, secret: str, metrics: Metrics) -> None:
        self.loop = asyncio.get_running_loop()
        self._broker = broker
        self._publisher = AsyncPublisher(**settings.overrides())
        self.hub = Hub(broker, settings)
        self.shared = Shared(settings, self.hub, broker, self._publisher, secret)
        self._metrics = metrics
        self._task = asyncio.create_task(self._keep())

    @classmethod
    async def start(cls, settings: Settings, metrics: Metrics) -> "_Running":
        broker = open_async_broker(settings)
        secret = settings.secret
        if secret is None:
            secret = await broker.secret()
            if settings.url != "memory://":
                warn_of_secret(settings)
        return cls(settings, broker, secret, metrics)

    async def _keep(self) -> None:
        """Run the hub; if it dies, which is a fault, say so and run it again: its connections are still here."""
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.hub.run())
                    tasks.create_task(self.shared.control.run())
                    tasks.create_task(self.shared.presence.run())
                    tasks.create_task(self._metrics.run(self.shared))
                    if self.shared.settings.lifecycle:
                        tasks.create_task(self.shared.lifecycle.run())
                    if self.shared.settings.authorize:
                        tasks.create_task(self.shared.authorizer.run())
            except Exception:
                log.exception("the hub died; it starts again, and every channel is read anew")
            await asyncio.sleep(_RESTART_SECONDS)

    async def stop(self) -> None:
        self.shared.lifecycle.stop()
        # Once may not do: before Python 3.13 a task group whose task fails at that moment, as when Redis goes away,
        # says that instead of being cancelled, and all would be begun anew.
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_RESTART_SECONDS)
        await self.shared.gate.close()
        await self._publisher.close()
        await self._broker.close()


async def _describe(request: Request) -> Response:
    servers = [{"url": request.scope.get("root_path") or "/"}]
    return JSONResponse({**DESCRIPTION, "servers": servers}, headers={"cache-control": "no-cache"})


async def _not_found(request: Request, _error: Exception) -> Response:
    mount = request.scope.get("root_path", "")
    message = f"there is nothing here; there are: {', '.join(mount + route.path for route in request.app.routes)}"
    return Refusal(404, ErrorCode.UNSUPPORTED, message).response()


async def _hint(_request: Request) -> Response:
    text = "This is a realtime endpoint: open a WebSocket here, or import connect from ./client.js\n"
    return PlainTextResponse(text, 426, {"upgrade": "websocket", "connection": "upgrade"})
