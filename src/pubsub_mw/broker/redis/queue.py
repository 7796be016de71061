"""Take requests from Redis and settle them.

In:     a worker's name; parts of answers
Out:    requests, those first that a dead worker left behind
Owns:   the consumer group and the commands on it
Never:  acknowledges before the answer is published; trims the stream, which would drop what nobody has read

XACK has no owner check, DELCONSUMER drops pending work and MAXLEN drops unread work: none of them is relied on.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pubsub_mw.broker.interface import Taken
from pubsub_mw.broker.redis.scripts import Call, Scripts
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import ConnectionId, Draft
from pubsub_mw.settings import Settings

__all__ = ["RedisQueue"]

_GROUP = "workers"
_DEAD_SIZE = 1_000
"""Requests kept that were set aside; the oldest go first."""


class _Link(Protocol):
    def run(self, build: Callable[[bool], Sequence[Call | tuple[Any, ...]]], *, wait: float = 0.0) -> list[Any]: ...


class RedisQueue:
    """`RequestQueue` on one Redis server."""

    def __init__(self, link: _Link, settings: Settings, worker: str) -> None:
        self._link = link
        self._settings = settings
        self._scripts = Scripts(settings)
        self._worker = worker
        self._stream = self._scripts.keyspace.requests
        self._reclaim_at = 0.0

    def take(self, limit: int, wait: float) -> list[Taken]:
        """Take up to `limit` requests; see `RequestQueue.take`."""
        try:
            return self._take(limit, wait)
        except BrokerUnavailable as error:
            if "NOGROUP" not in str(error):
                raise
            # The first worker ever, or the first after Redis lost its data.
            self._link.run(lambda _: [("XGROUP", "CREATE", self._stream, _GROUP, "0", "MKSTREAM")])
            return self._take(limit, wait)

    def _take(self, limit: int, wait: float) -> list[Taken]:
        if time.monotonic() >= self._reclaim_at:
            self._reclaim_at = time.monotonic() + min(1.0, self._settings.lease / 2)
            reclaim = self._scripts.reclaim(_GROUP, self._worker, self._settings.lease, limit)
            now, found = self._link.run(lambda _: [("TIME",), reclaim])
            if found:
                return [Taken(entry.decode(), payload, _age(entry, now), int(count)) for entry, count, payload in found]
        block = max(1, round(wait * 1_000))
        read = (
            *("XREADGROUP", "GROUP", _GROUP, self._worker, "COUNT", limit, "BLOCK", block),
            *("STREAMS", self._stream, ">"),
        )
        now, found = self._link.run(lambda _: [("TIME",), read], wait=wait)
        entries = found[0][1] if found else []
        return [Taken(entry.decode(), fields[1], _age(entry, now), 1) for entry, fields in entries]

    def renew(self, entries: Sequence[str]) -> None:
        """Say that these are still worked on."""
        if entries:
            self._link.run(lambda _: [("XCLAIM", self._stream, _GROUP, self._worker, 0, *entries, "JUSTID")])

    def settle(self, drafts: Sequence[Draft], done: Sequence[str]) -> None:
        """Publish, then acknowledge; see `RequestQueue.settle`."""

        def build(is_retry: bool) -> list[Call | tuple[Any, ...]]:
            calls: list[Call | tuple[Any, ...]] = [self._scripts.publish(draft, is_retry=is_retry) for draft in drafts]
            if done:
                calls += [("XACK", self._stream, _GROUP, *done), ("XDEL", self._stream, *done)]
            return calls

        self._link.run(build)

    def set_aside(self, taken: Taken) -> None:
        """Keep a request that cannot be run, without its payload: it may hold cookies, and whoever reads the queue
        need not be able to use them."""
        note = ("XADD", self._scripts.keyspace.dead, "MAXLEN", "~", _DEAD_SIZE, "*", "entry", taken.entry)
        count = ("deliveries", taken.delivery_count, "bytes", len(taken.payload))
        self._link.run(
            lambda _: [
                (*note, *count),
                ("XACK", self._stream, _GROUP, taken.entry),
                ("XDEL", self._stream, taken.entry),
            ]
        )

    def cancelled(self, requests: Sequence[tuple[ConnectionId, str]]) -> list[bool]:
        """Tell which were cancelled; see `RequestQueue.cancelled`."""
        if not requests:
            return []
        keys = [self._scripts.keyspace.cancelled(connection, request_id) for connection, request_id in requests]
        (replies,) = self._link.run(lambda _: [("MGET", *keys)])
        return [reply is not None for reply in replies]


def _age(entry: bytes, now: list[bytes]) -> float:
    """Seconds from a stream entry's id, whose first part is Redis's clock in ms, to `now`, as from TIME."""
    return max(0.0, int(now[0]) + int(now[1]) / 1e6 - int(entry.partition(b"-")[0]) / 1e3)
