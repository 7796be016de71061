"""The same for Starlette, in small."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pubsub_mw.asgi import with_realtime


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Any]]:
    yield {"loop": id(asyncio.get_running_loop())}


async def echo(request: Request) -> Response:
    publish = request.scope.get("pubsub.publish")
    if publish is not None:
        await publish("news", "from a view")
    return JSONResponse(
        {
            "is_same_loop": request.state.loop == id(asyncio.get_running_loop()),
            "query": request.url.query,
            "cookies": request.cookies,
            "body": (await request.body()).decode(),
            "delivery_count": request.scope["pubsub.connection"].delivery_count,
        }
    )


async def stream(_request: Request) -> Response:
    async def numbers() -> AsyncIterator[str]:
        for number in range(5):
            yield f"{number},"
            await asyncio.sleep(0.03)

    return StreamingResponse(numbers(), media_type="text/plain")


app = Starlette(
    routes=[Route("/echo", echo, methods=["GET", "POST"]), Route("/stream", stream)],
    lifespan=lifespan,
)


def whole() -> Any:
    """The app with its realtime endpoint and a worker inside."""
    return with_realtime(app)
