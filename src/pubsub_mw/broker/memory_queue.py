"""Keep the requests for workers inside one process.

In:     offers; what workers take, renew and settle
Out:    requests in order, those first whose worker gave no sign of life
Owns:   what is stored, by entry; the lane of each connection: how many run, and which wait for that
Never:  waits but in `take`; takes the lock, which is the broker's: but for `take` its callers hold it

What `lanes.lua` and the scripts after it are for Redis. Nothing is lost here, so nothing has to be found again.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pubsub_mw.broker.interface import Acceptance, Offer, Taken
from pubsub_mw.model import ConnectionId, Request
from pubsub_mw.settings import Settings

__all__ = ["MemoryRequests"]


@dataclass(slots=True)
class _Stored:
    """One request that a worker may take."""

    payload: bytes
    lane: str
    since: float
    taken_until: float = 0.0
    deliveries: int = 0


@dataclass(slots=True)
class _Lane:
    """Of one connection: entries that run, and what waits, by the request's id, in order."""

    running: set[str] = field(default_factory=set)
    waiting: dict[str, _Stored] = field(default_factory=dict)


class MemoryRequests:
    """The request queue of a `MemoryBroker`."""

    def __init__(self, settings: Settings, lock: threading.Lock) -> None:
        self._settings = settings
        self.stored: dict[str, _Stored] = {}
        self.lanes: dict[str, _Lane] = {}
        self._waiting = 0
        self._claims: dict[tuple[str, str], float] = {}
        self._cancelled: dict[tuple[str, str], float] = {}
        self._entry = 0
        self.use_lock(lock)

    def use_lock(self, lock: threading.Lock) -> None:
        """Wait with this lock from now on: a forked process has one of its own."""
        self._arrived = threading.Condition(lock)

    def put(self, payload: bytes) -> None:
        """Store a request that is in no lane, without a look at the bounds."""
        self._start(_Stored(payload, "", time.monotonic()))

    def offer(self, offer: Offer) -> Acceptance:
        settings, now, claim = self._settings, time.monotonic(), (offer.connection, offer.request_id)
        if self._claims.get(claim, 0.0) > now:
            return Acceptance.KNOWN
        if len(self.stored) + self._waiting >= settings.queue_size:
            return Acceptance.FULL
        request = _Stored(offer.payload, offer.connection if offer.is_ordered else "", now)
        lane = self.lanes.setdefault(request.lane, _Lane()) if request.lane else _Lane()
        if not lane.waiting and len(lane.running) < settings.in_flight:
            self._start(request)
        elif len(lane.waiting) < settings.request_backlog:
            lane.waiting[offer.request_id] = request
            self._waiting += 1
        else:
            return Acceptance.BUSY
        self._claims[claim] = now + settings.claim_ttl
        return Acceptance.STORED

    def _start(self, request: _Stored) -> None:
        self._entry += 1
        self.stored[str(self._entry)] = request
        if request.lane:
            self.lanes.setdefault(request.lane, _Lane()).running.add(str(self._entry))
        self._arrived.notify()

    def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        if self._leave_lane(connection, request_id):
            del self._claims[connection, request_id]
            return True
        self._cancelled[connection, request_id] = time.monotonic() + self._settings.idempotency_ttl
        return False

    def withdraw(self, connection: ConnectionId, request_id: str) -> None:
        self._leave_lane(connection, request_id)

    def _leave_lane(self, connection: str, request_id: str) -> bool:
        lane = self.lanes.get(connection)
        if lane is None or lane.waiting.pop(request_id, None) is None:
            return False
        self._waiting -= 1
        return True

    def take(self, limit: int, wait: float) -> list[Taken]:
        with self._arrived:
            taken = self._take(limit)
            if not taken:
                self._arrived.wait(wait)
                taken = self._take(limit)
            return taken

    def _take(self, limit: int) -> list[Taken]:
        now = time.monotonic()
        taken: list[Taken] = []
        for entry, request in self.stored.items():
            if len(taken) == limit:
                break
            if request.taken_until <= now:
                request.taken_until = now + self._settings.lease
                request.deliveries += 1
                taken.append(Taken(entry, request.lane, request.payload, now - request.since, request.deliveries))
        return taken

    def renew(self, running: Mapping[str, Request]) -> list[str]:
        now = time.monotonic()
        for entry, request in running.items():
            if entry in self.stored:
                self.stored[entry].taken_until = now + self._settings.lease
                self._claims[request.connection, request.id] = now + self._settings.claim_ttl
        return [entry for entry in running if entry not in self.stored]

    def give_back(self, taken: Iterable[Taken]) -> None:
        for item in taken:
            request = self.stored.get(item.entry)
            if request is not None and request.deliveries == item.delivery_count:
                request.taken_until = 0.0
                request.deliveries -= 1
                self._arrived.notify()

    def settle(self, done: Iterable[Taken]) -> None:
        for taken in done:
            self.stored.pop(taken.entry, None)
            lane = self.lanes.get(taken.lane)
            # Whoever settles it second finds it gone, and lets nothing in.
            if lane is None or taken.entry not in lane.running:
                continue
            lane.running.remove(taken.entry)
            if lane.waiting:
                self._waiting -= 1
                self._start(lane.waiting.pop(next(iter(lane.waiting))))
            elif not lane.running:
                del self.lanes[taken.lane]

    def cancelled(self, requests: Sequence[Request]) -> list[bool]:
        now = time.monotonic()
        return [self._cancelled.get((request.connection, request.id), 0.0) > now for request in requests]

    def counts(self) -> dict[str, int]:
        now = time.monotonic()
        running = sum(request.taken_until > now for request in self.stored.values())
        return {"ready": len(self.stored) - running, "running": running, "waiting": self._waiting}

    def sweep(self, now: float) -> None:
        """Forget claims and cancellations that are over."""
        self._claims = {claim: expires for claim, expires in self._claims.items() if expires > now}
        self._cancelled = {request: expires for request, expires in self._cancelled.items() if expires > now}

    def lose(self) -> None:
        """Forget everything, as a Redis restarted without persistence does."""
        for kept in (self.stored, self.lanes, self._claims, self._cancelled):
            kept.clear()
        self._waiting = 0
