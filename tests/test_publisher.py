"""What may be published, how it is encoded, and what publishers promise beside delivery."""

import asyncio
import json
import logging
import math
import re
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
import pytest
from django.utils.functional import lazy, lazystr
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw import AsyncPublisher, ChannelError, PublicationTooLarge, Publisher, PublishError, SettingsError
from pubsub_mw.drafts import build_draft, build_drafts, encode_data
from pubsub_mw.grants import GrantVerifier
from pubsub_mw.model import Draft
from pubsub_mw.settings import Settings
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer

SETTINGS = Settings.build(environ={}, history_size=100, private_history_size=1_000, max_publication_bytes=1_000)


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Kind(StrEnum):
    NEWS = "news"


class Nested(Enum):
    PLACE = PurePosixPath("/srv")


@dataclass
class Point:
    x: int
    when: date
    tags: set[str] = field(default_factory=set)


@dataclass(slots=True, frozen=True)
class Slotted:
    price: Decimal


Pair = namedtuple("Pair", "a b")

translated: Callable[[str], object] = lazy(
    lambda text: f"<{text}>", str
)  # as gettext_lazy is made, which needs a Django that is set up


def spelled(value: object) -> str:
    """Name a case the same in every process: without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


UUID_TEXT = "12345678-1234-5678-1234-567812345678"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (-1.5, -1.5),
        ("hé\n\u2028</script>", "hé\n\u2028</script>"),
        ([1, [2]], [1, [2]]),
        ((1, 2), [1, 2]),
        ({"a": {"b": None}}, {"a": {"b": None}}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({1: "a", None: "b", False: "c"}, {"1": "a", "null": "b", "false": "c"}),
        ({UUID(UUID_TEXT): 1, date(2024, 2, 29): 2}, {UUID_TEXT: 1, "2024-02-29": 2}),
        (datetime(2024, 2, 29, 12, 30, tzinfo=UTC), "2024-02-29T12:30:00+00:00"),
        (datetime(2024, 2, 29, 12, 30, 0, 5), "2024-02-29T12:30:00.000005"),  # noqa: DTZ001 - Django without USE_TZ
        (datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin")), "2024-07-01T12:00:00+02:00"),
        (date(2024, 2, 29), "2024-02-29"),
        (clock_time(12, 30), "12:30:00"),
        (clock_time(12, 30, tzinfo=UTC), "12:30:00+00:00"),
        (timedelta(minutes=1, milliseconds=500), 60.5),
        (UUID(UUID_TEXT), UUID_TEXT),
        (Decimal("10.50"), "10.50"),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Kind.NEWS, "news"),
        (Nested.PLACE, "/srv"),
        ({Colour.RED: 1}, {"red": 1}),
        ({3}, [3]),
        (frozenset("a"), ["a"]),
        (Path("/a/b"), "/a/b"),
        (Point(1, date(2024, 2, 29), {"t"}), {"x": 1, "when": "2024-02-29", "tags": ["t"]}),
        (Slotted(Decimal(1)), {"price": "1"}),
        (Pair(1, 2), [1, 2]),
        (translated("Yes"), "<Yes>"),
        ({"label": lazystr("text")}, {"label": "text"}),
        (2**63, 2**63),
        (2**64, 2**64),
        (-(10**40), -(10**40)),
        ({"big": 10**40, "when": date(2024, 2, 29), "id": UUID(UUID_TEXT), "point": Point(1, date(2024, 1, 1))}, None),
        ("\ud800", "\ud800"),
        ({"\ud83d": ["a\udc00"]}, {"\ud83d": ["a\udc00"]}),
    ],
    ids=spelled,
)
def test_what_a_web_application_has_at_hand_can_be_published(data: object, expected: object) -> None:
    decoded = json.loads(encode_data(data))
    if isinstance(data, dict) and "big" in data:
        expected = {
            "big": 10**40,
            "when": "2024-02-29",
            "id": UUID_TEXT,
            "point": {"x": 1, "when": "2024-01-01", "tags": []},
        }
    assert decoded == expected


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null(number: float) -> None:
    assert encode_data([number, {"a": number}]) == b'[null,{"a":null}]'


def test_nan_beside_a_number_that_only_the_slow_encoder_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be published"):
        encode_data([math.nan, 2**70])


class Plain:
    pass


@pytest.mark.parametrize(
    "data",
    [
        object(),
        Plain(),
        b"bytes",
        bytearray(b"b"),
        1j,
        Fraction(1, 2),
        range(3),
        iter([]),
        print,
        Point,
        Colour,
        {(1, 2): 3},
        {"a": [Plain()]},
        [2**70, Plain()],
        Path,
        Ellipsis,
        (number for number in [1]),
    ],
    ids=spelled,
)
def test_what_json_cannot_say_is_a_type_error(data: object) -> None:
    with pytest.raises(TypeError):
        encode_data(data)


def test_the_error_names_the_type_and_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"tests\.test_publisher\.Plain is not JSON; give a dict, list or text"):
        encode_data({"a": Plain()})


def own_list() -> object:
    made: list[object] = [1]
    made.append(made)
    return made


def own_dict() -> object:
    made: dict[str, object] = {}
    made["self"] = [made]
    return made


def own_dataclass() -> object:
    @dataclass
    class Node:
        next: object = None

    made = Node()
    made.next = made
    return made


def too_deep() -> object:
    made: object = None
    for _ in range(100_000):
        made = [made]
    return made


@pytest.mark.parametrize("make", [own_list, own_dict, own_dataclass, too_deep])
def test_data_that_holds_itself_or_has_no_end_is_a_value_error(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"itself|[Cc]ircular|deeply"):
        encode_data(make())


class Moody:
    def __str__(self) -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "moody")


@settings(deadline=None, max_examples=300)
@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(st.characters()),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
        max_leaves=10,
    )
)
def test_what_json_can_say_comes_back_as_it_was(data: object) -> None:
    assert json.loads(encode_data(data)) == data


def test_a_frame_with_lone_surrogates_is_valid_utf8() -> None:
    draft = build_draft(SETTINGS, "room:1", "\ud800")
    assert json.loads(draft.head.decode() + 'e.1.t"}')["data"] == "\ud800"


# Drafts.


def test_a_draft_has_a_tag_of_its_own() -> None:
    tags = {build_draft(SETTINGS, "room:1", 1).tag for _ in range(1_000)}
    assert len(tags) == 1_000
    assert all(8 <= len(tag) <= 32 for tag in tags)


@pytest.mark.parametrize(
    ("channel", "history", "size", "is_kept"),
    [
        ("room:1", None, 100, True),
        ("room:1", True, 100, True),
        ("room:1", False, 100, False),
        ("room:1", 0, 100, False),
        ("room:1", 1, 1, True),
        ("room:1", 5_000, 5_000, True),
        ("#connection-c1", None, 1_000, True),
        ("#connection-c1", False, 1_000, False),
        ("#user-7", None, 100, True),
    ],
)
def test_history_is_kept_as_asked(channel: str, history: bool | int | None, size: int, *, is_kept: bool) -> None:
    draft = build_draft(SETTINGS, channel, 1, history=history)
    assert (draft.history_size, draft.is_kept) == (size, is_kept)


@pytest.mark.parametrize(
    "arguments",
    [
        {"history": -1},
        {"history": 1_000_001},
        {"history": 1.5},
        {"history": "5"},
        {"event": ""},
        {"event": "a\nb"},
        {"event": "a\0"},
        {"event": "\ud800"},
        {"event": "a\x7f"},
        {"event": "a\x85"},
        {"event": "a\u2028"},
        {"event": "a\u2029"},
        {"event": "x" * 201},
        {"event": 5},
        {"event": None},
        {"exclude": ""},
        {"exclude": "a b"},
        {"exclude": "a\nb"},
        {"exclude": "x" * 200},
        {"idempotency_key": ""},
        {"idempotency_key": "x" * 201},
        {"idempotency_key": 5},
        {"idempotency_key": "\ud800"},
        {"channel": "#admin"},
        {"channel": "a b"},
        {"channel": None},
    ],
    ids=spelled,
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        build_draft(SETTINGS, **{"channel": "room:1", "data": 1, **arguments})


def test_what_exclude_wants_is_said() -> None:
    with pytest.raises(ChannelError, match="names no connection: its id is 1 to 188 of"):
        build_draft(SETTINGS, "room:1", 1, exclude="a b")


@pytest.mark.parametrize("event", ["x" * 200, "😀" * 200, "👩\u200d🚀", "a\u00a0b", "\ue000", "\u0378", " "], ids=ascii)
def test_an_event_may_hold_what_ends_no_line_and_controls_nothing(event: str) -> None:
    assert orjson.loads(build_draft(SETTINGS, "room:1", 1, event=event).head + b'"}')["event"] == event


def test_a_publication_may_be_as_large_as_the_limit_and_no_larger() -> None:
    assert build_draft(SETTINGS, "room:1", "x" * 998)
    with pytest.raises(PublicationTooLarge) as caught:
        build_draft(SETTINGS, "room:1", "x" * 999)
    assert (caught.value.size_bytes, caught.value.limit_bytes) == (1_001, 1_000)
    with pytest.raises(PublicationTooLarge):
        build_draft(SETTINGS, "room:1", "é" * 500)  # bytes count, not characters


@pytest.mark.parametrize(
    "item", ["ab", ("a",), ("a", 1, 2), None, {"channel": "a"}, {"data": 1}, {"channel": "a", "data": 1, "evnet": "x"}]
)
def test_an_item_of_another_shape_is_refused_and_named(item: Any) -> None:
    with pytest.raises(TypeError) as caught:
        build_drafts(SETTINGS, [("a", 1), item])
    assert "item 1" in caught.value.__notes__[0]


def test_one_wrong_item_stops_them_all_and_is_named(prefix: str) -> None:
    publisher = Publisher("memory://", prefix=prefix)
    with pytest.raises(ChannelError) as caught:
        publisher.many([("a", 1), ("b", 2), ("a b", 3)])
    assert "item 2" in caught.value.__notes__[0]
    assert publisher.position("a").offset == 0


def test_items_may_be_pairs_or_mappings_and_come_from_any_iterable(prefix: str) -> None:
    publisher = Publisher("memory://", prefix=prefix)
    items: list[Any] = [("a", 1), ["a", 2], {"channel": "a", "data": 3, "event": "typing", "history": False}]
    assert [position.offset for position in publisher.many(iter(items))] == [1, 2, 3]
    assert publisher.many([]) == []


# Publishers.


@pytest.mark.parametrize("make", [Publisher, AsyncPublisher])
@pytest.mark.parametrize(
    "arguments", [{"url": "nowhere://"}, {"url": "redis://h:port"}, {"histroy": 1}, {"history_size": 0}]
)
def test_wrong_settings_show_when_a_publisher_is_made(make: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        make(**arguments)


@pytest.mark.parametrize("make", [Publisher, AsyncPublisher])
def test_a_publisher_is_made_without_a_broker_that_answers(make: Any) -> None:
    assert make(f"redis://127.0.0.1:{free_port()}/0").settings.publish_timeout == 2


def test_the_environment_says_where_to_publish(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setenv("PUBSUB_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("PUBSUB_PREFIX", prefix)
    assert Publisher().settings.url == "redis://127.0.0.1:1/0"
    assert Publisher("memory://").publish("a", 1).offset == 1


def test_data_is_encoded_when_it_is_published_and_not_changed(prefix: str) -> None:
    data = {"when": date(2024, 2, 29)}
    Publisher("memory://", prefix=prefix).publish("a", data)
    assert data == {"when": date(2024, 2, 29)}


def test_publishing_none_of_many_needs_no_broker() -> None:
    assert Publisher(f"redis://127.0.0.1:{free_port()}/0").publish_drafts(list[Draft]()) == []


def test_an_async_publisher_serves_one_event_loop_after_another(redis_server: RedisServer, prefix: str) -> None:
    publisher = AsyncPublisher(redis_server.url, prefix=prefix)

    async def publish() -> int:
        offset = (await publisher.publish("a", {"n": 1}, event="typing")).offset
        assert (await publisher.position("a")).offset == offset
        await publisher.close()
        return offset

    assert [asyncio.run(publish()) for _ in range(3)] == [1, 2, 3]


@pytest.mark.anyio
async def test_an_async_publisher_is_as_strict_and_says_as_much(prefix: str) -> None:
    publisher = AsyncPublisher("memory://", prefix=prefix)
    with pytest.raises(ChannelError):
        await publisher.publish("a b", 1)
    with pytest.raises(TypeError):
        await publisher.publish("a", object())
    with pytest.raises(ChannelError):
        await publisher.position("a b")
    positions = await publisher.many([("a", 1), {"channel": "b", "data": 2}])
    assert [position.offset for position in positions] == [1, 1]
    assert await publisher.many([]) == []
    await publisher.close()


@pytest.mark.anyio
async def test_an_async_publisher_without_a_broker_raises_with_the_channels() -> None:
    publisher = AsyncPublisher(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(PublishError) as caught:
        await publisher.many([("a", 1), ("b", 2)])
    assert caught.value.channels == ("a", "b")
    await publisher.close()


# Grants.


def test_a_grant_made_by_a_publisher_is_good_for_its_secret() -> None:
    publisher = Publisher("memory://", secret="a secret of thirty-two characters")
    token = publisher.grant(7, ["room:*"], iter(["room:1"]), {"joined": date(2024, 2, 29)}, expires=60)  # type: ignore[arg-type]
    grant = GrantVerifier("a secret of thirty-two characters").verify(token, now=time.time())
    assert (grant.user, grant.channels, grant.publish) == ("7", ("room:*",), ("room:1",))
    assert grant.info == {"joined": "2024-02-29"}
    assert 55 < grant.expires_at - time.time() <= 60


def test_without_a_secret_one_is_kept_in_the_broker_and_said_so_once(
    prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = Publisher("memory://", prefix=prefix)
    tokens = [publisher.grant("7"), publisher.grant("8"), Publisher("memory://", prefix=prefix).grant("9")]
    verifier = GrantVerifier(publisher._broker.secret())
    assert [verifier.verify(token, now=time.time()).user for token in tokens] == ["7", "8", "9"]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, "once for each publisher"
    assert "PUBSUB_SECRET is not set" in warnings[0].getMessage()
    assert not any(publisher._broker.secret() in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": "room:*"},
        {"publish": "room:1"},
        {"channels": [1]},
        {"publish": [None]},
        {"channels": None},
        {"user": "a b"},
        {"user": ""},
        {"expires": 0},
        {"expires": -1},
        {"expires": math.inf},
        {"expires": math.nan},
        {"expires": 1e16},
        {"expires": "soon"},
        {"expires": timedelta(hours=1)},
        {"info": object()},
    ],
    ids=spelled,
)
def test_a_grant_that_nobody_could_use_is_not_made(arguments: dict[str, Any]) -> None:
    publisher = Publisher("memory://", secret="a secret of thirty-two characters")
    with pytest.raises((ValueError, TypeError)):
        publisher.grant(**arguments)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"user": "a b"}, "names no user: its id is 1 to 194 of"),
        ({"expires": timedelta(hours=1)}, "must be a number of seconds"),
        ({"expires": "3600"}, "must be a number of seconds"),
        ({"expires": None}, "must be a number of seconds"),
    ],
    ids=spelled,
)
def test_what_a_grant_wants_is_said(arguments: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Publisher("memory://", secret="a secret of thirty-two characters").grant(**arguments)


def test_a_moody_value_raises_what_a_caller_expects() -> None:
    with pytest.raises((ValueError, TypeError)):
        encode_data({"a": type("P", (PurePosixPath,), {"__str__": Moody.__str__})("x")})


def test_a_publication_is_encoded_once_for_all_who_get_it() -> None:
    head = build_draft(SETTINGS, "room:1", {"a": [1, 2]}, event="typing").head
    assert head == b'{"type":"message","channel":"room:1","event":"typing","data":{"a":[1,2]},"position":"'
    assert orjson.loads(head + b'e.1.t"}')["data"] == {"a": [1, 2]}
