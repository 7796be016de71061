"""Be one channel that the application listens to.

In:     publications, gaps and members of one channel, as the connection reads them
Out:    the same, to an iteration or to callbacks, one after another
Owns:   the channel's position, its members, and what waits
Never:  advances its position over what was not handed on
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pubsub_mw.client.arrivals import Arrivals, call
from pubsub_mw.errors import ConnectionClosed, PubSubError

__all__ = ["Gap", "Message", "Presence", "Subscription", "closed_here"]

log = logging.getLogger("pubsub_mw")


@dataclass(frozen=True, slots=True)
class Message:
    """A publication as it arrived.

    Attributes:
        channel: its name
        event: what kind it is
        data: any JSON value
        position: its place, as text; give it to `subscribe` to go on after it
    """

    channel: str
    event: str
    data: Any
    position: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Something was missed and cannot be told: fetch the state anew.

    Attributes:
        channel: its name
        position: from which everything follows again
        reason: `epoch`, `ahead`, `forked`, `trimmed`, or `unrecovered` when it showed on subscribing
    """

    channel: str
    position: str
    reason: str


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is on a presence channel, and what changed.

    Attributes:
        members: user -> info (any JSON), everybody who is there now
        joined: the user who came, or None
        left: the user who went, or None. Both None: the list is told anew, after subscribing and after a reconnect
    """

    members: dict[str, Any]
    joined: str | None = None
    left: str | None = None


Arrived = Message | Gap | Presence


class Subscription:
    """One channel that the connection listens to. Iterate over it, or give `subscribe` a callback.

    Attributes:
        channel: its name
        position: the last one received, as text; None before the server answered
        members: user -> info of who is there, on a presence channel; as last told, also while not connected
    """

    def __init__(
        self,
        channel: str,
        position: str | None,
        leave: Callable[["Subscription"], Awaitable[None]],
        on_message: Callable[[Message], object] | None,
        on_gap: Callable[[Gap], object] | None,
        on_members: Callable[[Presence], object] | None,
        max_waiting: int,
    ) -> None:
        self.channel = channel
        self.position = position
        self.members: dict[str, Any] = {}
        self._leave = leave
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_members = on_members
        self._arrivals = Arrivals[Arrived](max_waiting)
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next publication.

        Raises:
            SubscriptionRefused: the server ended the subscription.
            ConnectionClosed: the connection ended for good.
            TypeError: its publications go to a callback.
        """
        if self._on_message is not None:
            raise TypeError(f"what comes on {self.channel} goes to on_message; subscribe without it to iterate")
        return await self._next()

    async def unsubscribe(self) -> None:
        """Stop listening. Iteration ends after what has arrived; a callback is not called any more."""
        if self._on_message is not None:
            self._arrivals.clear()
        await self._leave(self)

    # What the connection calls.

    async def answered(self) -> None:
        """Wait for the server's first answer; raise its refusal."""
        await self._answered

    async def deliver(self, item: Message | Gap) -> None:
        # At the bound the link is not read any more; the server then closes it, and recovery brings the rest.
        if await self._arrivals.put(item):
            self.position = item.position

    async def subscribed(self, position: str, recovered: bool | None, members: list[dict[str, Any]] | None) -> None:
        if not self._answered.done():
            self._answered.set_result(None)
        if members is not None:
            await self._show({member["user"]: member["info"] for member in members})
        if recovered is False:
            await self.deliver(Gap(self.channel, position, "unrecovered"))
        self.position = position

    async def change(self, kind: str, member: dict[str, Any]) -> None:
        """Take a `join` or a `leave`."""
        user = member["user"]
        others = {name: info for name, info in self.members.items() if name != user}
        if kind == "join":
            await self._show(others | {user: member["info"]}, joined=user)
        else:
            await self._show(others, left=user)

    def end(self, error: PubSubError | None) -> None:
        self._arrivals.close(error)
        if not self._answered.done():
            self._answered.set_exception(error or closed_here())
            self._answered.exception()  # whoever still waits gets it; nobody has to

    async def call_back(self, on_message: Callable[[Message], object]) -> None:
        """Hand on all that comes; a task of its own, so that a callback may itself wait for this connection."""
        try:
            while True:
                await call(on_message, await self._next())
        except StopAsyncIteration:
            return
        except PubSubError as error:
            log.warning("%s gets nothing more: %s", self.channel, error)

    async def _show(self, members: dict[str, Any], joined: str | None = None, left: str | None = None) -> None:
        self.members = members
        if self._on_members is not None:
            await self._arrivals.put(Presence(members, joined, left))

    async def _next(self) -> Message:
        while (item := await self._arrivals.take()) is not None:
            if isinstance(item, Message):
                return item
            if isinstance(item, Presence):
                assert self._on_members is not None
                await call(self._on_members, item)
            elif self._on_gap is not None:
                await call(self._on_gap, item)
            else:
                log.warning("%s: something was missed (%s); give on_gap to fetch it anew", self.channel, item.reason)
        raise StopAsyncIteration


def closed_here() -> ConnectionClosed:
    return ConnectionClosed(1000, "the connection was closed here")
