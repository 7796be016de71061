"""Translate between frames and values. This docstring is the wire specification.

In:     text that a client sent; values to be sent
Out:    command values; frames as UTF-8 JSON, one object each
Owns:   the shape of every frame, in both directions
Never:  trusts a field it did not check; parses a publication's `data` on its way to the client

A frame is one JSON object; `type` names it. Unknown fields are ignored, so that either side may be newer.

A client sends:

`connect`       first, within `connect_timeout`. `grant` (text, optional); `resume` (text, optional: from the
                last `connected`); `channels` (object, optional: channel -> position as text, or null)
`subscribe`     `channel`; `position` (text, optional: the last one received); `grant` (text, optional:
                counts beside the connection's grant, until the first of the two expires)
`unsubscribe`   `channel`
`publish`       `channel`, `data` (any JSON), `event` (text, optional, default "message"), `id` (text, optional:
                comes back in an `error`). Straight to a channel, where a grant's `publish` allows it
`request`       `id` (text: 1 to 64 of `A-Za-z0-9_.:-`, unique on the connection; the same when it is sent again),
                `method`, `path` (with its query string), `headers` (object of texts, optional), `body` (text,
                optional), `encoding` ("base64" where the body is bytes, optional)
`cancel`        `id` of a request: its answer is not wanted any more
`grant`         `grant` (text): refreshes the permission before it expires
`pong`          the answer to `ping`

The server sends:

`connected`     `connection` (text), `resume` (text), `user` (text or null), `ping` (seconds between pings). By `/send`
                also `ticket` (text): instead of `resume`, once, for a stream that cannot send a header
`accepted`      by `/send` only: the command was carried out, or stored; its `id` and `channel` where it named them.
                After `grant` also a fresh `resume`
`subscribed`    `channel`, `position`, `recovered`: true = what was missed follows as messages, and `position` is
                where they start; false = what was missed could not be told, go on from `position`; null = no
                position was given. On a presence channel also `members`: a list of `{"user", "info"}`, each user
                once, whoever is there
`join`, `leave` `channel`, `member`: a user came to a presence channel with the first connection, or went with the
                last one; changes the `members` that `subscribed` told
`message`       `channel`, `event`, `data`, `position`. In offset order; each at most once on a connection
`response`      `id`, `status`, `headers` (object), `body` (text), `encoding` ("base64" where the body is bytes),
                `position`: the answer to a request. On the connection's own channel, so it survives a reconnect
`response_start`, `response_chunk`, `response_end`  the same in parts, for a view that streams: `status` and
                `headers`; then `body` (and `encoding`) each; then `error` (text) where it broke off; each with
                `id` and `position`
`gap`           `channel`, `position`, `reason`: continuity was lost while live. Fetch the state anew, go on from
                `position`. Reasons: `epoch` (the broker lost the channel), `ahead` (the broker fell behind what was
                received), `forked` (it holds other publications under the same offsets), `trimmed` (what was
                missed is no longer kept)
`unsubscribed`  `channel`, `code` ("client" = it was asked for; else an error code), `reason`
`error`         `code`, `message`; `id` and `channel` where the refused command named them
`ping`          answer with `pong`
`disconnect`    `code` (the close code that follows), `reason`, `retry` (seconds before coming back; null = do not)

A position is text that only a server makes; a client hands back the last one it received.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from pubsub_mw.errors import CloseCode, ErrorCode, FrameError, may_reconnect
from pubsub_mw.model import Position

__all__ = [
    "PING",
    "Cancel",
    "Command",
    "Connect",
    "MessageParts",
    "Pong",
    "Publish",
    "RefreshGrant",
    "RequestFrame",
    "Subscribe",
    "Unsubscribe",
    "accepted",
    "connected",
    "decode_body",
    "decode_command",
    "disconnect",
    "encode_body",
    "error",
    "gap",
    "head_of",
    "join",
    "leave",
    "message_head",
    "message_tail",
    "position_of",
    "read_command",
    "read_json",
    "response_chunk_head",
    "response_end_head",
    "response_head",
    "response_start_head",
    "split_message",
    "subscribed",
    "unsubscribed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    grant: str | None
    resume: str | None
    channels: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    channel: str
    position: str | None
    grant: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    channel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    id: str | None
    channel: str
    event: str
    data: object


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFrame:
    id: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshGrant:
    grant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    pass


Command = Connect | Subscribe | Unsubscribe | Publish | RequestFrame | Cancel | RefreshGrant | Pong

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")


def decode_command(text: str | bytes) -> Command:
    """Read what a client sent.

    Raises:
        FrameError: with the code and the sentence to answer with.
    """
    try:
        return read_command(read_json(text))
    except orjson.JSONDecodeError as problem:
        raise FrameError(ErrorCode.BAD_FRAME, f"a frame is one JSON object; this is not JSON: {problem}") from None


def read_json(text: str | bytes | bytearray) -> Any:
    """Read JSON that a client sent, with all digits of its integers: of those over 64 bits, orjson makes floats.

    Raises:
        orjson.JSONDecodeError: it is none.
    """
    value = orjson.loads(text)
    if len(text) > len(_LONG_NUMBER):
        content = text.encode() if isinstance(text, str) else text
        if _LONG_NUMBER in content.translate(_DIGITS):
            try:
                return json.loads(content)
            except RecursionError:
                raise orjson.JSONDecodeError("it is nested too deeply", "", 0) from None
    return value


_LONG_NUMBER = b"9" * 19  # in digits, the shortest that may be over 64 bits
_DIGITS = bytes(ord("9") if chr(byte).isdecimal() else byte for byte in range(256))


def read_command(frame: object) -> Command:
    """Read a frame whose JSON was read already; as `decode_command`."""
    if not isinstance(frame, dict):
        raise FrameError(ErrorCode.BAD_FRAME, f"a frame is one JSON object, not {_kind(frame)}")
    kind = frame.get("type")
    if not isinstance(kind, str):
        raise FrameError(ErrorCode.BAD_FRAME, "the frame has no type; it must be a text that names the command")
    decode = _DECODERS.get(kind)
    if decode is None:
        raise FrameError(
            ErrorCode.UNKNOWN_TYPE,
            f"there is no command {kind!r:.60}; there are: {', '.join(_DECODERS)}",
            id=_hint(frame, "id"),
            channel=_hint(frame, "channel"),
        )
    return decode(frame)


def _connect(frame: dict[str, Any]) -> Connect:
    channels = frame.get("channels")
    if channels is None:
        channels = {}
    if not isinstance(channels, dict):
        raise _wrong(frame, "channels", "an object of channel -> position or null", channels)
    for position in channels.values():
        if position is not None and not isinstance(position, str):
            raise _wrong(frame, "channels", "an object whose values are positions (text) or null", position)
    return Connect(grant=_optional_text(frame, "grant"), resume=_optional_text(frame, "resume"), channels=channels)


def _subscribe(frame: dict[str, Any]) -> Subscribe:
    return Subscribe(
        channel=_text(frame, "channel"),
        position=_optional_text(frame, "position"),
        grant=_optional_text(frame, "grant"),
    )


def _unsubscribe(frame: dict[str, Any]) -> Unsubscribe:
    return Unsubscribe(channel=_text(frame, "channel"))


def _publish(frame: dict[str, Any]) -> Publish:
    if "data" not in frame:
        raise _lacks(frame, "data", "any JSON")
    event = _optional_text(frame, "event")
    return Publish(
        id=_optional_text(frame, "id"),
        channel=_text(frame, "channel"),
        event="message" if event is None else event,
        data=frame["data"],
    )


def _request(frame: dict[str, Any]) -> RequestFrame:
    request_id = _request_id(frame)
    headers = frame.get("headers")
    if headers is None:
        headers = {}
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise _wrong(frame, "headers", "an object of texts", headers)
    body = _optional_text(frame, "body") or ""
    encoding = _optional_text(frame, "encoding")
    if encoding not in (None, "base64"):
        raise _wrong(frame, "encoding", 'absent or "base64"', encoding, f"{encoding!r:.40}")
    try:
        content = body.encode() if encoding is None else base64.b64decode(body, validate=True)
    except ValueError:
        raise _wrong(frame, "body", "base64, as its encoding says", body, f"{body!r:.40}") from None
    return RequestFrame(
        id=request_id, method=_text(frame, "method"), path=_text(frame, "path"), headers=headers, body=content
    )


def _cancel(frame: dict[str, Any]) -> Cancel:
    return Cancel(id=_request_id(frame))


def _request_id(frame: dict[str, Any]) -> str:
    request_id = _text(frame, "id")
    if not _REQUEST_ID.match(request_id):
        raise _wrong(frame, "id", "1 to 64 of A-Z a-z 0-9 _ . : -", request_id, f"{request_id!r:.80}")
    return request_id


def _refresh(frame: dict[str, Any]) -> RefreshGrant:
    return RefreshGrant(grant=_text(frame, "grant"))


def _pong(_frame: dict[str, Any]) -> Pong:
    return Pong()


_DECODERS: dict[str, Callable[[dict[str, Any]], Command]] = {
    "connect": _connect,
    "subscribe": _subscribe,
    "unsubscribe": _unsubscribe,
    "publish": _publish,
    "request": _request,
    "cancel": _cancel,
    "grant": _refresh,
    "pong": _pong,
}


def _text(frame: dict[str, Any], name: str) -> str:
    if name not in frame:
        raise _lacks(frame, name, "a text")
    value = frame[name]
    if not isinstance(value, str):
        raise _wrong(frame, name, "a text", value)
    return value


def _optional_text(frame: dict[str, Any], name: str) -> str | None:
    value = frame.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(frame, name, "a text or absent", value)
    return value


def _lacks(frame: dict[str, Any], name: str, wanted: str) -> FrameError:
    return _bad(frame, f"{name} must be {wanted}; it is missing")


def _wrong(frame: dict[str, Any], name: str, wanted: str, value: object, shown: str = "") -> FrameError:
    return _bad(frame, f"{name} must be {wanted}, not {shown or _kind(value)}")


def _bad(frame: dict[str, Any], problem: str) -> FrameError:
    text = f"{frame['type']}: {problem}"
    return FrameError(ErrorCode.BAD_FRAME, text, id=_hint(frame, "id"), channel=_hint(frame, "channel"))


def _hint(frame: dict[str, Any], name: str) -> str | None:
    """Return what an error can point at, cut so that an error is never larger than what it answers by much."""
    value = frame.get(name)
    return value[:200] if isinstance(value, str) else None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


PING = b'{"type":"ping"}'


def accepted(*, id: str | None = None, channel: str | None = None, resume: str | None = None) -> bytes:  # noqa: A002
    fields = {"type": "accepted", "id": id, "channel": channel, "resume": resume}
    return orjson.dumps({name: value for name, value in fields.items() if value is not None})


def connected(connection: str, resume: str, user: str | None, ping: float, ticket: str | None = None) -> bytes:
    frame = {"type": "connected", "connection": connection, "resume": resume, "user": user, "ping": ping}
    return orjson.dumps(frame if ticket is None else {**frame, "ticket": ticket})


def subscribed(
    channel: str, position: Position, recovered: bool | None, members: Mapping[str, bytes] | None = None
) -> bytes:
    """`members`: user -> info (JSON) of who is on a presence channel."""
    frame = {"type": "subscribed", "channel": channel, "position": str(position), "recovered": recovered}
    if members is not None:
        return orjson.dumps({**frame, "members": [_member(user, info) for user, info in members.items()]})
    return orjson.dumps(frame)


def join(channel: str, user: str, info: bytes) -> bytes:
    return orjson.dumps({"type": "join", "channel": channel, "member": _member(user, info)})


def leave(channel: str, user: str, info: bytes) -> bytes:
    return orjson.dumps({"type": "leave", "channel": channel, "member": _member(user, info)})


def _member(user: str, info: bytes) -> dict[str, object]:
    return {"user": user, "info": orjson.Fragment(info)}


def message_head(channel: str, event: str, data: bytes) -> bytes:
    """Return a `message` frame up to its position, which the broker adds. `data` is JSON already."""
    return b'{"type":"message","channel":%b,"event":%b,"data":%b,"position":"' % (
        orjson.dumps(channel),
        orjson.dumps(event),
        data,
    )


message_tail = b'"}'
"""What closes a frame after its position."""

_BEFORE_POSITION = b',"position":"'
_MESSAGE = re.compile(rb'\{"type":"message","channel":"([^"\\]+)","event":"((?:[^"\\]|\\.)*)","data":')


@dataclass(frozen=True, slots=True)
class MessageParts:
    """A `message` frame taken apart.

    Attributes:
        channel: its name
        event: JSON, without its quotes
        data: JSON, as it was published
        position: its text
    """

    channel: str
    event: bytes
    data: memoryview
    position: str


def split_message(frame: bytes) -> MessageParts | None:
    """Take a `message` frame apart, without reading its data; None = it is another one."""
    head = _MESSAGE.match(frame)
    if head is None:
        return None
    end = frame.rindex(_BEFORE_POSITION)
    return MessageParts(head[1].decode(), head[2], memoryview(frame)[head.end() : end], position_of(frame))


def position_of(frame: bytes) -> str:
    """Return the position of a publication's frame, without reading what comes before it."""
    return frame[frame.rindex(_BEFORE_POSITION) + len(_BEFORE_POSITION) : -len(message_tail)].decode()


