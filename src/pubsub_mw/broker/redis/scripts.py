"""Turn drafts and reads into script calls, and their replies into values.

In:     drafts; channels and offsets
Out:    Redis commands as tuples of arguments; positions and pages from replies
Owns:   the scripts' argument order, and their digests
Never:  does I/O: the synchronous and the asynchronous door both send what is built here
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import hiredis

from pubsub_mw.broker.codec import decode, header_end
from pubsub_mw.broker.interface import Offer, Taken
from pubsub_mw.broker.presence import PresenceCall, Present, Verb, decode_notice
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, ConnectionId, Draft, HistoryPage, Position
from pubsub_mw.protocol import message_tail
from pubsub_mw.settings import Settings

__all__ = ["PUBLICATIONS_PER_CALL", "Call", "Scripts", "pack"]


@dataclass(frozen=True, slots=True)
class Call:
    """One script call: its keys and arguments, and the script itself for a server that does not know it yet."""

    script: bytes
    digest: str
    keys: tuple[str, ...]
    arguments: tuple[str | bytes, ...]

    def by_digest(self) -> tuple[Any, ...]:
        return ("EVALSHA", self.digest, len(self.keys), *self.keys, *self.arguments)

    def by_source(self) -> tuple[Any, ...]:
        return ("EVAL", self.script, len(self.keys), *self.keys, *self.arguments)


def pack(commands: Iterable[tuple[Any, ...]]) -> bytes:
    """Return commands as Redis reads them. redis-py's own packing looks at each argument for what we never give it."""
    return b"".join(map(hiredis.pack_command, commands))


def _script(*parts: bytes) -> tuple[bytes, str]:
    source = b"".join(parts)
    return source, hashlib.sha1(source, usedforsecurity=False).hexdigest()


def _load(*names: str) -> tuple[bytes, str]:
    return _script(*[files("pubsub_mw.broker.redis").joinpath(name).read_bytes() for name in names])


PUBLICATIONS_PER_CALL, _BYTES_PER_CALL = 64, 65_536
"""How much one script call publishes. Redis serves nobody else meanwhile: for half a millisecond."""

_PUBLISH, _ = _load("publish.lua")
_READ = _load("read.lua")
_ACCEPT = _load("lanes.lua", "accept.lua")
_SETTLE = _load("lanes.lua", "settle.lua")
_SWEEP = _load("lanes.lua", "sweep.lua")
_CANCEL = _load("lanes.lua", "cancel.lua")
_RECLAIM = _load("reclaim.lua")
_GIVE_BACK = _load("give_back.lua")
_CONNECTION_BEGIN = _load("connection_begin.lua")
_CONNECTION_END = _load("connection_end.lua")
_SERVER_LEASE = _load("server_lease.lua")
_PRESENCE = _load("presence.lua")


