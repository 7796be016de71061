"""Be the broker inside one process.

In:     drafts, from any thread
Out:    the same promises as Redis, for as long as the process lives
Owns:   every channel's history; one registry of brokers by url, so that all of a process meet
Never:  waits; crosses a process. A process that publishes where no realtime endpoint listens is told so once

History is bounded per channel by its size and by `history_ttl`; channels are forgotten `position_ttl` after
their last publication, by a sweep that each thousandth publication pays for.
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from pubsub_mw.broker.codec import decode, encode
from pubsub_mw.broker.interface import Accepted, Key, Listener, Offer, Progress, Taken, answer_key, end_key, part_key
from pubsub_mw.broker.memory_queue import MemoryRequests
from pubsub_mw.broker.presence import Notice, PresenceCall, Present, Roster
from pubsub_mw.model import START_TAG, Channel, ConnectionId, Draft, HistoryPage, Position, Request
from pubsub_mw.settings import Settings

__all__ = ["AsyncMemoryBroker", "MemoryBroker", "MemorySubscriber", "memory_broker"]

log = logging.getLogger("pubsub_mw")

_SWEEP_EVERY = 1_000
_brokers: dict[tuple[str, str], "MemoryBroker"] = {}
_registry_lock = threading.Lock()


def memory_broker(settings: Settings) -> "MemoryBroker":
    """Return the one broker of this process for `settings.url` and `settings.prefix`."""
    key = (settings.url, settings.prefix)
    with _registry_lock:
        if key not in _brokers:
            _brokers[key] = MemoryBroker(settings)
        return _brokers[key]


def _after_fork() -> None:
    """Let a forked process begin without the locks, loops and endpoints of its parent, whose threads it has not."""
    global _registry_lock
    _registry_lock = threading.Lock()
    for broker in _brokers.values():
        broker.leave_parent()


os.register_at_fork(after_in_child=_after_fork)


# What was offered to a subscriber and not handed on yet: channel, and a publication's payload or a notice.
_Arrived = list[tuple[str, bytes | Notice]]


@dataclass(slots=True)
class _History:
    epoch: str
    offset: int = 0
    tag: str = START_TAG
    entries: deque[bytes] = field(default_factory=deque)
    entries_expire: float = 0.0
    expires: float = 0.0

    @property
    def top(self) -> Position:
        return Position(self.epoch, self.offset, self.tag)


@dataclass(slots=True)
class _Known:
    """What was published last under an idempotency key."""

    position: Position
    part: int
    expires: float


class MemoryBroker:
    """The engine: `Broker` and `RequestQueue` for threads; `AsyncMemoryBroker` shows it to an event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._histories: dict[str, _History] = {}
        self._keys: dict[tuple[str, str], _Known] = {}
        self._subscribers: list[MemorySubscriber[Any]] = []
        self.requests = MemoryRequests(settings, self._lock)
        self._reports: dict[ConnectionId, bytes] = {}
        self._revoked: dict[str, dict[str, float]] = {}
        self._rosters: dict[str, Roster] = {}
        self._tickets: dict[str, tuple[str, float]] = {}  # all good for as long, so the oldest come first
        self._secret = secrets.token_hex(32)
        self._published = 0
        self._has_endpoint = False
        self._warned = False

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish; the positions come back at once, delivery follows on each subscriber's own loop."""
        if not self._has_endpoint and not self._warned:
            self._warned = True
            log.warning(
                "published to %s, but nothing in this process listens: the memory broker ends with the process. "
                "Use `pubsub-mw serve`, or set PUBSUB_URL=redis://... for this process and for the realtime server",
                self._settings.url,
            )
        with self._lock:
            return [self._publish(draft) for draft in drafts]

    def _publish(self, draft: Draft) -> Position:
        now = time.monotonic()
        self._published += 1
        if self._published % _SWEEP_EVERY == 0:
            self._sweep(now)
        key = (draft.channel, draft.idempotency_key)
        if draft.idempotency_key:
            known = self._keys.get(key)
            if known is not None and known.expires > now and known.part >= draft.part:
                return known.position
        history = self._history(draft.channel, now)
        position = Position(history.epoch, history.offset + 1, draft.tag)
        payload = encode(draft, position, history.top)
        kept = payload if draft.is_kept else payload[: payload.index(b"\n") + 1]
        history.entries.append(kept)
        while len(history.entries) > draft.history_size:
            history.entries.popleft()
        history.offset, history.tag = position.offset, position.tag
        history.entries_expire = now + self._settings.history_ttl
        history.expires = now + self._settings.position_ttl
        if draft.idempotency_key:
            ttl = self._settings.claim_ttl if draft.reply else self._settings.idempotency_ttl
            self._keys[key] = _Known(position, draft.part, now + ttl)
        # Under the lock, so that every subscriber gets publications in offset order.
        for subscriber in self._subscribers:
            subscriber.offer(draft.channel, payload)
        return position

    def position(self, channel: Channel) -> Position:
        with self._lock:
            return self._history(channel, time.monotonic()).top

    def read(self, channel: Channel, since: int | None, page_bytes: int) -> HistoryPage:
        """Read one channel's history; see `AsyncBroker.read`."""
        with self._lock:
            history = self._history(channel, time.monotonic())
            if since is None:
                return HistoryPage(top=history.top, publications=(), is_complete=True)
            first = history.offset - len(history.entries) + 1
            size, publications = 0, []
            for index in range(max(0, since + 1 - first), len(history.entries)):
                if size >= page_bytes:
                    break
                size += len(history.entries[index])
                publications.append(decode(history.entries[index]))
            end = publications[-1].position.offset if publications else history.offset
            return HistoryPage(top=history.top, publications=tuple(publications), is_complete=end == history.offset)

    def secret(self) -> str:
        return self._secret

    def close(self) -> None:
        """Nothing to give back: the history stays for whoever else uses this broker."""

    def expect_endpoint(self) -> None:
        """Note that this process has a realtime endpoint, so publishing here is no mistake."""
        self._has_endpoint = True

    def report(self, connection: ConnectionId, begin: bytes, end: bytes) -> None:
        """Store the report that a connection began, unless it was there already."""
        with self._lock:
            if connection not in self._reports:
                self.requests.put(begin)
            self._reports[connection] = end

    def report_end(self, connection: ConnectionId) -> None:
        with self._lock:
            end = self._reports.pop(connection, None)
            if end is not None:
                self.requests.put(end)

    def presence(self, channel: Channel) -> Mapping[str, bytes]:
        return self.change_presence(PresenceCall(channel=channel)).users or {}

    def change_presence(self, call: PresenceCall) -> Present:
        """Change who is on a channel; see `AsyncBroker.presence`."""
        ttl, size = self._settings.presence_ttl, self._settings.presence_size
        with self._lock:
            roster = self._rosters.pop(call.channel, None) or Roster(secrets.token_hex(4))
            present, notices = roster.apply(call, now=time.monotonic(), ttl=ttl, size=size)
            if roster.users:
                self._rosters[call.channel] = roster
            for notice in notices:
                for subscriber in self._subscribers:
                    subscriber.offer(call.channel, notice)
            return present

    def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        with self._lock:
            self._revoked.setdefault(identity, {})[subject] = at
            self._publish(news)

    def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
        with self._lock:
            return [dict(self._revoked.get(identity, {})) for identity in identities]

    def put_ticket(self, ticket: str, token: str, seconds: float) -> None:
        """Keep a token; see `AsyncBroker.put_ticket`."""
        now = time.monotonic()
        with self._lock:
            for other, (_, expires) in list(self._tickets.items()):
                if expires > now:
                    break
                del self._tickets[other]
            self._tickets[ticket] = (token, now + seconds)

    def take_ticket(self, ticket: str) -> str | None:
        """Take a token; see `AsyncBroker.take_ticket`."""
        with self._lock:
            token, expires = self._tickets.pop(ticket, (None, 0.0))
        return token if expires > time.monotonic() else None

    def accept(self, offers: Sequence[Offer]) -> list[Accepted]:
        """Store requests; see `AsyncBroker.accept`."""
        with self._lock:
            return [
                Accepted(self.requests.offer(offer), self._published_at(offer.reply_to, answer_key(offer.request_id)))
                for offer in offers
            ]

    def _published_at(self, channel: Channel, key: str) -> Position | None:
        known = self._keys.get((channel, key))
        return known.position if known is not None and known.expires > time.monotonic() else None

    def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        with self._lock:
            return self.requests.cancel(connection, request_id)

    def withdraw(self, connection: ConnectionId, request_id: str) -> None:
        with self._lock:
            self.requests.withdraw(connection, request_id)

    def queue_counts(self) -> dict[str, int]:
        with self._lock:
            return self.requests.counts()

    def queue(self, worker: str) -> "MemoryBroker":  # noqa: ARG002 - who is in the same process needs no name
        return self

    def take(self, limit: int, wait: float) -> list[Taken]:
        return self.requests.take(limit, wait)

    def renew(self, running: Mapping[str, Request]) -> list[str]:
        known_until = time.monotonic() + self._settings.claim_ttl
        with self._lock:
            gone = self.requests.renew(running)
            for request in (request for entry, request in running.items() if entry not in gone):
                for key in (answer_key(request.id), part_key(request.id)):
                    known = self._keys.get((str(request.reply_to), key))
                    if known is not None:
                        known.expires = known_until
            return gone

    def give_back(self, taken: Sequence[Taken]) -> None:
        with self._lock:
            self.requests.give_back(taken)

    def settle(self, drafts: Sequence[Draft], done: Sequence[Taken]) -> None:
        self.publish(drafts)
        with self._lock:
            self.requests.settle(done)

    def set_aside(self, taken: Taken) -> None:
        """Take it out of the queue; a process that ends keeps nothing for later."""
        self.settle([], [taken])

    def leave(self) -> None:
        """Nobody keeps a list of workers here."""

    def cancelled(self, requests: Sequence[Request]) -> list[bool]:
        with self._lock:
            return self.requests.cancelled(requests)

    def progress(self, request: Request) -> Progress:
        with self._lock:
            begin = self._published_at(request.reply_to, answer_key(request.id))
            end = self._published_at(request.reply_to, end_key(request.id))
        if begin is None or end is not None:
            return Progress.NOTHING if begin is None else Progress.COMPLETE
        first = self.read(request.reply_to, begin.offset - 1, 1).publications[:1]
        is_whole = [item.position for item in first] == [begin] and first[0].reply.startswith(".")
        return Progress.COMPLETE if is_whole else Progress.BEGUN

    def leave_parent(self) -> None:
        """Note that this is another process now: what listened, and who held the lock, is in the parent."""
        self._lock = threading.Lock()
        self.requests.use_lock(self._lock)
        self._subscribers = []
        self._has_endpoint = False

    def attach(self, subscriber: "MemorySubscriber[Any]") -> None:
        with self._lock:
            self._subscribers.append(subscriber)

    def detach(self, subscriber: "MemorySubscriber[Any]") -> None:
        with self._lock:
            self._subscribers.remove(subscriber)

    def collect(self, subscriber: "MemorySubscriber[Any]") -> _Arrived | None:
        """Return what was offered to a subscriber since it last asked; None = too much, and it is gone."""
        with self._lock:
            return subscriber.take()

    @property
    def buffer_size(self) -> int:
        """Publications that may wait for an event loop; beyond it they are read from history."""
        return self._settings.recovery_buffer

    def lose(self) -> None:
        """Forget every channel, as a Redis restarted without persistence does."""
        with self._lock:
            self._histories.clear()
            self._keys.clear()
            self._rosters.clear()
            self.requests.lose()
            for subscriber in self._subscribers:
                subscriber.relink()

    def _history(self, channel: str, now: float) -> _History:
        history = self._histories.get(channel)
        if history is None or history.expires <= now:
            history = self._histories[channel] = _History(secrets.token_hex(4))
        # Whoever listens looks now and then, which keeps the position; an untouched channel's as long as history.
        if history.offset == 0:
            history.expires = now + max(self._settings.history_ttl, 2 * self._settings.check_interval)
        else:
            history.expires = now + self._settings.position_ttl
        if history.entries_expire <= now:
            history.entries.clear()
        return history

    def _sweep(self, now: float) -> None:
        self._histories = {name: history for name, history in self._histories.items() if history.expires > now}
        self._keys = {key: value for key, value in self._keys.items() if value.expires > now}
        # A revocation is older than every grant it can concern once `revocation_ttl` is over.
        limit = time.time() - self._settings.revocation_ttl
        self._revoked = {key: value for key, value in self._revoked.items() if max(value.values()) > limit}
        self.requests.sweep(now)


