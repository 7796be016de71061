r"""Keep who is on a channel: users, over all their connections, over all servers.

In:     changes that realtime servers make, and the time
Out:    what became of them, and one notice for each user who came or went
Owns:   the rules, for the memory engine (`presence.lua` holds the same); the layout of a notice on pub/sub,
        `!<epoch> <number> <+ or -> <user>\n<info>`, which no publication begins like
Never:  reads a clock; counts a connection twice, wherever it is resumed

A connection is there on a lease, which its server renews. Whoever asks next takes out those whose lease is over, so
the users of a server that died go without it. Each entry carries a nonce: a server that lost a connection to another
one holds an older nonce, and can neither renew nor end what is not its own any more.

Every user who comes or goes gets the next number of an epoch, in one order for all. Who knows the number before can
apply a notice; who does not asks for all users anew.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pubsub_mw.model import Channel, ConnectionId

__all__ = ["Change", "Notice", "PresenceCall", "Present", "Roster", "Verb", "decode_notice"]


class Verb(StrEnum):
    """What a server says about a connection."""

    ENTER = "enter"  # it is there; taken over from whoever entered it before
    STAY = "stay"  # it is still there, unless another server entered it since; entered anew if it was lost
    LEAVE = "leave"  # it is gone, unless another server entered it since


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that a server says about one connection.

    Attributes:
        verb: see there
        connection: its id
        nonce: of the entry that is meant; no blank
        user: whose connection it is
        info: JSON
        after: of a LEAVE: seconds until it is gone, if it is not entered again
    """

    verb: Verb
    connection: ConnectionId
    nonce: str
    user: str
    info: bytes
    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Notice:
    """A user came, with the first connection, or went, with the last one."""

    epoch: str
    number: int
    is_join: bool
    user: str
    info: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceCall:
    """Changes on one channel; none = just ask.

    Attributes:
        channel: its name
        epoch, number: up to where the caller knows who is there; "" = it does not
        changes: in order
    """

    channel: Channel
    epoch: str = ""
    number: int = 0
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The answer to a call.

    Attributes:
        epoch, number: where the channel is after it
        accepted: for each change whether there was room for the user; True for all but ENTER and STAY
        notices: of what this call brought about, for a caller who knew what was before; else empty
        users: user -> info (JSON) of all who are there, for a caller who did not; else None
    """

    epoch: str
    number: int
    accepted: tuple[bool, ...]
    notices: tuple[Notice, ...]
    users: Mapping[str, bytes] | None


def decode_notice(payload: bytes) -> Notice:
    """Read a notice.

    Raises:
        ValueError: the bytes are not one.
    """
    header, _, info = payload.partition(b"\n")
    epoch, number, sign, user = header.decode("ascii").split(" ")
    if not epoch.startswith("!") or sign not in ("+", "-"):
        raise ValueError("not a notice")
    return Notice(epoch[1:], int(number), sign == "+", user, info)


@dataclass(slots=True)
class _Entry:
    nonce: str
    user: str
    expires: float


@dataclass(slots=True)
class Roster:
    """Who is on one channel, for the memory engine."""

    epoch: str
    number: int = 0
    users: dict[str, bytes] = field(default_factory=dict)
    _entries: dict[ConnectionId, _Entry] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def apply(self, call: PresenceCall, *, now: float, ttl: float, size: int) -> tuple[Present, list[Notice]]:
        """Make the changes, take out whose lease is over; return the answer, and the notices for everybody.

        Args:
            call: what is asked
            now: seconds
            ttl: seconds that a lease lasts
            size: users that there may be
        """
        knows = (call.epoch, call.number) == (self.epoch, self.number)
        notices: list[Notice] = []
        accepted = tuple(self._change(change, now, ttl, size, notices) for change in call.changes)
        for connection in [name for name, entry in self._entries.items() if entry.expires <= now]:
            self._remove(connection, notices)
        present = Present(
            epoch=self.epoch,
            number=self.number,
            accepted=accepted,
            notices=tuple(notices) if knows else (),
            users=None if knows else dict(self.users),
        )
        return present, notices

    def _change(self, change: Change, now: float, ttl: float, size: int, notices: list[Notice]) -> bool:
        entry = self._entries.get(change.connection)
        is_own = entry is not None and entry.nonce == change.nonce
        if change.verb is Verb.LEAVE:
            if entry is not None and is_own:
                entry.expires = now + change.after
            return True
        if entry is not None and change.verb is Verb.STAY and not is_own:
            return True
        if entry is not None and entry.user != change.user:
            self._remove(change.connection, notices)
            entry, is_own = None, False
        if change.user not in self.users and len(self.users) >= size:
            return False
        self._entries[change.connection] = _Entry(change.nonce, change.user, now + ttl)
        if entry is None:
            self._counts[change.user] += 1
        if not is_own:
            is_new = change.user not in self.users
            self.users[change.user] = change.info
            if is_new:
                self._tell(change.user, change.info, notices, is_join=True)
        return True

    def _remove(self, connection: ConnectionId, notices: list[Notice]) -> None:
        user = self._entries.pop(connection).user
        self._counts[user] -= 1
        if not self._counts[user]:
            del self._counts[user]
            self._tell(user, self.users.pop(user), notices, is_join=False)

    def _tell(self, user: str, info: bytes, notices: list[Notice], *, is_join: bool) -> None:
        self.number += 1
        notices.append(Notice(self.epoch, self.number, is_join, user, info))
