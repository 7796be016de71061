"""Carry out what the application says about connections: end them, end their subscriptions.

In:     news on the control channel, from `Publisher.disconnect` and `.unsubscribe`, and from other servers where a
        connection was resumed, or a fresh grant came for one; connections that come and go
Out:    the same, on the connections of this process
Owns:   which connections there are, by identity; one subscription on the control channel
Never:  relies on having heard every word: what a connection may do is looked up when it begins, and again for all of
        them when news may have been missed

A connection is entered before its revocations are looked up, so that what is revoked in between reaches it too.

A connection id is open once. Where one is resumed, its server says so on the control channel, which has one order for
all servers: whoever says it last has the connection. So a server closes its own on another one's word, unless it has
said its own and not heard it yet, which then comes later.
"""

import asyncio
import itertools
import json
import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import BrokerUnavailable, CloseCode, FrameError, GrantError, PublishError
from pubsub_mw.grants import Resume, sign_resume, verify_resume
from pubsub_mw.model import CONTROL_CHANNEL, ConnectionId, Draft, Grant
from pubsub_mw.protocol import head_of
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["Control", "Controlled", "close_unsettled"]

log = logging.getLogger("pubsub_mw")

_BATCH = 500
"""Connections looked up, or claimed, in one round trip."""
_NEWS_SECONDS = 60.0
"""How long news that carry a grant are good for; they arrive within one."""
_RETRY_SECONDS = 0.5
"""Until the broker is asked again when it did not answer."""


class Controlled(Protocol):
    """What the control needs of a connection."""

    @property
    def identities(self) -> Sequence[str]:
        """`user:<user>`, `connection:<id>`: whatever is known by now."""

    def revoke(self, identity: str, subject: str, at: float) -> ConnectionId | None:
        """Give up `subject`, a channel or `*`, if what `identity` was given for it is no younger than `at`."""

    async def take_grant(self, grant: Grant) -> None:
        """Take a fresh grant, which came by another way than the connection itself.

        Raises:
            FrameError: it is not for this connection.
        """


