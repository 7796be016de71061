"""Make one ASGI app out of a web application and the realtime endpoint.

In:     a WSGI or ASGI app
Out:    an ASGI app: `/realtime` to `Realtime`, the rest to the app
Owns:   the bridge from ASGI to WSGI, and `scope["pubsub.publish"]` for ASGI apps
Never:  runs a WSGI request on the event loop; holds a thread for a client that is gone

`app` is `Realtime` alone, at `/realtime`, configured from the environment: `uvicorn pubsub_mw.asgi:app`.
"""

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import sync_to_async
from asgiref.wsgi import WsgiToAsgiInstance
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pubsub_mw.apps import is_asgi
from pubsub_mw.drafts import build_draft
from pubsub_mw.errors import PublishError
from pubsub_mw.middleware import PubSub
from pubsub_mw.model import Draft, Position
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.app import Realtime
from pubsub_mw.worker import Worker

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["AsyncRequestPublisher", "app", "for_worker", "with_realtime"]  # noqa: F822 - app: see __getattr__

log = logging.getLogger("pubsub_mw")

MOUNT = "/realtime"
_THREADS = 40
"""HTTP requests run at once, each in a thread of its own; further ones wait. anyio's default for threads."""

_GC_THRESHOLDS = (10_000, 5, 10)
"""Of `gc.set_threshold`: the young after so many new objects, everything after 500,000 that stayed."""


def with_realtime(app: "ASGIApp | WSGIApplication", *, url: str | None = None, **settings: Any) -> ASGIApp:
    """Return one ASGI app: `/realtime` is the realtime endpoint, everything else is `app`.

    A WSGI app finds `environ["pubsub.publish"]`, an ASGI app `scope["pubsub.publish"]`, whose methods are coroutines
    except `on_success`.

    Args:
        app: a WSGI or ASGI app, told apart by its signature
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
        TypeError: `app` is neither.
    """
    if not callable(app):
        raise TypeError(f"{app!r:.100} is neither a WSGI nor an ASGI app: it cannot be called")
    if "requests" not in settings and not os.environ.get("PUBSUB_REQUESTS"):
        settings["requests"] = "/*"  # the app is exposed here anyway
    realtime, threads = Realtime(url, **settings), _WORKER_THREADS
    if is_asgi(app):
        app, threads = _AsyncPubSub(cast(ASGIApp, app), url, **settings), _THREADS
    elif not isinstance(app, PubSub):
        app = PubSub(cast("WSGIApplication", app), url, **settings)
    return _WithRealtime(realtime, app, lambda: Worker(app, url, threads=threads, **settings))


def for_worker(app: "ASGIApp | WSGIApplication") -> "ASGIApp | WSGIApplication":
    """Return `app` as a worker process runs it: an ASGI app finds the same in its scope as under `with_realtime`.

    Of what `with_realtime` returned it is the app inside: a worker process has one worker, and no endpoint.
    """
    if isinstance(app, _WithRealtime):
        return app.inner
    return _AsyncPubSub(cast(ASGIApp, app), None) if is_asgi(app) else app


