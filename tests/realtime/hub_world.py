"""Play a schedule on a hub: clients that come, go, read slowly and remember, over a broker and links that fail.

In:     steps, each a name and a number
Out:    an AssertionError at the first frame that a client should not have got, or at the end for one that is missing
Owns:   the clients, each with what it knows; a `Timeline` per channel, which judges
Never:  waits for real time
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from pubsub_mw.drafts import build_draft
from pubsub_mw.model import Channel, ConnectionId, Position
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.realtime.bent_broker import BentBroker
from tests.realtime.timeline import Entry, Timeline

__all__ = ["HARSH_STEPS", "KIND_STEPS", "Client", "World", "spin"]

Step = tuple[str, int]

KIND_STEPS = (
    *["publish"] * 6,
    *["subscribe"] * 4,
    "subscribe now",
    "unsubscribe",
    "drop client",
    *["read"] * 3,
    *["up", "down", "begin read", "end read"] * 3,
    "spin",
    "wait",
    "go dark",
    "break link",
    "fail read",
)
"""What loses nothing: with history long enough, nobody may ever be told of a loss."""

HARSH_STEPS = (*KIND_STEPS, "publish unkept", "publish excluding", "lose", "flush", "save", "roll back", "fail over")
"""What loses something, too."""


async def spin(turns: int = 30) -> None:
    """Let everything run that needs no time."""
    for _ in range(turns):
        await asyncio.sleep(0)


class Client:
    """One client: what it is subscribed to, and the last position it has read of each channel."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.id = ConnectionId(name)
        self.queue = world.new_queue()
        self.subscriptions: dict[Channel, Subscription] = {}
        self.asked_with: dict[Channel, Position | None] = {}  # not answered yet
        self.positions: dict[Channel, Position] = {}
        self.received: dict[Channel, list[int]] = {}
        self.told: list[str] = []

    def subscribe(self, channel: Channel, position: Position | None) -> None:
        subscription = Subscription(channel, self.id, self.queue, position)
        self.subscriptions[channel] = subscription
        self.asked_with[channel] = position
        self.world.hub.subscribe(subscription)

    def unsubscribe(self, channel: Channel) -> None:
        self.read()
        self.world.hub.unsubscribe(self.subscriptions.pop(channel))
        self.asked_with.pop(channel, None)

    def drop(self) -> None:
        """Lose the connection with all that was not read; come back later from where reading had come."""
        for subscription in self.subscriptions.values():
            self.world.hub.unsubscribe(subscription)
        self.subscriptions.clear()
        self.asked_with.clear()
        self.queue = self.world.new_queue()

    async def read_some(self, count: int) -> None:
        for _ in range(count):
            if self.queue.waiting_bytes:
                self.take(await self.queue.take())

    def read(self) -> None:
        for frame in self.queue.take_nowait():
            self.take(frame)
        if self.queue.closed is not None:
            self.drop()

    def take(self, raw: bytes) -> None:
        frame: dict[str, Any] = json.loads(raw)
        channel = Channel(frame["channel"])
        match frame["type"]:
            case "subscribed":
                self._subscribed(channel, Position.parse(frame["position"]), frame["recovered"])
            case "message":
                self._message(channel, Position.parse(frame["position"]), frame["data"])
            case "gap":
                assert channel not in self.asked_with, f"{self.id}: gap before subscribed"
                self._told(channel, Position.parse(frame["position"]), frame["reason"])
            case "error":
                assert frame["code"] == "unavailable"
                assert channel in self.asked_with, f"{self.id}: refused after it was accepted"
                del self.asked_with[channel]
                assert not self.subscriptions.pop(channel).is_open
            case kind:
                raise AssertionError(f"{self.id}: {kind}")

    def _subscribed(self, channel: Channel, position: Position, recovered: bool | None) -> None:
        assert channel in self.asked_with, f"{self.id}: subscribed twice"
        asked = self.asked_with.pop(channel)
        assert (recovered is None) == (asked is None)
        if recovered is True:
            assert position == asked, f"{self.id}: recovery from {position}, not from {asked}"
        if recovered is False:
            self._told(channel, position, "unrecovered")
        self.positions[channel] = position
        self.received.setdefault(channel, [])

    def _told(self, channel: Channel, position: Position, reason: str) -> None:
        timeline, known = self.world.timelines[channel], self.positions[channel]
        may_be_told = timeline.may_be_told(known, position) or timeline.has_branch(known, self.id)
        assert may_be_told, f"{self.id}: told {reason} from {known} to {position} for nothing"
        self.told.append(reason)
        self.positions[channel] = position

    def _message(self, channel: Channel, position: Position, data: int) -> None:
        assert channel not in self.asked_with, f"{self.id}: message before subscribed"
        entry = self.world.timelines[channel].entry(position)
        assert entry.data == data
        assert entry.exclude != self.id, f"{self.id}: got what excludes it"
        known = self.positions[channel]
        assert self.missed(channel, known, entry.previous) == [], (
            f"{self.id}: {data} at {position} does not follow {known}"
        )
        self.positions[channel] = position
        self.received.setdefault(channel, []).append(data)

    def missed(self, channel: Channel, older: Position, newer: Position) -> list[int] | None:
        entries = self.world.timelines[channel].between(older, newer)
        return None if entries is None else [entry.data for entry in entries if entry.exclude != self.id]


