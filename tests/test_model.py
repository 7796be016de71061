"""The values that travel: names of channels, positions, patterns, handshakes."""

import string
import time
from dataclasses import FrozenInstanceError
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.errors import ChannelError
from pubsub_mw.model import (
    ConnectionId,
    Handshake,
    Position,
    Publication,
    channel_of_connection,
    channel_of_user,
    check_channel,
    check_subscribable,
    compile_patterns,
    is_presence,
    is_protected,
)

ALLOWED = string.ascii_letters + string.digits + "_.,:;=@/-"

names = st.text(ALLOWED, min_size=1, max_size=200)
nearly_names = st.one_of(
    st.text(max_size=210),
    st.text(ALLOWED + "#{}*?[]\\ \n\r\0é", max_size=210),
    names.map(lambda name: name + "\n"),
    names.map(lambda name: "#connection-" + name),
    names.map(lambda name: "#user-" + name),
    names.map(lambda name: "#" + name),
)


def may_be_published_to(text: str) -> bool:
    """The rule of the documentation, written a second time."""
    for own in ("#connection-", "#user-"):
        if text.startswith(own):
            return len(text) <= 200 and len(text) > len(own) and set(text[len(own) :]) <= set(ALLOWED)
    return 1 <= len(text) <= 200 and set(text) <= set(ALLOWED)


@settings(deadline=None, max_examples=300)
@given(nearly_names)
def test_only_documented_names_are_channels(text: str) -> None:
    if may_be_published_to(text):
        assert check_channel(text) == text
    else:
        with pytest.raises(ChannelError) as caught:
            check_channel(text)
        assert caught.value.channel == text


@settings(deadline=None)
@given(nearly_names)
def test_clients_may_ask_for_every_channel_but_reserved_ones(text: str) -> None:
    if may_be_published_to(text) and not text.startswith("#"):
        assert check_subscribable(text) == text
    else:
        with pytest.raises(ChannelError):
            check_subscribable(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 201,
        "a b",
        "a\n",
        "a\r\nb",
        "a\0",
        "{a}",
        "}",
        "a*",
        "a?",
        "[a]",
        "é",
        "\ud800",
        "\u0663",
        "#",
        "#connection-",
        "#user-",
        "#admin",
        "#Connection-1",
        "#user-a b",
        "#user-" + "a" * 195,
        "#user-#user-1",
        "\\",
        "%2e",
        "a|b",
    ],
)
def test_hostile_names_are_refused(text: str) -> None:
    with pytest.raises(ChannelError):
        check_channel(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("#admin", "only #connection-<id> and #user-<id>"),
        ("#users-1", "only #connection-<id> and #user-<id>"),
        ("#connection-a b", "names no connection: its id is 1 to 188 of A-Z"),
        ("#connection-" + "a" * 189, "names no connection: its id is 1 to 188 of A-Z"),
        ("#user-", "names no user: its id is 1 to 194 of A-Z"),
        ("#user-" + "a" * 195, "names no user: its id is 1 to 194 of A-Z"),
    ],
)
def test_what_is_wrong_with_an_own_channel_is_said(text: str, wanted: str) -> None:
    with pytest.raises(ChannelError, match=wanted):
        check_channel(text)
    for prefix, longest in (("#connection-", 188), ("#user-", 194)):
        assert check_channel(prefix + "a" * longest)


@pytest.mark.parametrize("value", [None, 5, b"room", ["room"], object()])
def test_a_name_is_a_string(value: object) -> None:
    with pytest.raises(ChannelError, match="a name is a string"):
        check_channel(value)  # type: ignore[arg-type]


def test_prefixes_say_who_may_listen() -> None:
    assert [is_protected(name) for name in ("room", "private-1", "presence-1", "a-private-1")] == [
        False,
        True,
        True,
        False,
    ]
    assert [is_presence(name) for name in ("private-1", "presence-1")] == [False, True]


def test_own_channels_are_named_after_connection_and_user() -> None:
    assert channel_of_connection(ConnectionId("c1")) == "#connection-c1"
    assert channel_of_user("7") == "#user-7"
    with pytest.raises(ChannelError):
        channel_of_user("a b")


marks = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=32)


