"""Know who listens to what in this process, and keep all of them complete.

In:     subscriptions from `connection`; publications, confirmations and losses from the broker's subscriber
Out:    frames into send queues: `subscribed`, `message`, `gap`, and `error` where the broker does not answer
Owns:   one `_Channel` per channel with a subscription: who is live, who catches up, and their shared track
Never:  sends a live publication that is not exactly the next one; awaits anything per subscriber

The order that loses nothing: a subscription first waits, then the broker confirms that the channel is followed, and
only then history is read. What comes live during the read is remembered (`recent`). When the page is there, what was
missed, then what is in `recent`, is sent, and the subscription goes live: all with no `await` in between.

A channel is stale when its track met anything but the next publication, or when the link to the broker was made
anew. Nothing goes out on a stale channel until history was read. Reads are done by a few workers, each for many
channels in one round trip, so that a reconnect of everybody costs one read per channel.
"""

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterable
from typing import NoReturn

from pubsub_mw import protocol
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.broker.presence import Notice
from pubsub_mw.errors import BrokerUnavailable, CloseCode, ErrorCode
from pubsub_mw.model import Channel, ConnectionId, HistoryPage, Position, Publication
from pubsub_mw.realtime.send_queue import Batch, SendQueue
from pubsub_mw.realtime.subscription import GapReason, Next, Subscription, Track, catch_up
from pubsub_mw.settings import Settings

__all__ = ["Hub"]

log = logging.getLogger("pubsub_mw")

_RETRY_SECONDS = 0.5
"""Between attempts to read from a broker that does not answer; jittered."""

_REREAD_SECONDS = 0.01
"""Until history is read again for a subscription that is ahead of what has come live."""


class _Channel:
    """One channel that somebody in this process listens to."""

    __slots__ = ("doubts", "is_confirmed", "is_reading", "is_stale", "live", "name", "recent", "track", "waiting")

    def __init__(self, name: Channel) -> None:
        self.name = name
        self.live: dict[Subscription, None] = {}  # everything up to `track` was put into their queues
        self.waiting: dict[Subscription, None] = {}  # each at its own position
        self.track: Track | None = None  # None until history was read for the first time
        self.is_confirmed = False  # the broker delivers this channel's publications to us
        self.is_stale = False  # `track` is not to be trusted before history was read
        self.doubts = 0  # counts what makes a read under way worthless: history must be asked after it
        self.is_reading = False
        self.recent: list[Publication] | None = None  # what came live since the read under way began

    @property
    def is_settled(self) -> bool:
        return self.is_confirmed and self.track is not None and not self.is_stale


