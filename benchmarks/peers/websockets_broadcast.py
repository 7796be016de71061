"""`websockets` and its `broadcast()`. Usage: python websockets_broadcast.py <port> <publish port>."""

import asyncio
import sys
from collections import defaultdict

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

channels: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def listen(connection: ServerConnection) -> None:
    assert connection.request is not None
    channel = channels[connection.request.path[1:]]
    channel.add(connection)
    try:
        await connection.send("ready")
        await connection.wait_closed()
    finally:
        channel.remove(connection)


async def publish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            _, name, size = line.decode().split()
            broadcast(channels[name], (await reader.readexactly(int(size))).decode())
    finally:
        writer.close()


async def main() -> None:
    port, publish_port = map(int, sys.argv[1:])
    async with (
        serve(listen, "127.0.0.1", port, compression=None, backlog=4096),
        await asyncio.start_server(publish, "127.0.0.1", publish_port),
    ):
        await asyncio.get_running_loop().create_future()


uvloop.run(main())
