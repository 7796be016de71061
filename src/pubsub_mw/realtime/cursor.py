"""Remember where each of several channels was left, as one text.

In:     a cursor that a client gives back; frames on their way to it
Out:    positions to go on from; the cursor after those frames
Owns:   the text: of one channel its position; of several, for each a mark and a colon, `<key>.<epoch>.<offset>.<tag>:`.
        The key is a hash of the channel's name, which may hold what an SSE `id` should not
Never:  lets a client believe what it did not receive: a mark moves with a frame and no sooner

A channel that a cursor does not know begins anew. Two names with one key are not to be expected (48 bits), and would
harm nobody but who chose them: the position of another channel is told to be one, as lost continuity.
"""

import base64
import hashlib
import re
from functools import lru_cache

import orjson

from pubsub_mw import protocol
from pubsub_mw.model import Position

__all__ = ["Cursor"]

_MARKS = re.compile(r"(?:[A-Za-z0-9_-]{8}\.[A-Za-z0-9_.-]+:)+")


class Cursor:
    """Where a client is.

    Args:
        first: the channel that a bare position belongs to: the first one that was asked for, or ""
    """

    __slots__ = ("_first", "_marks")

    def __init__(self, first: str) -> None:
        self._first = first
        self._marks: dict[str, str] = {}

    @classmethod
    def parse(cls, text: str, first: str) -> "Cursor":
        """Read a cursor.

        Raises:
            ValueError: the text is none.
        """
        cursor = cls(first)
        if _MARKS.fullmatch(text):
            cursor._marks = {mark[:8]: mark[9:] for mark in text[:-1].split(":")}
        else:
            cursor.move(first, str(Position.parse(text)))
        return cursor

    def __str__(self) -> str:
        if len(self._marks) == 1 and (only := self._marks.get(_key(self._first))):
            return only
        return "".join(f"{key}.{mark}:" for key, mark in self._marks.items())

    def add(self, other: "Cursor") -> None:
        """Take over what `other` knows."""
        self._marks |= other._marks

    def at(self, channel: str) -> str | None:
        """Return the position at which the client left `channel`, if it is known."""
        return self._marks.get(_key(channel))

    def move(self, channel: str, position: str) -> None:
        """Note that the client has everything of `channel` up to `position`."""
        self._marks[_key(channel)] = position

    def follow(self, frame: bytes, own: str) -> None:
        """Move by a frame that goes to the client.

        Args:
            own: the connection's own channel: that of a frame with a position and no channel
        """
        message = protocol.split_message(frame)
        if message is not None:
            self.move(message.channel, message.position)
        elif b'"position":"' in frame:
            told = orjson.loads(frame)
            self.move(told.get("channel", own), told["position"])


@lru_cache(maxsize=4_096)
def _key(channel: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(channel.encode()).digest()[:6]).decode()
