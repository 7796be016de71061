"""Carry clients' requests to the queue, in the order they came.

In:     `request` and `cancel` frames; news of answers that passed on a connection's own channel
Out:    signed requests into the broker's queue; an `error` frame where one is refused
Owns:   what is on its way to the broker, and until when each request that was stored from here has to be answered
Never:  takes a request for accepted before the broker has stored it; keeps the order of what is stored, which is the
        broker's part

The answer does not come back through here: the worker publishes it to the connection's own channel, where it takes
the way of every publication. A request whose answer has not begun `request_timeout` after it was stored, and
`request_grace` more, is answered 504 from here, under the same idempotency key that the worker would use, so that one
of the two shows.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Coroutine, Sequence

from pubsub_mw import protocol
from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import Acceptance, Accepted, AsyncBroker, Offer, answer_key
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import BrokerUnavailable, ErrorCode, FrameError, PublishError
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Channel, ConnectionId, Handshake, Position, Publication, Request
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.request_check import RequestCheck
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["RequestGate", "Requests", "TaskSet"]

log = logging.getLogger("pubsub_mw")

_MOST_PER_ROUND_TRIP = 256
_MOST_EXPECTED = 100_000
"""Answers that one process waits for, to give its own if none comes; or twice `queue_size`, if that is more. It is not
told of those that go to clients elsewhere, so beyond it the oldest is waited for no longer: of those after it at least
half were answered, since the queue does not hold so many, and workers that live answer that one too."""
_NO_WORKER = "a request is answered 504: no worker began to answer in time. Is `pubsub-mw worker` running?"
_RETRY_SECONDS = 1.0
"""Until the broker is asked again when it did not take an answer."""


class TaskSet:
    """Tasks of one owner, which sees them end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: "Coroutine[None, None, None]") -> "asyncio.Task[None]":
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request was dropped by a fault of the server", exc_info=task.exception())


