"""Take requests from Redis and settle them.

In:     a worker's name; parts of answers
Out:    requests, those first that a dead worker left behind
Owns:   the consumer group and the commands on it
Never:  acknowledges before the answer is published; trims the stream, which would drop what nobody has read

XACK has no owner check, DELCONSUMER drops pending work and MAXLEN drops unread work: none of them is relied on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pubsub_mw.broker.interface import Progress, Taken, answer_key, end_key, part_key
from pubsub_mw.broker.redis.scripts import Call, Scripts
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Draft, Request
from pubsub_mw.settings import Settings

__all__ = ["GROUP", "RedisQueue"]

GROUP = "workers"
"""The consumer group of all workers."""
_DEAD_SIZE = 1_000
"""Requests kept that were set aside; the oldest go first."""
_LANES_PER_CALL = 500
"""Lanes that one script call looks at, so that it does not hold up Redis."""


class _Link(Protocol):
    def run(self, build: Callable[[bool], Sequence[Call | tuple[Any, ...]]], *, wait: float = 0.0) -> list[Any]: ...


class RedisQueue:
    """`RequestQueue` on one Redis server."""

    def __init__(self, link: _Link, settings: Settings, worker: str) -> None:
        self._link = link
        self._settings = settings
        self._scripts = Scripts(settings)
        self._worker = worker
        self._keyspace = self._scripts.keyspace
        self._stream = self._keyspace.requests
        self._claim_ttl = round(settings.claim_ttl * 1_000)
        self._sweep = self._scripts.sweep(settings.lease, _LANES_PER_CALL)
        self._reclaim_at = 0.0

    def take(self, limit: int, wait: float) -> list[Taken]:
        """Take up to `limit` requests; see `RequestQueue.take`."""
        try:
            return self._take(limit, wait)
        except BrokerUnavailable as error:
            if "NOGROUP" not in str(error):
                raise
            self._make_group()
            return self._take(limit, wait)

    def _make_group(self) -> None:
        """Make the group: for the first worker ever, or the first after Redis lost its data."""
        try:
            self._link.run(lambda _: [("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")])
        except BrokerUnavailable as error:
            if "BUSYGROUP" not in str(error):  # else another worker was first
                raise

    def _take(self, limit: int, wait: float) -> list[Taken]:
        if time.monotonic() >= self._reclaim_at:
            lease = self._settings.lease
            self._reclaim_at = time.monotonic() + min(1.0, lease / 2)
            reclaim, sweep = self._scripts.reclaim(GROUP, self._worker, lease, limit), self._sweep
            now, found, lanes = self._link.run(lambda _: [("TIME",), reclaim, sweep])
            while lanes >= _LANES_PER_CALL:
                (lanes,) = self._link.run(lambda _: [sweep])
            if len(found) == limit:
                self._reclaim_at = 0.0  # there may be more, and they are the oldest
            if found:
                at = _milliseconds(now)
                return [_taken(entry, fields, at, int(count)) for entry, count, fields in found]
        block = max(1, round(wait * 1_000))
        read = (
            *("XREADGROUP", "GROUP", GROUP, self._worker, "COUNT", limit, "BLOCK", block),
            *("STREAMS", self._stream, ">"),
        )
        now, found = self._link.run(lambda _: [("TIME",), read], wait=wait)
        entries = found[0][1] if found else []
        at = _milliseconds(now)
        return [_taken(entry, fields, at, 1) for entry, fields in entries]

    def renew(self, running: Mapping[str, Request]) -> list[str]:
        """Renew leases, claims, and what makes an answer show once; see `RequestQueue.renew`."""
        if not running:
            return []
        calls: list[tuple[Any, ...]] = [("XCLAIM", self._stream, GROUP, self._worker, 0, *running, "JUSTID")]
        for request in running.values():
            calls.append(("PEXPIRE", self._keyspace.claim(request.connection, request.id), self._claim_ttl))
            for key in (answer_key(request.id), part_key(request.id)):
                calls.append(("PEXPIRE", self._keyspace.idempotency(request.reply_to, key), self._claim_ttl))
            calls += [("PEXPIRE", key, self._claim_ttl) for key in self._keyspace.lane(request.connection)]
        held = set(self._link.run(lambda _: calls)[0])
        return [entry for entry in running if entry.encode() not in held]

    def give_back(self, taken: Sequence[Taken]) -> None:
        """Let others take what was not begun; see `RequestQueue.give_back`."""
        if taken:
            self._link.run(lambda _: [self._scripts.give_back(GROUP, self._worker, self._settings.lease, taken)])
            self._reclaim_at = 0.0  # if nobody else is there to take it, this worker need not wait

    def settle(self, drafts: Sequence[Draft], done: Sequence[Taken]) -> None:
        """Publish, then take out of the queue; see `RequestQueue.settle`."""

        def build(is_retry: bool) -> list[Call]:
            calls = self._scripts.publish(drafts, is_retry=is_retry)
            return [*calls, self._scripts.settle(GROUP, done)] if done else calls

        self._link.run(build)

    def set_aside(self, taken: Taken) -> None:
        """Keep a request that cannot be run, without its payload: it may hold cookies, and whoever reads the queue
        need not be able to use them."""
        note = ("XADD", self._keyspace.dead, "MAXLEN", "~", _DEAD_SIZE, "*", "entry", taken.entry)
        count = ("deliveries", taken.delivery_count, "bytes", len(taken.payload))
        self._link.run(lambda _: [(*note, *count), self._scripts.settle(GROUP, [taken])])

    def cancelled(self, requests: Sequence[Request]) -> list[bool]:
        """Tell which were cancelled; see `RequestQueue.cancelled`."""
        if not requests:
            return []
        keys = [self._keyspace.cancelled(request.connection, request.id) for request in requests]
        (replies,) = self._link.run(lambda _: [("MGET", *keys)])
        return [reply is not None for reply in replies]

    def progress(self, request: Request) -> Progress:
        """Say how much of an answer was published; see `RequestQueue.progress`."""
        channel = request.reply_to
        keys = [self._keyspace.idempotency(channel, key) for key in (answer_key(request.id), end_key(request.id))]
        begin, end = self._link.run(lambda _: [("GET", key) for key in keys])
        if begin is None or end is not None:
            return Progress.NOTHING if begin is None else Progress.COMPLETE
        place = Scripts.position_from(begin)
        (reply,) = self._link.run(lambda _: [self._scripts.read(channel, place.offset - 1, 1)])
        is_whole = any(
            item.position == place and item.reply.startswith(".")
            for item in Scripts.page_from(reply, None).publications
        )
        return Progress.COMPLETE if is_whole else Progress.BEGUN

    def leave(self) -> None:
        """Take the worker out of the group, if that drops nothing that waits for another one to take it over."""
        try:
            (pending,) = self._link.run(lambda _: [("XPENDING", self._stream, GROUP, "-", "+", 1, self._worker)])
            if not pending:
                self._link.run(lambda _: [("XGROUP", "DELCONSUMER", self._stream, GROUP, self._worker)])
        except BrokerUnavailable as error:
            if "NOGROUP" not in str(error):
                raise


def _milliseconds(time: list[bytes]) -> int:
    """Return a reply to TIME, which is seconds and microseconds."""
    return int(time[0]) * 1_000 + int(time[1]) // 1_000


def _taken(entry: bytes, fields: Sequence[bytes], now: int, delivery_count: int) -> Taken:
    """Return what a stream entry holds: p; c and a too if it came through `accept.lua`. Its id begins with a time."""
    lane, accepted_at = b"", entry.partition(b"-")[0]
    if len(fields) == 6 and fields[5].isdigit():
        lane, accepted_at = fields[3], fields[5]
    age = max(0, now - int(accepted_at)) / 1_000
    return Taken(entry.decode(), lane.decode(errors="replace"), fields[1], age, delivery_count)
