"""Know who listens to what in this process, and keep all of them complete.

In:     subscriptions from `connection`; publications, confirmations and losses from the broker's subscriber
Out:    frames into send queues: `subscribed`, `message`, `gap`, and `error` where the broker does not answer
Owns:   one `_Channel` per channel with a subscription: who is live, who catches up, and their shared track
Never:  sends a live publication that is not exactly the next one; awaits anything per subscriber; keeps the event loop
        from other connections for longer than `fan_out_slice` deliveries take

The order that loses nothing: a subscription first waits, then the broker confirms that the channel is followed, and
only then history is read. What comes live during the read is remembered (`recent`). When the page is there, what was
missed, then what is in `recent`, is sent, and the subscription goes live: all with no `await` in between.

A channel is stale when its track met anything but the next publication, or when the link to the broker was made
anew. Nothing goes out on a stale channel until history was read. Reads are done by a few workers, each for many
channels in one round trip, and what was read for one is kept for a moment for others (`Window`), so that a reconnect of
everybody costs one read per channel.

What arrives on a channel at once goes out as one batch, in the same turn of the event loop. A fan-out too large for one
turn (`_FanOut`) begins in the next one, and takes as many as it needs. It is for those who were live when it was
decided, unless they leave; who joins later, joins behind it. Until it is over the track stays where it is, nothing else
goes to the channel's live subscriptions, and what comes meanwhile, live or from history, waits for its end.
"""

import asyncio
import functools
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

from pubsub_mw import protocol
from pubsub_mw.broker.codec import decode
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.broker.presence import Notice
from pubsub_mw.errors import BrokerUnavailable, CloseCode, ErrorCode
from pubsub_mw.model import Channel, ConnectionId, HistoryPage, Position, Publication
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import GapReason, Run, Subscription, Track, catch_up, runs_of
from pubsub_mw.realtime.window import Window
from pubsub_mw.settings import Settings

__all__ = ["Hub"]

log = logging.getLogger("pubsub_mw")

_RETRY_SECONDS = 0.5
"""Between attempts to read from a broker that does not answer; jittered."""

_REREAD_SECONDS = 0.01
"""Until history is read again for a subscription that is ahead of what has come live."""


_PAGES_AT_ONCE = 16
"""Whole pages that one round trip may bring; the pages of a larger batch are smaller."""

_WINDOW_SECONDS, _MOST_WINDOWS = 2.0, 64
"""How long what was read for somebody who came back is kept for others, and of how many channels."""

_NOBODY: dict[Subscription, None] = {}
"""Shared, and never added to."""


class _FanOut:
    """What is on its way to the live subscriptions of a channel, and what waits for its end.

    Attributes:
        runs: what is sent, in order
        targets: to whom; `done` of them have it
        payloads: what came live meanwhile
        page: what a read of history found meanwhile
        cost: of one target, in deliveries
    """

    __slots__ = ("cost", "done", "page", "payloads", "runs", "targets")

    def __init__(self, runs: list[Run], targets: list[Subscription], cost: int) -> None:
        self.runs = runs
        self.targets = targets
        self.done = 0
        self.cost = cost
        self.payloads: list[bytes] = []
        self.page: tuple[_Read, HistoryPage] | None = None


