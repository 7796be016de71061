"""Show who is on a channel, and say so when that changes.

In:     subscriptions to presence channels, each with its user; notices from the broker
Out:    changes to the broker; the same subscriptions to the hub, once they are entered; `join` and `leave` frames
Owns:   per channel that somebody in this process is on: the users that its subscribers have been told of; the lease
        of this process's entries; the changes not yet sent
Never:  tells a user twice, or one who is there already: a frame is the difference to what was told before. Takes a
        user from a frame: it comes from the grant or from the application

What `subscribed` tells and the frames after it go through one send queue, in one step with the change to what was told,
so a client that applies them knows what this server knows. A notice that is lost shows in the number of the next one,
else when the lease is renewed, each third of `presence_ttl`: then all users are asked for, and the difference is told.

A change that the broker did not take is not repeated: renewal enters what is missing, and the lease ends what is too
much. When Redis loses its data, or cannot be reached for longer than `presence_ttl`, users seem to leave and join.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import NoReturn

from pubsub_mw import protocol
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.broker.presence import Change, Notice, PresenceCall, Present, Verb
from pubsub_mw.drafts import encode_data
from pubsub_mw.errors import BrokerUnavailable, ErrorCode, FrameError
from pubsub_mw.model import Channel
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings

__all__ = ["Presence"]

log = logging.getLogger("pubsub_mw")

_CHANGES_PER_CALL = 200
"""On one channel in one step, so that a step does not hold up Redis."""
_RETRY_SECONDS = 0.5
"""After a round trip that failed."""


class _Entry:
    """One subscription, as the broker knows it."""

    __slots__ = ("info", "is_entered", "nonce", "subscription", "user")

    def __init__(self, subscription: Subscription, user: str, info: bytes) -> None:
        self.subscription = subscription
        self.user = user
        self.info = info
        self.nonce = secrets.token_urlsafe(9)
        self.is_entered = False

    def change(self, verb: Verb, after: float = 0.0) -> Change:
        connection = self.subscription.connection
        return Change(verb=verb, connection=connection, nonce=self.nonce, user=self.user, info=self.info, after=after)


class _Room:
    """One channel that somebody in this process is on."""

    __slots__ = ("channel", "entries", "epoch", "listening", "number", "users")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.entries: dict[Subscription, _Entry] = {}
        self.listening: dict[Subscription, None] = {}  # those who have been told `users`
        self.users: dict[str, bytes] = {}
        self.epoch, self.number = "", 0  # what `users` is as of; "" = not to be built upon

    def move(self, users: Mapping[str, bytes]) -> None:
        """Let `users` be there; tell the difference."""
        before, self.users = self.users, dict(users)
        for user in before.keys() - users.keys():
            self._tell(protocol.leave(self.channel, user, before[user]))
        for user in users.keys() - before.keys():
            self._tell(protocol.join(self.channel, user, users[user]))

    def follow(self, notice: Notice) -> bool:
        """Apply a notice; False if others are missing before it."""
        if notice.epoch != self.epoch or notice.number > self.number + 1:
            return False
        if notice.number == self.number + 1:
            self.number = notice.number
            was_there = self.users.pop(notice.user, None) is not None
            if notice.is_join:
                self.users[notice.user] = notice.info
            if notice.is_join is not was_there:
                frame = protocol.join if notice.is_join else protocol.leave
                self._tell(frame(self.channel, notice.user, notice.info))
        return True

    def _tell(self, frame: bytes) -> None:
        for subscription in self.listening:
            subscription.send_queue.put_nowait(frame)


class Presence:
    """The presence of one process's connections. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, hub: Hub, settings: Settings) -> None:
        self._broker = broker
        self._hub = hub
        self._settings = settings
        self._rooms: dict[str, _Room] = {}
        self._entering: dict[str, _Entry] = {}  # by nonce
        # What is to be said, in order per channel, by verb and nonce: a renewal that waits is not put twice.
        self._wanted: dict[Channel, dict[tuple[Verb, str], Change]] = {}
        self._work = asyncio.Event()
        hub.on_presence = self._on_presence

    def enter(self, subscription: Subscription, user: str, info: object) -> None:
        """Enter a subscription, then hand it to the hub.

        Raises:
            FrameError: `info` is over `max_info_bytes`.
        """
        channel, encoded = subscription.channel, encode_data(info)
        if len(encoded) > self._settings.max_info_bytes:
            message = f"the info is {len(encoded)} bytes of JSON, over {self._settings.max_info_bytes}"
            raise FrameError(ErrorCode.TOO_LARGE, message, channel=channel)
        room = self._rooms.setdefault(channel, _Room(channel))
        entry = room.entries[subscription] = _Entry(subscription, user, encoded)
        subscription.on_begin = partial(self._on_begin, room, subscription)
        subscription.settled = asyncio.get_running_loop().create_future()
        subscription.settled.add_done_callback(partial(self._on_settled, subscription))
        self._entering[entry.nonce] = entry
        self._want(channel, entry.change(Verb.ENTER))

    def leave(self, subscription: Subscription, *, after: float = 0.0) -> None:
        """Let a subscription's user be gone `after` seconds, unless the connection comes back. Idempotent."""
        room = self._rooms.get(subscription.channel)
        entry = room.entries.pop(subscription, None) if room is not None else None
        if room is None or entry is None:
            return
        room.listening.pop(subscription, None)
        if not room.entries:
            del self._rooms[room.channel]
        self._want(room.channel, entry.change(Verb.LEAVE, after))
        if after:
            # Its lease is over by then; whoever asks takes it out. If nobody else is there to ask, this does.
            asyncio.get_running_loop().call_later(after, self._want, room.channel, entry.change(Verb.LEAVE))

    async def run(self) -> NoReturn:
        """Send changes and renew leases, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            tasks.create_task(self._renew())
        raise AssertionError("unreachable: the tasks above do not end")

    # What the hub tells.

    def _on_presence(self, channel: str, notice: Notice | None) -> None:
        room = self._rooms.get(channel)
        if room is None:
            return
        if notice is None:
            room.epoch = ""  # another Redis may count on from an older state
            self._renew_room(room)
        elif not room.follow(notice):
            self._want(room.channel)

    def _on_begin(self, room: _Room, subscription: Subscription) -> Mapping[str, bytes]:
        room.listening[subscription] = None
        return room.users

    def _on_settled(self, subscription: Subscription, settled: "asyncio.Future[bool]") -> None:
        if not settled.cancelled() and not settled.result():
            self.leave(subscription)

    # What the broker is told.

    def _want(self, channel: Channel, change: Change | None = None) -> None:
        changes = self._wanted.setdefault(channel, {})
        if change is not None:
            # A LEAVE that is due replaces the one that waits, in its place.
            changes[change.verb, change.nonce] = change
        self._work.set()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.presence_ttl / 3)
            for room in list(self._rooms.values()):
                self._renew_room(room)

    def _renew_room(self, room: _Room) -> None:
        self._want(room.channel)
        for entry in room.entries.values():
            if entry.is_entered:
                self._want(room.channel, entry.change(Verb.STAY))

    async def _send(self) -> None:
        while True:
            await self._work.wait()
            calls = [self._call(channel) for channel in list(self._wanted)[: self._settings.resync_batch]]
            if not self._wanted:
                self._work.clear()
            answers: list[Present | Exception] = [BrokerUnavailable("the server stops")] * len(calls)
            pause = 0.0
            try:
                answers = await self._broker.presence(calls)
            except BrokerUnavailable as error:
                answers, pause = [error] * len(calls), _RETRY_SECONDS
            finally:
                for call, answer in zip(calls, answers, strict=True):
                    self._take(call, answer)
            await asyncio.sleep(pause)

    def _call(self, channel: Channel) -> PresenceCall:
        changes = self._wanted.pop(channel)
        first = tuple(islice(changes.values(), _CHANGES_PER_CALL))
        if len(first) < len(changes):
            self._wanted[channel] = dict(islice(changes.items(), _CHANGES_PER_CALL, None))
        room = self._rooms.get(channel)
        if room is None:
            return PresenceCall(channel=channel, changes=first)
        return PresenceCall(channel=channel, epoch=room.epoch, number=room.number, changes=first)

    def _take(self, call: PresenceCall, answer: Present | Exception) -> None:
        room = self._rooms.get(call.channel)
        if isinstance(answer, Exception):
            log.warning("presence on %s not written: %s", call.channel, answer)
        elif room is not None:
            self._update(room, call, answer)
        for index, change in enumerate(call.changes):
            entry = self._entering.pop(change.nonce, None) if change.verb is Verb.ENTER else None
            if entry is None or not entry.subscription.is_open:
                continue
            if isinstance(answer, Exception):
                self._refuse(entry, ErrorCode.UNAVAILABLE, "the broker does not answer; try again in a few seconds")
            elif not answer.accepted[index]:
                self._refuse(entry, ErrorCode.BUSY, f"{self._settings.presence_size} users are on it already")
            else:
                entry.is_entered = True
                self._hub.subscribe(entry.subscription)

    def _update(self, room: _Room, call: PresenceCall, answer: Present) -> None:
        if answer.users is None:
            for notice in answer.notices:
                if not room.follow(notice):
                    self._want(room.channel)
        elif answer.epoch != room.epoch or not call.number <= answer.number < room.number:
            room.move(answer.users)
            room.epoch, room.number = answer.epoch, answer.number
        # Else notices have overtaken the answer.

    def _refuse(self, entry: _Entry, code: ErrorCode, message: str) -> None:
        subscription = entry.subscription
        self.leave(subscription)
        self._hub.unsubscribe(subscription)
        subscription.send_queue.put_nowait(protocol.error(code, message, channel=subscription.channel))