class Scripts:
    """The calls for one keyspace under one set of settings."""

    def __init__(self, settings: Settings) -> None:
        self.keyspace = Keyspace(settings.prefix)
        self._position_ttl = _milliseconds(settings.position_ttl)
        # A channel that nobody published to: as long as history would live, and longer than two position checks.
        self._untouched_ttl = _milliseconds(max(settings.history_ttl, 2 * settings.check_interval))
        self._idempotency_ttl = _milliseconds(settings.idempotency_ttl)
        self._presence_ttl = _milliseconds(settings.presence_ttl)
        self._presence_lifetime = _milliseconds(2 * (settings.presence_ttl + settings.presence_grace))
        self._presence_size = str(settings.presence_size)
        self._claim_ttl = _milliseconds(settings.claim_ttl)
        self._revocation_ttl = _milliseconds(settings.revocation_ttl)
        # In the script and not beside each publication, where Redis would read it each time.
        same = (_milliseconds(settings.history_ttl), self._position_ttl, message_tail.decode())
        first = "local history_ttl, position_ttl, tail = '{}', '{}', '{}'\n".format(*same)
        self._publish = _script(first.encode(), _PUBLISH)

    def publish(self, drafts: Sequence[Draft], *, is_retry: bool) -> list[Call]:
        """Return the calls that publish `drafts` in order; `positions_from` reads what they return."""
        epoch = _fresh_epoch() if is_retry else ""
        calls, together, size = list[Call](), list[Draft](), 0
        for draft in drafts:
            together.append(draft)
            size += len(draft.head)
            if len(together) == PUBLICATIONS_PER_CALL or size >= _BYTES_PER_CALL:
                calls.append(self._publish_call(together, epoch))
                together, size = [], 0
        return [*calls, self._publish_call(together, epoch)] if together else calls

    def _publish_call(self, drafts: Sequence[Draft], epoch: str) -> Call:
        arguments: list[str | bytes] = [epoch]
        for draft in drafts:
            size = str(draft.history_size if draft.is_kept else -draft.history_size)
            arguments += (
                draft.tag,
                draft.head,
                header_end(draft),
                size,
                self._once(draft) if draft.idempotency_key else "",
            )
        keys = tuple([self.keyspace.position(draft.channel) for draft in drafts])
        return Call(*self._publish, keys, tuple(arguments))

    def _once(self, draft: Draft) -> str:
        ttl = self._claim_ttl if draft.reply else self._idempotency_ttl
        return f"{draft.part} {ttl} {draft.idempotency_key}"

    def read(self, channel: Channel, since: int | None, page_bytes: int) -> Call:
        return Call(
            *_READ,
            (self.keyspace.position(channel), self.keyspace.history(channel)),
            (
                _fresh_epoch(),
                "" if since is None else str(since),
                str(page_bytes),
                self._untouched_ttl,
                self._position_ttl,
            ),
        )

    def revoke(
        self, identity: str, subject: str, at: float, news: Draft, *, is_retry: bool
    ) -> list[Call | tuple[Any, ...]]:
        key = self.keyspace.revoked(identity)
        kept = [("HSET", key, subject, repr(at)), ("PEXPIRE", key, self._revocation_ttl)]
        return [*kept, *self.publish([news], is_retry=is_retry)]

    def accept(self, offer: Offer, queue_size: int, in_flight: int, backlog: int) -> Call:
        keys = (*self.keyspace.lanes, self.keyspace.claim(offer.connection, offer.request_id))
        lane = offer.connection if offer.is_ordered else ""
        limits = (str(queue_size), str(in_flight), str(backlog))
        return Call(*_ACCEPT, keys, (self._claim_ttl, offer.payload, offer.request_id, lane, *limits))

    def settle(self, group: str, done: Sequence[Taken]) -> Call:
        held = [part for taken in done for part in (taken.entry, taken.lane)]
        return Call(*_SETTLE, self.keyspace.lanes, (self._claim_ttl, group, *held))

    def sweep(self, interval: float, most: int) -> Call:
        return Call(*_SWEEP, self.keyspace.lanes, (self._claim_ttl, _milliseconds(interval), str(most)))

    def cancel(self, connection: ConnectionId, request_id: str, *, is_answered: bool) -> Call:
        keyspace = self.keyspace
        keys = (*keyspace.lanes, keyspace.claim(connection, request_id), keyspace.cancelled(connection, request_id))
        mark_ttl = "" if is_answered else self._idempotency_ttl
        return Call(*_CANCEL, keys, (self._claim_ttl, connection, request_id, mark_ttl))

    def reclaim(self, group: str, worker: str, lease: float, limit: int) -> Call:
        return Call(*_RECLAIM, (self.keyspace.requests,), (group, worker, _milliseconds(lease), str(limit)))

    def give_back(self, group: str, worker: str, lease: float, taken: Sequence[Taken]) -> Call:
        held = [part for item in taken for part in (item.entry, str(item.delivery_count))]
        return Call(*_GIVE_BACK, (self.keyspace.requests,), (group, worker, _milliseconds(lease), *held))

    def connection_begin(
        self, connection: ConnectionId, server: str, begin: bytes, end: bytes, *, takes_over: bool
    ) -> Call:
        arguments = (connection, server, begin, end, self._presence_ttl, "1" if takes_over else "0")
        return Call(*_CONNECTION_BEGIN, self.keyspace.reports, arguments)

    def connection_end(self, connection: ConnectionId, server: str) -> Call:
        return Call(*_CONNECTION_END, self.keyspace.reports[:3], (connection, server))

    def server_lease(self, server: str, lease: float, most: int) -> Call:
        return Call(*_SERVER_LEASE, self.keyspace.reports, (server, _milliseconds(lease), str(most)))

    def presence(self, call: PresenceCall) -> Call:
        arguments: list[str | bytes] = [_fresh_epoch(), call.epoch, str(call.number)]
        arguments += [self._presence_ttl, self._presence_lifetime, self._presence_size]
        for change in call.changes:
            rest = str(round(change.after * 1_000)) if change.verb is Verb.LEAVE else change.info
            arguments += [change.verb.value, change.connection, change.nonce, change.user, rest]
        return Call(
            *_PRESENCE, (*self.keyspace.presence(call.channel), self.keyspace.live(call.channel)), tuple(arguments)
        )

    @staticmethod
    def present_from(reply: list[Any]) -> Present:
        epoch, number, accepted, notices, *users = reply
        return Present(
            epoch=epoch.decode(),
            number=int(number),
            accepted=tuple(map(bool, accepted)),
            notices=tuple(map(decode_notice, notices)),
            users=_users(users[0]) if users else None,
        )

    @staticmethod
    def positions_from(replies: Iterable[bytes | list[bytes]]) -> list[Position]:
        """Read what the calls of `publish` returned.

        Raises:
            BrokerUnavailable: something else is kept under our keys.
        """
        made = (reply if isinstance(reply, list) else [reply] for reply in replies)
        return [Scripts.position_from(text) for texts in made for text in texts]

    @staticmethod
    def position_from(reply: bytes) -> Position:
        """Read a position as `publish.lua` keeps it.

        Raises:
            BrokerUnavailable: something else is kept under our keys.
        """
        try:
            return Position.parse(reply.decode())
        except ValueError as error:
            raise BrokerUnavailable(f"a key of ours holds something else: {error}") from error

    @staticmethod
    def page_from(reply: list[bytes], since: int | None) -> HistoryPage:
        """Read what `read.lua` returned.

        Raises:
            BrokerUnavailable: something else is kept under our keys.
        """
        try:
            top, *payloads = Position.parse(reply[0].decode()), *reply[1:]
            publications = tuple(decode(payload) for payload in payloads)
        except ValueError as error:
            raise BrokerUnavailable(f"a key of ours holds something else: {error}") from error
        # Where nothing is left of history the page is complete too: there is no more to come.
        end = publications[-1].position.offset if publications else top.offset
        return HistoryPage(top=top, publications=publications, is_complete=since is None or end >= top.offset)


def _users(flat: list[bytes]) -> dict[str, bytes]:
    return {user.decode(): info for user, info in zip(flat[::2], flat[1::2], strict=True)}


def _fresh_epoch() -> str:
    return secrets.token_hex(4)


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1_000)))
