"""What a client gets of what the application says."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_mw.model import Draft
from pubsub_mw.protocol import message_tail
from pubsub_mw.settings import Settings
from pubsub_mw.worker.answers import Answer
from tests.worker.requests import request

SETTINGS = Settings.build(environ={})
PLAIN = [("Content-Type", "text/plain")]


def answer(*, has_begun: bool = False) -> Answer:
    return Answer(request(id="r1"), SETTINGS, has_begun=has_begun)


def frame(draft: Draft) -> dict[str, Any]:
    """The frame of a draft, without what all have: the id, and the place of its position."""
    content: dict[str, Any] = json.loads(draft.head + b"0.0.0" + message_tail)
    assert content.pop("id") == "r1"
    assert content.pop("position") == "0.0.0"
    return content


def content_of(drafts: list[Draft]) -> bytes:
    """The body that a client makes of these frames."""
    found = b""
    for content in map(frame, drafts):
        text = content.get("body", "")
        found += base64.b64decode(text) if content.get("encoding") == "base64" else text.encode()
    return found


def types(drafts: list[Draft]) -> list[str]:
    return [frame(draft)["type"] for draft in drafts]


def keys(drafts: list[Draft]) -> list[str]:
    """The idempotency key of each, and which of its parts it is."""
    return [draft.idempotency_key + (f" {draft.part}" if draft.part else "") for draft in drafts]


def test_a_short_answer_is_one_frame_on_the_connections_own_channel() -> None:
    made = answer()
    made.head(201, PLAIN)
    (draft,) = made.whole("ä".encode())
    assert frame(draft) == {"type": "response", "status": 201, "headers": {"content-type": "text/plain"}, "body": "ä"}
    assert (draft.channel, draft.idempotency_key, draft.reply) == ("#connection-c1", "r:r1", ".r1")
    assert draft.history_size == SETTINGS.private_history_size
    assert made.is_complete


def test_bytes_that_are_no_text_come_as_base64() -> None:
    (draft,) = answer().whole(b"\xff\x00")
    assert frame(draft)["encoding"] == "base64"
    assert content_of([draft]) == b"\xff\x00"


def test_headers_that_are_not_on_the_list_stay_behind_and_repeated_ones_are_joined() -> None:
    made = answer()
    made.head(
        200,
        [
            ("Content-Type", "text/html"),
            ("Content-Length", "12"),
            ("Set-Cookie", "session=abc; HttpOnly"),
            ("set-cookie", "other=1"),
            ("X-Secret", "1"),
            ("Server", "gunicorn"),
            ("Link", "<a>"),
            ("link", "<b>"),
            ("Location", "/next"),
        ],
    )
    (draft,) = made.whole(b"")
    assert frame(draft)["headers"] == {"content-type": "text/html", "link": "<a>, <b>", "location": "/next"}


def test_a_cookie_that_is_dropped_is_logged_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    answer().head(200, [("Set-Cookie", "session=abc")])
    assert "set a cookie" in caplog.text
    assert "abc" not in caplog.text


def test_a_stream_is_a_start_numbered_chunks_and_an_end() -> None:
    made = answer()
    made.head(200, PLAIN)
    drafts = [*made.chunk(b"a"), *made.chunk(b"b"), *made.chunk(b"c"), *made.end(None)]
    assert types(drafts) == ["response_start", "response_chunk", "response_chunk", "response_chunk", "response_end"]
    assert keys(drafts) == ["r:r1", "c:r1 1", "c:r1 2", "c:r1 3", "e:r1"]
    assert [draft.reply[0] for draft in drafts] == [">", "-", "-", "-", "."]
    assert content_of(drafts) == b"abc"


def test_an_iterator_with_one_chunk_is_one_frame() -> None:
    made = answer()
    made.head(200, PLAIN)
    assert made.chunk(b"a") == []
    assert types(made.end(None)) == ["response"]


def test_a_first_chunk_that_waits_goes_out_when_it_has_waited_long_enough() -> None:
    made = answer()
    made.head(200, PLAIN)
    made.chunk(b"a")
    assert types(made.start()) == ["response_start", "response_chunk"]
    assert made.start() == []
    assert types(made.end(None)) == ["response_end"]


def test_a_problem_before_anything_went_out_is_an_error_of_the_server() -> None:
    made = answer()
    made.head(200, [("location", "/")])
    made.chunk(b"half")
    (draft,) = made.end("the application failed")
    assert frame(draft)["status"] == 500
    assert frame(draft)["headers"] == {"content-type": "text/plain; charset=utf-8"}
    assert content_of([draft]) == b"Internal Server Error\n"


def test_a_problem_in_the_middle_breaks_the_stream_off() -> None:
    made = answer()
    made.head(200, PLAIN)
    drafts = [*made.chunk(b"a"), *made.start(), *made.end("the application failed")]
    assert frame(drafts[-1]) == {"type": "response_end", "error": "the application failed"}


def test_after_the_end_nothing_comes() -> None:
    made = answer()
    made.whole(b"")
    assert made.end("too late") == made.start() == []


@pytest.mark.parametrize("size", [(1 << 16) + 1, 200_001])
@pytest.mark.parametrize("letter", [b"a", b"\xff", "ä".encode()])
def test_a_long_answer_comes_in_chunks_and_is_the_same(size: int, letter: bytes) -> None:
    content = (letter * size)[:size]
    drafts = answer().whole(content)
    assert types(drafts) == ["response_start", *["response_chunk"] * -(-size // (1 << 16)), "response_end"]
    assert content_of(drafts) == content


def test_a_single_long_chunk_comes_once() -> None:
    made = answer()
    made.head(200, PLAIN)
    content = b"a" * 100_000
    assert made.chunk(content) == []
    assert content_of(made.end(None)) == content


# Run again, after a first run had begun to publish.


def test_a_stream_that_is_run_again_says_the_same_under_the_same_keys_but_for_the_begin() -> None:
    first, second = answer(), answer(has_begun=True)
    for made in (first, second):
        made.head(200, PLAIN)
    begun = [*first.chunk(b"a"), *first.chunk(b"b")]
    again = [*second.chunk(b"a"), *second.chunk(b"b"), *second.chunk(b"c"), *second.end(None)]
    assert keys(begun) == ["r:r1", *keys(again)[:2]]
    assert keys(again) == ["c:r1 1", "c:r1 2", "c:r1 3", "e:r1"]


def test_a_short_answer_to_what_had_begun_to_stream_ends_the_stream() -> None:
    drafts = answer(has_begun=True).whole(b"a")
    assert types(drafts) == ["response_chunk", "response_end"]
    assert keys(drafts) == ["c:r1 1", "e:r1"]


def test_a_refusal_of_what_had_begun_to_stream_breaks_it_off() -> None:
    (draft,) = answer(has_begun=True).refuse(504, "Gateway Timeout")
    assert frame(draft) == {"type": "response_end", "error": "Gateway Timeout"}


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=200_000), max_size=5),
    starts=st.sets(st.integers(0, 5)),
)
def test_any_chunks_make_up_the_same_body_under_keys_that_never_repeat(chunks: list[bytes], starts: set[int]) -> None:
    made = answer()
    made.head(200, PLAIN)
    drafts: list[Draft] = []
    for number, chunk in enumerate(chunks):
        drafts += made.chunk(chunk)
        drafts += made.start() if number in starts else []
    drafts += made.end(None)
    assert content_of(drafts) == b"".join(chunks)
    assert len(set(keys(drafts))) == len(drafts)
    assert [draft.reply[0] for draft in drafts].count(".") == 1
    assert drafts[0].idempotency_key == "r:r1"
