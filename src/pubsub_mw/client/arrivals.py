"""Keep what arrived for the application and was not handed on yet.

In:     values, in the order in which they arrived
Out:    the same values; then the end, or the error that ended them
Owns:   one bounded queue
Never:  drops a value; takes more than its bound: whoever puts waits
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Arrivals", "call"]

log = logging.getLogger("pubsub_mw")

T = TypeVar("T")


class Arrivals(Generic[T]):
    """What arrived, in order; at `limit` values, whoever puts waits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._error: Exception | None = None
        self._is_open = True
        self._changed = asyncio.Event()

    async def put(self, item: T) -> bool:
        """Append; False if it was closed instead."""
        while self._is_open and len(self._items) >= self._limit:
            await self._change()
        if self._is_open:
            self._items.append(item)
            self._changed.set()
        return self._is_open

    async def take(self) -> T | None:
        """Return the next one; None when there will be no more.

        Raises:
            Exception: the one given to `close`, after all that arrived before it.
        """
        while not self._items:
            if not self._is_open:
                if self._error is not None:
                    raise self._error
                return None
            await self._change()
        self._changed.set()
        return self._items.popleft()

    def close(self, error: Exception | None = None) -> None:
        """Take nothing more. What is here can still be taken. Idempotent."""
        if self._is_open:
            self._is_open, self._error = False, error
            self._changed.set()

    def clear(self) -> None:
        self._items.clear()
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def call(callback: Callable[..., object], *values: Any) -> None:
    """Call the application; what it raises is logged and stops nothing."""
    try:
        result = callback(*values)
        if inspect.isawaitable(result):
            await result
    except Exception:
        log.exception("a callback raised")
