"""Put a network between the hub and a memory broker, with every packet moved by hand.

In:     calls by the hub; steps by the test
Out:    the same calls and answers, each as late as the test wants, in the order that Redis keeps
Owns:   what is under way: commands up and events down one pub/sub link; reads, each on a connection of its own
Never:  reorders what one connection carries, or loses part of it and goes on: a link that loses is dark until broken
"""

import asyncio
import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

from pubsub_mw.broker.interface import Key, Listener
from pubsub_mw.broker.memory import AsyncMemoryBroker, MemoryBroker, MemorySubscriber
from pubsub_mw.broker.presence import Notice
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, HistoryPage
from pubsub_mw.settings import Settings

__all__ = ["BentBroker", "BentLink"]


class BentLink(MemorySubscriber[Key]):
    """The pub/sub link. Commands and events wait in it until the test moves them, or until `is_smooth`."""

    def __init__(self, broker: MemoryBroker, listener: Listener[Key]) -> None:
        super().__init__(broker, listener)
        self._hub = listener
        self._wanted: dict[Channel, Key] = {}
        self._followed: set[str] = set()
        self._up: deque[tuple[str, Channel]] = deque()
        self._down: deque[tuple[Channel, bytes | None]] = deque()
        self._is_dark = False
        self.is_held = False
        self.is_smooth = False
        self.keeps_over_loss = False

    @property
    def is_up(self) -> bool:
        return True

    def subscribe(self, channel: Channel, key: Key) -> None:
        self._wanted[channel] = key
        self._up.append(("subscribe", channel))
        self._flow()

    def unsubscribe(self, channel: Channel) -> None:
        self._wanted.pop(channel, None)
        self._up.append(("unsubscribe", channel))
        self._flow()

    async def run(self) -> None:
        self._broker.attach(self)
        try:
            self.break_off()
            await asyncio.Event().wait()
        finally:
            self._broker.detach(self)

    def pause(self) -> None:
        self.is_held = True

    def resume(self) -> None:
        self.is_held = False
        self._flow()

    def offer(self, channel: str, item: bytes | Notice) -> None:
        if isinstance(item, bytes) and channel in self._followed and not self._is_dark:
            self._down.append((Channel(channel), item))
            self._flow()

    def relink(self) -> None:
        """The broker lost its data: with its process, and so every connection; or, by a flush, with none."""
        if not self.keeps_over_loss:
            self.break_off()

    def move_up(self, count: int) -> None:
        """Let the oldest commands take effect."""
        for _ in range(min(count, len(self._up))):
            verb, channel = self._up.popleft()
            if self._is_dark:
                continue
            if verb == "subscribe":
                self._followed.add(channel)
                self._down.append((channel, None))
            else:
                self._followed.discard(channel)

    def move_down(self, count: int) -> None:
        """Let the oldest events arrive, at once as far as they are publications."""
        arrived: dict[Key, list[bytes]] = {}
        for _ in range(0 if self.is_held else min(count, len(self._down))):
            channel, payload = self._down.popleft()
            key = self._wanted.get(channel)
            if key is None:
                continue
            if payload is not None:
                arrived.setdefault(key, []).append(payload)
                continue
            self._arrive(arrived)
            arrived = {}
            self._hub.on_subscribed(key)
        self._arrive(arrived)

    def _arrive(self, arrived: dict[Key, list[bytes]]) -> None:
        if arrived:
            self._hub.on_publications(arrived)

    def make_smooth(self) -> None:
        """From now on move everything at once, from a new link if this one is dark."""
        self.is_smooth = True
        if self._is_dark:
            self.break_off()
        else:
            self._flow()

    def go_dark(self) -> None:
        """Lose everything from now on without a sign, as a half-open connection does."""
        self._is_dark = True
        self._up.clear()
        self._down.clear()

    def break_off(self) -> None:
        """Lose what is under way; then make a new link and ask for every channel again."""
        self._is_dark = False
        self._followed.clear()
        self._down.clear()
        self._hub.on_lost()
        self._up = deque(("subscribe", channel) for channel in self._wanted)
        self._flow()

    def _flow(self) -> None:
        if self.is_smooth:
            asyncio.get_running_loop().call_soon(self._move_all)

    def _move_all(self) -> None:
        self.move_up(len(self._up))
        self.move_down(len(self._down))


class _Read:
    """One read of history under way."""

    def __init__(self) -> None:
        self.may_begin = asyncio.Event()
        self.may_end = asyncio.Event()
        self.fails = False


class BentBroker(AsyncMemoryBroker):
    """A memory broker behind that network."""

    def __init__(self, settings: Settings) -> None:
        self.engine = MemoryBroker(settings)
        super().__init__(self.engine)
        self.links: list[BentLink[Any]] = []
        self.reads: list[_Read] = []
        self.is_smooth = False
        self.read_count = 0

    @property
    def link(self) -> BentLink[Any]:
        return self.links[-1]

    def subscriber(self, listener: Listener[Key]) -> BentLink[Key]:
        self.engine.expect_endpoint()
        link = BentLink(self.engine, listener)
        self.links.append(link)
        return link

    async def read(
        self, wanted: Sequence[tuple[Channel, int | None]], *, page_bytes: int
    ) -> list[HistoryPage | Exception]:
        self.read_count += 1
        read = _Read()
        self.reads.append(read)
        if self.is_smooth:
            read.may_begin.set()
            read.may_end.set()
        try:
            await read.may_begin.wait()
            pages = await super().read(wanted, page_bytes=page_bytes)
            await read.may_end.wait()
            if read.fails:
                raise BrokerUnavailable("as the test wants")
            return pages
        finally:
            self.reads.remove(read)

    def begin_read(self, index: int) -> None:
        """Let a read reach the broker; its answer is of this moment."""
        if self.reads:
            self.reads[index % len(self.reads)].may_begin.set()

    def end_read(self, index: int, *, fails: bool = False) -> None:
        """Let a read's answer arrive, or fail."""
        if self.reads:
            read = self.reads[index % len(self.reads)]
            read.fails = fails
            read.may_begin.set()
            read.may_end.set()

    def make_smooth(self) -> None:
        """From now on everything arrives by itself."""
        self.is_smooth = True
        for read in self.reads:
            read.may_begin.set()
            read.may_end.set()
        for link in self.links:
            link.make_smooth()

    def save(self) -> Any:
        """Take a snapshot, as Redis does now and then."""
        return copy.deepcopy(self.engine._histories)

    def roll_back(self, saved: Any, *, breaks_link: bool) -> None:
        """Go on from a snapshot, as a Redis restarted from it does, or its replica after a failover."""
        self.engine._histories = copy.deepcopy(saved)
        if breaks_link:
            self.link.break_off()
