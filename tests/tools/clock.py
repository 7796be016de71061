"""Measure test time in one unit, and wait for a thing instead of for a while.

In:     `PUBSUB_TEST_SCALE`, a factor for slow machines; 1 by default
Out:    `MS`, and `eventually` for synchronous and asynchronous tests
Owns:   the pause between two looks
Never:  waits longer than it must; gives up without saying on what
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeVar, overload

__all__ = ["MS", "eventually", "eventually_async"]

T = TypeVar("T")

MS = float(os.environ.get("PUBSUB_TEST_SCALE", "1")) / 1000
_PAUSES_SECONDS = (0.001, 0.01)
"""Between two looks: at first, and after a while. Most of what is waited for is there at once or soon."""


def eventually(condition: Callable[[], T], timeout: float = 10_000 * MS, message: str = "") -> T:
    """Call `condition` until what it returns is true, and return that.

    An `AssertionError` in `condition` means *not yet*, and the last one is the cause of the failure in the end.
    """
    began = time.monotonic()
    while True:
        value, doubt = None, None
        try:
            if value := condition():
                return value
        except AssertionError as error:
            doubt = error
        waited = time.monotonic() - began
        if waited > timeout:
            raise _gave_up(timeout, message, value) from doubt
        time.sleep(_pause(waited))


@overload
async def eventually_async(condition: Callable[[], Awaitable[T]], timeout: float = ..., message: str = ...) -> T: ...
@overload
async def eventually_async(condition: Callable[[], T], timeout: float = ..., message: str = ...) -> T: ...
async def eventually_async(
    condition: Callable[[], T | Awaitable[T]], timeout: float = 10_000 * MS, message: str = ""
) -> T:
    """Do the same on the event loop; `condition` may be a coroutine function."""
    began = time.monotonic()
    while True:
        value, doubt = None, None
        try:
            answer = condition()
            if value := (await answer if isawaitable(answer) else answer):
                return value
        except AssertionError as error:
            doubt = error
        waited = time.monotonic() - began
        if waited > timeout:
            raise _gave_up(timeout, message, value) from doubt
        await asyncio.sleep(_pause(waited))


def _pause(waited: float) -> float:
    shortest, longest = _PAUSES_SECONDS
    return min(longest, max(shortest, waited / 5))


def _gave_up(timeout: float, message: str, value: object) -> AssertionError:
    return AssertionError(f"{message or 'the condition never came true'}: gave up after {timeout:g} s, last {value!r}")
