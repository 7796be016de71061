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
from collections.abc import Sequence
from dataclasses import dataclass, field

from pubsub_mw.broker.codec import decode, encode
from pubsub_mw.broker.interface import Listener
from pubsub_mw.model import START_TAG, Channel, Draft, HistoryPage, Position, Publication
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


class MemoryBroker:
    """The engine: `Broker` for threads; `AsyncMemoryBroker` shows it to an event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._histories: dict[str, _History] = {}
        self._keys: dict[tuple[str, str], tuple[Position, float]] = {}
        self._subscribers: list[MemorySubscriber] = []
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
            known, expires = self._keys.get(key, (None, 0.0))
            if known is not None and expires > now:
                return known
        history = self._history(draft.channel, now)
        position = Position(history.epoch, history.offset + 1, draft.tag)
        payload = encode(draft, position, history.tag)
        kept = payload if draft.is_kept else payload[: payload.index(b"\n") + 1]
        history.entries.append(kept)
        while len(history.entries) > draft.history_size:
            history.entries.popleft()
        history.offset, history.tag = position.offset, position.tag
        history.entries_expire = now + self._settings.history_ttl
        history.expires = now + self._settings.position_ttl
        if draft.idempotency_key:
            self._keys[key] = (position, now + self._settings.idempotency_ttl)
        publication = decode(payload)
        # Under the lock, so that every subscriber gets publications in offset order.
        for subscriber in self._subscribers:
            subscriber.offer(draft.channel, publication)
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

    def leave_parent(self) -> None:
        """Note that this is another process now: what listened, and who held the lock, is in the parent."""
        self._lock = threading.Lock()
        self._subscribers = []
        self._has_endpoint = False

    def attach(self, subscriber: "MemorySubscriber") -> None:
        with self._lock:
            self._subscribers.append(subscriber)

    def detach(self, subscriber: "MemorySubscriber") -> None:
        with self._lock:
            self._subscribers.remove(subscriber)

    def lose(self) -> None:
        """Forget every channel, as a Redis restarted without persistence does."""
        with self._lock:
            self._histories.clear()
            self._keys.clear()
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
        self._keys = {key: value for key, value in self._keys.items() if value[1] > now}


class MemorySubscriber:
    """One event loop's link to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, listener: Listener) -> None:
        self._broker = broker
        self._listener = listener
        self._channels: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._is_up = False

    @property
    def is_up(self) -> bool:
        return self._is_up

    def subscribe(self, channel: Channel) -> None:
        self._channels.add(channel)
        self._loop.call_soon(self._confirm, channel)

    def unsubscribe(self, channel: Channel) -> None:
        self._channels.discard(channel)

    async def run(self) -> None:
        self._broker.attach(self)
        self._is_up = True
        try:
            self._relink()
            await asyncio.Event().wait()
        finally:
            self._is_up = False
            self._broker.detach(self)

    def offer(self, channel: str, publication: Publication) -> None:
        """Take a publication, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, channel, publication)
        except RuntimeError:
            # The loop is closed and its owner has not come to `detach`: there is nobody left to tell.
            log.debug("a publication came for an event loop that is closed")

    def relink(self) -> None:
        """Make the listener read everything anew, as after a broken link; from any thread."""
        self._loop.call_soon_threadsafe(self._relink)

    def _relink(self) -> None:
        self._listener.on_lost()
        for channel in list(self._channels):
            self._confirm(channel)

    def _confirm(self, channel: str) -> None:
        if self._is_up and channel in self._channels:
            self._listener.on_subscribed(channel)

    def _deliver(self, channel: str, publication: Publication) -> None:
        if self._is_up and channel in self._channels:
            self._listener.on_publication(channel, publication)


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

    def subscriber(self, listener: Listener) -> MemorySubscriber:
        self._broker.expect_endpoint()
        return MemorySubscriber(self._broker, listener)

    async def close(self) -> None:
        """Nothing to give back."""