class RequestGate(RequestCheck):
    """What all connections of a process have in common: what may be requested, and the way into the queue.

    Offers are stored in the order they came, those that came meanwhile with the next round trip.
    """

    def __init__(self, settings: Settings, broker: AsyncBroker, publisher: AsyncPublisher, secret: str) -> None:
        super().__init__(settings)
        self.broker = broker
        self.publisher = publisher
        self._key = queue_key(secret)
        self._offers: deque[tuple[Offer, asyncio.Future[Accepted]]] = deque()
        self._stored: dict[tuple[ConnectionId, str], asyncio.Future[Accepted]] = {}  # those under way
        self._storing: asyncio.Task[None] | None = None
        self._timers: OrderedDict[tuple[ConnectionId, str], asyncio.TimerHandle] = OrderedDict()  # the oldest first
        self._most_timers = max(_MOST_EXPECTED, 2 * settings.queue_size)
        self._tasks = TaskSet()
        self.accepted = self.answered = self.timed_out = 0  # for `metrics`, as is `refused`

    async def accept(
        self,
        frame: protocol.RequestFrame,
        connection: ConnectionId,
        user: str | None,
        handshake: Handshake,
        transport: str = "websocket",
    ) -> list[Publication]:
        """Store a request, from wherever it came; its answer goes to the connection's own channel.

        If no worker begins to answer in time, this process answers 504.

        Returns:
            Its answer, if it was answered before.

        Raises:
            FrameError: it is not allowed, there is no room for it, or the broker does not answer; or it was answered,
                and the answer cannot be read.
        """
        request = self.check(frame, connection, user, handshake, transport)
        answered_at = (await self.store(request)).answered_at
        return [] if answered_at is None else await self.read_answer(request, answered_at)

    def store(self, request: Request) -> "asyncio.Future[Accepted]":
        """Have a checked request stored after those that came before it; see `accept`."""
        stored: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        # Whoever waited may be gone when there is an answer.
        stored.add_done_callback(lambda stored: stored.cancelled() or stored.exception())
        if len(self._offers) >= self.settings.queue_size:
            self.refused[ErrorCode.BUSY] += 1
            stored.set_exception(FrameError(ErrorCode.BUSY, "too many requests wait at this server", id=request.id))
            return stored
        offer = Offer(
            connection=request.connection,
            request_id=request.id,
            payload=encode_request(request, self._key),
            reply_to=request.reply_to,
        )
        self._offers.append((offer, stored))
        self._stored[request.connection, request.id] = stored
        if self._storing is None or self._storing.done():
            self._storing = self._tasks.spawn(self._store())
        return stored

    async def _store(self) -> None:
        while self._offers:
            batch = [self._offers.popleft() for _ in range(min(len(self._offers), _MOST_PER_ROUND_TRIP))]
            replies: Sequence[Accepted | Exception]
            try:
                replies = await self.broker.accept([offer for offer, _ in batch])
            except BrokerUnavailable as error:
                log.warning("requests were not stored: %s", error)
                replies = [error] * len(batch)
            for (offer, stored), reply in zip(batch, replies, strict=True):
                key = (offer.connection, offer.request_id)
                if self._stored.get(key) is stored:
                    del self._stored[key]
                refusal = self._refusal(offer, reply)
                if refusal is not None:
                    self.refused[refusal.code] += 1
                elif isinstance(reply, Accepted):
                    self.accepted += reply.acceptance is Acceptance.STORED
                if isinstance(reply, Accepted) and refusal is None and reply.answered_at is None:
                    self._expect(*key, offer.reply_to, self.settings.request_timeout + self.settings.request_grace)
                if stored.done():
                    continue  # nobody waits for it any more
                if refusal is not None:
                    stored.set_exception(refusal)
                elif isinstance(reply, Accepted):
                    stored.set_result(reply)

    def _refusal(self, offer: Offer, reply: Accepted | Exception) -> FrameError | None:
        if isinstance(reply, Exception):
            return FrameError(ErrorCode.UNAVAILABLE, "the broker does not answer; send it again", id=offer.request_id)
        if reply.acceptance is Acceptance.FULL:
            message = f"{self.settings.queue_size} requests wait for the application"
        elif reply.acceptance is Acceptance.BUSY:
            message = f"{self.settings.request_backlog} requests of this connection wait already"
        else:
            return None
        return FrameError(ErrorCode.BUSY, message, id=offer.request_id)

    async def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        """Have the worker that runs a request told that its answer is not wanted.

        Returns:
            Whether it waited for others; then it is gone, and nobody will answer it.

        Raises:
            FrameError: the broker does not answer.
        """
        under_way = self._stored.get((connection, request_id))
        if under_way is not None:
            await asyncio.wait({under_way})
        try:
            is_gone = await self.broker.cancel(connection, request_id)
        except BrokerUnavailable as error:
            log.warning("a request was not cancelled: %s", error)
            message = "the broker does not answer; cancel it again"
            raise FrameError(ErrorCode.UNAVAILABLE, message, id=request_id) from error
        if is_gone and (timer := self._timers.pop((connection, request_id), None)) is not None:
            timer.cancel()
        return is_gone

    async def read_answer(self, request: Request, position: Position) -> list[Publication]:
        """Return the answer that begins at `position`; nothing while it goes on, because the rest is on its way.

        Raises:
            FrameError: it cannot be read now, or is no longer kept.
        """
        offset, parts = position.offset - 1, list[Publication]()
        while not parts or parts[-1].reply[0] != ".":
            (page,) = await self.broker.read([(request.reply_to, offset)], page_bytes=self.settings.recovery_page_bytes)
            if isinstance(page, Exception):
                message = "its answer could not be read; send it again"
                raise FrameError(ErrorCode.UNAVAILABLE, message, id=request.id)
            parts += [item for item in page.publications if item.reply[1:] == request.id]
            if not parts or parts[0].position != position:
                message = "it was answered, and the answer is no longer kept"
                raise FrameError(ErrorCode.EXPIRED, message, id=request.id)
            if page.is_complete and parts[-1].reply[0] != ".":
                return []
            offset = page.publications[-1].position.offset
        return parts

    # For want of a worker.

    def on_reply(self, connection: ConnectionId, reply: str) -> None:
        """Note that a part of an answer passed on a connection's own channel."""
        self.on_begun(connection, reply[1:])

    def on_begun(self, connection: ConnectionId, request_id: str) -> None:
        """Note that an answer has begun: it needs no other one."""
        timer = self._timers.pop((connection, request_id), None)
        if timer is not None:
            timer.cancel()
            self.answered += 1

    def _expect(self, connection: ConnectionId, request_id: str, reply_to: Channel, seconds: float) -> None:
        key = (connection, request_id)
        if key not in self._timers:
            if len(self._timers) >= self._most_timers:
                self._timers.popitem(last=False)[1].cancel()
            loop = asyncio.get_running_loop()
            self._timers[key] = loop.call_later(seconds, self._on_timeout, *key, reply_to)

    def _on_timeout(self, connection: ConnectionId, request_id: str, reply_to: Channel) -> None:
        del self._timers[connection, request_id]
        self._tasks.spawn(self._time_out(connection, request_id, reply_to))

    async def _time_out(self, connection: ConnectionId, request_id: str, reply_to: Channel) -> None:
        body = b"no worker has begun to answer in time\n"
        head = protocol.response_head(request_id, 504, {"content-type": "text/plain; charset=utf-8"}, body)
        draft = build_answer_draft(self.settings, reply_to, head, answer_key(request_id), "." + request_id)
        try:
            (position,) = await self.publisher.publish_drafts([draft])
            if position.tag == draft.tag:
                self.timed_out += 1
                log.warning(_NO_WORKER)
            else:
                self.answered += 1  # and the answer passed by other servers
            await self.broker.withdraw(connection, request_id)
        except (PublishError, BrokerUnavailable) as error:
            log.warning("a request is answered 504 later: %s", error)
            self._expect(connection, request_id, reply_to, _RETRY_SECONDS)

    async def close(self) -> None:
        """Answer for nothing any more: clients send what is not answered to another server."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for stored in self._stored.values():
            stored.cancel()
        await self._tasks.close()


class Requests:
    """The requests of one connection.

    Args:
        gate: of this process
        connection: its id
        handshake: cookies and more for each request
        send_queue: for refusals, and for answers that are sent again
        own: the subscription on the connection's own channel
        transport: by which it came
    """

    def __init__(
        self,
        gate: RequestGate,
        connection: ConnectionId,
        handshake: Handshake,
        send_queue: SendQueue,
        own: Subscription,
        transport: str = "websocket",
    ) -> None:
        self._gate = gate
        self._connection = connection
        self._handshake = handshake
        self._send_queue = send_queue
        self._own = own
        self._transport = transport
        self._unanswered: set[str] = set()
        self._tasks = TaskSet()

    def put(self, frame: protocol.RequestFrame, user: str | None) -> None:
        """Take a request: it is stored, and runs when those before it are answered.

        Raises:
            FrameError: it is not allowed.
        """
        request = self._gate.check(frame, self._connection, user, self._handshake, self._transport)
        is_resend = frame.id in self._unanswered
        self._unanswered.add(frame.id)
        self._tasks.spawn(self._store(request, self._gate.store(request), is_resend=is_resend))

    def cancel(self, request_id: str) -> None:
        """Drop a request that waits, or have the worker that runs it told; it may be one from before a reconnect."""
        self._tasks.spawn(self._cancel(request_id))

    def on_reply(self, connection: ConnectionId, reply: str) -> None:
        """Note that a part of an answer passed on the connection's own channel."""
        self._gate.on_reply(connection, reply)
        if reply[0] == ".":
            self._unanswered.discard(reply[1:])

    def close(self) -> None:
        """Store nothing more: what was not stored its client sends again on its next connection."""
        self._tasks.cancel()

    async def _store(self, request: Request, stored: "asyncio.Future[Accepted]", *, is_resend: bool) -> None:
        try:
            accepted = await stored
            if request.id not in self._unanswered:
                self._gate.on_begun(self._connection, request.id)  # answered meanwhile
            elif accepted.answered_at is not None and not is_resend:  # else what passes on the channel is its answer
                await self._answer_again(request, accepted.answered_at)
        except FrameError as error:
            self._refuse(error)

    async def _answer_again(self, request: Request, position: Position) -> None:
        """Send the answer of a request that was answered before, unless recovery brings it, or the rest of it."""
        parts = await self._gate.read_answer(request, position)
        if parts and request.id in self._unanswered:
            if not self._is_told(position, parts[-1].position):
                for part in parts:
                    self._send_queue.put_recovered_nowait(part.frame)
            self._unanswered.discard(request.id)

    def _is_told(self, begin: Position, end: Position) -> bool:
        """Whether a resumed client gets an answer, or had its begin and gets the rest, without being sent it again.

        It gets what comes after `since`; up to `joined_at` from history, which it may be about to read.
        """
        since, joined = self._own.since, self._own.joined_at
        if since is None or not (since.is_start or since.epoch == end.epoch):
            return False
        return end.offset > since.offset and (joined is None or begin.offset <= joined.offset)

    async def _cancel(self, request_id: str) -> None:
        try:
            if await self._gate.cancel(self._connection, request_id):
                self._refuse(FrameError(ErrorCode.CANCELLED, "cancelled before it was begun", id=request_id))
        except FrameError as error:
            self._refuse(error)

    def _refuse(self, error: FrameError) -> None:
        self._send_queue.put_nowait(protocol.error(error.code, str(error), id=error.id))
        self._unanswered.discard(error.id or "")
