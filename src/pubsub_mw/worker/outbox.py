"""Publish what the application answers: many parts in one round trip, an acknowledgement with the last.

In:     parts of answers, from any thread
Out:    drafts and acknowledgements to the queue; word of what is settled
Owns:   what is not published yet; how long a first chunk is held, which may be all there is
Never:  waits for the broker once per request; lets one answer that cannot be sent end the worker
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from pubsub_mw.broker.interface import RequestQueue, Taken
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Draft, Request
from pubsub_mw.worker.answers import Answer

__all__ = ["Job", "Outbox"]

log = logging.getLogger("pubsub_mw")

_MOST_WAITING = 2_048
"""Parts that wait to be published; an application that is faster waits."""
_MOST_PER_ROUND_TRIP = 256
_HOLD_SECONDS = 0.02
"""For a second chunk or the end to follow the first, before an answer is sent in parts."""
_RETRY_SECONDS = 0.5
"""Until the broker is asked again when it did not answer."""

_Part = tuple["Job", Callable[..., list[Draft]], tuple[Any, ...]]


class Job:
    """One request that was taken: a `Sink` for its answer, and what the worker has to know of it.

    Attributes:
        taken: as it came from the queue
        request: what the application is asked
        taken_at: when it came, by the monotonic clock
        deadline: after which it is not begun any more, by that clock
        began_at: when the application was called; 0.0 = not yet
        is_wanted: false when the client cancelled it, or it is another worker's
        is_started: a part of its answer was published, or is about to be
        is_answered: nothing more is to be published
        is_over: the application has returned, or is not asked
        is_given_up: it took too long
    """

    __slots__ = (
        "_outbox",
        "answer",
        "began_at",
        "deadline",
        "is_answered",
        "is_given_up",
        "is_over",
        "is_started",
        "is_wanted",
        "request",
        "taken",
        "taken_at",
        "task",
    )

    def __init__(self, outbox: "Outbox", taken: Taken, request: Request, answer: Answer, deadline: float) -> None:
        self._outbox = outbox
        self.taken = taken
        self.request = request
        self.answer = answer
        self.taken_at = time.monotonic()
        self.deadline = deadline
        self.began_at = 0.0
        self.is_wanted = True
        self.is_started = self.is_answered = self.is_over = self.is_given_up = False
        self.task: Any = None  # of an ASGI app: what cancels it

    def refuse(self, status: HTTPStatus) -> None:
        """Answer in the place of the application."""
        self._outbox.put((self, self.answer.refuse, (int(status), status.phrase)))

    # As a sink.

    def whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._outbox.put((self, self._whole, (status, headers, body)))

    def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._outbox.put((self, self._head, (status, headers)))

    def chunk(self, body: bytes) -> None:
        self._outbox.put((self, self.answer.chunk, (body,)))

    def end(self, problem: str | None) -> None:
        self._outbox.put((self, self.answer.end, (problem,)))

    def _whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> list[Draft]:
        self.answer.head(status, headers)
        return self.answer.whole(body)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> list[Draft]:
        self.answer.head(status, headers)
        return []


class Outbox:
    """What waits to be published. `run` belongs to one thread, the rest to any.

    Args:
        requests: where to publish and to acknowledge
        on_settled: called with the jobs that are answered and acknowledged
    """

    def __init__(self, requests: RequestQueue, on_settled: Callable[[Sequence[Job]], None]) -> None:
        self._requests = requests
        self._on_settled = on_settled
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._is_closing = threading.Event()

    def put(self, part: _Part) -> None:
        """Take a part: a job, and which step of its answer makes the drafts, of what."""
        self._parts.put(part)

    @property
    def is_full(self) -> bool:
        """Whether an application should wait before it goes on."""
        return self._parts.qsize() > _MOST_WAITING and not self._is_closing.is_set()

    def close(self) -> None:
        """Let `run` publish what waits and return; what the broker does not take at once is left to other workers."""
        self._is_closing.set()
        self._parts.put(None)

    def run(self) -> None:
        """Publish until `close`."""
        held: dict[Job, float] = {}  # answers whose first chunk may be all -> when to send it all the same
        is_over = False
        while not is_over:
            drafts: list[Draft] = []
            done: list[Job] = []
            timeout = max(0.0, min(held.values()) - time.monotonic()) if held else None
            while len(drafts) < _MOST_PER_ROUND_TRIP:
                try:
                    part = self._parts.get(timeout=timeout)
                except queue.Empty:
                    break
                if part is None:
                    is_over = True
                    break
                self._add(part, drafts, done, held)
                timeout = 0.0
            now = time.monotonic()
            for job in [job for job, at in held.items() if at <= now]:
                self._add((job, job.answer.start, ()), drafts, done, held)
            if drafts or done:
                self._settle(drafts, done)

    def _add(self, part: _Part, drafts: list[Draft], done: list[Job], held: dict[Job, float]) -> None:
        job, step, arguments = part
        if job.is_answered:
            return  # what a view says after it was given up
        answer = job.answer
        try:
            drafts += step(*arguments)
        except Exception:
            log.exception("%s %s gave an answer that cannot be sent", job.request.method, job.request.path)
            drafts += answer.end("the application failed")
        if answer.is_complete:
            job.is_answered = True
            done.append(job)
        job.is_started = answer.is_started or answer.is_complete
        if job.is_started:
            held.pop(job, None)
        else:
            held.setdefault(job, time.monotonic() + _HOLD_SECONDS)

    def _settle(self, drafts: Sequence[Draft], done: Sequence[Job]) -> None:
        answered = [job.taken for job in done]
        while True:
            try:
                self._requests.settle(drafts, answered)
                break
            except BrokerUnavailable as error:
                # The keys of the drafts make it safe to send them again, also if another worker has done it by then.
                log.warning("answers wait for the broker: %s", error)
                if self._is_closing.wait(_RETRY_SECONDS):
                    return
        self._on_settled(done)
