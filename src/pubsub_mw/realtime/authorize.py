"""Let the application decide who may listen, by a request with the visitor's own cookies.

In:     a channel, and the connection that asks for it
Out:    yes or no, and who the application says it is
Owns:   the channel to which answers for this process come, and who waits for which
Never:  caches a yes: it is asked anew on every subscription, so a logout is felt at the next one

The request takes the way of every other one, so the application sees an ordinary GET.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import quote

from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import Acceptance, AsyncBroker, Offer
from pubsub_mw.errors import BrokerUnavailable, ChannelError
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Channel, ConnectionId, Handshake, Position, Request, channel_of_user
from pubsub_mw.protocol import decode_body
from pubsub_mw.realtime.control import close_unsettled
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["Authorizer", "Decision"]

log = logging.getLogger("pubsub_mw")

_MOST_BODY_BYTES = 1 << 16
"""Of a decision; in a longer one nothing is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The application's word.

    Attributes:
        is_allowed: whether the visitor may listen
        user: who it is, or None if the application did not say
        info: any JSON that presence shows beside the user
    """

    is_allowed: bool
    user: str | None = None
    info: object = None


class Authorizer:
    """Ask the application for one process's connections. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, hub: Hub, settings: Settings, secret: str) -> None:
        self._broker = broker
        self._hub = hub
        self._settings = settings
        self._key = queue_key(secret)
        self._channel = Channel(f"#server-{secrets.token_urlsafe(12)}")
        self._waiting: dict[str, asyncio.Queue[dict[str, Any]]] = {}  # frames of each answer

    async def ask(
        self, channel: Channel, connection: ConnectionId, user: str | None, transport: str, handshake: Handshake
    ) -> Decision:
        """Return the application's decision.

        Raises:
            BrokerUnavailable: the question could not be stored, the application failed (5xx), or nobody answered
                within `request_timeout`.
        """
        request_id = f"authorize-{secrets.token_urlsafe(12)}"
        request = Request(
            connection=connection,
            user=user,
            transport=transport,
            id=request_id,
            method="GET",
            path=self._settings.authorize,
            query=f"channel={quote(channel, safe='')}",
            headers=(("accept", "application/json"),),
            body=b"",
            handshake=handshake,
            reply_to=self._channel,
        )
        frames = self._waiting[request_id] = asyncio.Queue()
        try:
            # In no lane: a question of the server's does not wait for what its client asked for.
            offer = Offer(
                connection=connection,
                request_id=request_id,
                payload=encode_request(request, self._key),
                reply_to=self._channel,
                is_ordered=False,
            )
            (accepted,) = await self._broker.accept([offer])
            if isinstance(accepted, Exception):
                raise accepted
            if accepted.acceptance is Acceptance.FULL:
                raise BrokerUnavailable("the request queue is full")
            async with asyncio.timeout(self._settings.request_timeout + self._settings.request_grace):
                return _decision(*await _collect(frames))
        except TimeoutError:
            raise BrokerUnavailable(f"no worker answered for {self._settings.authorize}") from None
        finally:
            del self._waiting[request_id]

    async def run(self) -> NoReturn:
        """Take answers, for ever."""
        while True:
            queue = SendQueue(self._settings.send_queue_bytes, self._settings.send_queue_bytes // 4)
            name = ConnectionId("authorizer")
            settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            settled.add_done_callback(partial(close_unsettled, queue))
            # From the channel's very beginning: an answer may be there before the broker follows it.
            start = Position.start()
            subscription = Subscription(self._channel, name, queue, start, is_announced=False, settled=settled)
            self._hub.subscribe(subscription)
            try:
                while frame := await queue.take():
                    self._take(json.loads(frame))
            finally:
                self._hub.unsubscribe(subscription)
            log.error("answers of %s are not followed (%s); beginning again", self._settings.authorize, queue.closed)

    def _take(self, frame: dict[str, Any]) -> None:
        frames = self._waiting.get(frame.get("id", ""))
        if frames is not None:
            frames.put_nowait(frame)


async def _collect(frames: asyncio.Queue[dict[str, Any]]) -> tuple[int, bytes]:
    """Return the status and the body of an answer, which may come in parts; of a long body a bit over the bound."""
    status, body = int(HTTPStatus.SERVICE_UNAVAILABLE), b""
    while True:
        frame = await frames.get()
        if "status" in frame:  # it begins, or begins again where this process lost its place
            status, body = frame["status"], b""
        if "body" in frame and len(body) <= _MOST_BODY_BYTES:
            body += decode_body(frame)
        if "error" in frame:  # it broke off, so nobody knows what it was to say
            status = int(HTTPStatus.BAD_GATEWAY)
        if frame["type"] in ("response", "response_end"):
            return status, body


def _decision(status: int, body: bytes) -> Decision:
    if status >= 500:
        raise BrokerUnavailable(f"the application answered {status}")
    if not 200 <= status < 300:
        return Decision(is_allowed=False)
    said = None
    if len(body) > _MOST_BODY_BYTES:
        log.error("the application's decision has more than %d bytes; whom it names is not read", _MOST_BODY_BYTES)
    else:
        with contextlib.suppress(ValueError):
            said = json.loads(body)
    if not isinstance(said, dict) or said.get("user") is None:
        return Decision(is_allowed=True)
    user = str(said["user"])
    try:
        channel_of_user(user)
    except ChannelError as error:
        log.error("the application named a user that cannot be one: %s", error)
        return Decision(is_allowed=False)
    return Decision(is_allowed=True, user=user, info=said.get("info"))