def response_head(request_id: str, status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a `response` frame up to its position."""
    start = {"type": "response", "id": request_id, "status": status, "headers": headers, **encode_body(body)}
    return head_of(start)


def response_start_head(request_id: str, status: int, headers: Mapping[str, str]) -> bytes:
    return head_of({"type": "response_start", "id": request_id, "status": status, "headers": headers})


def response_chunk_head(request_id: str, body: bytes) -> bytes:
    return head_of({"type": "response_chunk", "id": request_id, **encode_body(body)})


def response_end_head(request_id: str, problem: str | None) -> bytes:
    frame = {"type": "response_end", "id": request_id}
    if problem is not None:
        frame["error"] = problem
    return head_of(frame)


def head_of(frame: Mapping[str, object]) -> bytes:
    """Return any frame up to its position, which the broker adds."""
    return orjson.dumps(frame)[:-1] + b',"position":"'


def encode_body(body: bytes) -> dict[str, str]:
    """Return what a frame says of a body: `body`, and `encoding` where it is no text."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body": base64.b64encode(body).decode(), "encoding": "base64"}


def decode_body(frame: Mapping[str, Any]) -> bytes:
    """Return the body of a frame that a server made."""
    body: str = frame["body"]
    return base64.b64decode(body) if frame.get("encoding") == "base64" else body.encode()


def gap(channel: str, position: Position, reason: str) -> bytes:
    return orjson.dumps({"type": "gap", "channel": channel, "position": str(position), "reason": reason})


def unsubscribed(channel: str, code: str, reason: str) -> bytes:
    return orjson.dumps({"type": "unsubscribed", "channel": channel, "code": code, "reason": reason})


def error(code: ErrorCode, message: str, *, id: str | None = None, channel: str | None = None) -> bytes:  # noqa: A002
    frame = {"type": "error", "code": code, "message": message}
    if id is not None:
        frame["id"] = id
    if channel is not None:
        frame["channel"] = channel
    return orjson.dumps(frame)


def disconnect(code: CloseCode, reason: str, retry: float) -> bytes:
    """`retry`: seconds; sent as null where the code says not to come back."""
    return orjson.dumps(
        {"type": "disconnect", "code": int(code), "reason": reason, "retry": retry if may_reconnect(code) else None}
    )
