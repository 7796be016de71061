"""A window answers for every position in it, and for none beyond."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from pubsub_mw.model import Position, Publication
from pubsub_mw.realtime.window import Window


def at(offset: int, branch: str = "t") -> Position:
    return Position("e", offset, f"{branch}{offset}")


def publication(offset: int, *, branch: str = "t", exclude: str = "", reply: str = "", size: int = 10) -> Publication:
    frame = b"%0*d" % (size, offset) if size else b""
    return Publication(at(offset, branch), at(offset - 1, branch), exclude, frame, reply)


def told(window: Window, position: Position) -> list[int] | None:
    runs = window.after(position)
    return None if runs is None else [int(frame) for run in runs for frame in run.frames]


def test_whoever_is_in_the_window_gets_what_follows_and_others_are_sent_away() -> None:
    window = Window(at(3), 1_000)
    window.extend([publication(4), publication(5), publication(6)])
    assert window.top == at(6)
    assert [told(window, at(offset)) for offset in (3, 4, 5, 6)] == [[4, 5, 6], [5, 6], [6], []]
    for position in (at(2), at(7), at(4, "other"), Position("f", 4, "t4"), Position.start()):
        assert told(window, position) is None


def test_those_at_one_place_get_the_same_batches() -> None:
    window = Window(at(3), 1_000)
    window.extend([publication(4), publication(5)])
    first, again = window.after(at(3)), window.after(at(3))
    assert first
    assert again == first
    window.extend([publication(6)])
    assert told(window, at(3)) == [4, 5, 6]


def test_only_what_follows_is_appended() -> None:
    window = Window(at(3), 1_000)
    window.extend([publication(3), publication(4), publication(4), publication(6), publication(5, branch="other")])
    assert window.top == at(4)
    assert told(window, at(3)) == [4]


def test_what_was_not_kept_is_not_told_from_here() -> None:
    window = Window(at(3), 1_000)
    window.extend([publication(4), publication(5, size=0), publication(6)])
    assert [told(window, at(offset)) for offset in (3, 4, 5)] == [None, None, [6]]


def test_what_changes_how_much_is_kept_ends_the_window() -> None:
    window = Window(at(3), 1_000)
    own = dataclasses.replace(publication(5), has_own_history=True)
    window.extend([publication(4)], are_live=True)
    window.extend([own, publication(6)], are_live=True)
    assert window.top == at(4)
    window.extend([own, publication(6)])
    assert window.top == at(6)


def test_what_is_meant_for_some_only_stays_so() -> None:
    window = Window(at(0), 1_000)
    window.extend([publication(1), publication(2, exclude="c1"), publication(3, reply=".7"), publication(4)])
    runs = window.after(at(0))
    assert runs is not None
    assert [(len(run.frames), run.exclude, run.reply) for run in runs] == [
        (1, "", ""), (1, "c1", ""), (1, "", ".7"), (1, "", ""),
    ]  # fmt: skip
    assert all(run.is_recovered for run in runs)


@given(st.lists(st.integers(0, 40), max_size=60))
def test_it_holds_no_more_than_its_bound_and_answers_rightly_for_all_that_it_holds(sizes: list[int]) -> None:
    window = Window(at(0), 100)
    publications = [publication(offset, size=size) for offset, size in enumerate(sizes, 1)]
    for offset, item in enumerate(publications, 1):
        window.extend([item])
        for place in range(offset + 1):
            missed = publications[place:offset]
            is_held = sum(len(one.frame) for one in missed) <= 100 and all(one.frame for one in missed)
            assert told(window, at(place)) == ([one.position.offset for one in missed] if is_held else None)
