"""Move frames between one WebSocket and one connection, and nothing more.

In:     text frames from the client; the connection's send queue
Out:    the same, the other way round; at the end a `disconnect` frame and the close code
Owns:   the choice: the connection on the transport itself, where the server gives it away, or else on ASGI's `receive`
        and `send`, by a task that writes, and the endpoint itself, which reads
Never:  looks into a frame; lets a stuck client keep the server's tasks (closing has a bound)

Source: ASGI spec, "WebSocket"; RFC 6455.
"""

import asyncio
import logging
from collections.abc import Callable

from starlette.responses import PlainTextResponse
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from pubsub_mw.errors import CloseCode, ErrorCode
from pubsub_mw.model import Handshake
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.realtime.socket import CLOSE_SECONDS, farewell

__all__ = ["deny", "serve_websocket", "take_over"]

log = logging.getLogger("pubsub_mw")

_EXTENSION = "pubsub_mw.websocket"
"""Where a server offers its connection; see `uvicorn_protocol`, which need not be there."""


async def deny(websocket: WebSocket, status: int, reason: str) -> None:
    """Refuse before accept, with a reason where the server can send one."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(PlainTextResponse(reason + "\n", status))
    else:
        await websocket.close(1008, reason)


def take_over(scope: Scope, shared: Shared, handshake: Handshake, on_end: Callable[[], None] | None) -> bool:
    """Serve an admitted client on its transport, where the server gives that away; False = it does not.

    `on_end` is called when the client is gone.
    """
    offer = scope.get("extensions", {}).get(_EXTENSION)
    socket = offer["take_over"](shared.sockets) if offer is not None else None
    if socket is None:
        return False
    socket.serve(Connection(shared, handshake, send_queue=socket), on_end)
    return True


async def serve_websocket(websocket: WebSocket, shared: Shared, handshake: Handshake) -> None:
    """Serve an admitted client until either side ends it."""
    await websocket.accept()
    connection = Connection(shared, handshake)
    queue, loop = connection.send_queue, asyncio.get_running_loop()
    writer = asyncio.create_task(_write(websocket, queue))
    reader = asyncio.create_task(_read(websocket, connection, shared.settings.max_frame_bytes))
    # A client that does not read keeps the writer waiting, also with the farewell.
    queue.when_closed(lambda: loop.call_later(CLOSE_SECONDS, writer.cancel))
    try:
        await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done() and reader.exception() is not None:
            log.error("a connection ended by a fault of the server", exc_info=reader.exception())
            queue.close(CloseCode.SERVER_ERROR, "a fault of the server; it is in the server's log")
            await asyncio.wait({writer})
    finally:
        connection.close()
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


async def _read(websocket: WebSocket, connection: Connection, max_frame_bytes: int) -> None:
    """Read until the client is gone, or must go."""
    while connection.send_queue.closed is None:
        try:
            message = await websocket.receive()
        except WebSocketDisconnect:
            return
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        if text is None:
            connection.refuse(ErrorCode.BAD_FRAME, "a frame is text, not bytes")
        elif len(text) > max_frame_bytes or len(text.encode()) > max_frame_bytes:
            reason = f"a frame may have {max_frame_bytes} bytes"
            connection.send_queue.close(CloseCode.MESSAGE_TOO_BIG, reason)
        else:
            await connection.receive(text)
    await asyncio.Event().wait()  # the writer has the last word


async def _write(websocket: WebSocket, queue: SendQueue) -> None:
    """Write until the send queue closes; then say why, and close."""
    try:
        while queue.closed is None:
            frame = await queue.take()
            if frame:
                await websocket.send({"type": "websocket.send", "text": frame.decode()})
        code, reason = queue.closed
        # SLOW: what waits will not be read, and recovery brings it. Otherwise errors and answers still go out.
        last = [] if code is CloseCode.SLOW else queue.take_nowait()
        last.append(farewell(code, reason))
        for frame in last:
            await websocket.send({"type": "websocket.send", "text": frame.decode()})
        await websocket.close(code, reason)
    except (WebSocketDisconnect, OSError):
        return
    except RuntimeError as error:
        # Starlette says so when the client closed while we were sending.
        log.debug("not sent: %s", error)
