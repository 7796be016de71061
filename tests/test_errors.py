"""The table of codes: its ranges, its golden copy, and exceptions that keep their facts."""

import json
from pathlib import Path

import pytest

from pubsub_mw import errors
from pubsub_mw.errors import (
    ChannelError,
    CloseCode,
    ErrorCode,
    FrameError,
    GrantError,
    GrantExpired,
    PublicationTooLarge,
    PublishError,
    PubSubError,
    SettingsError,
    may_reconnect,
)

GOLDEN = json.loads((Path(__file__).parent / "frames.json").read_text())


def test_close_codes_are_those_of_the_golden_file() -> None:
    assert {code.name: [int(code), may_reconnect(code)] for code in CloseCode} == GOLDEN["close_codes"]


def test_error_codes_are_those_of_the_golden_file() -> None:
    assert sorted(ErrorCode) == sorted(GOLDEN["error_codes"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1000, True),
        (1006, True),
        (2999, True),
        (3000, True),
        (3499, True),
        (3500, False),
        (3999, False),
        (4000, True),
        (4499, True),
        (4500, False),
        (4999, False),
    ],
)
def test_the_range_of_a_close_code_is_its_retry_policy(code: int, *, expected: bool) -> None:
    assert may_reconnect(code) is expected


def test_close_codes_fit_into_a_websocket_close_frame() -> None:
    assert all(code == 1009 or 3000 <= code <= 3999 for code in CloseCode)


def test_every_exception_is_a_pubsub_error() -> None:
    exceptions = [
        value
        for name in errors.__all__
        if isinstance(value := getattr(errors, name), type) and issubclass(value, Exception)
    ]
    assert len(exceptions) > 8
    assert all(issubclass(exception, PubSubError) for exception in exceptions)


def test_wrong_use_is_also_a_value_error() -> None:
    assert all(issubclass(kind, ValueError) for kind in (SettingsError, ChannelError, PublicationTooLarge))
    assert not issubclass(PublishError, ValueError)


def test_an_expired_grant_is_a_kind_of_invalid_one() -> None:
    assert issubclass(GrantExpired, GrantError)


def test_exceptions_keep_their_facts_and_say_them() -> None:
    assert PublishError(("a", "b"), "no answer").channels == ("a", "b")
    assert "a, b" in str(PublishError(("a", "b"), "no answer"))
    too_large = PublicationTooLarge(11, 10)
    assert (too_large.size_bytes, too_large.limit_bytes) == (11, 10)
    assert "11" in str(too_large)
    frame = FrameError(ErrorCode.BAD_FRAME, "no", id="1", channel="a")
    assert (frame.code, frame.id, frame.channel, str(frame)) == ("bad_frame", "1", "a", "no")


def test_a_channel_error_never_repeats_a_whole_novel() -> None:
    error = ChannelError("x" * 1_000_000, "is too long")
    assert len(str(error)) < 300
    assert error.channel == "x" * 1_000_000
