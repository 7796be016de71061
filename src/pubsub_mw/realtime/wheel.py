"""Keep many deadlines on one timer.

In:     whoever has a deadline, and when it is (seconds of the loop's clock)
Out:    `on_due` calls, never before their time, late by `_TICK_SECONDS` at most while the loop is not busy
Owns:   one timer of the event loop, and a bucket for each tick in which something is due
Never:  keeps whoever has gone: `discard` forgets at once; holds the loop for more than `_CALLS_PER_TURN` calls

A timer of its own per connection would cost an idle connection more memory than all its other clockwork, and a heap of
100,000 of them is slow to change.
"""

import asyncio
import heapq
import math
from typing import Protocol

__all__ = ["Timed", "Wheel"]

_TICK_SECONDS = 1 / 64
_CALLS_PER_TURN = 500


class Timed(Protocol):
    """Who may have one deadline at a time. `due` belongs to the wheel: the tick, or 0 for none."""

    due: int

    def on_due(self) -> None:
        """Be told, once; what comes after that is set anew."""


class Wheel:
    """The deadlines of one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buckets: dict[int, set[Timed] | None] = {}  # None: nothing is due then any more
        self._ticks: list[int] = []  # the keys of `_buckets`, as a heap
        self._timer: asyncio.TimerHandle | None = None

    def set(self, timed: Timed, at: float) -> None:
        """Let `timed` be told at `at`, instead of whenever it was to be told before."""
        tick = max(1, math.ceil(at / _TICK_SECONDS))
        if timed.due != tick:
            self.discard(timed)
            if tick not in self._buckets:
                self._buckets[tick] = None
                heapq.heappush(self._ticks, tick)
                if self._ticks[0] == tick:
                    self._start_timer()
            bucket = self._buckets[tick]
            if bucket is None:
                bucket = self._buckets[tick] = set()
            bucket.add(timed)
            timed.due = tick

    def discard(self, timed: Timed) -> None:
        """Forget the deadline of `timed`, if it has one."""
        bucket = self._buckets.get(timed.due)
        if bucket is not None:
            bucket.discard(timed)
            if not bucket:
                self._buckets[timed.due] = None
        timed.due = 0

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._ticks[0] * _TICK_SECONDS, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now, calls = self._loop.time(), 0
        try:
            while self._ticks and self._ticks[0] * _TICK_SECONDS <= now and calls < _CALLS_PER_TURN:
                bucket = self._buckets[self._ticks[0]]
                if not bucket:
                    del self._buckets[heapq.heappop(self._ticks)]
                    continue
                timed = bucket.pop()
                timed.due = 0
                calls += 1
                timed.on_due()
        finally:
            if self._ticks:
                self._start_timer()