class MemorySubscriber(Generic[Key]):
    """One event loop's link to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, listener: Listener[Key]) -> None:
        self._broker = broker
        self._listener = listener
        self._keys: dict[str, Key] = {}  # by channel
        self._unconfirmed: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._is_up = False
        self._is_paused = False
        self._arrived: _Arrived | None = []

    @property
    def is_up(self) -> bool:
        return self._is_up

    def subscribe(self, channel: Channel, key: Key) -> None:
        self._keys[channel] = key
        self._unconfirmed.add(channel)
        self._loop.call_soon(self._confirm_new, channel)

    def unsubscribe(self, channel: Channel) -> None:
        self._keys.pop(channel, None)

    async def run(self) -> None:
        self._broker.attach(self)
        self._is_up = True
        try:
            self._relink()
            await asyncio.Event().wait()
        finally:
            self._is_up = False
            self._broker.detach(self)

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._deliver()

    def offer(self, channel: str, item: bytes | Notice) -> None:
        """Take a publication's payload or a notice, from any thread that holds the broker's lock."""
        if self._arrived is None:
            return
        self._arrived.append((channel, item))
        if len(self._arrived) == 1:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The loop is closed and its owner has not come to `detach`: there is nobody left to tell.
                log.debug("a publication came for an event loop that is closed")
        elif len(self._arrived) > self._broker.buffer_size:
            self._arrived = None

    def take(self) -> _Arrived | None:
        """Give up what has arrived, to whom holds the broker's lock."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def relink(self) -> None:
        """Make the listener read everything anew, as after a broken link; from any thread."""
        self._loop.call_soon_threadsafe(self._relink)

    def _relink(self) -> None:
        self._listener.on_lost()
        for channel in list(self._keys):
            self._confirm(channel)

    def _confirm_new(self, channel: str) -> None:
        # A link made since has confirmed it already; twice would mean that something may have gone by in between.
        if channel in self._unconfirmed:
            self._confirm(channel)

    def _confirm(self, channel: str) -> None:
        if self._is_up and channel in self._keys:
            self._unconfirmed.discard(channel)
            self._listener.on_subscribed(self._keys[channel])

    def _deliver(self) -> None:
        """Hand on all that arrived since the last time, publications of one channel together."""
        if self._is_paused:
            return
        arrived = self._broker.collect(self)
        if not self._is_up:
            return
        if arrived is None:
            log.warning("more was published than this process could deliver; what is missing is read from history")
            self._relink()
            return
        publications: dict[Key, list[bytes]] = {}
        for channel, item in arrived:
            key = self._keys.get(channel)
            if key is None:
                continue
            if isinstance(item, bytes):
                publications.setdefault(key, []).append(item)
            else:
                # A notice keeps its place among the publications.
                self._hand_on(publications)
                publications = {}
                self._listener.on_notice(key, item)
        self._hand_on(publications)

    def _hand_on(self, publications: dict[Key, list[bytes]]) -> None:
        if publications:
            self._listener.on_publications(publications)


