"""Take requests off the queue, run the application on them, publish the answers.

In:     signed requests from the broker's queue
Out:    answers on the clients' own channels; acknowledgements, last
Owns:   the threads: one takes, `threads` run the app, one publishes answers, one renews leases and watches the time
Never:  waits for the broker once per request: what is done meanwhile goes out in one round trip; takes more than it
        can begin soon, because what waits here another worker could run

A request is run *at least once*: again if its worker died, with `delivery_count` above 1. Whatever is published for
it carries an idempotency key, so its client sees one answer.
"""

import asyncio
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from pubsub_mw.broker.codec import decode_request
from pubsub_mw.broker.engines import open_broker
from pubsub_mw.broker.interface import Taken
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Draft, Request
from pubsub_mw.settings import Settings
from pubsub_mw.worker.answers import Answer
from pubsub_mw.worker.asgi import ASGIApp, run_asgi
from pubsub_mw.worker.environ import build_environ, build_scope
from pubsub_mw.worker.wsgi import run_wsgi

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Worker"]

log = logging.getLogger("pubsub_mw")

_WAIT_SECONDS = 1.0
"""For a request to come; how long `stop` may go unseen."""
_AHEAD_SECONDS = 0.05
"""How much work is taken ahead of the threads, by the time that requests took lately."""
_MOST_AHEAD = 64
_MOST_WAITING_PARTS = 2_048
"""Parts of answers that wait to be published; an application that is faster waits."""
_MOST_PER_ROUND_TRIP = 256
_HOLD_SECONDS = 0.02
"""For a second chunk or the end to follow the first, before an answer is sent in parts."""
_RETRY_SECONDS = 0.5
"""Until the broker is asked again when it did not answer."""
_WATCH_SECONDS = 0.25
"""Between looks at leases, deadlines and cancellations."""