def __getattr__(name: str) -> Any:
    """Build `app` when it is first asked for, so that importing this module reads no environment."""
    if name == "app":
        globals()["app"] = _WithRealtime(Realtime(), _not_here, None)
        return globals()["app"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


async def _not_here(scope: Scope, receive: Receive, send: Send) -> None:
    text = f"The realtime endpoint is at {MOUNT}; nothing else is served here.\n"
    await PlainTextResponse(text, 404)(scope, receive, send)


_WORKER_THREADS = 8
"""Requests that came through connections, run at once by a WSGI app."""


class _WithRealtime:
    """The two apps side by side."""

    def __init__(
        self, realtime: Realtime, inner: "ASGIApp | WSGIApplication", new_worker: Callable[[], Worker] | None
    ) -> None:
        self.realtime = realtime
        self.inner = inner
        self._app = cast(ASGIApp, inner) if is_asgi(inner) else _WsgiApp(cast("WSGIApplication", inner))
        self._new_worker = new_worker
        self._worker = new_worker() if new_worker is not None else None
        self._is_stopping = False
        self._worker_thread: threading.Thread | None = None
        self._router = Router(routes=[Mount(MOUNT, realtime)], default=self._app, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._start_worker(scope.get("state", {}))
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket" and path in (MOUNT, MOUNT + "/"):
            await self.realtime(scope, receive, send)  # nothing is to be routed, 10,000 times in a mass reconnect
            return
        if path == MOUNT:
            scope = {**scope, "path": scope["path"] + "/"}
        await self._router(scope, receive, send)

    def _start_worker(self, state: dict[str, Any]) -> None:
        """Start the worker in threads of its own, once; on first use, since a mounted app gets no lifespan."""
        if self._worker is not None and self._worker_thread is None:
            arguments = (asyncio.get_running_loop(), state)
            self._worker_thread = threading.Thread(target=self._run_worker, args=arguments, name="worker", daemon=True)
            self._worker_thread.start()

    def _run_worker(self, loop: asyncio.AbstractEventLoop, state: dict[str, Any]) -> None:
        """Run the worker, and another one when it cannot go on: here nobody ends the process."""
        while self._worker is not None and self._new_worker is not None and not self._is_stopping:
            self._worker.use_loop(loop, state)
            try:
                self._worker.run()
            except RuntimeError:
                log.exception("the worker is started anew")
                self._worker = self._new_worker()

    async def _stop_worker(self) -> None:
        if self._worker is not None and self._worker_thread is not None:
            self._is_stopping = True
            self._worker.stop()
            await asyncio.to_thread(self._worker_thread.join)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and stop the realtime endpoint and the worker beside an ASGI app's own lifespan."""
        is_shared = isinstance(self._app, _AsyncPubSub)

        async def receive_both() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup" and self._new_worker is None:
                _collect_seldom()
            if message["type"] == "lifespan.startup" and is_shared:
                await self.realtime.open()
            elif message["type"] == "lifespan.shutdown":
                await self._stop_worker()
                if is_shared:
                    await self.realtime.stop()
            return message

        await (self._app if is_shared else self.realtime)(scope, receive_both, send)


def _collect_seldom() -> None:
    """Look for garbage less often, in a process that does nothing but serve connections.

    Reference counts free a WebSocket whole, and a look at 20,000 of them takes 60 ms, in which nobody is served. What
    leaves some kilobytes in cycles, as a refused request does, is still collected before it is much.
    """
    gc.collect()
    gc.freeze()  # what was imported stays
    gc.set_threshold(*_GC_THRESHOLDS)


class _WsgiApp:
    """A WSGI app as an ASGI app, each request in a thread of its own, at most `_THREADS` at once."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(_THREADS, "wsgi")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _WsgiRequest(self._app, self._threads, receive)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000, "reason": f"WebSockets are at {MOUNT}"})


_run_wsgi_app = vars(WsgiToAsgiInstance)["run_wsgi_app"].func
"""asgiref's synchronous part of a request, without the choice of a thread around it."""


class _WsgiRequest(WsgiToAsgiInstance):
    """asgiref's bridge, with what it lacks: `close()`, a thread per request, an end when the client is gone."""

    def __init__(self, app: "WSGIApplication", threads: ThreadPoolExecutor, receive: Receive) -> None:
        super().__init__(self._run_app)  # type: ignore[no-untyped-call]
        self._wrapped = app
        self._threads = threads
        self._receive = receive
        self._is_gone = threading.Event()

    async def run_wsgi_app(self, body: Any) -> None:
        # asgiref would take the thread from the context, and on a connection that is kept alive the next request can
        # inherit the context of the one before: its thread has ended, or serves somebody else.
        run = sync_to_async(_run_wsgi_app, thread_sensitive=False, executor=self._threads)
        watcher = asyncio.create_task(self._watch())
        try:
            await run(self, body)
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone.set()

    def _run_app(self, environ: "WSGIEnvironment", start_response: Any) -> Iterator[bytes]:
        response = self._wrapped(environ, start_response)
        try:
            for chunk in response:
                if self._is_gone.is_set():
                    return
                yield chunk
        finally:
            close = getattr(response, "close", None)
            if close is not None:
                close()

    def build_environ(self, scope: Scope, body: Any) -> "WSGIEnvironment":
        # A name with an underscore would pass for one with a dash (CVE-2026-3902), and several cookie headers
        # (RFC 9113 8.2.3) are joined by a semicolon, not by a comma.
        changed = (b"cookie", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if b"_" not in name and name not in changed]
        cookies = [value for name, value in scope["headers"] if name == b"cookie"]
        if cookies:
            headers.append((b"cookie", b"; ".join(cookies)))
        if all(name != b"content-length" for name, _ in headers):
            # It came in chunks, which are put together by now. A WSGI app reads no further than the length it is told.
            headers.append((b"content-length", str(body.seek(0, os.SEEK_END)).encode()))
            body.seek(0)
        self.scope = {**scope, "headers": headers}
        return cast("WSGIEnvironment", super().build_environ(self.scope, body))  # type: ignore[no-untyped-call]

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        super().start_response(status, [], exc_info)  # type: ignore[no-untyped-call]
        for name, value in headers:
            if name.lower() == "content-length":
                self.response_content_length = int(value)
        # PEP 3333 allows what latin-1 can say; asgiref only ASCII.
        self.response_start["headers"] = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
        ]
        return self._write

    def _write(self, data: bytes) -> None:
        """PEP 3333's `write`, for the few apps that still use it."""
        if not self.response_started:
            self.response_started = True
            self.sync_send(self.response_start)
        self.sync_send({"type": "http.response.body", "body": data, "more_body": True})


class _AsyncPubSub:
    """Put an async publisher into the scope of an ASGI app."""

    def __init__(self, app: ASGIApp, url: str | None, **settings: Any) -> None:
        self._app = app
        self._publisher = AsyncPublisher(url, **settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        publish = AsyncRequestPublisher(self._publisher)
        scope = {"pubsub.connection": None, **scope}
        scope |= {"pubsub.publish": publish, "pubsub.publisher": self._publisher}

        async def note_status(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                await publish.finish(message["status"])
            await send(message)

        await self._app(scope, receive, note_status)


class AsyncRequestPublisher:
    """`scope["pubsub.publish"]` of one request: await a call to publish now."""

    __slots__ = ("_publisher", "_status", "_waiting")

    def __init__(self, publisher: AsyncPublisher) -> None:
        self._publisher = publisher
        self._waiting: list[Draft] = []
        self._status: int | None = None

    async def __call__(self, channel: str, data: object, **options: Any) -> Position:
        """Publish now; see `Publisher.publish`."""
        return await self._publisher.publish(channel, data, **options)

    async def many(self, items: Iterable[tuple[str, object] | Mapping[str, Any]]) -> list[Position]:
        """Publish several now, in one round trip; see `Publisher.many`."""
        return await self._publisher.many(items)

    def on_success(self, channel: str, data: object, **options: Any) -> None:
        """Publish when the app starts a response below 500; forget it if it raises before, or answers 5xx.

        Raises:
            RuntimeError: the response has started: await a call instead.
        """
        if self._status is not None:
            raise RuntimeError("the response has started; publish at once, by `await publish(channel, data)`")
        self._waiting.append(build_draft(self._publisher.settings, channel, data, **options))

    async def finish(self, status: int) -> None:
        """Publish what waits if `status` is below 500. Never raises."""
        self._status = status
        drafts, self._waiting = self._waiting, []
        if drafts and status < 500:
            try:
                await self._publisher.publish_drafts(drafts)
            except PublishError as error:
                log.error("on_success: %s", error)