class AsyncMemoryBroker:
    """A `MemoryBroker` as one event loop sees it."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        return self._broker.publish(drafts)

    async def read(
        self, wanted: Sequence[tuple[Channel, int | None]], *, page_bytes: int
    ) -> list[HistoryPage | Exception]:
        return [self._broker.read(channel, since, page_bytes) for channel, since in wanted]

    async def secret(self) -> str:
        return self._broker.secret()

    async def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        self._broker.revoke(identity, subject, at, news)

    async def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
        return self._broker.revoked(identities)

    async def accept(self, offers: Sequence[Offer]) -> list[Accepted | Exception]:
        return [*self._broker.accept(offers)]

    async def put_ticket(self, ticket: str, token: str, seconds: float) -> None:
        self._broker.put_ticket(ticket, token, seconds)

    async def take_ticket(self, ticket: str) -> str | None:
        return self._broker.take_ticket(ticket)

    async def report_begin(
        self,
        server: str,  # noqa: ARG002 - there is one server
        connection: ConnectionId,
        begin: bytes,
        end: bytes,
        *,
        takes_over: bool,  # noqa: ARG002
    ) -> None:
        self._broker.report(connection, begin, end)

    async def report_end(self, server: str, connection: ConnectionId) -> None:  # noqa: ARG002 - there is one server
        self._broker.report_end(connection)

    async def keep_lease(self, server: str, lease: float) -> bool:  # noqa: ARG002
        """Nothing to keep: the server and the broker end together."""
        return True

    async def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        return self._broker.cancel(connection, request_id)

    async def withdraw(self, connection: ConnectionId, request_id: str) -> None:
        self._broker.withdraw(connection, request_id)

    async def queue_counts(self) -> dict[str, int]:
        return self._broker.queue_counts()

    async def presence(self, calls: Sequence[PresenceCall]) -> list[Present | Exception]:
        return [self._broker.change_presence(call) for call in calls]

    def subscriber(self, listener: Listener[Key]) -> MemorySubscriber[Key]:
        self._broker.expect_endpoint()
        return MemorySubscriber(self._broker, listener)

    async def close(self) -> None:
        """Nothing to give back."""