class World:
    """A hub with everything around it."""

    def __init__(
        self, settings: Settings, *, clients: int = 3, channels: int = 2, queue_bytes: int = 6_000, low_bytes: int = 400
    ) -> None:
        self.settings = settings
        self.queue_bytes, self.low_bytes = queue_bytes, low_bytes
        self.broker = BentBroker(settings)
        self.hub = Hub(self.broker, settings)
        self.channels = [Channel(f"channel{index}") for index in range(channels)]
        self.timelines = {channel: Timeline(settings.history_size) for channel in self.channels}
        self.clients = [Client(self, f"client{index}") for index in range(clients)]
        self.published = 0
        self.saved = self.broker.save()
        self.has_lost_silently = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["World"]:
        self._task = asyncio.create_task(self.hub.run())
        await spin(3)
        try:
            yield self
            assert not self._task.done(), self._task.exception()
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def rerun(self) -> None:
        """Let the hub die in the middle of what it does, and run it again."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = asyncio.create_task(self.hub.run())
        await spin(3)

    def new_queue(self) -> SendQueue:
        return SendQueue(self.queue_bytes, self.low_bytes)

    def publish(
        self, channel: Channel, *, is_kept: bool = True, exclude: ConnectionId | None = None, size: int = 0
    ) -> int:
        self.published += 1
        data = self.published
        previous = self.broker.engine.position(channel)
        draft = build_draft(
            self.settings, channel, data, event="x" * size or "x", exclude=exclude, history=None if is_kept else False
        )
        (position,) = self.broker.engine.publish([draft])
        self.timelines[channel].add(Entry(position, previous, data, is_kept, exclude or ""))
        return data

    async def play(self, steps: Iterable[Step]) -> None:
        for name, number in steps:
            await self.step(name, number)

    async def step(self, name: str, number: int) -> None:
        client = self.clients[number % len(self.clients)]
        number //= len(self.clients)
        channel = self.channels[number % len(self.channels)]
        number //= len(self.channels)
        broker = self.broker
        match name:
            case "publish":
                for _ in range(1 + number % 4):
                    self.publish(channel, size=number % 100)
            case "publish unkept":
                self.publish(channel, is_kept=False)
            case "publish excluding":
                self.publish(channel, exclude=client.id)
            case "subscribe" | "subscribe now":
                if client.queue.closed is not None:
                    client.drop()
                if channel not in client.subscriptions:
                    client.subscribe(channel, client.positions.get(channel) if name == "subscribe" else None)
            case "unsubscribe":
                client.read()
                if channel in client.subscriptions:
                    client.unsubscribe(channel)
            case "drop client":
                client.drop()
            case "read":
                await client.read_some(1 + number % 8)
            case "up":
                broker.link.move_up(1 + number % 4)
            case "down":
                broker.link.move_down(1 + number % 6)
            case "begin read":
                broker.begin_read(number)
            case "end read":
                broker.end_read(number)
            case "fail read":
                broker.end_read(number, fails=True)
            case "spin":
                await spin()
            case "wait":
                await asyncio.sleep((0.01, 0.5, 6.0, 26.0)[number % 4])
            case "go dark":
                broker.link.go_dark()
            case "break link":
                broker.link.break_off()
            case "lose" | "flush":
                broker.link.keeps_over_loss = name == "flush"
                self.has_lost_silently |= name == "flush"
                broker.engine.lose()
            case "save":
                self.saved = broker.save()
            case "roll back" | "fail over":
                for timeline in self.timelines.values():
                    timeline.was_rolled_back = True
                self.has_lost_silently |= name == "roll back"
                broker.roll_back(self.saved, breaks_link=name == "fail over")
            case _:
                raise AssertionError(name)
        if number % 3:
            await spin(number % 3)

    async def settle(self) -> None:
        """Let everything arrive; then every client must be where its channels are, with no publication to help.

        Nor does the regular check of positions help, unless the broker lost data without breaking the link.
        """
        self.broker.make_smooth()
        if self.has_lost_silently:
            await asyncio.sleep(2 * self.settings.check_interval)
        for _ in range(self.published + 20):
            await asyncio.sleep(0.5)
            for client in self.clients:
                client.read()
                for channel in client.positions:
                    if channel not in client.subscriptions:
                        client.subscribe(channel, client.positions[channel])
            if all(self.is_complete(client) for client in self.clients) and not self.broker.reads:
                break
        await asyncio.sleep(10)
        for client in self.clients:
            client.read()
            assert self.is_complete(client), self.story(client)
        assert all(
            channel in {c for client in self.clients for c in client.subscriptions} for channel in self.hub_channels
        )

    @property
    def hub_channels(self) -> set[str]:
        return set(self.hub._channels)

    def is_complete(self, client: Client) -> bool:
        return not client.asked_with and all(
            client.missed(channel, client.positions[channel], self.broker.engine.position(channel)) == []
            for channel in client.subscriptions
        )

    def story(self, client: Client) -> str:
        tops = {channel: str(self.broker.engine.position(channel)) for channel in client.subscriptions}
        return f"{client.id}: is at { {name: str(at) for name, at in client.positions.items()} }, of {tops}"
