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
_PAUSE_SECONDS = 0.01


def eventually(condition: Callable[[], T], timeout: float = 5000 * MS, message: str = "") -> T:
    """Call `condition` until what it returns is true, and return that.

    An `AssertionError` in `condition` means *not yet*, and the last one is the cause of the failure in the end.
    """
    deadline = time.monotonic() + timeout
    while True:
        value, doubt = None, None
        try:
            if value := condition():
                return value
        except AssertionError as error:
            doubt = error
        if time.monotonic() > deadline:
            raise _gave_up(timeout, message, value) from doubt
        time.sleep(_PAUSE_SECONDS)


@overload
async def eventually_async(condition: Callable[[], Awaitable[T]], timeout: float = ..., message: str = ...) -> T: ...
@overload
async def eventually_async(condition: Callable[[], T], timeout: float = ..., message: str = ...) -> T: ...
async def eventually_async(
    condition: Callable[[], T | Awaitable[T]], timeout: float = 5000 * MS, message: str = ""
) -> T:
    """Do the same on the event loop; `condition` may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        value, doubt = None, None
        try:
            answer = condition()
            if value := (await answer if isawaitable(answer) else answer):
                return value
        except AssertionError as error:
            doubt = error
        if time.monotonic() > deadline:
            raise _gave_up(timeout, message, value) from doubt
        await asyncio.sleep(_PAUSE_SECONDS)


def _gave_up(timeout: float, message: str, value: object) -> AssertionError:
    return AssertionError(f"{message or 'the condition never came true'}: gave up after {timeout:g} s, last {value!r}")
