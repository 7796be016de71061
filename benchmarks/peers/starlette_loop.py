"""What one writes first: Starlette, and a loop of `send`. Usage: python starlette_loop.py <port> <publish port>."""

import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

channels: defaultdict[str, set[WebSocket]] = defaultdict(set)


async def listen(websocket: WebSocket) -> None:
    await websocket.accept()
    channel = channels[websocket.path_params["channel"]]
    channel.add(websocket)
    try:
        await websocket.send_text("ready")
        async for _ in websocket.iter_text():
            pass
    finally:
        channel.remove(websocket)


async def publish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            _, name, size = line.decode().split()
            payload = (await reader.readexactly(int(size))).decode()
            for websocket in list(channels[name]):
                await websocket.send_text(payload)
    finally:
        writer.close()


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with await asyncio.start_server(publish, "127.0.0.1", int(sys.argv[2])):
        yield


app = Starlette(routes=[WebSocketRoute("/{channel}", listen)], lifespan=lifespan)
uvicorn.run(
    app, port=int(sys.argv[1]), log_level="warning", access_log=False, ws_per_message_deflate=False, backlog=4096
)
