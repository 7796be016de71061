"""Have the server subscribed to what the application wants.

In:     subscriptions, as the application makes and ends them; the frames about their channels
Out:    `subscribe` and `unsubscribe` frames; what came, to the subscription that it belongs to
Owns:   what is wanted, and what the server was asked for on this link
Never:  sends a channel's next command before the last one was answered: so every answer, and every publication, is
        known to belong to one subscription
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pubsub_mw.client.subscription import Gap, Message, Subscription
from pubsub_mw.errors import ConnectionClosed, ErrorCode, SubscriptionRefused

__all__ = ["PASSING", "Channels"]

PASSING = (ErrorCode.UNAVAILABLE, ErrorCode.GRANT_EXPIRED)
"""With these the server refuses a channel only for now."""

Frame = dict[str, Any]


@dataclass(slots=True)
class _Asked:
    """What the server was last asked for on one channel: to subscribe for `subscription`, or (None) to unsubscribe."""

    subscription: Subscription | None
    is_subscribed: bool = False


class Channels:
    """The channels of one connection, without its own.

    Args:
        send: a frame to the server; what the link loses, it loses silently
    """

    def __init__(self, send: Callable[[Frame], Awaitable[None]]) -> None:
        self._send = send
        self._wanted: dict[str, Subscription] = {}
        self._asked: dict[str, _Asked] = {}
        self._is_connected = False

    def is_wanted(self, channel: str) -> bool:
        return channel in self._wanted

    def is_asked(self, channel: str | None) -> bool:
        return channel in self._asked

    async def add(self, subscription: Subscription) -> None:
        """Have the server subscribed for it.

        Raises:
            SubscriptionRefused: it is one of the connection's own channels. Asked for over HTTP, the server would take
                it for that, and not answer.
        """
        if subscription.channel.startswith("#"):
            raise SubscriptionRefused(subscription.channel, ErrorCode.BAD_CHANNEL, "give on_private to listen to it")
        self._wanted[subscription.channel] = subscription
        await self._settle(subscription.channel)

    async def remove(self, subscription: Subscription) -> None:
        if self._wanted.get(subscription.channel) is subscription:
            del self._wanted[subscription.channel]
            subscription.end(None)
            await self._settle(subscription.channel)

    def positions(self) -> dict[str, str | None]:
        """Return what a `connect` frame asks for; from now on it is what the server was asked."""
        self._asked = {name: _Asked(subscription) for name, subscription in self._wanted.items()}
        return {name: subscription.position for name, subscription in self._wanted.items()}

    async def settle(self) -> None:
        """Ask the server for what it lacks: it is connected."""
        self._is_connected = True
        for channel in list(self._wanted):
            await self._settle(channel)

    def pause(self) -> None:
        """Ask for nothing: there is no connection."""
        self._is_connected = False

    def end(self, error: ConnectionClosed | None) -> None:
        """End all subscriptions."""
        self.pause()
        wanted, self._wanted = self._wanted, {}
        for subscription in wanted.values():
            subscription.end(error)

    async def receive(self, frame: Frame) -> None:
        """Take a frame about one channel."""
        kind, channel = frame["type"], frame["channel"]
        asked = self._asked.get(channel)
        if asked is None:
            return
        subscription = asked.subscription
        if kind == "subscribed":
            asked.is_subscribed = True
            await self._settle(channel)  # the application may have left meanwhile
            if subscription is not None:
                await subscription.subscribed(frame["position"], frame["recovered"], frame.get("members"))
        elif kind == "unsubscribed" or frame.get("code") == ErrorCode.NOT_SUBSCRIBED:
            if frame["code"] in ("client", ErrorCode.NOT_SUBSCRIBED):
                del self._asked[channel]
                await self._settle(channel)
            else:
                await self.refuse(channel, frame["code"], frame["reason"])
        elif subscription is None:
            return
        elif kind == "message":
            await subscription.deliver(Message(channel, frame["event"], frame["data"], frame["position"]))
        elif kind == "gap":
            await subscription.deliver(Gap(channel, frame["position"], frame["reason"]))
        elif kind in ("join", "leave"):
            await subscription.change(kind, frame["member"])

    async def refuse(self, channel: str, code: str, message: str) -> None:
        """End the subscription that the server refused or ended; one of `PASSING` leaves it to be asked for again."""
        asked = self._asked.get(channel)
        if asked is None or asked.subscription is None:
            return  # what was asked for since is answered by itself
        del self._asked[channel]
        if code in PASSING:
            return
        if self._wanted.get(channel) is asked.subscription:
            del self._wanted[channel]
            asked.subscription.end(SubscriptionRefused(channel, code, message))
        else:
            await self._settle(channel)

    async def _settle(self, channel: str) -> None:
        if not self._is_connected:
            return
        wanted, asked = self._wanted.get(channel), self._asked.get(channel)
        if asked is None and wanted is not None:
            self._asked[channel] = _Asked(wanted)
            await self._send({"type": "subscribe", "channel": channel, "position": wanted.position})
        elif asked is not None and asked.is_subscribed and asked.subscription is not wanted:
            self._asked[channel] = _Asked(None)
            await self._send({"type": "unsubscribe", "channel": channel})
