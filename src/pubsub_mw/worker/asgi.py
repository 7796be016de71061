"""Run an ASGI app on one request.

In:     a scope and a body
Out:    the head, the chunks and the end of its answer, to a sink
Owns:   the server's side of ASGI's HTTP messages, and of its lifespan where no server takes care of that
Never:  lets the app outrun what can be published (`pace` is awaited after each chunk)

Source: ASGI spec, "HTTP & WebSocket ASGI Message Format" and "Lifespan Protocol".
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pubsub_mw.worker.wsgi import Sink

__all__ = ["ASGIApp", "Lifespan", "run_asgi"]

log = logging.getLogger("pubsub_mw")

ASGIApp = Callable[..., Awaitable[None]]


async def run_asgi(
    app: ASGIApp, scope: dict[str, Any], body: bytes, sink: Sink, pace: Callable[[], Awaitable[None]]
) -> None:
    """Run `app` and tell `sink` its answer; what the app raises is logged and ends the answer."""
    requests: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    start: list[Any] = []
    is_told = is_over = False

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        while sink.is_wanted and not is_over:  # noqa: ASYNC110 - another thread finds out
            await asyncio.sleep(0.25)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal is_told, is_over
        if message["type"] == "http.response.start":
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
            start[:] = [message["status"], headers]
        elif message["type"] == "http.response.body" and not is_over:
            chunk, has_more = message.get("body", b""), message.get("more_body", False)
            if not is_told and not has_more:
                sink.whole(start[0], start[1], chunk)
                is_told = is_over = True
                return
            if not is_told:
                is_told = True
                sink.head(start[0], start[1])
            if chunk:
                sink.chunk(chunk)
            if not has_more:
                is_over = True
                sink.end(None)
            elif not sink.is_wanted:
                is_over = True
                sink.end("cancelled")
                raise OSError("the client cancelled the request")
            await pace()

    try:
        await app(scope, receive, send)
        if not is_over:
            raise AssertionError("the app returned before its response was complete")
    except (Exception, SystemExit) as error:
        if is_over and isinstance(error, OSError):
            return  # our own, out of `send`
        log.exception("%s %s raised", scope["method"], scope["path"])
        if not is_over:
            sink.end("the application failed")


class Lifespan:
    """Tell an ASGI app that it starts and stops.

    Args:
        app: which may not support that
        state: what it leaves there is for its requests
    """

    def __init__(self, app: ASGIApp, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when the app has started.

        Raises:
            RuntimeError: it said that it cannot.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        self._task = asyncio.create_task(self._run(scope))
        await self._ask("lifespan.startup")

    async def stop(self) -> None:
        """Return when the app has stopped."""
        await self._ask("lifespan.shutdown")

    async def _ask(self, question: str) -> None:
        assert self._task is not None
        if self._task.done():
            return
        await self._to_app.put({"type": question})
        answer = asyncio.create_task(self._from_app.get())
        await asyncio.wait({self._task, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()  # the app knows no lifespan
        elif answer.result()["type"].endswith(".failed"):
            raise RuntimeError(f"the application failed on {question}: {answer.result().get('message', '')}")

    async def _run(self, scope: dict[str, Any]) -> None:
        try:
            await self._app(scope, self._to_app.get, self._from_app.put)
        except Exception:
            log.debug("the application knows no lifespan", exc_info=True)
