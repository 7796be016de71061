"""python-socketio with its Redis manager, on uvicorn. Usage: python python_socketio.py <port> <redis port>."""

import sys
from typing import Any
from urllib.parse import parse_qs

import socketio
import uvicorn

manager = socketio.AsyncRedisManager(f"redis://127.0.0.1:{sys.argv[2]}/0")
server = socketio.AsyncServer(
    async_mode="asgi",
    client_manager=manager,
    transports=["websocket"],
    http_compression=False,
    cors_allowed_origins="*",
)


@server.event
async def connect(sid: str, environ: dict[str, Any]) -> None:
    await server.enter_room(sid, parse_qs(environ["QUERY_STRING"])["channel"][0])
    await server.emit("ready", to=sid, ignore_queue=True)


uvicorn.run(
    socketio.ASGIApp(server),
    port=int(sys.argv[1]),
    log_level="warning",
    access_log=False,
    ws_per_message_deflate=False,
    backlog=4096,
)
