"""Frames and values: what clients may send, what the server says, and that nothing else gets through."""

import base64
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw import protocol
from pubsub_mw.errors import CloseCode, ErrorCode, FrameError
from pubsub_mw.model import Position
from pubsub_mw.protocol import (
    Connect,
    Pong,
    Publish,
    RefreshGrant,
    Subscribe,
    Unsubscribe,
    decode_command,
)

GOLDEN = json.loads((Path(__file__).parent / "frames.json").read_text())["frames"]

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


def as_bytes(frame: dict[str, Any]) -> bytes:
    body: str = frame["body"]
    return base64.b64decode(body) if "encoding" in frame else body.encode()


def decode(frame: Any) -> protocol.Command:
    return decode_command(json.dumps(frame))


@pytest.mark.parametrize("frame", GOLDEN["client"], ids=json.dumps)
def test_golden_client_frames_are_understood(frame: dict[str, Any]) -> None:
    command = decode(frame)
    expected = {name: value for name, value in frame.items() if name not in ("type", "encoding")}
    if "body" in expected:
        expected["body"] = as_bytes(frame)
    assert {name: getattr(command, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("frame", "command"),
    [
        ({"type": "connect"}, Connect(grant=None, resume=None, channels={})),
        ({"type": "connect", "channels": None, "grant": None}, Connect(grant=None, resume=None, channels={})),
        ({"type": "subscribe", "channel": "a"}, Subscribe(channel="a", position=None, grant=None)),
        ({"type": "unsubscribe", "channel": "a"}, Unsubscribe(channel="a")),
        ({"type": "publish", "channel": "a", "data": None}, Publish(id=None, channel="a", event="message", data=None)),
        ({"type": "publish", "channel": "a", "data": 1, "event": ""}, Publish(id=None, channel="a", event="", data=1)),
        ({"type": "grant", "grant": "g"}, RefreshGrant(grant="g")),
        ({"type": "pong", "from": "the future"}, Pong()),
    ],
    ids=str,
)
def test_commands_are_decoded_and_unknown_fields_ignored(frame: dict[str, Any], command: protocol.Command) -> None:
    assert decode(frame) == command
    assert decode({**frame, "x-new": {"deep": [1]}}) == command


FIELDS: list[tuple[str, str, bool]] = [
    ("connect", "grant", False),
    ("connect", "resume", False),
    ("connect", "channels", False),
    ("subscribe", "channel", True),
    ("subscribe", "position", False),
    ("subscribe", "grant", False),
    ("unsubscribe", "channel", True),
    ("publish", "channel", True),
    ("publish", "id", False),
    ("publish", "event", False),
    ("grant", "grant", True),
]
COMPLETE: dict[str, dict[str, Any]] = {
    "connect": {},
    "subscribe": {"channel": "a"},
    "unsubscribe": {"channel": "a"},
    "publish": {"channel": "a", "data": 1},
    "grant": {"grant": "g"},
}


@pytest.mark.parametrize("value", [0, 1.5, True, False, [], ["a"], {"a": 1}, {"a": []}, "a text"], ids=repr)
@pytest.mark.parametrize(("kind", "field", "is_required"), FIELDS)
def test_a_field_of_the_wrong_type_is_a_bad_frame_that_names_it(
    kind: str, field: str, value: object, *, is_required: bool
) -> None:
    frame = {"type": kind, **COMPLETE[kind], field: value}
    if isinstance(value, str) and field != "channels":
        assert getattr(decode(frame), field) == value
        return
    with pytest.raises(FrameError, match=f"{kind}: {field} must be") as caught:
        decode(frame)
    assert caught.value.code == ErrorCode.BAD_FRAME
    absent = {"type": kind, **COMPLETE[kind]}
    absent.pop(field, None)
    if is_required:
        with pytest.raises(FrameError, match=f"{kind}: {field} must be .*; it is missing"):
            decode(absent)
    else:
        decode(absent)


def test_a_publish_without_data_is_a_bad_frame_with_its_id_and_channel() -> None:
    with pytest.raises(FrameError, match="data must be any JSON; it is missing") as caught:
        decode({"type": "publish", "id": "7", "channel": "a"})
    assert (caught.value.code, caught.value.id, caught.value.channel) == (ErrorCode.BAD_FRAME, "7", "a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "nothing",
        "null",
        "1",
        '"text"',
        "[]",
        '[{"type":"pong"}]',
        "{}",
        '{"type":null}',
        '{"type":1}',
        '{"type":"pong"} {"type":"pong"}',
        '{"type":"pong",}',
        "{'type':'pong'}",
        '{"type":"pong"',
        "NaN",
        "\ufeff{}",
        '{"type":["pong"]}',
        '{"type":"publish","channel":"a","data":NaN}',
        '{"type":"publish","channel":"a","data":1e999}',
        '{"type":"publish","channel":"a","data":"\\ud800"}',
        '{"type":"\ud800"}',
        b"\xff\xfe",
        b'{"type":"\xff"}',
        "\0",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_what_is_no_frame_is_answered_with_bad_frame(text: str | bytes) -> None:
    with pytest.raises(FrameError) as caught:
        decode_command(text)
    assert caught.value.code == ErrorCode.BAD_FRAME
    orjson.loads(protocol.error(caught.value.code, str(caught.value)))


@pytest.mark.parametrize("kind", ["", "Connect", "connected", "ping", "x" * 60_000, "a\nb", "__class__"])
def test_an_unknown_type_is_told_so_briefly(kind: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode({"type": kind, "id": "7", "channel": "c" * 60_000})
    assert caught.value.code == ErrorCode.UNKNOWN_TYPE
    assert len(str(caught.value)) < 300
    assert caught.value.id == "7"
    assert len(caught.value.channel or "") <= 200


@pytest.mark.parametrize("depth", [100, 1_000, 2_000, 30_000])
@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_a_frame_or_an_error_never_a_crash(depth: int, before: str, after: str) -> None:
    data = before * depth + "1" + after * depth
    for text in (data, before * depth, f'{{"type":"publish","channel":"a","data":{data}}}'):
        try:
            command = decode_command(text)
        except FrameError:
            continue
        # What gets in gets out again: it is encoded for publishing.
        assert isinstance(command, Publish)
        assert depth <= 1_000


@pytest.mark.parametrize(
    "number", [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**22 + 1, 10**300 + 7]
)
@pytest.mark.parametrize("kind", [str, str.encode])
def test_an_integer_keeps_all_its_digits(number: int, kind: Any) -> None:
    data = {"\u00e9": [number, -number, 1.5, 1e22, "12345678901234567890", 0.12345678901234567890123]}
    command = decode_command(kind(json.dumps({"type": "publish", "channel": "a", "data": data}, ensure_ascii=False)))
    assert isinstance(command, Publish)
    assert json.dumps(command.data) == json.dumps(data)


@pytest.mark.parametrize(
    "other", ["NaN", "-Infinity", "1e400", '"\\ud800"', "9" * 400, "[" * 5_000, "[" * 1_020 + "]" * 1_020]
)
def test_beside_a_long_integer_nothing_more_is_json(other: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_command(f'{{"type":"publish","channel":"a","data":[12345678901234567890123,{other}]}}')
    assert caught.value.code == ErrorCode.BAD_FRAME


def decode_or_refuse(text: str | bytes) -> protocol.Command | None:
    """Return the command, or None after showing that the refusal is a frame that can be sent."""
    try:
        return decode_command(text)
    except FrameError as error:
        refusal = error
    frame = orjson.loads(protocol.error(refusal.code, str(refusal), id=refusal.id, channel=refusal.channel))
    assert frame["code"] in ("bad_frame", "unknown_type")
    return None


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.text(), st.binary(), json_values.map(orjson.dumps)))
def test_whatever_a_client_sends_raises_nothing_but_a_frame_error(text: str | bytes) -> None:
    decode_or_refuse(text)


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from([*COMPLETE, "pong"]),
    st.dictionaries(
        st.sampled_from(["grant", "resume", "channels", "channel", "position", "data", "event", "id"]), json_values
    ),
)
def test_commands_with_fields_of_any_kind_raise_nothing_but_a_frame_error(kind: str, fields: dict[str, Any]) -> None:
    command = decode_or_refuse(orjson.dumps({"type": kind, **fields}))
    if isinstance(command, Publish):
        assert command.data == fields["data"]
    if isinstance(command, Connect):
        assert all(position is None or isinstance(position, str) for position in command.channels.values())


def encode(frame: dict[str, Any]) -> bytes:
    """Say `frame` by the function of the module that makes its type."""
    fields = {name: value for name, value in frame.items() if name != "type"}
    match frame["type"]:
        case "message":
            head = protocol.message_head(frame["channel"], frame["event"], orjson.dumps(frame["data"]))
            position: str = frame["position"]
            return head + position.encode() + protocol.message_tail
        case "response" | "response_start" | "response_chunk" | "response_end" as kind:
            place: str = fields.pop("position")
            arguments = [fields.pop("id")]
            arguments += [fields[name] for name in ("status", "headers") if name in fields]
            arguments += [as_bytes(fields)] if "body" in fields else []
            arguments += [fields.get("error")] if kind == "response_end" else []
            head = getattr(protocol, f"{kind}_head")(*arguments)
            return bytes(head + place.encode() + protocol.message_tail)
        case "join" | "leave" as kind:
            member = fields["member"]
            told: bytes = getattr(protocol, kind)(fields["channel"], member["user"], orjson.dumps(member["info"]))
            return told
        case "ping":
            return protocol.PING
        case "error":
            return protocol.error(ErrorCode(fields.pop("code")), **fields)
        case "disconnect":
            return protocol.disconnect(CloseCode(frame["code"]), frame["reason"], frame["retry"] or 0.0)
        case kind:
            if "members" in fields:
                fields["members"] = {one["user"]: orjson.dumps(one["info"]) for one in fields["members"]}
            if "position" in fields:
                fields["position"] = Position.parse(fields["position"])
            made: bytes = getattr(protocol, kind)(**fields)
            return made


@pytest.mark.parametrize("frame", GOLDEN["server"], ids=json.dumps)
def test_server_frames_are_those_of_the_golden_file(frame: dict[str, Any]) -> None:
    assert orjson.loads(encode(frame)) == frame


@pytest.mark.parametrize("code", CloseCode)
def test_a_disconnect_says_when_to_come_back_only_if_one_may(code: CloseCode) -> None:
    frame = orjson.loads(protocol.disconnect(code, "why", 2.5))
    assert frame["retry"] == (None if 3500 <= code <= 3999 else 2.5)


@settings(deadline=None)
@given(st.text().filter(lambda text: text.isprintable()), json_values)
def test_a_message_frame_is_one_line_of_json_whatever_it_carries(event: str, data: object) -> None:
    head = protocol.message_head("room:1", event, orjson.dumps(data))
    frame = head + b"e.1.t" + protocol.message_tail
    assert b"\n" not in frame
    assert orjson.loads(frame) == {
        "type": "message",
        "channel": "room:1",
        "event": event,
        "data": data,
        "position": "e.1.t",
    }


@given(
    st.text("ABCxyz019_.,:;=@/-", min_size=1),
    st.text(min_size=1, max_size=20),
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    ),
)
def test_a_message_comes_apart_as_it_was_put_together(channel: str, event: str, data: object) -> None:
    encoded = json.dumps(data).encode()
    parts = protocol.split_message(protocol.message_head(channel, event, encoded) + b"e.7.t" + protocol.message_tail)
    assert parts is not None
    assert (parts.channel, json.loads(b'"%b"' % parts.event), bytes(parts.data)) == (channel, event, encoded)
    assert parts.position == "e.7.t"
    assert protocol.split_message(protocol.PING) is None
