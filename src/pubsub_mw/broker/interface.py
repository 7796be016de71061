"""Say what a broker promises, whichever engine does it.

In:     drafts to publish; channels to follow
Out:    positions, pages of history, publications in offset order
Owns:   nothing: these are the shapes that `redis` and `memory` fill
Never:  returns as if something were stored that is not

Publishing is atomic: offset, tag, history and delivery happen in one step or not at all. A read of history is
atomic too: `top` and the publications are of one moment.

`Broker` is for synchronous code: thread-safe and fork-safe. `AsyncBroker` is for one event loop. The request queue
of the worker will be a third shape beside them.
"""

from collections.abc import Sequence
from typing import Protocol

from pubsub_mw.model import Channel, Draft, HistoryPage, Position, Publication

__all__ = ["AsyncBroker", "Broker", "Listener", "Subscriber"]


class Broker(Protocol):
    """The broker as synchronous code sees it. Every method raises `BrokerUnavailable` within `publish_timeout`."""

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish all of `drafts` in one round trip, in order; return their positions."""

    def position(self, channel: Channel) -> Position:
        """Return the channel's newest position; of a channel never published to, one from which nothing is missed."""

    def secret(self) -> str:
        """Return the secret kept in the broker; made on the first call by anybody."""

    def close(self) -> None:
        """Give connections back to the system."""


class Listener(Protocol):
    """What a `Subscriber` tells, always from the event loop, never concurrently."""

    def on_publication(self, channel: str, publication: Publication) -> None:
        """A publication arrived. *At most once*, in the order of the link; recovery is the listener's part."""

    def on_subscribed(self, channel: str) -> None:
        """From now on the channel's publications arrive. Again after each new link: what came between is to be read."""

    def on_lost(self) -> None:
        """The link broke: nothing arrives until `on_subscribed` is called again."""


class Subscriber(Protocol):
    """One process's link to the broker's pub/sub. Both methods take effect later, in the order called."""

    def subscribe(self, channel: Channel) -> None: ...

    def unsubscribe(self, channel: Channel) -> None: ...

    async def run(self) -> None:
        """Keep the link, for ever. Its one owner awaits this."""

    @property
    def is_up(self) -> bool:
        """Whether the link has proven that it delivers."""


class AsyncBroker(Protocol):
    """The broker as one event loop sees it. Every coroutine raises `BrokerUnavailable` within its time."""

    async def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """As `Broker.publish`."""

    async def read(
        self, wanted: Sequence[tuple[Channel, int | None]], *, page_bytes: int
    ) -> list[HistoryPage | Exception]:
        """Read the history of several channels in one round trip.

        Args:
            wanted: channel and the offset after which publications are wanted; None = only `top`
            page_bytes: where a page ends, after at least one publication

        Returns:
            A page for each, in order, or what went wrong with that one alone.
        """

    async def secret(self) -> str:
        """As `Broker.secret`."""

    def subscriber(self, listener: Listener) -> Subscriber:
        """Make a link that tells `listener`; the caller runs it."""

    async def close(self) -> None:
        """Give connections back to the system."""
