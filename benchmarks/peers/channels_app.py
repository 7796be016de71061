"""Django Channels with its Redis layer: a consumer on uvicorn, or what publishes to it.

Usage: python channels_app.py serve <port> <redis port>
       python channels_app.py publish <port> <redis port>     takes `PUB <channel> <size>\\n<payload>`, answers a line
"""

import asyncio
import sys
from typing import Any

import uvicorn
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import re_path

what, port, redis_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

# As its documentation shows it; `capacity` so that nothing is dropped where messages wait.
settings.configure(
    CHANNEL_LAYERS={
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {"hosts": [("127.0.0.1", redis_port)], "capacity": 10_000},
        }
    }
)


class Listener(AsyncWebsocketConsumer):  # type: ignore[misc]
    async def connect(self) -> None:
        self.group = self.scope["url_route"]["kwargs"]["channel"]
        await self.channel_layer.group_add(self.group, self.channel_name)
        await self.accept()
        await self.send("ready")

    async def disconnect(self, code: int) -> None:
        del code
        await self.channel_layer.group_discard(self.group, self.channel_name)

    async def say(self, event: dict[str, Any]) -> None:
        await self.send(event["text"])


async def publish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    layer = get_channel_layer()
    try:
        while line := await reader.readline():
            _, name, size = line.decode().split()
            text = (await reader.readexactly(int(size))).decode()
            await layer.group_send(name, {"type": "say", "text": text})
            writer.write(b"ok\n")
    finally:
        writer.close()


async def publisher() -> None:
    async with await asyncio.start_server(publish, "127.0.0.1", port):
        await asyncio.get_running_loop().create_future()


if what == "serve":
    app = ProtocolTypeRouter({"websocket": URLRouter([re_path(r"^(?P<channel>\d+)$", Listener.as_asgi())])})
    uvicorn.run(app, port=port, log_level="warning", access_log=False, ws_per_message_deflate=False, backlog=4096)
else:
    asyncio.run(publisher())
