"""Carry out what the application says about connections: end them, end their subscriptions.

In:     news on the control channel, from `Publisher.disconnect` and `.unsubscribe`; connections that come and go
Out:    the same, on the connections of this process
Owns:   which connections there are, by identity; one subscription on the control channel
Never:  relies on having heard every word: what a connection may do is looked up when it begins, and again for all of
        them when news were missed

A connection is entered before its revocations are looked up, so that what is revoked in between reaches it too.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import CONTROL_CHANNEL, ConnectionId
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["Control", "Controlled"]

log = logging.getLogger("pubsub_mw")


class Controlled(Protocol):
    """What the control needs of a connection."""

    @property
    def identities(self) -> Sequence[str]:
        """`user:<user>`, `connection:<id>`: whatever is known by now."""

    def revoke(self, identity: str, subject: str, at: float) -> None:
        """Give up `subject`, a channel or `*`, if what `identity` was given for it is no younger than `at`."""


class Control:
    """The control of one process's connections. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, hub: Hub, settings: Settings) -> None:
        self._broker = broker
        self._hub = hub
        self._settings = settings
        self._connections: dict[Controlled, None] = {}

    def enter(self, connection: Controlled) -> None:
        """Let news reach a connection. Before its revocations are looked up."""
        self._connections[connection] = None

    def leave(self, connection: Controlled) -> None:
        """Forget a connection. Idempotent."""
        self._connections.pop(connection, None)

    async def look_up(self, connection: Controlled) -> None:
        """Apply to a connection what was revoked before it came.

        Raises:
            BrokerUnavailable: it cannot be known now.
        """
        if connection.identities:
            identities = connection.identities
            for identity, revoked in zip(identities, await self._broker.revoked(identities), strict=True):
                for subject, at in revoked.items():
                    connection.revoke(identity, subject, at)

    async def run(self) -> NoReturn:
        """Follow the control channel, for ever."""
        while True:
            queue = SendQueue(self._settings.send_queue_bytes, self._settings.send_queue_bytes // 4)
            name = ConnectionId("control")
            subscription = Subscription(CONTROL_CHANNEL, name, queue, None, is_announced=False)
            self._hub.subscribe(subscription)
            try:
                while frame := await queue.take():
                    await self._take(json.loads(frame))
            finally:
                self._hub.unsubscribe(subscription)
            log.error("the control channel was faster than this server; looking up all connections")
            await self._look_up_all()

    async def _take(self, news: dict[str, Any]) -> None:
        if news["type"] == "control":
            for connection in list(self._connections):
                if news["identity"] in connection.identities:
                    connection.revoke(news["identity"], news["subject"], news["at"])
        elif news["type"] in ("gap", "subscribed"):
            await self._look_up_all()

    async def _look_up_all(self) -> None:
        for connection in list(self._connections):
            try:
                await self.look_up(connection)
            except BrokerUnavailable as error:
                log.warning("revocations not looked up, the next news or connect will: %s", error)
                return
