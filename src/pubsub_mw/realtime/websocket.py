"""Move frames between one WebSocket and one connection, and nothing more.

In:     text frames from the client; the connection's send queue
Out:    the same, the other way round; at the end a `disconnect` frame and the close code
Owns:   the socket's two directions: a task that writes, and the endpoint itself, which reads
Never:  looks into a frame; lets a stuck client keep the server's tasks (closing has a bound)

Source: ASGI spec, "WebSocket"; RFC 6455.
"""

import asyncio
import logging
import random

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from pubsub_mw import protocol
from pubsub_mw.errors import CloseCode, ErrorCode
from pubsub_mw.model import Handshake
from pubsub_mw.realtime.connection import Connection, Shared
from pubsub_mw.realtime.send_queue import SendQueue

__all__ = ["CLOSE_SECONDS", "deny", "retry_after", "serve_websocket"]

log = logging.getLogger("pubsub_mw")

CLOSE_SECONDS = 3.0
"""For the last frames and the close to go out; a client that does not read is left after that."""

_RETRY_SECONDS = {CloseCode.SHUTDOWN: 2.0, CloseCode.BROKER_UNAVAILABLE: 5.0, CloseCode.SERVER_ERROR: 5.0}
"""Upper end of the time after which a client is asked to come back; drawn anew for each, so that they do not come
all at once. Others may come back at once."""


def retry_after(code: CloseCode) -> float:
    """Return after how many seconds a client is asked to come back."""
    return random.uniform(0, _RETRY_SECONDS.get(code, 0.0))


async def deny(websocket: WebSocket, status: int, reason: str) -> None:
    """Refuse before accept, with a reason where the server can send one."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(PlainTextResponse(reason + "\n", status))
    else:
        await websocket.close(1008, reason)


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
        last.append(protocol.disconnect(code, reason, retry_after(code)))
        for frame in last:
            await websocket.send({"type": "websocket.send", "text": frame.decode()})
        await websocket.close(code, reason)
    except (WebSocketDisconnect, OSError):
        return
    except RuntimeError as error:
        # Starlette says so when the client closed while we were sending.
        log.debug("not sent: %s", error)