class _Channel:
    """One channel that somebody in this process listens to."""

    __slots__ = (
        "doubts",
        "fan_out",
        "is_confirmed",
        "is_reading",
        "is_stale",
        "live",
        "name",
        "recent",
        "sole",
        "track",
        "waiting",
        "weight",
        "window",
    )

    def __init__(self, name: Channel) -> None:
        self.name = name
        # They have, or are about to get, everything up to `track`; changed by `go_live` and `leave` alone.
        self.live: dict[Subscription, SendQueue] = {}
        self.sole: SendQueue | None = None  # of the only one that is live, if it is a client's
        self.waiting: dict[Subscription, None] = _NOBODY  # each at its own position; see `wait` and `wait_no_more`
        self.track: Track | None = None  # None until history was read for the first time
        self.is_confirmed = False  # the broker delivers this channel's publications to us
        self.is_stale = False  # `track` is not to be trusted before history was read
        self.doubts = 0  # counts what makes a read under way worthless: history must be asked after it
        self.is_reading = False
        self.recent: list[bytes] | None = None  # what came live since the read under way began
        self.fan_out: _FanOut | None = None
        # Of each delivery in what is counted: channels to which the server itself listens are not.
        self.weight = 0 if name.startswith(("#control", "#server-")) else 1
        self.window: Window | None = None  # what was read last, while others may want the same

    def go_live(self, subscription: Subscription) -> None:
        self.live[subscription] = subscription.send_queue
        self._note_sole()

    def leave(self, subscription: Subscription) -> None:
        self.live.pop(subscription, None)
        self._note_sole()

    def _note_sole(self) -> None:
        self.sole = next(iter(self.live.values())) if len(self.live) == self.weight == 1 else None

    def wait(self, subscription: Subscription) -> None:
        if self.waiting is _NOBODY:
            self.waiting = {}
        self.waiting[subscription] = None

    def wait_no_more(self, subscription: Subscription) -> None:
        if self.waiting.pop(subscription, subscription) is None and not self.waiting:
            self.waiting = _NOBODY  # most channels have one connection, which waits once

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
        self._unsettled: dict[Subscription, float] = {}  # since when
        self._idle: dict[_Channel, float] = {}  # nobody listens to them since; those who left first come first
        self._subscriber = broker.subscriber(self)
        self._wanted: dict[_Channel, None] = {}
        self._work = asyncio.Event()
        self._fanning_out: dict[_Channel, None] = {}
        self._goes_on = False  # in the next turn
        self._left = 0  # deliveries that may still be made in this turn
        self._waiting_bytes = 0  # of payloads that wait for a fan-out
        self._is_paused = False
        self._windows: dict[_Channel, None] = {}  # of channels that have one, the oldest first
        self.on_presence: Callable[[str, Notice | None], None] = lambda _channel, _notice: None
        """Told of each notice, and of None when a channel's notices may have been missed."""
        # What is counted for `metrics`, which reads it: nothing is called for it.
        self.gaps_told: Counter[GapReason] = Counter()
        self.publications_delivered = 0
        self.recoveries: Counter[bool] = Counter()  # whether it was known what was missed
        self.history_reads = self.history_failures = 0

    @property
    def is_up(self) -> bool:
        """Whether publications arrive."""
        return self._subscriber.is_up

    @property
    def channel_count(self) -> int:
        """Channels that connections listen to; the server's own are not counted."""
        return sum(channel.weight for channel in self._channels.values()) - len(self._idle)

    @property
    def subscription_count(self) -> int:
        """Subscriptions of connections, their own channels included."""
        channels = self._channels.values()
        return sum(channel.weight * (len(channel.live) + len(channel.waiting)) for channel in channels)

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

    def replace(self, connection: ConnectionId, *, by_poll: bool) -> None:
        """Close a connection that was resumed on another server; nothing if it is not here.

        A poll does not end a poll: the one elsewhere was answered before this one came, and is heard of later.
        """
        older = self._connections.get(connection)
        if older is not None and not (by_poll and older.is_poll):
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
            self._subscriber.subscribe(channel.name, channel)
        was_idle = self._idle.pop(channel, None) is not None
        self._unsettled[subscription] = asyncio.get_running_loop().time()
        channel.wait(subscription)
        track = channel.track
        if track is None or track.position.is_start or not channel.is_settled:
            is_there = False  # or it is not known where: what nobody has published to has a position too
        else:
            # Who begins now on a channel that was idle is not to hear what was published before.
            is_there = subscription.position == track.position or (subscription.position is None and not was_idle)
        if track is not None and is_there:
            self._join(channel, subscription, track.position)
        elif channel.is_confirmed and not self._serve(channel, subscription):
            self._want(channel)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget a subscription. What is in its send queue stays there; who waits for it to settle waits no longer."""
        subscription.is_open = False
        self._unsettled.pop(subscription, None)
        subscription.settle(False)
        channel = self._channels.get(subscription.channel)
        if channel is not None:
            channel.leave(subscription)
            channel.wait_no_more(subscription)
            if not channel.live and not channel.waiting:
                if channel.is_settled and self._settings.channel_linger:
                    self._idle[channel] = asyncio.get_running_loop().time()
                else:
                    self._give_up(channel)

    def _give_up(self, channel: _Channel) -> None:
        del self._channels[channel.name]
        self._wanted.pop(channel, None)
        self._forget(channel)
        self._subscriber.unsubscribe(channel.name)

    # What the broker's subscriber tells.

    def on_publications(self, arrived: Mapping[_Channel, Sequence[bytes]]) -> None:
        self._left = self._settings.fan_out_slice
        ready: list[tuple[SendQueue, bytes]] = []  # sent at the end: in turn with the kernel's code ours is slower
        for channel, payloads in arrived.items():
            track, sole = channel.track, channel.sole
            if channel.recent is not None and len(channel.recent) <= self._settings.recovery_buffer:
                channel.recent += payloads
            if track is None or channel.is_stale:
                continue
            if sole is not None and len(payloads) == 1 and channel.fan_out is None and channel.window is None:
                # Nearly all that arrives on many channels: one publication for one client, with nothing to share.
                frame = track.step(payloads[0]) if self._left > 0 else b""
                if frame:
                    self._left -= 1
                    ready.append((sole, frame))
                    continue
            self._offer(channel, track, payloads)
        self.publications_delivered += len(ready)
        for sole, frame in ready:
            sole.put_nowait(frame)

    def on_notice(self, channel: _Channel, notice: Notice) -> None:
        while channel.fan_out is not None:
            self._slice(channel, channel.fan_out, len(channel.fan_out.targets))  # what came before goes out before
        self.on_presence(channel.name, notice)

    def on_subscribed(self, channel: _Channel) -> None:
        self.on_presence(channel.name, None)
        channel.is_confirmed = True
        channel.doubts += 1
        if channel.track is None and all(subscription.is_fresh for subscription in channel.waiting):
            channel.track = Track(Position.start())
            for subscription in list(channel.waiting):
                self._join(channel, subscription, channel.track.position)
        else:
            channel.is_stale = channel.track is not None
            self._want(channel)

    def on_lost(self) -> None:
        for channel in self._channels.values():
            channel.is_confirmed = False
            channel.doubts += 1
            channel.is_stale = channel.track is not None

    # Sending.

    def _offer(self, channel: _Channel, track: Track, payloads: Sequence[bytes]) -> None:
        """Send those that are next, and have history read if there are others."""
        if channel.fan_out is not None:
            channel.fan_out.payloads += payloads
            self._waiting_bytes += sum(map(len, payloads))
            if self._waiting_bytes > self._settings.fan_out_bytes and not self._is_paused:
                self._is_paused = True
                self._subscriber.pause()
            return
        rest: Sequence[bytes] = ()
        if len(payloads) > 1:
            # What is written in a turn waits until its end, also for a client that reads at once, and must not look
            # like what a slow one leaves waiting.
            payloads, rest = _first(payloads, self._settings.send_queue_bytes // 4)
        try:
            runs, is_whole = track.advance(payloads)
        except ValueError as error:
            log.error("ignored %d publications on %s, one of which is not ours: %s", len(payloads), channel.name, error)
            runs, is_whole = [], False
        if channel.window is not None:
            channel.window.extend(_ours(payloads), are_live=True)
        for run in runs:
            self.publications_delivered += channel.weight * len(channel.live) * len(run.frames)
        if runs or rest:
            self._fan_out(channel, runs, rest if is_whole else ())
        if not is_whole:
            channel.is_stale = True
            channel.doubts += 1
            self._want(channel)

    def _fan_out(self, channel: _Channel, runs: list[Run], rest: Sequence[bytes] = ()) -> None:
        """Send to all that are live, now if that is little, else from the next turn on; then take up `rest`."""
        live, cost = channel.live, 0
        for run in runs:
            cost += run.cost
        if not rest and len(live) * cost <= self._left:
            self._left -= len(live) * cost
            for run in runs:
                if run.is_plain:
                    for send_queue in list(live.values()):  # one that closes may make its subscription leave
                        send_queue.put_batch(run)
                else:
                    for subscription in list(live):
                        _put(subscription, run)
        elif live or rest:
            channel.fan_out = _FanOut(runs, list(live), max(1, cost))
            channel.fan_out.payloads += rest
            self._waiting_bytes += sum(map(len, rest))
            self._fanning_out[channel] = None
            self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._fanning_out and not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Make this turn's part of the fan-outs under way."""
        self._goes_on, self._left = False, self._settings.fan_out_slice
        if not self._fanning_out:
            return
        self._go_on_soon()  # whatever happens below
        share = self._left // len(self._fanning_out)
        for channel in list(self._fanning_out):
            if channel.fan_out is not None:
                self._slice(channel, channel.fan_out, max(1, share // channel.fan_out.cost))

    def _slice(self, channel: _Channel, fan_out: _FanOut, count: int) -> None:
        """Send to the next `count` targets; after the last one, take up what waited."""
        targets = fan_out.targets[fan_out.done : fan_out.done + count]
        fan_out.done += len(targets)
        self._left -= len(targets) * fan_out.cost
        for subscription in targets:
            if subscription in channel.live:
                for run in fan_out.runs:
                    _put(subscription, run)
        if fan_out.done < len(fan_out.targets):
            return
        channel.fan_out = None
        del self._fanning_out[channel]
        self._waiting_bytes -= sum(map(len, fan_out.payloads))
        # On a channel that became stale they are too old for whatever comes next; history has them.
        is_wanted = not channel.is_stale
        if fan_out.page is not None:
            self._take(*fan_out.page)
        if fan_out.payloads and is_wanted and not channel.is_stale and channel.track is not None:
            self._offer(channel, channel.track, fan_out.payloads)
        if self._is_paused and self._waiting_bytes <= self._settings.fan_out_bytes // 2:
            self._is_paused = False
            self._subscriber.resume()

    def _serve(self, channel: _Channel, subscription: Subscription) -> bool:
        """Let a waiting subscription catch up from what was read for others, if that is enough."""
        track, window, position = channel.track, channel.window, subscription.position
        if window is None or track is None or position is None or not channel.is_settled:
            return False
        runs = window.after(position) if window.top == track.position and subscription.send_queue.is_low else None
        if runs is None:
            return False
        window.used_at = asyncio.get_running_loop().time()
        self._begin(subscription, position, True)
        for run in runs:
            _put(subscription, run)
        self._join(channel, subscription, track.position)
        return True

    def _remember(
        self, channel: _Channel, track: Track, publications: Sequence[Publication], recent: Sequence[bytes]
    ) -> None:
        """Keep what was read for those who come back next, if it leads up to the track."""
        window = Window(publications[0].previous, self._settings.recovery_page_bytes)
        window.extend(publications)
        window.extend(_ours(recent), are_live=True)
        if window.top == track.position:
            if len(self._windows) >= _MOST_WINDOWS:
                self._forget(next(iter(self._windows)))
            window.used_at = asyncio.get_running_loop().time()
            channel.window = window
            self._windows[channel] = None

    def _forget(self, channel: _Channel) -> None:
        channel.window = None
        self._windows.pop(channel, None)

    def _join(self, channel: _Channel, subscription: Subscription, position: Position) -> None:
        """Make a waiting subscription live; it has been sent everything up to the channel's track."""
        self._begin(subscription, position, None if subscription.position is None else True)
        channel.wait_no_more(subscription)
        channel.go_live(subscription)
        subscription.joined_at = subscription.joined_at or position
        subscription.position = position
        self._unsettled.pop(subscription, None)
        subscription.settle(True)

    def _begin(self, subscription: Subscription, position: Position, recovered: bool | None) -> None:
        """Answer a subscription, if it was not answered yet."""
        if not subscription.has_begun:
            subscription.has_begun = True
            if subscription.is_announced or recovered is False:
                if recovered is not None:
                    self.recoveries[recovered] += 1
                members = subscription.on_begin() if subscription.on_begin is not None else None
                frame = protocol.subscribed(subscription.channel, position, recovered, members)
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
                tasks.create_task(self._sweep())
                for _ in range(self._settings.resync_concurrency):
                    tasks.create_task(self._read())
        finally:
            for channel in self._channels.values():
                channel.is_reading, channel.recent = False, None
                if channel.fan_out is not None:
                    channel.fan_out.page = None
        raise AssertionError("unreachable: the tasks above do not end")

    async def _read(self) -> None:
        while True:
            await self._work.wait()
            channels = list(itertools.islice(self._wanted, self._settings.resync_batch))
            for channel in channels:
                del self._wanted[channel]
            if not self._wanted:
                self._work.clear()
            await self._read_batch([_Read(channel) for channel in channels if channel.is_confirmed])
            del channels  # and with the call what it read: not kept until there is more to do

    async def _read_batch(self, reads: list["_Read"]) -> None:
        """Read several channels in one round trip."""
        if not reads:
            return
        whole = self._settings.recovery_page_bytes
        pages: list[HistoryPage | Exception]
        try:
            wanted = [(read.channel.name, read.since) for read in reads]
            pages = await self._broker.read(wanted, page_bytes=min(whole, _PAGES_AT_ONCE * whole // len(reads)))
        except BrokerUnavailable as error:
            pages = [error] * len(reads)
        self.history_reads += len(reads)
        for read, page in zip(reads, pages, strict=True):
            channel = read.channel
            if not isinstance(page, Exception):
                self._left = self._settings.fan_out_slice
                self._take(read, page)
                continue
            read.end()
            self.history_failures += 1
            if self._channels.get(channel.name) is channel:
                log.warning("history of %s could not be read: %s", channel.name, page)
                delay = random.uniform(_RETRY_SECONDS / 2, _RETRY_SECONDS)
                asyncio.get_running_loop().call_later(delay, self._want, channel)

    def _take(self, read: "_Read", page: HistoryPage) -> None:
        """Take what a read found, if it still counts and nothing is on its way out that must come before it."""
        channel = read.channel
        if channel.fan_out is not None:
            channel.fan_out.page = (read, page)
            return
        recent = read.end()
        if self._channels.get(channel.name) is not channel:
            return
        if read.doubts == channel.doubts:
            self._settle(read, page, recent)
        elif channel.is_confirmed:
            self._want(channel)

    def _settle(self, read: "_Read", page: HistoryPage, recent: list[bytes]) -> None:
        """Bring the track and those who wait forward by what `page` tells. No `await` from here to the end."""
        channel = read.channel
        was_stale = channel.track is None or channel.is_stale
        track = self._settle_track(read, page)
        # Many wait at the same place, and get the same batches.
        places: dict[Position | None, list[Subscription]] = {}
        for subscription in read.waiting:
            if subscription in channel.waiting:
                places.setdefault(subscription.position, []).append(subscription)
        for position, subscriptions in places.items():
            self._settle_place(channel, track, position, subscriptions, page, recent)
        if was_stale and not channel.is_stale and recent:
            self._offer(channel, track, recent)
        if page.publications and not channel.is_stale and any(position is not None for position in places):
            self._remember(channel, track, page.publications, recent)
        for subscription in [item for item in channel.waiting if item not in read.waiting]:
            self._serve(channel, subscription)
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
            if lost is None and track.position.is_start and not page.top.offset:
                track.move(catch_up(track.position, page))  # nothing but its epoch becomes known
            if lost is not None or page.top.offset <= track.position.offset:
                return track  # what is newer is on its way to us
        outcome = catch_up(track.position, page)
        if outcome.lost is None:
            self._bring_forward(channel, track.position, outcome.publications)
            # A page that brings the track forward, but not to its end, is followed by the next one.
            channel.is_stale = not page.is_complete and (channel.is_stale or bool(outcome.publications))
        elif channel.is_stale:
            for subscription in channel.live:
                subscription.since = outcome.position
            self.gaps_told[outcome.lost] += channel.weight * len(channel.live)
            channel.is_stale = False
            self._fan_out(channel, [Run((protocol.gap(channel.name, outcome.position, outcome.lost),))])
        else:
            return track
        track.move(outcome)
        return track

    def _bring_forward(self, channel: _Channel, position: Position, publications: tuple[Publication, ...]) -> None:
        """Send to the live what they missed; who reads too slowly for that catches up alone, from `position`."""
        if not publications:
            return
        for subscription in [item for item, send_queue in channel.live.items() if not send_queue.is_low]:
            channel.leave(subscription)
            channel.wait(subscription)
            subscription.position = position
        self._fan_out(channel, runs_of(publications))

    def _settle_place(
        self,
        channel: _Channel,
        track: Track,
        start: Position | None,
        subscriptions: list[Subscription],
        page: HistoryPage,
        recent: list[bytes],
    ) -> None:
        """Bring forward those who wait at `start`."""
        if start is None:
            if not channel.is_stale:
                for subscription in subscriptions:
                    self._join(channel, subscription, track.position)
            return
        outcome = catch_up(start, page)
        position = outcome.position
        if outcome.lost is None and not outcome.publications and position != page.top:
            # The page ended before it: others are further behind. The broker did answer, so the time begins anew.
            for subscription in subscriptions:
                if subscription in self._unsettled:
                    self._unsettled[subscription] = asyncio.get_running_loop().time()
            return
        if outcome.lost is not None and not channel.is_stale and not _is_behind(track.position, start):
            # Newer publications are on their way to the track: to begin ahead of it could miss one that is not kept.
            position = track.position
        began_at = position
        if outcome.lost is None:
            began_at = Position(page.top.epoch, start.offset, start.tag) if start.is_start else start
        missed = list(outcome.publications)
        if not channel.is_stale and (page.is_complete or outcome.lost is not None):
            for publication in _ours(recent):
                if position == track.position:
                    break
                if publication.follows(position):
                    missed.append(publication)
                    position = publication.position
        runs = runs_of(missed)
        is_there = position == track.position and not channel.is_stale
        for subscription in subscriptions:
            if not subscription.has_begun:
                self._begin(subscription, began_at, outcome.lost is None)
                self._unsettled.pop(subscription, None)
            elif outcome.lost is not None:
                self.gaps_told[outcome.lost] += channel.weight
                subscription.send_queue.put_nowait(protocol.gap(channel.name, began_at, outcome.lost))
            if outcome.lost is not None:
                subscription.since = began_at
            for run in runs:
                _put(subscription, run)
            subscription.position = position
            if is_there:
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

    async def _sweep(self) -> None:
        """Give up channels that nobody has listened to for `channel_linger`."""
        linger = self._settings.channel_linger
        while True:
            await asyncio.sleep(max(0.05, linger / 4))
            deadline = asyncio.get_running_loop().time() - linger
            for channel in [channel for channel, since in self._idle.items() if since <= deadline]:
                del self._idle[channel]
                self._give_up(channel)

    async def _refuse(self) -> None:
        """Refuse subscriptions that the broker has not answered within `broker_timeout`; forget windows nobody uses."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(0.25, self._settings.broker_timeout / 4))
            deadline = loop.time() - self._settings.broker_timeout
            for channel in [
                item for item in self._windows if item.window and item.window.used_at < loop.time() - _WINDOW_SECONDS
            ]:
                self._forget(channel)
            for subscription in self._unsettled:
                if not subscription.send_queue.is_low:
                    self._unsettled[subscription] = loop.time()  # it is the client that keeps it waiting
            for subscription in [item for item, since in self._unsettled.items() if since < deadline]:
                self.unsubscribe(subscription)
                if subscription.is_announced:
                    subscription.send_queue.put_nowait(
                        protocol.error(
                            ErrorCode.UNAVAILABLE,
                            "the broker does not answer; try again in a few seconds",
                            channel=subscription.channel,
                        )
                    )


def _is_behind(position: Position, other: Position) -> bool:
    return position.epoch == other.epoch and position.offset < other.offset


def _put(subscription: Subscription, run: Run) -> None:
    """Send a run to one subscription, as far as it is meant for it."""
    if not run.exclude or subscription.connection != run.exclude:
        if run.is_recovered:
            subscription.send_queue.put_recovered_batch(run)
        else:
            subscription.send_queue.put_batch(run)
    if run.reply and subscription.on_reply is not None:
        subscription.on_reply(subscription.connection, run.reply)


def _first(payloads: Sequence[bytes], most_bytes: int) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """Return those that go out now, at least one, and the rest."""
    if sum(map(len, payloads)) <= most_bytes:
        return payloads, ()
    size = 0
    for index, payload in enumerate(payloads):
        size += len(payload)
        if index and size > most_bytes:
            return payloads[:index], payloads[index:]
    raise AssertionError("unreachable: together they are more than that")


def _ours(payloads: Iterable[bytes]) -> Iterator[Publication]:
    """Read payloads up to the first that is not ours."""
    for payload in payloads:
        try:
            yield decode(payload)
        except ValueError as error:
            log.error("ignored %d foreign bytes on a channel: %s", len(payload), error)
            return


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

    def end(self) -> list[bytes]:
        """Stop remembering what comes live, and return it."""
        recent = self.channel.recent or []
        self.channel.recent, self.channel.is_reading = None, False
        return recent
