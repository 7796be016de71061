"""Cursors: several positions in one text that an SSE id, a header and a query can carry."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_mw.model import Position
from pubsub_mw.protocol import gap, message_head, message_tail
from pubsub_mw.realtime.cursor import Cursor

NAMES = st.text("ABCxyz019_.,:;=@/-", min_size=1, max_size=200)
WORDS = st.text("ABCxyz019_-", min_size=1, max_size=32)
POSITIONS = st.builds(Position, WORDS, st.integers(0, 9_999_999_999_999_999), WORDS)


@given(st.dictionaries(NAMES, POSITIONS, max_size=130), NAMES)
def test_what_was_noted_is_read_back(places: dict[str, Position], first: str) -> None:
    cursor = Cursor(first)
    for name, position in places.items():
        cursor.move(name, str(position))
    text = str(cursor)
    assert re.fullmatch(r"[A-Za-z0-9.:_-]*", text)
    again = Cursor.parse(text, first) if text else Cursor(first)
    assert {name: again.at(name) for name in places} == {name: str(position) for name, position in places.items()}
    assert again.at("another") is None
    assert str(again) == text


@given(POSITIONS)
def test_of_the_one_channel_asked_for_it_is_the_position(position: Position) -> None:
    cursor = Cursor("room")
    cursor.move("room", str(position))
    assert str(cursor) == str(position)
    # Asked again with more channels behind it, it still counts for that one.
    assert Cursor.parse(str(position), "room").at("room") == str(position)


def test_of_another_one_it_says_which() -> None:
    cursor = Cursor("room")
    cursor.move("#connection-1", "e.1.t")
    assert Cursor.parse(str(cursor), "room").at("#connection-1") == "e.1.t"
    assert Cursor.parse(str(cursor), "room").at("room") is None


@pytest.mark.parametrize("text", ["", "x", "a.1", "e.1.t:", ":", "12345678.e.1.t", "é.1.t", "e.1.t\n", "e.1.t e.1.t"])
def test_anything_else_is_none(text: str) -> None:
    if text == "12345678.e.1.t":
        text += "!"
    with pytest.raises(ValueError, match="is not a position"):
        Cursor.parse(text, "room")


def test_it_follows_what_is_sent() -> None:
    cursor = Cursor("a")
    cursor.follow(gap("a", Position("e", 5, "t"), "trimmed"), "#connection-1")
    cursor.follow(message_head("b", "message", b'{"position":"x.1.y"}') + b"f.1.t" + message_tail, "#connection-1")
    cursor.follow(
        b'{"type":"response","id":"1","status":200,"headers":{},"body":"","position":"g.2.t"}', "#connection-1"
    )
    cursor.follow(b'{"type":"ping"}', "#connection-1")
    assert [cursor.at(name) for name in ("a", "b", "#connection-1")] == ["e.5.t", "f.1.t", "g.2.t"]


def subscribed_frame(recovered: bool | None, **fields: object) -> bytes:
    position = "e.5.t"
    frame = {"type": "subscribed", "channel": "a", "position": position, "recovered": recovered, **fields}
    return json.dumps(frame).encode()


def test_a_poller_is_told_what_it_does_not_know() -> None:
    cursor = Cursor("a")
    assert cursor.follow(subscribed_frame(None), "")
    assert not cursor.follow(subscribed_frame(True), "")
    assert cursor.follow(subscribed_frame(False), "")
    assert not cursor.follow(b'{"type":"ping"}', "")
    error = b'{"type":"error","code":"forbidden","message":"no","channel":"b"}'
    assert [cursor.follow(error, "") for _ in range(2)] == [True, False]
    again = Cursor.parse(str(cursor), "a")
    assert not again.follow(error, "")
    assert again.at("b") is None


@pytest.mark.parametrize("code", ["forbidden", "unavailable", "busy", "grant_expired"])
@pytest.mark.parametrize("members", [{}, {"members": []}, {"members": [{"user": "ann", "info": None}]}])
def test_a_refusal_is_told_once_and_leaves_the_place_where_it_was(code: str, members: dict[str, object]) -> None:
    error = json.dumps({"type": "error", "code": code, "message": "no", "channel": "a"}).encode()
    cursor = Cursor("a")
    for recovered in (None, True):
        assert cursor.follow(subscribed_frame(recovered, **members), "")
        for is_news in (True, False, False):
            assert cursor.follow(error, "") == is_news
            cursor = Cursor.parse(str(cursor), "a")
            assert cursor.at("a") == "e.5.t"


def test_members_are_told_when_they_are_others_whatever_their_order() -> None:
    ann, bob = {"user": "ann", "info": {"x": 1, "y": 2}}, {"user": "bob", "info": None}
    cursor = Cursor("a")
    assert cursor.follow(subscribed_frame(None, members=[ann, bob]), "")
    cursor = Cursor.parse(str(cursor), "a")
    assert not cursor.follow(subscribed_frame(True, members=[bob, {"info": {"y": 2, "x": 1}, "user": "ann"}]), "")
    assert cursor.follow(subscribed_frame(True, members=[ann]), "")
    assert cursor.follow(json.dumps({"type": "join", "channel": "a", "member": bob}).encode(), "")
    assert not cursor.follow(subscribed_frame(True, members=[ann, bob]), "")
    assert cursor.follow(json.dumps({"type": "leave", "channel": "a", "member": ann}).encode(), "")
    assert not cursor.follow(subscribed_frame(True, members=[bob]), "")
