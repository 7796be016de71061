"""Run an ASGI app on one request.

In:     a scope and a body
Out:    the head, the chunks and the end of its answer, to a sink
Owns:   the server's side of ASGI's HTTP messages
Never:  lets the app outrun what can be published (`pace` is awaited after each chunk)

Source: ASGI spec, "HTTP & WebSocket ASGI Message Format".
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pubsub_mw.worker.wsgi import Sink

__all__ = ["ASGIApp", "run_asgi"]

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
    except Exception as error:
        if is_over and isinstance(error, OSError):
            return  # our own, out of `send`
        log.exception("%s %s raised", scope["method"], scope["path"])
        if not is_over:
            sink.end("the application failed")
