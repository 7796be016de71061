"""Remember where each of several channels was left, as one text.

In:     a cursor that a client gives back; frames on their way to it
Out:    positions to go on from; which frames a poller knows already; the cursor after those frames
Owns:   the text: of one channel its position; of several, for each a mark and a colon, `<key>.<epoch>.<offset>.<tag>:`.
        The key is a hash of the channel's name, which may hold what an SSE `id` should not
Never:  lets a client believe what it did not receive: a mark moves with a frame and no sooner

A mark may go on with a digest of who the client believes to be on a presence channel, or say that the channel was
refused: by these a poller is told of both once, though each poll subscribes anew.

A channel that a cursor does not know begins anew. Two names with one key are not to be expected (48 bits), and would
harm nobody but who chose them: the position of another channel is told to be one, as lost continuity.
"""

import base64
import hashlib
import re
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from pubsub_mw import protocol
from pubsub_mw.model import Position

__all__ = ["Cursor"]

_REFUSED = "-"
_MARK = r"([A-Za-z0-9_-]{8})\.(-|[A-Za-z0-9_-]+\.[0-9]+\.[A-Za-z0-9_-]+)(?:\.(-|[0-9a-f]{1,16}))?:"
_MARKS = re.compile(f"(?:{_MARK})+")


class _Mark(NamedTuple):
    """What is known of one channel: `position`, `-` = none; `digest` of its members, "" = none, `_REFUSED` = it was."""

    position: str = "-"
    digest: str = ""


class Cursor:
    """Where a client is. It is false while nothing is known.

    Args:
        first: the channel that a bare position belongs to: the first one that was asked for, or ""
    """

    __slots__ = ("_first", "_marks")

    def __init__(self, first: str) -> None:
        self._first = first
        self._marks: dict[str, _Mark] = {}

    @classmethod
    def parse(cls, text: str, first: str) -> "Cursor":
        """Read a cursor.

        Raises:
            ValueError: the text is none.
        """
        cursor = cls(first)
        if _MARKS.fullmatch(text):
            cursor._marks = {key: _Mark(position, digest) for key, position, digest in re.findall(_MARK, text)}
        else:
            cursor.move(first, str(Position.parse(text)))
        return cursor

    def __bool__(self) -> bool:
        return bool(self._marks)

    def __str__(self) -> str:
        only = self._marks.get(_key(self._first), _Mark())
        if len(self._marks) == 1 and only.position != "-" and not only.digest:
            return only.position
        return "".join(f"{key}.{'.'.join(filter(None, mark))}:" for key, mark in self._marks.items())

    def add(self, other: "Cursor") -> None:
        """Take over what `other` knows."""
        self._marks |= other._marks

    def at(self, channel: str) -> str | None:
        """Return the position at which the client left `channel`, if it is known."""
        position = self._marks.get(_key(channel), _Mark()).position
        return None if position == "-" else position

    def move(self, channel: str, position: str) -> None:
        """Note that the client has everything of `channel` up to `position`."""
        key = _key(channel)
        self._marks[key] = self._marks.get(key, _Mark())._replace(position=position)

    def follow(self, frame: bytes, own: str) -> bool:
        """Move by a frame that goes to the client; False if it says nothing that a poller does not know already.

        Args:
            own: the connection's own channel: that of a frame with a position and no channel
        """
        message = protocol.split_message(frame)
        if message is not None:
            self.move(message.channel, message.position)
            return True
        if frame == protocol.PING:
            return False
        if frame.startswith(b'{"type":"response'):
            self.move(own, protocol.position_of(frame))
            return True
        told = orjson.loads(frame)
        kind, channel = told["type"], told.get("channel", own)
        key = _key(channel)
        before = self._marks.get(key, _Mark())
        if kind == "error" and "channel" in told:
            self._marks[key] = before._replace(digest=_REFUSED)
            return before.digest != _REFUSED
        if "position" in told:
            self.move(channel, told["position"])
        if kind == "subscribed":
            digest = _digest("0", told["members"]) if "members" in told else ""
            self._marks[key] = self._marks[key]._replace(digest=digest)
        elif kind in ("join", "leave") and before.digest:
            self._marks[key] = before._replace(digest=_digest(before.digest, [told["member"]]))
        return kind != "subscribed" or told["recovered"] is not True or before != self._marks[key]


def _digest(digest: str, members: list[dict[str, Any]]) -> str:
    """Take members into a digest, or out of it: it is the sum, without carry, of those of all."""
    total = int(digest, 16)
    for member in members:
        content = orjson.dumps(member, option=orjson.OPT_SORT_KEYS)
        total ^= int.from_bytes(hashlib.sha256(content).digest()[:8])
    return f"{total:x}"


@lru_cache(maxsize=4_096)
def _key(channel: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(channel.encode()).digest()[:6]).decode()
