"""Say what a broker promises, whichever engine does it.

In:     drafts to publish; channels to follow
Out:    positions, pages of history, publications in offset order
Owns:   nothing: these are the shapes that `redis` and `memory` fill
Never:  returns as if something were stored that is not

Publishing is atomic: offset, tag, history and delivery happen in one step or not at all. A read of history is
atomic too: `top` and the publications are of one moment.

`Broker` is for synchronous code: thread-safe and fork-safe. `AsyncBroker` is for one event loop. `RequestQueue` is
what a worker sees of the requests that `AsyncBroker.accept` stored. A request is delivered *at least once*; its
answer is published at most once, because everything published for it carries an idempotency key (`answer_key`).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from pubsub_mw.broker.presence import Notice, PresenceCall, Present
from pubsub_mw.model import Channel, ConnectionId, Draft, HistoryPage, Position, Request

__all__ = [
    "Acceptance",
    "Accepted",
    "AsyncBroker",
    "Broker",
    "Key",
    "Listener",
    "Offer",
    "Progress",
    "RequestQueue",
    "Subscriber",
    "Taken",
    "answer_key",
    "end_key",
    "part_key",
]


def answer_key(request_id: str) -> str:
    """Return the idempotency key of what begins the answer to a request: whoever publishes first has answered."""
    return f"r:{request_id}"


def end_key(request_id: str) -> str:
    """Return the idempotency key of what ends an answer that is published in parts."""
    return f"e:{request_id}"


def part_key(request_id: str) -> str:
    """Return the idempotency key of all between the two, which are counted: see `Draft.part`."""
    return f"c:{request_id}"


class Acceptance(Enum):
    """What became of a request that was offered to the queue."""

    STORED = 1  # a worker will run it
    KNOWN = 2  # it was stored before: a resend
    FULL = 3  # `queue_size` requests are stored already; nothing was added
    BUSY = 4  # `request_backlog` requests of this connection wait already; nothing was added


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A request that is offered to the queue.

    Attributes:
        connection: whose it is
        request_id: unique on its connection
        payload: for the worker; the queue does not look into it
        reply_to: the channel that its answer goes to
        is_ordered: whether it runs after those of its connection that were offered before; if not, beside them
    """

    connection: ConnectionId
    request_id: str
    payload: bytes
    reply_to: Channel
    is_ordered: bool = True


@dataclass(frozen=True, slots=True)
class Accepted:
    """The queue's word on one request.

    Attributes:
        acceptance: see there
        answered_at: where on its channel the answer begins, if it has begun
    """

    acceptance: Acceptance
    answered_at: Position | None


class Progress(Enum):
    """How much of the answer to a request was published."""

    NOTHING = 1
    BEGUN = 2  # its begin, perhaps more
    COMPLETE = 3


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that a worker took and has to answer.

    Attributes:
        entry: names it in the queue
        lane: the connection whose next request waits until this one is settled, or "" = none does
        payload: as it was offered
        age: seconds since it was accepted, by the broker's clock; those in which it waited for others included
        delivery_count: 1 = for the first time
    """

    entry: str
    lane: str
    payload: bytes
    age: float
    delivery_count: int


class RequestQueue(Protocol):
    """The request queue as one worker sees it. Thread-safe; every method may raise `BrokerUnavailable`."""

    def take(self, limit: int, wait: float) -> list[Taken]:
        """Take up to `limit` requests, waiting up to `wait` seconds for the first.

        Those come first that were given back, or that a worker took and has not renewed for `lease` seconds.
        """

    def renew(self, running: Mapping[str, Request]) -> list[str]:
        """Say that these, by entry, are still worked on, so that a resend is known and does not run them again, and
        the next of their connections wait.

        Returns:
            Entries that are not in the queue any more: another worker answered them.
        """

    def give_back(self, taken: Sequence[Taken]) -> None:
        """Let other workers take these soon, which this one has not begun; that it took them is not counted.

        What another worker has taken meanwhile stays with that one.
        """

    def settle(self, drafts: Sequence[Draft], done: Sequence[Taken]) -> None:
        """Publish parts of answers, then take the requests that are answered whole out of the queue; one round trip.

        With each the next request of its connection is let in, once, whoever else settles it.
        """

    def set_aside(self, taken: Taken) -> None:
        """Keep a request that cannot be run for whoever looks into it, bounded, and settle it."""

    def cancelled(self, requests: Sequence[Request]) -> list[bool]:
        """Tell for each whether its client cancelled it."""

    def progress(self, request: Request) -> Progress:
        """Say how much of an answer to it was published."""

    def leave(self) -> None:
        """Say that this worker takes no more. What it has not settled is kept for others."""


class Broker(Protocol):
    """The broker as synchronous code sees it. Every method raises `BrokerUnavailable` within `publish_timeout`."""

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish all of `drafts` in one round trip, in order; return their positions."""

    def position(self, channel: Channel) -> Position:
        """Return the channel's newest position; of a channel never published to, one from which nothing is missed."""

    def secret(self) -> str:
        """Return the secret kept in the broker; made on the first call by anybody."""

    def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        """Remember that what `identity` was granted until `at` is void for `subject`, and publish `news`; one step.

        Args:
            identity: `user:<user>` or `connection:<id>`
            subject: a channel, or `*` for everything
            at: seconds since 1970
            news: for the realtime servers that run now
        """

    def queue(self, worker: str) -> RequestQueue:
        """Return the request queue as the worker of that name sees it."""

    def presence(self, channel: Channel) -> Mapping[str, bytes]:
        """Return user -> info (JSON) of all who are on the channel."""

    def close(self) -> None:
        """Give connections back to the system."""