class Worker:
    """Run `app` on what clients send.

    Args:
        app: a WSGI or ASGI app, told apart by `is_asgi`
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        is_asgi: which of the two `app` is
        threads: requests run at once
        loop: the event loop for an ASGI app; None = one of its own
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(
        self,
        app: "WSGIApplication | ASGIApp",
        url: str | None = None,
        *,
        is_asgi: bool = False,
        threads: int = 4,
        loop: asyncio.AbstractEventLoop | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings.build(url, **settings)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._app = app
        self._is_asgi = is_asgi
        self._threads = threads
        self._loop = loop
        self._broker = open_broker(self.settings)
        self._queue = self._broker.queue(self.name)
        self._key = b""
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._parts: queue.Queue[tuple[_Job, str, Any] | None] = queue.Queue(_MOST_WAITING_PARTS)
        self._running: dict[str, _Job] = {}  # taken and not settled, by entry
        self._room = threading.Condition()
        self._is_stopping = threading.Event()
        self._is_settled = threading.Event()
        self._seconds_per_request = 0.0
        self._hung = 0
        self._fault: BaseException | None = None

    def run(self) -> None:
        """Take and run requests until `stop`; then finish what runs, and return.

        Raises:
            RuntimeError: every thread hangs in the application; the process should end and be started anew.
        """
        self._key = queue_key(self.settings.secret or self._secret())
        if self._is_asgi and self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="asgi", daemon=True).start()
        helpers = [threading.Thread(target=self._guard, args=(task,)) for task in (self._publish, self._watch)]
        for helper in helpers:
            helper.start()
        for _ in range(0 if self._is_asgi else self._threads):
            self._start_runner()
        log.info("worker %s takes requests", self.name)
        try:
            while not self._is_stopping.is_set():
                self._take()
            self._finish()
        finally:
            self._is_stopping.set()
            for _ in range(self._threads + self._hung):
                self._inbox.put(None)
            self._parts.put(None)
            self._is_settled.set()
            for helper in helpers:
                helper.join()
            self._broker.close()
        if self._fault is not None:
            raise RuntimeError("the worker failed") from self._fault
        if self._hung >= self._threads:
            raise RuntimeError(f"all {self._threads} threads hang in the application")

    def use_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run an ASGI app on this loop, where its own connections and locks belong. Before `run`."""
        self._loop = loop

    def stop(self) -> None:
        """Take no more; `run` returns when what runs is answered. From any thread, and from a signal handler."""
        self._is_stopping.set()

    def _guard(self, task: Callable[[], None]) -> None:
        """Run one of the worker's own threads; if it dies, which is a fault, the worker ends."""
        try:
            task()
        except BaseException as error:
            log.critical("the worker ends by a fault of its own", exc_info=True)
            self._fault = error
            self._is_stopping.set()

    def _secret(self) -> str:
        while not self._is_stopping.is_set():
            try:
                return self._broker.secret()
            except BrokerUnavailable as error:
                log.error("%s; trying again", error)
                self._is_stopping.wait(_RETRY_SECONDS)
        return ""

    # Taking.

    def _take(self) -> None:
        ahead = _MOST_AHEAD
        if self._seconds_per_request:
            ahead = min(ahead, int(_AHEAD_SECONDS / self._seconds_per_request) * self._threads)
        most = self._threads - self._hung + ahead
        with self._room:
            free = most - len(self._running)
            if free <= 0:
                self._room.wait(_WAIT_SECONDS)
                return
        try:
            taken = self._queue.take(free, _WAIT_SECONDS)
        except BrokerUnavailable as error:
            log.warning("no requests taken: %s", error)
            self._is_stopping.wait(_RETRY_SECONDS)
            return
        for item in taken:
            self._begin(item)

    def _begin(self, taken: Taken) -> None:
        """Check a request and hand it to the threads; what cannot be run is answered or set aside here."""
        if taken.entry in self._running:
            return  # its lease ran out while the broker was away; it still runs here
        try:
            request = decode_request(taken.payload, self._key)
        except (ValueError, KeyError, TypeError) as error:
            log.error("set aside a request that is not ours: %s", error)
            self._set_aside(taken)
            return
        job = _Job(self, taken, request)
        self._running[taken.entry] = job
        if taken.delivery_count > self.settings.max_deliveries:
            log.error(
                "set aside %s %s: its workers died %d times", request.method, request.path, taken.delivery_count - 1
            )
            self._set_aside(taken)
            job.refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
        elif taken.age > self.settings.request_timeout:
            job.refuse(HTTPStatus.GATEWAY_TIMEOUT)
        elif self._is_asgi:
            assert self._loop is not None
            asyncio.run_coroutine_threadsafe(self._run_asgi(job), self._loop)
        else:
            self._inbox.put(job)

    def _set_aside(self, taken: Taken) -> None:
        try:
            self._queue.set_aside(taken)
        except BrokerUnavailable as error:
            log.warning("not set aside, so it will come again: %s", error)

    # Running.

    def _start_runner(self) -> None:
        # A daemon, because a view that hangs must not keep the process from ending.
        threading.Thread(target=self._run_wsgi, name="views", daemon=True).start()

    def _run_wsgi(self) -> None:
        while (job := self._inbox.get()) is not None:
            job.began_at = time.monotonic()
            if job.is_wanted:
                run_wsgi(cast("WSGIApplication", self._app), build_environ(job.request, job.taken.delivery_count), job)
            else:
                job.end("cancelled")
            self._note_time(time.monotonic() - job.began_at)
            if job.is_given_up:
                # Another thread took this one's place while it hung.
                self._hung -= 1
                return

    async def _run_asgi(self, job: "_Job") -> None:
        job.began_at = time.monotonic()
        scope = build_scope(job.request, job.taken.delivery_count)
        await run_asgi(cast(ASGIApp, self._app), scope, job.request.body, job, self._pace)
        self._note_time(time.monotonic() - job.began_at)

    async def _pace(self) -> None:
        while self._parts.qsize() > _MOST_WAITING_PARTS // 2:  # noqa: ASYNC110 - it is emptied by another thread
            await asyncio.sleep(_HOLD_SECONDS)

    def _note_time(self, seconds: float) -> None:
        self._seconds_per_request += (seconds - self._seconds_per_request) * 0.1

    # Publishing.

    def put_part(self, job: "_Job", kind: str, value: Any) -> None:
        """Leave a part of an answer to be published; waits while `_MOST_WAITING_PARTS` wait."""
        self._parts.put((job, kind, value))

    def _publish(self) -> None:
        held: dict[_Job, float] = {}  # answers with one chunk so far -> when to begin sending them in parts
        is_over = False
        while not is_over:
            drafts: list[Draft] = []
            done: list[_Job] = []
            timeout = max(0.0, min(held.values()) - time.monotonic()) if held else None
            for count in range(_MOST_PER_ROUND_TRIP):
                try:
                    item = self._parts.get(block=count == 0, timeout=timeout)
                except queue.Empty:
                    break
                if item is None:
                    is_over = True
                    break
                self._add_part(*item, drafts, done, held)
            now = time.monotonic()
            for job in [job for job, at in held.items() if at <= now]:
                del held[job]
                job.is_started = True
                drafts += job.answer.start()
            if drafts or done:
                self._settle(drafts, done)

    def _add_part(
        self, job: "_Job", kind: str, value: Any, drafts: list[Draft], done: list["_Job"], held: dict["_Job", float]
    ) -> None:
        answer = job.answer
        if job.is_answered:
            return  # what a view says after it was given up
        if kind == "whole":
            answer.head(*value[:2])
            drafts += answer.whole(value[2])
        elif kind == "head":
            answer.head(*value)
            held[job] = time.monotonic() + _HOLD_SECONDS
        elif kind == "chunk":
            drafts += answer.chunk(value)
        else:
            drafts += answer.end(value)
        if answer.is_started or answer.is_complete:
            held.pop(job, None)
            job.is_started = True
        if answer.is_complete:
            job.is_answered = True
            done.append(job)

    def _settle(self, drafts: Sequence[Draft], done: Sequence["_Job"]) -> None:
        while True:
            try:
                self._queue.settle(drafts, [job.taken.entry for job in done])
                break
            except BrokerUnavailable as error:
                # The keys of the drafts make it safe to send them again, also if another worker has done it by then.
                log.warning("answers wait for the broker: %s", error)
                time.sleep(_RETRY_SECONDS)
        with self._room:
            for job in done:
                self._running.pop(job.taken.entry, None)
            self._room.notify()

    # Watching.

    def _watch(self) -> None:
        """Renew leases, note cancellations, answer 504 for views that hang."""
        renew_at = 0.0
        while not self._is_settled.wait(_WATCH_SECONDS):
            jobs = list(self._running.values())
            now = time.monotonic()
            try:
                if now >= renew_at:
                    renew_at = now + self.settings.lease / 3
                    self._queue.renew([job.taken.entry for job in jobs])
                cancelled = self._queue.cancelled([(job.request.connection, job.request.id) for job in jobs])
            except BrokerUnavailable as error:
                log.warning("leases not renewed: %s", error)
                renew_at, cancelled = 0.0, [False] * len(jobs)
            for job, is_cancelled in zip(jobs, cancelled, strict=True):
                job.is_wanted = job.is_wanted and not is_cancelled
                if job.began_at and not job.is_started and now - job.began_at > self.settings.request_timeout:
                    self._give_up(job)

    def _give_up(self, job: "_Job") -> None:
        if job.is_given_up:
            return
        job.is_given_up = True
        job.is_wanted = False
        job.refuse(HTTPStatus.GATEWAY_TIMEOUT)
        request, limit = job.request, self.settings.request_timeout
        log.error("%s %s has not begun to answer for %g s; its client is told 504", request.method, request.path, limit)
        if not self._is_asgi:
            self._hung += 1
            if self._hung < self._threads:
                self._start_runner()
            else:
                log.critical("all %d threads hang in the application; the worker ends", self._threads)
                self._is_stopping.set()

    def _finish(self) -> None:
        """Wait until everything that was taken is answered, for `drain` seconds; the rest another worker runs."""
        deadline = time.monotonic() + self.settings.drain
        with self._room:
            while self._running and self._fault is None and self._hung < self._threads and time.monotonic() < deadline:
                self._room.wait(_WATCH_SECONDS)
        if self._running:
            log.error("%d requests were not finished; another worker runs them", len(self._running))


class _Job:
    """One request that was taken: a `Sink` for its answer, and what the watch has to know."""

    __slots__ = (
        "_worker",
        "answer",
        "began_at",
        "is_answered",
        "is_given_up",
        "is_started",
        "is_wanted",
        "request",
        "taken",
    )

    def __init__(self, worker: Worker, taken: Taken, request: Request) -> None:
        self._worker = worker
        self.taken = taken
        self.request = request
        self.answer = Answer(request, worker.settings)
        self.began_at = 0.0
        self.is_started = False
        self.is_answered = False
        self.is_given_up = False
        self.is_wanted = True

    def refuse(self, status: HTTPStatus) -> None:
        """Answer in the place of the application."""
        text = f"{status.phrase}\n".encode()
        self._worker.put_part(self, "whole", (int(status), [("content-type", "text/plain; charset=utf-8")], text))

    def whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._worker.put_part(self, "whole", (status, headers, body))

    def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._worker.put_part(self, "head", (status, headers))

    def chunk(self, body: bytes) -> None:
        self._worker.put_part(self, "chunk", body)

    def end(self, problem: str | None) -> None:
        self._worker.put_part(self, "end", problem)