class Hub:
    """The registry of one process. All methods belong to one event loop; `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, settings: Settings) -> None:
        self._broker = broker
        self._settings = settings
        self._channels: dict[str, _Channel] = {}
        self._connections: dict[ConnectionId, SendQueue] = {}
        self._unsettled: dict[Subscription, None] = {}
        self._subscriber = broker.subscriber(self)
        self._wanted: dict[_Channel, None] = {}
        self._work = asyncio.Event()
        self.on_presence: Callable[[str, Notice | None], None] = lambda _channel, _notice: None
        """Told of each notice, and of None when a channel's notices may have been missed."""
        self.gaps_told = 0
        self.publications_delivered = 0

    @property
    def is_up(self) -> bool:
        """Whether publications arrive."""
        return self._subscriber.is_up

    @property
    def channel_count(self) -> int:
        """Channels that connections listen to; the server's own are not counted."""
        return sum(not name.startswith(("#control", "#server-")) for name in self._channels)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def send_queues(self) -> list[SendQueue]:
        """Return the queue of every open connection."""
        return list(self._connections.values())

    def open(self, connection: ConnectionId, send_queue: SendQueue) -> None:
        """Register a connection. One with the same id, if still open, is closed: this one took over."""
        older = self._connections.get(connection)
        self._connections[connection] = send_queue
        if older is not None:
            older.close(CloseCode.REPLACED, "this connection was resumed elsewhere")

    def replace(self, connection: ConnectionId) -> None:
        """Close a connection that was resumed on another server; nothing if it is not here."""
        older = self._connections.get(connection)
        if older is not None:
            older.close(CloseCode.REPLACED, "this connection was resumed elsewhere")

    def close(self, connection: ConnectionId, send_queue: SendQueue) -> bool:
        """Forget a connection, and return True, unless another one has taken over its id."""
        if self._connections.get(connection) is not send_queue:
            return False
        del self._connections[connection]
        return True

    def subscribe(self, subscription: Subscription) -> None:
        """Take a subscription; its answer comes through its send queue."""
        channel = self._channels.get(subscription.channel)
        if channel is None:
            channel = self._channels[subscription.channel] = _Channel(subscription.channel)
            self._subscriber.subscribe(channel.name)
        subscription.registered_at = asyncio.get_running_loop().time()
        self._unsettled[subscription] = None
        channel.waiting[subscription] = None
        track = channel.track
        if track is not None and channel.is_settled and subscription.position in (None, track.position):
            self._join(channel, subscription, track.position)
        elif channel.is_confirmed:
            self._want(channel)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget a subscription. What is in its send queue stays there."""
        subscription.is_open = False
        self._unsettled.pop(subscription, None)
        channel = self._channels.get(subscription.channel)
        if channel is not None:
            channel.live.pop(subscription, None)
            channel.waiting.pop(subscription, None)
            if not channel.live and not channel.waiting:
                del self._channels[channel.name]
                self._wanted.pop(channel, None)
                self._subscriber.unsubscribe(channel.name)

    # What the broker's subscriber tells.

    def on_publication(self, channel: str, publication: Publication) -> None:
        found = self._channels.get(channel)
        if found is None:
            return
        if found.recent is not None and len(found.recent) <= self._settings.recovery_buffer:
            found.recent.append(publication)
        if found.track is not None and not found.is_stale:
            self._offer(found, found.track, publication)

    def on_notice(self, channel: str, notice: Notice) -> None:
        self.on_presence(channel, notice)

    def on_subscribed(self, channel: str) -> None:
        found = self._channels.get(channel)
        if found is None:
            return
        self.on_presence(channel, None)
        found.is_confirmed = True
        found.doubts += 1
        if found.track is None and all(subscription.is_fresh for subscription in found.waiting):
            found.track = Track(Position.start())
            for subscription in list(found.waiting):
                self._join(found, subscription, found.track.position)
        else:
            found.is_stale = found.track is not None
            self._want(found)

    def on_lost(self) -> None:
        for channel in self._channels.values():
            channel.is_confirmed = False
            channel.doubts += 1
            channel.is_stale = channel.track is not None

    # Sending.

    def _offer(self, channel: _Channel, track: Track, publication: Publication) -> None:
        verdict = track.offer(publication)
        if verdict is Next.NEXT:
            batch, exclude = Batch((publication.frame,)), publication.exclude
            for subscription in channel.live:
                if not exclude or subscription.connection != exclude:
                    subscription.send_queue.put_batch(batch)
                if publication.reply and subscription.on_reply is not None:
                    subscription.on_reply(publication.reply)
            self.publications_delivered += len(channel.live)
        elif verdict is Next.BROKEN:
            channel.is_stale = True
            channel.doubts += 1
            self._want(channel)

    def _send_missed(self, subscription: Subscription, publications: Iterable[Publication]) -> None:
        for publication in publications:
            if not publication.exclude or publication.exclude != subscription.connection:
                subscription.send_queue.put_recovered_nowait(publication.frame)
            if publication.reply and subscription.on_reply is not None:
                subscription.on_reply(publication.reply)

    def _join(self, channel: _Channel, subscription: Subscription, position: Position) -> None:
        """Make a waiting subscription live; it has been sent everything up to the channel's track."""
        self._begin(subscription, position, None if subscription.position is None else True)
        del channel.waiting[subscription]
        channel.live[subscription] = None
        subscription.joined_at = subscription.joined_at or position
        subscription.position = position
        self._unsettled.pop(subscription, None)
        subscription.settle(True)

    def _begin(self, subscription: Subscription, position: Position, recovered: bool | None) -> None:
        """Answer a subscription, if it was not answered yet."""
        if not subscription.has_begun:
            subscription.has_begun = True
            if subscription.is_announced or recovered is False:
                members = subscription.on_begin() if subscription.on_begin is not None else None
                frame = protocol.subscribed(subscription.channel, position, recovered, members)
                subscription.send_queue.put_nowait(frame)

    def _tell_gap(self, subscription: Subscription, position: Position, reason: GapReason) -> None:
        subscription.since = position
        self.gaps_told += 1
        frame = protocol.gap(subscription.channel, position, reason)
        subscription.send_queue.put_nowait(frame)

    # Reading history.

    def _want(self, channel: _Channel) -> None:
        """Ask for a read of the channel's history; once for all who ask before it begins.

        While a read is under way this does nothing: its end looks at who still waits, and at `doubts`.
        """
        if self._channels.get(channel.name) is channel and not channel.is_reading:
            self._wanted[channel] = None
            self._work.set()

    async def run(self) -> NoReturn:
        """Follow the broker and read history where it is wanted, for ever."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._subscriber.run())
                tasks.create_task(self._check())
                tasks.create_task(self._refuse())
                for _ in range(self._settings.resync_concurrency):
                    tasks.create_task(self._read())
        finally:
            for channel in self._channels.values():
                channel.is_reading, channel.recent = False, None
        raise AssertionError("unreachable: the tasks above do not end")

    async def _read(self) -> None:
        while True:
            await self._work.wait()
            batch = [item for item in list(self._wanted)[: self._settings.resync_batch] if item.is_confirmed]
            for channel in list(self._wanted)[: self._settings.resync_batch]:
                del self._wanted[channel]
            if not self._wanted:
                self._work.clear()
            if not batch:
                continue
            reads = [_Read(channel) for channel in batch]
            pages: list[HistoryPage | Exception]
            try:
                wanted = [(read.channel.name, read.since) for read in reads]
                pages = await self._broker.read(wanted, page_bytes=self._settings.recovery_page_bytes)
            except BrokerUnavailable as error:
                pages = [error] * len(reads)
            for read, page in zip(reads, pages, strict=True):
                recent = read.end()
                channel = read.channel
                if self._channels.get(channel.name) is not channel:
                    continue
                if isinstance(page, Exception):
                    log.warning("history of %s could not be read: %s", channel.name, page)
                    delay = random.uniform(_RETRY_SECONDS / 2, _RETRY_SECONDS)
                    asyncio.get_running_loop().call_later(delay, self._want, channel)
                elif read.doubts == channel.doubts:
                    self._settle(read, page, recent)
                elif channel.is_confirmed:
                    self._want(channel)

    def _settle(self, read: "_Read", page: HistoryPage, recent: list[Publication]) -> None:
        """Bring the track and those who wait forward by what `page` tells. No `await` from here to the end."""
        channel = read.channel
        was_stale = channel.track is None or channel.is_stale
        track = self._settle_track(read, page)
        for subscription in read.waiting:
            if subscription in channel.waiting:
                self._settle_subscription(channel, track, subscription, page, recent)
        if was_stale and not channel.is_stale:
            for publication in recent:
                if not channel.is_stale:
                    self._offer(channel, track, publication)
        if len(recent) > self._settings.recovery_buffer:
            self._want(channel)
        elif self._needs_read(channel):
            is_done = page.is_complete and not channel.is_stale
            is_ahead = is_done and all(item in read.waiting for item in channel.waiting)
            delay = _REREAD_SECONDS if is_ahead else 0
            asyncio.get_running_loop().call_later(delay, self._want, channel)

    def _needs_read(self, channel: _Channel) -> bool:
        """Whether a read would help anybody now; a client with enough to read calls for one when it has read that."""
        needs_read = channel.is_stale
        for subscription in channel.waiting:
            if subscription.send_queue.is_low:
                needs_read = True
            elif not subscription.is_held:
                subscription.is_held = True
                subscription.send_queue.when_low(functools.partial(self._release, channel, subscription))
        return needs_read

    def _release(self, channel: _Channel, subscription: Subscription) -> None:
        subscription.is_held = False
        self._want(channel)

    def _settle_track(self, read: "_Read", page: HistoryPage) -> Track:
        channel = read.channel
        if channel.track is None:
            channel.track = Track(page.top)
            return channel.track
        track = channel.track
        if not channel.is_stale:
            lost = catch_up(read.track_position, page).lost
            if lost not in (None, GapReason.TRIMMED):
                channel.is_stale = True  # looked at again, with nothing live in between
                return track
            if lost is not None or page.top.offset <= track.position.offset:
                return track  # what is newer is on its way to us
        outcome = catch_up(track.position, page)
        if outcome.lost is None:
            self._bring_forward(channel, track.position, outcome.publications)
            # A page that brings the track forward, but not to its end, is followed by the next one.
            channel.is_stale = not page.is_complete and (channel.is_stale or bool(outcome.publications))
        elif channel.is_stale:
            for subscription in channel.live:
                self._tell_gap(subscription, outcome.position, outcome.lost)
            channel.is_stale = False
        else:
            return track
        track.move(outcome)
        return track

    def _bring_forward(self, channel: _Channel, position: Position, publications: tuple[Publication, ...]) -> None:
        """Send to the live what they missed; who reads too slowly for that catches up alone, from `position`."""
        for subscription in list(channel.live) if publications else ():
            if subscription.send_queue.is_low:
                self._send_missed(subscription, publications)
            else:
                del channel.live[subscription]
                channel.waiting[subscription] = None
                subscription.position = position

    def _settle_subscription(
        self,
        channel: _Channel,
        track: Track,
        subscription: Subscription,
        page: HistoryPage,
        recent: list[Publication],
    ) -> None:
        if subscription.position is None:
            if not channel.is_stale:
                self._join(channel, subscription, track.position)
            return
        outcome = catch_up(subscription.position, page)
        position = outcome.position
        if outcome.lost is None and not outcome.publications and position != page.top:
            # The page ended before it: others are further behind. The broker did answer, so the time begins anew.
            subscription.registered_at = asyncio.get_running_loop().time()
            return
        if outcome.lost is not None and not channel.is_stale and not _is_behind(track.position, subscription.position):
            # Newer publications are on their way to the track: to begin ahead of it could miss one that is not kept.
            position = track.position
        if outcome.lost is not None:
            subscription.since = position
        if not subscription.has_begun:
            start = subscription.position
            if start.is_start:
                start = Position(page.top.epoch, start.offset, start.tag)
            self._begin(subscription, position if outcome.lost else start, outcome.lost is None)
            self._unsettled.pop(subscription, None)
        elif outcome.lost is not None:
            self._tell_gap(subscription, position, outcome.lost)
        self._send_missed(subscription, outcome.publications)
        if not channel.is_stale and (page.is_complete or outcome.lost is not None):
            for publication in recent:
                if position == track.position:
                    break
                if publication.follows(position):
                    self._send_missed(subscription, (publication,))
                    position = publication.position
        subscription.position = position
        if position == track.position and not channel.is_stale:
            self._join(channel, subscription, position)

    async def _check(self) -> None:
        """Compare each channel's position with the broker's once per `check_interval`, spread over that time."""
        while True:
            await asyncio.sleep(self._settings.check_interval / 2)
            channels = list(self._channels.values())
            pause = self._settings.check_interval / 2 / (len(channels) // self._settings.resync_batch + 1)
            for index, channel in enumerate(channels):
                if channel.is_settled and channel.track is not None and not channel.track.position.is_start:
                    self._want(channel)
                if index % self._settings.resync_batch == 0:
                    await asyncio.sleep(pause)

    async def _refuse(self) -> None:
        """Refuse subscriptions that the broker has not answered within `broker_timeout`."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(0.25, self._settings.broker_timeout / 4))
            deadline = loop.time() - self._settings.broker_timeout
            for subscription in self._unsettled:
                if not subscription.send_queue.is_low:
                    subscription.registered_at = loop.time()  # it is the client that keeps it waiting
            for subscription in [item for item in self._unsettled if item.registered_at < deadline]:
                self.unsubscribe(subscription)
                if subscription.is_announced:
                    subscription.send_queue.put_nowait(
                        protocol.error(
                            ErrorCode.UNAVAILABLE,
                            "the broker does not answer; try again in a few seconds",
                            channel=subscription.channel,
                        )
                    )
                subscription.settle(False)


def _is_behind(position: Position, other: Position) -> bool:
    return position.epoch == other.epoch and position.offset < other.offset


class _Read:
    """One channel's part in one read of history.

    A stale track comes first: whoever is further behind than the live ones waits for the next read, because a page
    has its bound and the live ones must not wait until everybody has come up to them.
    """

    __slots__ = ("channel", "doubts", "since", "track_position", "waiting")

    def __init__(self, channel: _Channel) -> None:
        self.channel = channel
        channel.is_reading, channel.recent = True, []
        self.doubts = channel.doubts
        self.track_position = channel.track.position if channel.track is not None else None
        floor = self.track_position.offset if channel.is_stale and self.track_position is not None else 0
        self.waiting = {
            item: None
            for item in channel.waiting
            if item.send_queue.is_low and (item.position is None or item.position.offset >= floor)
        }
        positions = [item.position for item in self.waiting] + [self.track_position]
        self.since = min((position.offset for position in positions if position is not None), default=None)

    def end(self) -> list[Publication]:
        """Stop remembering what comes live, and return it."""
        recent = self.channel.recent or []
        self.channel.recent, self.channel.is_reading = None, False
        return recent
