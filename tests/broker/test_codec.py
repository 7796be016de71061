"""A publication as bytes: it comes back as it was, and foreign bytes are refused."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.broker.codec import decode, encode, split
from pubsub_mw.model import Channel, Draft, Position, Publication

marks = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=32)
positions = st.builds(Position, marks, st.integers(1, 10**15), marks)
excluded = st.text(string.ascii_letters + string.digits + "_.,:;=@/-", max_size=180)


replies = st.sampled_from(["", "-", ".", ">h", ">7"])


def draft(head: bytes, tag: str, exclude: str, reply: str = "", *, has_own_history: bool = False) -> Draft:
    return Draft(
        channel=Channel("a"),
        tag=tag,
        head=head,
        exclude=exclude,
        idempotency_key="",
        history_size=1,
        is_kept=True,
        reply=reply,
        has_own_history=has_own_history,
    )


@settings(deadline=None)
@given(st.binary(), positions, positions, excluded, replies, st.booleans())
def test_a_publication_survives_its_bytes(
    head: bytes, position: Position, previous: Position, exclude: str, reply: str, has_own_history: bool
) -> None:
    frame = head + str(position).encode() + b'"}'
    item = draft(head, position.tag, exclude, reply, has_own_history=has_own_history)
    payload = encode(item, position, previous)
    assert decode(payload) == Publication(position, previous, exclude, frame, reply, has_own_history)
    assert split(payload) == (str(previous).encode(), str(position).encode(), exclude.encode(), reply.encode(), frame)


def test_a_publication_that_was_not_kept_has_an_empty_frame() -> None:
    payload = encode(draft(b"{", "t", "c1"), Position("e", 1, "t"), Position("e", 0, "0"))
    header = payload[: payload.index(b"\n") + 1]
    assert decode(header) == Publication(Position("e", 1, "t"), Position("e", 0, "0"), "c1", b"")


@settings(deadline=None, max_examples=500)
@given(
    st.one_of(
        st.binary(),
        st.lists(st.sampled_from([b"e.1.t", b" ", b"\n", b"0", b"{}", b"\xff", b"a.b", b"\0"]), max_size=8).map(
            b"".join
        ),
    )
)
def test_bytes_of_others_raise_nothing_but_a_value_error(payload: bytes) -> None:
    try:
        publication = decode(payload)
    except ValueError:
        return
    header, _, frame = payload.partition(b"\n")
    end = " h" if publication.has_own_history else ""
    assert header.decode() == (
        f"{publication.previous} {publication.position} {publication.exclude} {publication.reply}{end}"
    )
    assert publication.frame == frame


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\n",
        b"hello",
        b"e.0.0 e.1.t  ",
        b"e.0.0 e.1.t\n{}",
        b"e.0.0  e.1.t  \n{}",
        b"e.0.0 e.x.t  \n{}",
        b"e.x.0 e.1.t  \n{}",
        b"x" * 600 + b"\n{}",
        b"e.0.0 e.1.t c d e\n{}",
        b"e.0.0 e.1.t c d h h\n{}",
        b"\xc3\xa9.0.0 e.1.t  \n{}",
        b'{"json":1}',
        b"\x80\x04K\x01.",
    ],
)
def test_what_has_no_header_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a p"):
        decode(payload)
