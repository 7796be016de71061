"""Decide what one connection gets of one channel: order, duplicates, gaps, recovery.

In:     a position, a page of history, payloads that came live
Out:    what to send, in runs, and the position after it; or the reason why continuity is lost
Owns:   the rule: a publication is sent if it is exactly the next one, and otherwise history is asked
Never:  does I/O; guesses. What cannot be shown to be complete is reported as lost

`catch_up` is the whole of recovery. `Track` is the place in a channel that all of a process's live subscriptions
share: they have all been sent everything up to it, so one comparison of bytes per publication serves them all. While
each is exactly the next one, nothing of it is parsed.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pubsub_mw.broker.codec import decode, split
from pubsub_mw.model import Channel, ConnectionId, HistoryPage, Position, Publication
from pubsub_mw.realtime.send_queue import Batch, SendQueue

__all__ = ["CatchUp", "GapReason", "Run", "Subscription", "Track", "catch_up", "runs_of"]


class GapReason(StrEnum):
    """Why continuity is lost."""

    EPOCH = "epoch"  # the broker lost the channel and began anew
    AHEAD = "ahead"  # the broker is behind what was received: it fell back to an older state
    FORKED = "forked"  # the broker holds another publication under an offset that was received
    TRIMMED = "trimmed"  # what was missed is no longer kept, or was published with history=False


@dataclass(frozen=True, slots=True)
class CatchUp:
    """What a page of history means for somebody at a position.

    Attributes:
        position: where they are after `publications`; if lost, the channel's newest position
        publications: what they missed, in offset order; empty if lost
        lost: None, or why it cannot be told what they missed
    """

    position: Position
    publications: tuple[Publication, ...]
    lost: GapReason | None


def catch_up(position: Position | None, page: HistoryPage) -> CatchUp:
    """Find what somebody at `position` missed; None = they begin now. Publications are all or none.

    A page that is not complete may end before `position`: then nothing is known yet, and they stay where they are.
    """
    top = page.top
    if position is None:
        return CatchUp(top, (), None)
    if position.is_start:
        position = Position(top.epoch, position.offset, position.tag)
    if position.epoch != top.epoch:
        return CatchUp(top, (), GapReason.EPOCH)
    if position.offset > top.offset:
        return CatchUp(top, (), GapReason.AHEAD)
    if position.offset == top.offset:
        return CatchUp(top, (), None if position.tag == top.tag else GapReason.FORKED)
    missed = tuple(publication for publication in page.publications if publication.position.offset > position.offset)
    for publication in missed:
        if not publication.follows(position):
            is_next = publication.position.offset == position.offset + 1
            return CatchUp(top, (), GapReason.FORKED if is_next else GapReason.TRIMMED)
        if not publication.frame:
            return CatchUp(top, (), GapReason.TRIMMED)
        position = publication.position
    # A page that ends before `position`, because others are further behind, says nothing yet.
    if page.is_complete and position != top:
        return CatchUp(top, (), GapReason.TRIMMED)
    return CatchUp(position, missed, None)


class Run(Batch):
    """Publications of one channel that follow each other and go, live, to all who listen.

    Attributes:
        exclude: the connection that does not get it, or ""
        reply: as in `Publication`; of a run of one
        is_recovered: whether it comes from history, and so is not bounded but paced
        is_plain: whether everybody gets it, live, and that is all
    """

    __slots__ = ()
    exclude = reply = ""
    is_recovered = False
    is_plain = True


class _MarkedRun(Run):
    """A run that is not plain."""

    __slots__ = ("exclude", "is_recovered", "reply")
    is_plain = False

    def __init__(self, frames: tuple[bytes, ...], exclude: str, reply: str, *, is_recovered: bool) -> None:
        super().__init__(frames)
        self.exclude = exclude
        self.reply = reply
        self.is_recovered = is_recovered


def runs_of(publications: Iterable[Publication]) -> list[Run]:
    """Return what was read from history as it is sent to those who missed it."""
    runs: list[Run] = []
    frames: list[bytes] = []
    for publication in publications:
        if publication.exclude or publication.reply:
            if frames:
                runs.append(_MarkedRun(tuple(frames), "", "", is_recovered=True))
                frames = []
            frame = publication.frame
            runs.append(_MarkedRun((frame,), publication.exclude, publication.reply, is_recovered=True))
        else:
            frames.append(publication.frame)
    if frames:
        runs.append(_MarkedRun(tuple(frames), "", "", is_recovered=True))
    return runs


class Track:
    """The place in a channel up to which everything has been sent."""

    __slots__ = ("_at", "_from_history", "_position")

    def __init__(self, position: Position) -> None:
        self._position: Position | None = position
        # The same, as it stands in payloads; of the start, which has no epoch yet, what cannot stand there.
        self._at = b" " if position.is_start else str(position).encode()
        # Offset -> tag of what was sent from history and may still come live: the two travel on different links.
        self._from_history: dict[int, str] | None = None

    @property
    def position(self) -> Position:
        if self._position is None:
            self._position = Position.parse(self._at.decode())
        return self._position

    def step(self, payload: bytes) -> bytes:
        """Advance over one that is exactly the next and for everybody, and return its frame; else b""."""
        header, newline, frame = payload.partition(b"\n")
        try:
            previous, position, end = header.split(b" ", 2)
        except ValueError:
            return b""
        if previous != self._at or end != b" " or not newline:
            return b""
        self._at, self._position, self._from_history = position, None, None
        return frame

    def advance(self, payloads: Sequence[bytes]) -> tuple[list[Run], bool]:
        """Advance over those that are exactly the next; what was sent from history already is left out.

        Returns:
            What is to be sent; and False if history must be asked, because one is neither. Those after it are not
            looked at.

        Raises:
            ValueError: one is not ours. Nothing was advanced over.
        """
        runs: list[Run] = []
        frames: list[bytes] = []
        at, is_whole = self._at, True
        for payload in payloads:
            previous, position, exclude, reply, frame = split(payload)
            if previous != at:
                publication = decode(payload)
                place = self.position if at is self._at else Position.parse(at.decode())
                if not publication.follows(place):
                    if publication.position == place or (at is self._at and self._is_from_history(publication)):
                        continue
                    is_whole = False
                    break
            at = position
            if not exclude and not reply:
                frames.append(frame)
            else:
                if frames:
                    runs.append(Run(tuple(frames)))
                    frames = []
                runs.append(_MarkedRun((frame,), exclude.decode(), reply.decode(), is_recovered=False))
        if frames:
            runs.append(Run(tuple(frames)))
        if at is not self._at:
            self._at, self._position, self._from_history = at, None, None
        return runs, is_whole

    def _is_from_history(self, publication: Publication) -> bool:
        own = publication.position
        return (
            self._from_history is not None
            and own.epoch == self.position.epoch
            and self._from_history.get(own.offset) == own.tag
        )

    def move(self, outcome: CatchUp) -> None:
        """Take over what history told."""
        self._position, self._at = outcome.position, str(outcome.position).encode()
        if outcome.lost is not None:
            self._from_history = None
        elif outcome.publications:
            told = {item.position.offset: item.position.tag for item in outcome.publications}
            self._from_history = {**(self._from_history or {}), **told}


class Subscription:
    """One connection on one channel.

    While it is live its position is the channel's track; `position` is then where it went live.

    Args:
        channel: its name
        connection: whose `exclude` counts
        send_queue: where its frames go
        position: the last one the client received, or None
        is_announced: whether `subscribed` is sent when it begins (not for a connection's own channels, unless asked)
        is_fresh: the channel cannot have been published to yet, so there is no history to ask
        on_reply: called with the connection and `Publication.reply` of each publication that is part of an answer
        on_begin: called when `subscribed` is sent; returns who is on a presence channel, user -> info
        settled: is set to whether it succeeded, when it is live for the first time or given up
    """

    __slots__ = (
        "channel",
        "connection",
        "has_begun",
        "is_announced",
        "is_fresh",
        "is_held",
        "is_open",
        "joined_at",
        "on_begin",
        "on_reply",
        "position",
        "send_queue",
        "settled",
        "since",
    )

    def __init__(
        self,
        channel: Channel,
        connection: ConnectionId,
        send_queue: SendQueue,
        position: Position | None,
        *,
        is_announced: bool = True,
        is_fresh: bool = False,
        settled: "asyncio.Future[bool] | None" = None,
        on_reply: Callable[[ConnectionId, str], None] | None = None,
    ) -> None:
        self.channel = channel
        self.connection = connection
        self.send_queue = send_queue
        self.position = position
        self.is_announced = is_announced
        self.is_fresh = is_fresh
        self.settled = settled
        self.on_reply = on_reply
        self.on_begin: Callable[[], Mapping[str, bytes]] | None = None
        self.since = position  # everything after it is told; moves where continuity was lost
        self.joined_at: Position | None = None  # where it became live for the first time: up to there history told
        self.has_begun = False
        self.is_open = True
        self.is_held = False  # the hub waits for its client to read before it is sent more of history

    def settle(self, succeeded: bool) -> None:
        """Tell whoever waits for the subscription, once."""
        settled, self.settled = self.settled, None
        if settled is not None and not settled.done():
            settled.set_result(succeeded)