@settings(deadline=None)
@given(marks, st.integers(0, 10**16 - 1), marks)
def test_a_position_survives_its_text(epoch: str, offset: int, tag: str) -> None:
    position = Position(epoch, offset, tag)
    assert str(position) == f"{epoch}.{offset}.{tag}"
    assert Position.parse(str(position)) == position


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.text("ab01.-_ \n\u0663", max_size=12)))
def test_text_is_a_position_only_if_it_is_exactly_its_text(text: str) -> None:
    try:
        position = Position.parse(text)
    except ValueError:
        return
    assert str(position) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a.1",
        "a.-1.b",
        "a.01.b",
        "a.+1.b",
        "a.1.b\n",
        " a.1.b",
        "a.1.b.c",
        "a.1e3.b",
        "a.\u0661.b",
        "é.1.b",
        ".0.0",
        "a." + "9" * 17 + ".b",
        "a" * 33 + ".1.b",
        "a.1." + "b" * 33,
        "a..b",
        "a.1.",
        "a.1 .b",
        "a.1_0.b",
        "\ud800.1.b",
        None,
        1,
        b"a.1.b",
        ["a.1.b"],
    ],
)
def test_what_no_server_made_is_no_position(text: object) -> None:
    with pytest.raises(ValueError, match="not a position"):
        Position.parse(text)  # type: ignore[arg-type]


def test_a_position_cannot_be_changed() -> None:
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        Position("e", 1, "t").offset = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("before", "follows"),
    [
        (Position("e", 4, "t4"), True),
        (Position("e", 4, "fork"), False),
        (Position("other", 4, "t4"), False),
        (Position("e", 3, "t4"), False),
        (Position("e", 5, "t4"), False),
        (Position("e", 6, "t4"), False),
        (Position.start(), False),
    ],
)
def test_a_publication_follows_the_one_position_before_it(before: Position, *, follows: bool) -> None:
    assert Publication(Position("e", 5, "t5"), Position("e", 4, "t4"), "", b"").follows(before) is follows


def test_the_first_publication_follows_the_start_whatever_the_epoch() -> None:
    assert Position.start().is_start
    assert not Position("e", 0, "0").is_start
    first = Publication(Position("e", 1, "t1"), Position("e", 0, "0"), "", b"")
    assert first.follows(Position.start())
    assert first.follows(Position("e", 0, "0"))
    assert not first.follows(Position("f", 0, "0"))


@pytest.mark.parametrize(
    ("patterns", "text", "matches"),
    [
        ((), "room", False),
        (("*",), "", True),
        (("*",), "a/b\nc", True),
        (("room:*",), "room:", True),
        (("room:*",), "room:1/2", True),
        (("room:*",), "a-room:1", False),
        (("room",), "rooms", False),
        (("room",), "room\n", False),
        (("*-x",), "a-x", True),
        (("*-x",), "a-x-y", False),
        (("*-x",), "a-x-x", True),
        (("a*b*c",), "abc", True),
        (("a*b*c",), "a-b-b-c-c", True),
        (("a*b*c",), "acb", False),
        (("a*a",), "a", False),
        (("**",), "anything", True),
        (("room.1",), "room-1", False),
        (("a|b",), "a", False),
        (("(a",), "(a", True),
        (("one", "two:*"), "two:3", True),
        (("one", "two:*"), "onetwo:3", False),
    ],
)
def test_patterns_match_a_text_as_a_whole(patterns: tuple[str, ...], text: str, *, matches: bool) -> None:
    assert compile_patterns(patterns)(text) is matches


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("ab*.", max_size=8), max_size=3), st.text("ab.", max_size=10))
def test_patterns_agree_with_globs_that_have_stars_alone(patterns: list[str], text: str) -> None:
    assert compile_patterns(patterns)(text) == any(fnmatchcase(text, pattern) for pattern in patterns)


def test_no_pattern_makes_a_long_name_slow() -> None:
    matches = compile_patterns(["*a*a*a*a*a*a*a*a*a*b"])
    began = time.process_time()
    assert not matches("a" * 200)
    assert time.process_time() - began < 0.5


HANDSHAKE = Handshake(
    headers=(("cookie", "session=canary"), ("x-a", "1"), ("x-a", "2")), scheme="https", address="192.0.2.1"
)


def test_a_handshake_gives_every_value_of_a_header() -> None:
    assert HANDSHAKE.all("x-a") == ["1", "2"]
    assert HANDSHAKE.all("x-b") == []


def test_a_handshake_never_shows_its_cookies() -> None:
    assert "canary" not in repr(HANDSHAKE)
    assert "canary" not in str(HANDSHAKE)


@pytest.mark.parametrize(
    ("scheme", "expected"), [("ws", "http"), ("http", "http"), ("wss", "https"), ("https", "https"), (None, "http")]
)
def test_a_handshake_is_read_from_a_scope(scheme: str | None, expected: str) -> None:
    scope = {"headers": [(b"X-Name", b"caf\xe9"), (b"x-name", b"2")], "client": ("192.0.2.1", 5), "scheme": scheme}
    handshake = Handshake.from_scope(scope)
    assert handshake.headers == (("x-name", "café"), ("x-name", "2"))
    assert (handshake.scheme, handshake.address) == (expected, "192.0.2.1")


def test_a_handshake_without_an_address_has_none() -> None:
    assert Handshake.from_scope({"headers": [], "client": None}).address == ""