class Control:
    """The control of one process's connections. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, hub: Hub, settings: Settings, secret: str) -> None:
        self._broker = broker
        self._hub = hub
        self._settings = settings
        self._secret = secret
        self._connections: dict[Controlled, None] = {}
        self._server = secrets.token_urlsafe(12)
        self._claims: dict[ConnectionId, int] = {}  # said to be resumed here, and not heard yet
        self._numbers = itertools.count()
        self._unsaid: dict[ConnectionId, tuple[int, bool]] = {}
        self._saying: asyncio.Task[None] | None = None
        self._asking: list[tuple[Controlled, asyncio.Future[None]]] = []  # what of theirs was revoked
        self._looking: asyncio.Task[None] | None = None
        self._barring: set[asyncio.Task[None]] = set()

    def enter(self, connection: Controlled) -> None:
        """Let news reach a connection. Before its revocations are looked up."""
        self._connections[connection] = None

    def leave(self, connection: Controlled) -> None:
        """Forget a connection. Idempotent."""
        self._connections.pop(connection, None)

    async def look_up(self, connection: Controlled) -> None:
        """Apply to a connection what was revoked before it came; in one round trip for all who ask meanwhile.

        Raises:
            BrokerUnavailable: it cannot be known now.
        """
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking.append((connection, told))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(_log_fault)
        await told

    async def _look(self) -> None:
        try:
            while self._asking:
                batch, self._asking = self._asking[:_BATCH], self._asking[_BATCH:]
                problem: Exception | None = None
                try:
                    await self._look_up([connection for connection, _ in batch])
                except Exception as error:  # noqa: BLE001 - those who asked are told
                    problem = error
                for _, told in batch:
                    if told.done():
                        continue  # who asked has gone
                    if problem is None:
                        told.set_result(None)
                    else:
                        told.set_exception(problem)
        finally:
            self._looking = None

    async def _look_up(self, connections: Sequence[Controlled]) -> None:
        named = [(connection, identity) for connection in connections for identity in connection.identities]
        if named:
            found = await self._broker.revoked([identity for _, identity in named])
            for (connection, identity), revoked in zip(named, found, strict=True):
                for subject, at in revoked.items():
                    self._revoke(connection, identity, subject, at)

    def claim(self, connection: ConnectionId, *, by_poll: bool) -> None:
        """Tell the other servers that a connection was resumed here, so that they close theirs of that id."""
        self._claims[connection] = number = next(self._numbers)
        self._unsaid[connection] = (number, by_poll)
        if self._saying is None:
            self._saying = asyncio.create_task(self._say())
            self._saying.add_done_callback(_log_fault)

    async def run(self) -> NoReturn:
        """Follow the control channel, for ever."""
        while True:
            queue = SendQueue(self._settings.send_queue_bytes, self._settings.send_queue_bytes // 4)
            settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            settled.add_done_callback(partial(close_unsettled, queue))
            subscription = Subscription(CONTROL_CHANNEL, ConnectionId("control"), queue, None, settled=settled)
            self._hub.subscribe(subscription)
            try:
                while frame := await queue.take():
                    await self._take(json.loads(frame))
            finally:
                self._hub.unsubscribe(subscription)
            log.error("the control channel is not followed (%s); beginning again", queue.closed)

    async def _take(self, news: dict[str, Any]) -> None:
        if news["type"] == "control":
            for connection in list(self._connections):
                if news["identity"] in connection.identities:
                    self._revoke(connection, news["identity"], news["subject"], news["at"])
        elif news["type"] == "granted":
            await self._take_grant(news["token"])
        elif news["type"] == "resumed":
            self._hear(ConnectionId(news["connection"]), news["server"], news["number"], news.get("poll", False))
        elif news["type"] in ("gap", "subscribed"):
            self._claims.clear()
            await self._look_up_all()

    async def send_grant(self, resume: Resume) -> None:
        """Have the connection of `resume`, on whichever server it is, take the grant of `resume`.

        Raises:
            BrokerUnavailable: it may not have been told.
        """
        token = sign_resume(self._secret, resume, expires=_NEWS_SECONDS, use="news")
        news = head_of({"type": "granted", "token": token})
        await self._broker.publish([build_answer_draft(self._settings, CONTROL_CHANNEL, news, "", "")])

    async def _take_grant(self, token: str) -> None:
        try:
            resume = verify_resume(self._secret, token, now=time.time(), use="news")
        except GrantError as error:
            log.warning("a grant was not taken: %s", error)
            return
        for connection in list(self._connections):
            if resume.grant is not None and f"connection:{resume.connection}" in connection.identities:
                try:
                    await connection.take_grant(resume.grant)
                except FrameError as error:
                    log.warning("a grant was not taken by its connection: %s", error)

    async def _look_up_all(self) -> None:
        connections = list(self._connections)
        while connections:
            try:
                await self._look_up(connections[:_BATCH])
            except BrokerUnavailable as error:
                log.warning("revocations not looked up yet: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                del connections[:_BATCH]

    def _revoke(self, connection: Controlled, identity: str, subject: str, at: float) -> None:
        ended = connection.revoke(identity, subject, at)
        if ended is not None:
            task = asyncio.create_task(self._bar(ended, at))
            self._barring.add(task)
            task.add_done_callback(self._barring.discard)
            task.add_done_callback(_log_fault)

    async def _bar(self, connection: ConnectionId, at: float) -> None:
        """Make the resume tokens of a connection void."""
        identity = f"connection:{connection}"
        news = head_of({"type": "control", "identity": identity, "subject": "*", "at": at})
        try:
            draft = build_answer_draft(self._settings, CONTROL_CHANNEL, news, "", "")
            await self._broker.revoke(identity, "*", at, draft)
        except (BrokerUnavailable, PublishError) as error:
            log.warning("a connection that the application ended may be resumed, as nobody's: %s", error)

    # Who has a connection.

    async def _say(self) -> None:
        """Publish claims, one batch after another, so that a later one never comes before an earlier one."""
        try:
            while self._unsaid:
                batch = dict(itertools.islice(self._unsaid.items(), _BATCH))
                self._unsaid = {name: claim for name, claim in self._unsaid.items() if name not in batch}
                drafts = [self._draft(connection, *claim) for connection, claim in batch.items()]
                try:
                    await self._broker.publish(drafts)
                except BrokerUnavailable as error:
                    log.warning("other servers may still hold %d resumed connections: %s", len(batch), error)
                    for connection, (number, _) in batch.items():
                        self._forget_claim(connection, number)
        finally:
            self._saying = None

    def _draft(self, connection: ConnectionId, number: int, by_poll: bool) -> Draft:
        place = {"connection": connection, "server": self._server, "number": number, "poll": by_poll}
        return build_answer_draft(self._settings, CONTROL_CHANNEL, head_of({"type": "resumed", **place}), "", "")

    def _hear(self, connection: ConnectionId, server: str, number: int, by_poll: bool) -> None:
        if server == self._server:
            self._forget_claim(connection, number)
        elif connection not in self._claims:
            self._hub.replace(connection, by_poll=by_poll)

    def _forget_claim(self, connection: ConnectionId, number: int) -> None:
        if self._claims.get(connection) == number:
            del self._claims[connection]


def _log_fault(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the control failed by a fault of the server", exc_info=task.exception())


def close_unsettled(queue: SendQueue, settled: "asyncio.Future[bool]") -> None:
    """End the wait for news of a subscription that the hub has given up."""
    if not settled.cancelled() and not settled.result():
        queue.close(CloseCode.BROKER_UNAVAILABLE, "the broker does not answer")
