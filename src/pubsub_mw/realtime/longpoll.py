"""Answer one poll: what a client has not heard yet, at once or as soon as there is something.

In:     channels, and where the client is; a connection that lasts as long as the poll
Out:    `{"frames": [...], "cursor": "..."}`
Owns:   when to answer: as soon as it is known of every channel what there is, if that is something new; else at the
        first frame that tells something, or when the time is over. Up to `max_poll_bytes`
Never:  keeps anything for the next poll: the cursor says it all, so any server can answer that

Who shows a token is that connection, for the time of the poll; between two polls it counts as one that broke a moment
ago (`lifecycle_grace`, `presence_grace`). Who shows none is nobody, and nothing is reported of it.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence

import orjson
from starlette.types import Receive, Scope

from pubsub_mw import protocol
from pubsub_mw.errors import CloseCode, ErrorCode
from pubsub_mw.model import ConnectionId, Handshake, channel_of_connection
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.cursor import Cursor
from pubsub_mw.realtime.http import Refusal, bearer, connect, read_query, read_resume, read_wanted, until_gone
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.realtime.socket import retry_after

__all__ = ["answer_poll"]

_WAIT_SECONDS = 25.0
"""Where the client does not say; under what proxies allow."""
_PASSING = (ErrorCode.UNAVAILABLE, ErrorCode.BUSY, ErrorCode.GRANT_EXPIRED)
_REFUSED_SECONDS = 2.0
"""For which a poll is kept that knows already that a channel is refused for now, which is what these say: the next poll
asks for it again."""


async def answer_poll(scope: Scope, receive: Receive, shared: Shared, handshake: Handshake) -> bytes:
    """Return the answer's body; b"" where the client is gone.

    Raises:
        Refusal: it may not poll like that, or not now.
    """
    connection = Connection(shared, handshake, "longpoll")
    reader = asyncio.create_task(until_gone(receive))
    poll = asyncio.create_task(_poll(scope, shared, connection, handshake))
    try:
        await asyncio.wait({poll, reader}, return_when=asyncio.FIRST_COMPLETED)
        return poll.result() if poll.done() else b""
    finally:
        connection.close()
        for task in (poll, reader):
            task.cancel()
        await asyncio.gather(poll, reader, return_exceptions=True)


async def _poll(scope: Scope, shared: Shared, connection: Connection, handshake: Handshake) -> bytes:
    deadline = asyncio.get_running_loop().time()
    query = read_query(scope, shared.settings.max_channels)
    deadline += _wait_seconds(query, shared.settings.max_poll_wait)
    resume = read_resume(shared, bearer(handshake))
    wanted = read_wanted(query, handshake, resume)
    # A client that is polling already has nothing elsewhere that is to be closed.
    await connect(connection, wanted, resume, takes_over=not wanted.cursor)
    assert connection.id is not None
    # Of the channel of a user whom the application has not named, there may be no answer.
    unanswered = {name for name in wanted.channels if not name.startswith("#")}.union(connection.own_channels)
    frames = await _collect(connection, wanted.cursor, unanswered, deadline, shared.settings.max_poll_bytes)
    return b'{"frames":[%b],"cursor":%b}' % (b",".join(frames), orjson.dumps(str(wanted.cursor)))


async def _collect(
    connection: Connection, cursor: Cursor, unanswered: set[str], deadline: float, limit_bytes: int
) -> list[bytes]:
    """Take what is to be told, and move the cursor by it.

    A channel that is still asked about is waited for, also when the time is over or another one has news: otherwise it
    would never be heard. It has an answer of its own within `broker_timeout`, or `request_timeout` if the app decides.
    """
    queue, frames, size = connection.send_queue, list[bytes](), 0
    own = channel_of_connection(connection.id or ConnectionId(""))
    while size < limit_bytes and (unanswered or queue.waiting_bytes or not frames):
        try:
            async with asyncio.timeout_at(None if unanswered else deadline):
                frame = await queue.take()
        except TimeoutError:
            break
        if not frame:
            break
        if unanswered and protocol.split_message(frame) is None:
            told = orjson.loads(frame)
            unanswered.discard(told.get("channel", ""))
            if told.get("code") in _PASSING:
                deadline = min(deadline, asyncio.get_running_loop().time() + _REFUSED_SECONDS)
        if cursor.follow(frame, own):
            frames.append(frame)
            size += len(frame)
    if queue.closed is not None and queue.closed[0] is not CloseCode.SLOW and size < limit_bytes:
        code, reason = queue.closed
        frames.append(protocol.disconnect(code, reason, retry_after(code)))
    return frames


def _wait_seconds(query: Mapping[str, Sequence[str]], limit: float) -> float:
    text = query.get("wait", [str(_WAIT_SECONDS)])[-1]
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise Refusal(400, ErrorCode.BAD_FRAME, f"wait={text!r:.40} must be a number of seconds")
    return min(seconds, limit)
