"""`catch_up` and `Track`: by table for each reason, and by hypothesis against a channel that does its worst."""

import asyncio
import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.model import START_TAG, Channel, ConnectionId, HistoryPage, Position, Publication
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import CatchUp, GapReason, Subscription, Track, catch_up
from tests.realtime.timeline import Entry, Timeline


def at(offset: int, epoch: str = "e", branch: str = "a") -> Position:
    """A position on one of the branches of an epoch; branches meet nowhere but at their start."""
    return Position(epoch, offset, START_TAG if offset == 0 else f"{branch}{offset}")


def publication(offset: int, *, epoch: str = "e", branch: str = "a", is_kept: bool = True) -> Publication:
    position = at(offset, epoch, branch)
    return Publication(position, at(offset - 1, epoch, branch), "", b"frame" if is_kept else b"")


def page(first: int, last: int, top: int | None = None, *, branch: str = "a", unkept: int = 0) -> HistoryPage:
    """History that holds `first` to `last`; complete if nothing newer exists."""
    entries = tuple(publication(n, branch=branch, is_kept=n != unkept) for n in range(first, last + 1))
    top = last if top is None else top
    return HistoryPage(top=at(top, branch=branch), publications=entries, is_complete=last >= top or not entries)


EMPTY = HistoryPage(top=at(0), publications=(), is_complete=True)
ALL_TRIMMED = HistoryPage(top=at(9), publications=(), is_complete=True)


@pytest.mark.parametrize(
    ("position", "history", "sent", "ends_at"),
    [
        pytest.param(None, page(1, 5), [], at(5), id="begins now"),
        pytest.param(None, EMPTY, [], at(0), id="begins now, nothing was published yet"),
        pytest.param(at(5), page(1, 5), [], at(5), id="is up to date"),
        pytest.param(at(9), ALL_TRIMMED, [], at(9), id="is up to date, history is gone"),
        pytest.param(at(0), EMPTY, [], at(0), id="at the start, nothing was published yet"),
        pytest.param(at(0), page(1, 3), [1, 2, 3], at(3), id="from the start"),
        pytest.param(at(3), page(1, 5), [4, 5], at(5), id="missed two, history holds more"),
        pytest.param(at(3), page(4, 5), [4, 5], at(5), id="missed two, history holds no more"),
        pytest.param(at(3), page(4, 6, top=9), [4, 5, 6], at(6), id="the page ends before the top"),
        pytest.param(at(3), page(1, 2, top=9), [], at(3), id="the page ends before the position"),
        pytest.param(at(3), page(1, 3, top=9), [], at(3), id="the page ends at the position"),
        pytest.param(at(3), page(1, 5, unkept=2), [4, 5], at(5), id="an unkept one before the position is no matter"),
        pytest.param(Position.start(), page(1, 2), [1, 2], at(2), id="from the start of whichever epoch"),
        pytest.param(Position.start(), EMPTY, [], at(0), id="the start of whichever epoch, empty"),
    ],
)
def test_what_was_missed_is_all_told(
    position: Position | None, history: HistoryPage, sent: list[int], ends_at: Position
) -> None:
    outcome = catch_up(position, history)
    assert outcome.lost is None
    assert [item.position.offset for item in outcome.publications] == sent
    assert outcome.position == ends_at


@pytest.mark.parametrize(
    ("position", "history", "reason"),
    [
        pytest.param(at(3, epoch="old"), page(1, 5), GapReason.EPOCH, id="another epoch, same offsets"),
        pytest.param(at(9, epoch="old"), page(1, 5), GapReason.EPOCH, id="another epoch, ahead"),
        pytest.param(at(0, epoch="old"), EMPTY, GapReason.EPOCH, id="another epoch, both at the start"),
        pytest.param(at(6), page(1, 5), GapReason.AHEAD, id="one ahead of the top"),
        pytest.param(at(1), EMPTY, GapReason.AHEAD, id="ahead of an empty channel"),
        pytest.param(at(5, branch="b"), page(1, 5), GapReason.FORKED, id="same offset as the top, another tag"),
        pytest.param(at(3, branch="b"), page(1, 5), GapReason.FORKED, id="another tag, inside history"),
        pytest.param(at(3, branch="b"), page(4, 5), GapReason.FORKED, id="another tag, its own entry is trimmed"),
        pytest.param(
            at(3, branch="b"), page(1, 4, top=9), GapReason.FORKED, id="another tag, the page is not the last"
        ),
        pytest.param(at(3), page(5, 9), GapReason.TRIMMED, id="the next one is trimmed"),
        pytest.param(
            at(3), page(5, 6, top=9), GapReason.TRIMMED, id="the next one is trimmed, the page is not the last"
        ),
        pytest.param(at(3), ALL_TRIMMED, GapReason.TRIMMED, id="all of history is gone"),
        pytest.param(at(3), page(1, 5, unkept=4), GapReason.TRIMMED, id="the next one was not kept"),
        pytest.param(at(3), page(1, 5, unkept=5), GapReason.TRIMMED, id="a later one was not kept"),
        pytest.param(Position.start(), page(2, 5), GapReason.TRIMMED, id="the first one is trimmed"),
    ],
)
def test_what_cannot_be_shown_complete_is_lost(position: Position, history: HistoryPage, reason: GapReason) -> None:
    assert catch_up(position, history) == CatchUp(history.top, (), reason)


