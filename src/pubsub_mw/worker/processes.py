"""Keep several worker processes running.

In:     how to start one; how many; folders to watch in development
Out:    processes, started anew when one ends by itself or a source file changes
Owns:   the processes; SIGTERM and SIGINT of the one that supervises
Never:  leaves a process behind: they end when this one does, also when it is killed
"""

import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from watchfiles import PythonFilter, watch

from pubsub_mw.worker.loop import Worker

__all__ = ["run_until_signal", "supervise"]

log = logging.getLogger("pubsub_mw")

_spawn = multiprocessing.get_context("spawn")

_RESTART_SECONDS = 1.0
"""Least time between two starts of one process, so that one that cannot run does not keep the machine busy."""
_LOOK_SECONDS = 0.5
_KILL_SECONDS = 5.0
"""Beyond the drain, for a process to end before it is killed."""


def run_until_signal(worker: Worker) -> None:
    """Run `worker` in this process until SIGTERM, SIGINT, or the end of the process that started this one."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    def stop_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    worker.run()


def supervise(
    target: Callable[..., None], arguments: tuple[Any, ...], count: int, *, drain: float, reload: bool
) -> None:
    """Run `count` processes of `target(*arguments)` until SIGTERM or SIGINT; then let them finish, and return.

    Args:
        target: importable, since each process imports it anew
        arguments: of `target`
        count: processes
        drain: seconds that a process may take to finish
        reload: whether to start all anew when a Python file below this folder changes
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    processes = [_Slot(target, arguments) for _ in range(count)]
    with _changes(reload, stopping) as changed:
        while not stopping.is_set():
            multiprocessing.connection.wait([slot.process.sentinel for slot in processes], _LOOK_SECONDS)
            if changed.is_set():
                changed.clear()
                log.info("a source file changed; starting the workers anew")
                _stop([slot.process for slot in processes], drain)
            for slot in processes:
                if not stopping.is_set():
                    slot.look()
    _stop([slot.process for slot in processes], drain)


class _Slot:
    """A place for one process, filled again when it ends."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._target = target
        self._arguments = arguments
        self.process = self._start()

    def _start(self) -> SpawnProcess:
        self._started_at = time.monotonic()
        process = _spawn.Process(target=self._target, args=self._arguments)
        process.start()
        return process

    def look(self) -> None:
        """Start the process anew if it ended."""
        if not self.process.is_alive() and time.monotonic() - self._started_at >= _RESTART_SECONDS:
            log.warning("worker process %s ended with %s; starting another", self.process.pid, self.process.exitcode)
            self.process = self._start()


def _stop(processes: list[SpawnProcess], drain: float) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + drain + _KILL_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            log.error("worker process %s did not end; it is killed, and its requests run elsewhere", process.pid)
            process.kill()
            process.join()


@contextmanager
def _changes(is_wanted: bool, stopping: threading.Event) -> Iterator[threading.Event]:
    changed = threading.Event()

    def look() -> None:
        for _ in watch(Path.cwd(), watch_filter=PythonFilter(), stop_event=stopping, raise_interrupt=False):
            changed.set()

    if is_wanted:
        threading.Thread(target=look, daemon=True).start()
    yield changed
