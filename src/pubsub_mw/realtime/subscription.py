"""Decide what one connection gets of one channel: order, duplicates, gaps, recovery.

In:     a position, a page of history, live publications
Out:    what to send, and the position after it; or the reason why continuity is lost
Owns:   the rule: a publication is sent if it is exactly the next one, and otherwise history is asked
Never:  does I/O; guesses. What cannot be shown to be complete is reported as lost

`catch_up` is the whole of recovery. `Track` is the place in a channel that all of a process's live subscriptions
share: they have all been sent everything up to it, so one comparison per publication serves them all.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from pubsub_mw.model import Channel, ConnectionId, HistoryPage, Position, Publication
from pubsub_mw.realtime.send_queue import SendQueue

__all__ = ["CatchUp", "GapReason", "Next", "Subscription", "Track", "catch_up"]


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


class Next(Enum):
    """What a live publication is to a track."""

    NEXT = 1  # exactly the next one: send it
    KNOWN = 2  # it was sent already, from history
    BROKEN = 3  # anything else: history must be asked


class Track:
    """The place in a channel up to which everything has been sent."""

    __slots__ = ("_from_history", "position")

    def __init__(self, position: Position) -> None:
        self.position = position
        # Offset -> tag of what was sent from history and may still come live: the two travel on different links.
        self._from_history: dict[int, str] = {}

    def offer(self, publication: Publication) -> Next:
        """Advance over `publication` if it is exactly the next one."""
        if publication.follows(self.position):
            self.position = publication.position
            if self._from_history:
                self._from_history = {}
            return Next.NEXT
        own = publication.position
        if own == self.position:
            return Next.KNOWN
        if own.epoch == self.position.epoch and self._from_history.get(own.offset) == own.tag:
            return Next.KNOWN
        return Next.BROKEN

    def move(self, outcome: CatchUp) -> None:
        """Take over what history told."""
        self.position = outcome.position
        self._from_history |= {item.position.offset: item.position.tag for item in outcome.publications}
        if outcome.lost is not None:
            self._from_history = {}


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
        on_reply: called with `Publication.reply` of each publication that is part of an answer
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
        "registered_at",
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
        on_reply: Callable[[str], None] | None = None,
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
        self.registered_at = 0.0

    def settle(self, succeeded: bool) -> None:
        """Tell whoever waits for the subscription, once."""
        settled, self.settled = self.settled, None
        if settled is not None and not settled.done():
            settled.set_result(succeeded)