def test_a_page_with_a_hole_is_never_passed_on() -> None:
    holed = HistoryPage(top=at(6), publications=(publication(4), publication(6)), is_complete=True)
    assert catch_up(at(3), holed).lost is GapReason.TRIMMED


def test_history_that_ends_before_the_top_though_complete_is_lost() -> None:
    short = HistoryPage(top=at(6), publications=(publication(4), publication(5)), is_complete=True)
    assert catch_up(at(3), short).lost is GapReason.TRIMMED


NEXT, KNOWN, BROKEN = "exactly the next one: sent", "sent before", "anything else: history must be asked"


def payload_of(item: Publication) -> bytes:
    return f"{item.previous} {item.position} {item.exclude} {item.reply}\n".encode() + item.frame


def offer(track: Track, item: Publication) -> str:
    runs, is_whole = track.advance([payload_of(item)])
    assert [frame for run in runs for frame in run.frames] == ([item.frame] if runs else [])
    return NEXT if runs else KNOWN if is_whole else BROKEN


@pytest.mark.parametrize(
    ("position", "offered", "verdict"),
    [
        pytest.param(at(3), publication(4), NEXT, id="the next"),
        pytest.param(at(0), publication(1), NEXT, id="the first"),
        pytest.param(Position.start(), publication(1, epoch="any"), NEXT, id="the first of whichever epoch"),
        pytest.param(at(3), publication(4, is_kept=False), NEXT, id="the next, not kept"),
        pytest.param(at(3), publication(3), KNOWN, id="the same again"),
        pytest.param(at(3), publication(3, branch="b"), BROKEN, id="the same offset of another branch"),
        pytest.param(at(3), publication(4, branch="b"), BROKEN, id="the next of another branch"),
        pytest.param(at(3), publication(4, epoch="new"), BROKEN, id="the next offset of another epoch"),
        pytest.param(at(3), publication(1, epoch="new"), BROKEN, id="the first of another epoch"),
        pytest.param(at(3), publication(5), BROKEN, id="one was skipped"),
        pytest.param(at(3), publication(2), BROKEN, id="an older one"),
        pytest.param(Position.start(), publication(2), BROKEN, id="not the first"),
    ],
)
def test_a_track_takes_only_the_next(position: Position, offered: Publication, verdict: str) -> None:
    track = Track(position)
    assert offer(track, offered) is verdict
    assert track.position == (offered.position if verdict is NEXT else position)
    track = Track(position)
    can_step = verdict is NEXT and not position.is_start
    assert track.step(payload_of(offered)) == (offered.frame if can_step else b"")
    assert track.position == (offered.position if can_step else position)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"e.3.t3 e.4.t4 abc \n{}", id="excludes somebody"),
        pytest.param(b"e.3.t3 e.4.t4  r:1\n{}", id="is part of an answer"),
        pytest.param(b"e.3.t3 e.4.t4 \n{}  \n", id="a field too few"),
        pytest.param(b"e.3.t3 e.4.t4   \n{}", id="a field too many"),
        pytest.param(b"e.3.t3 e.4.t4  ", id="no frame"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_track_steps_over_nothing_that_is_not_for_everybody(payload: bytes) -> None:
    track = Track(Position("e", 3, "t3"))
    assert track.step(payload) == b""
    assert track.position == Position("e", 3, "t3")
    assert track.step(b"e.3.t3 e.4.t4  \n{}") == b"{}"


def test_what_history_told_is_known_when_it_comes_live() -> None:
    track = Track(at(3))
    track.move(catch_up(at(3), page(4, 6)))
    assert [offer(track, publication(n)) for n in (4, 5, 6, 7)] == [KNOWN, KNOWN, KNOWN, NEXT]


def test_what_history_told_is_known_by_tag_not_by_offset() -> None:
    track = Track(at(3))
    track.move(catch_up(at(3), page(4, 6)))
    assert offer(track, publication(5, branch="b")) is BROKEN


def test_after_a_loss_nothing_older_is_taken_for_known() -> None:
    track = Track(at(3))
    track.move(catch_up(at(3), page(4, 6)))
    track.move(CatchUp(at(9, epoch="new"), (), GapReason.EPOCH))
    assert offer(track, publication(5)) is BROKEN
    assert offer(track, publication(5, epoch="new")) is BROKEN


@pytest.mark.anyio
async def test_a_subscription_settles_once() -> None:
    settled = asyncio.get_running_loop().create_future()
    subscription = Subscription(Channel("c"), ConnectionId("x"), SendQueue(1_024, 1_024), None, settled=settled)
    subscription.settle(True)
    subscription.settle(False)
    assert await settled is True


# By hypothesis. Every publication knows which one it followed, and so does `Timeline`, which judges.


@dataclass
class ModelChannel:
    """A channel as a broker keeps it, and all the harm a broker can do."""

    size: int
    epoch: str = "e0"
    top: Position = field(default_factory=lambda: at(0, "e0"))
    entries: list[Publication] = field(default_factory=list)

    def read(self, since: int, length: int) -> HistoryPage:
        newer = [entry for entry in self.entries if entry.position.offset > since]
        found = tuple(newer[:length])
        end = found[-1].position.offset if found else self.top.offset
        return HistoryPage(top=self.top, publications=found, is_complete=end == self.top.offset)


class World:
    """A model channel, its truth, and every position that a client may hold."""

    def __init__(self, size: int) -> None:
        self.channel = ModelChannel(size)
        self.timeline = Timeline(size)
        self.given = [self.channel.top]
        self.published: list[Publication] = []
        self.saved = copy.deepcopy(self.channel)
        self._count = 0

    def publish(self, is_kept: bool) -> None:
        self._count += 1
        channel, previous = self.channel, self.channel.top
        channel.top = Position(channel.epoch, previous.offset + 1, f"t{self._count}")
        live = Publication(channel.top, previous, "", b"%d" % self._count)
        kept = live if is_kept else Publication(channel.top, previous, "", b"")
        channel.entries = [*channel.entries, kept][-channel.size :]
        self.timeline.add(Entry(channel.top, previous, self._count, is_kept, ""))
        self.given.append(channel.top)
        self.published.append(live)

    def apply(self, step: str) -> None:
        match step:
            case "publish":
                self.publish(True)
            case "publish unkept":
                self.publish(False)
            case "lose":
                self._count += 1
                self.channel = ModelChannel(self.channel.size, f"e{self._count}", at(0, f"e{self._count}"))
                self.given.append(self.channel.top)
            case "save":
                self.saved = copy.deepcopy(self.channel)
            case "roll back":
                self.channel = copy.deepcopy(self.saved)
                self.timeline.was_rolled_back = True


STEPS = ["publish"] * 6 + ["publish unkept", "lose", "save", "roll back"]
HISTORIES = st.lists(st.sampled_from(STEPS), max_size=40)


@given(HISTORIES, st.integers(1, 12), st.data())
@settings(deadline=None)
def test_whoever_comes_back_gets_exactly_what_was_missed_or_is_told(
    steps: list[str], size: int, data: st.DataObject
) -> None:
    world = World(size)
    for step in steps:
        world.apply(step)
    position = start = data.draw(st.sampled_from(world.given), "position")
    received: list[Publication] = []
    while True:
        since = data.draw(st.integers(0, position.offset), "since")
        history = world.channel.read(since, data.draw(st.integers(1, 20), "length"))
        outcome = catch_up(position, history)
        if outcome.lost is not None:
            assert outcome.position == world.channel.top
            assert not outcome.publications
            assert world.timeline.may_be_told(position, outcome.position)
            assert (outcome.lost is GapReason.EPOCH) == (position.epoch != world.channel.epoch)
            assert (outcome.lost is GapReason.AHEAD) == (
                position.epoch == world.channel.epoch and position.offset > world.channel.top.offset
            )
            break
        received += outcome.publications
        position = outcome.position
        missed = world.timeline.between(start, position)
        assert missed is not None
        assert [int(item.frame) for item in received] == [entry.data for entry in missed]
        if history.is_complete:
            assert position == world.channel.top
            break


@given(HISTORIES, st.integers(1, 12), st.data())
@settings(deadline=None)
def test_a_track_over_a_bad_link_sends_everything_once_or_tells(
    steps: list[str], size: int, data: st.DataObject
) -> None:
    """The link drops, repeats and delays; history is read whenever the track meets anything but the next."""
    world = World(size)
    track, sent_at = Track(world.channel.top), world.channel.top
    flying: list[Publication] = []

    def send(item: Publication) -> None:
        nonlocal sent_at
        assert world.timeline.entry(item.position).previous == sent_at
        assert item.frame
        sent_at = item.position

    def read() -> None:
        nonlocal sent_at
        outcome = catch_up(track.position, world.channel.read(track.position.offset, 1_000))
        for item in outcome.publications:
            send(item)
        if outcome.lost is not None:
            assert world.timeline.may_be_told(sent_at, outcome.position)
            sent_at = outcome.position
        track.move(outcome)

    for step in steps:
        before = len(world.published)
        world.apply(step)
        flying += world.published[before:]
        match data.draw(st.sampled_from(["wait", "arrive", "arrive twice", "drop", "read"]), "link"):
            case "arrive" | "arrive twice" as how:
                arriving, flying = flying, []
                for item in arriving * (2 if how == "arrive twice" else 1):
                    verdict = offer(track, item)
                    if verdict is NEXT:
                        send(item)
                    elif verdict is BROKEN:
                        read()
            case "drop":
                flying = []
            case "read":
                read()
    read()
    assert sent_at == world.channel.top == track.position