Key = TypeVar("Key", bound=Hashable)
_Key_contra = TypeVar("_Key_contra", bound=Hashable, contravariant=True)


class Listener(Protocol[Key]):
    """What a `Subscriber` tells, always from the event loop, never concurrently. It names a channel by the key that
    the listener has given with it.
    """

    def on_publications(self, arrived: Mapping[Key, Sequence[bytes]]) -> None:
        """Publications arrived, all that came at once: for each channel their payloads, as `codec` lays them out.

        *At most once*, in the order of the link within a channel; recovery is the listener's part, and so is finding
        out whether they are ours.
        """

    def on_notice(self, key: Key, notice: Notice) -> None:
        """A user came to the channel or went. *At most once*; numbers that are left out are the listener's part."""

    def on_subscribed(self, key: Key) -> None:
        """From now on the channel's publications arrive. Again after each new link: what came between is to be read."""

    def on_lost(self) -> None:
        """The link broke: nothing arrives until `on_subscribed` is called again."""


class Subscriber(Protocol[_Key_contra]):
    """One process's link to the broker's pub/sub. Wishes take effect later, in the order called."""

    def subscribe(self, channel: Channel, key: _Key_contra) -> None: ...

    def unsubscribe(self, channel: Channel) -> None: ...

    def pause(self) -> None:
        """Take in no more, until `resume`: the listener has more than it can hand on. What comes meanwhile may be
        lost, and then is so as with a link that broke.
        """

    def resume(self) -> None: ...

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

    async def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        """As `Broker.revoke`, within `broker_timeout`."""

    async def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
        """Return for each identity what was revoked: subject -> until when."""

    async def accept(self, offers: Sequence[Offer]) -> list[Accepted | Exception]:
        """Store requests, in order and in one round trip; each in one step with the checks that it is new and that
        there is room.

        Of a connection `in_flight` run at once and `request_backlog` wait in its lane, in order. A lane whose running
        requests the broker lost goes on within `lease` and a second, as long as a worker lives.

        Returns:
            An answer for each, in order, or what went wrong with that one alone.
        """

    async def put_ticket(self, ticket: str, token: str, seconds: float) -> None:
        """Keep `token` for whoever shows `ticket`, once, within `seconds`."""

    async def take_ticket(self, ticket: str) -> str | None:
        """Return what is kept for `ticket`, and keep it no longer; None = it was taken, or it is too late."""

    async def report_begin(
        self, server: str, connection: ConnectionId, begin: bytes, end: bytes, *, takes_over: bool
    ) -> None:
        """Store the report that a connection began, unless it was there already, and keep the report of its end.

        Args:
            server: which holds it from now on
            connection: its id
            begin: the report to store
            end: the report to keep
            takes_over: whether `server` takes it from another one that holds it; if not, nothing is done then
        """

    async def report_end(self, server: str, connection: ConnectionId) -> None:
        """Store the report that a connection ended, unless another server holds it by now."""

    async def keep_lease(self, server: str, lease: float) -> bool:
        """Say that `server` lives for `lease` seconds more, and store the reports of servers that do not.

        Returns:
            False if it had no lease any more, or none yet: what it holds may have been reported as ended.
        """

    async def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        """Note that an answer is not wanted any more.

        Returns:
            Whether the request still waited for others; then it is out of the queue, and nobody will answer it.
        """

    async def withdraw(self, connection: ConnectionId, request_id: str) -> None:
        """Take a request out of the queue that still waits for others, after it was answered without a worker."""

    async def queue_counts(self) -> dict[str, int]:
        """Count the requests in the queue, in one round trip that costs Redis no more when there are many.

        Returns:
            `ready`: for the next worker that is free; `running`: a worker has taken them; `waiting`: for those of
            their connection before them.
        """

    async def presence(self, calls: Sequence[PresenceCall]) -> list[Present | Exception]:
        """Change who is on several channels, or ask, in one round trip, in order.

        Returns:
            An answer for each, in order, or what went wrong with that one alone.
        """

    def subscriber(self, listener: Listener[Key]) -> Subscriber[Key]:
        """Make a link that tells `listener`; the caller runs it."""

    async def close(self) -> None:
        """Give connections back to the system."""
