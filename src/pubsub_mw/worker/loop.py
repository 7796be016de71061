"""Take requests off the queue and run the application on them.

In:     signed requests from the broker's queue
Out:    answers, to the outbox
Owns:   the threads: one takes, `threads` run the app, one publishes answers, one renews leases and watches the time
Never:  keeps what it cannot begin soon, because another worker could run it; runs a request that is past its deadline

A request is run *at least once*: again if its worker died, with `delivery_count` above 1. Whatever is published for
it carries an idempotency key, so its client sees one answer.
"""

import asyncio
import contextlib
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

from pubsub_mw import apps
from pubsub_mw.broker.codec import decode_request
from pubsub_mw.broker.engines import open_broker
from pubsub_mw.broker.interface import Progress, Taken
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.grants import queue_key
from pubsub_mw.model import LIFECYCLE_CHANNEL
from pubsub_mw.settings import Settings
from pubsub_mw.worker.answers import Answer
from pubsub_mw.worker.asgi import ASGIApp, Lifespan, run_asgi
from pubsub_mw.worker.environ import build_environ, build_scope
from pubsub_mw.worker.outbox import Job, Outbox
from pubsub_mw.worker.wsgi import run_wsgi

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Worker"]

log = logging.getLogger("pubsub_mw")

_WAIT_SECONDS = 0.25
"""For a request to come; how long `stop` may go unseen."""
_AHEAD_SECONDS = 0.05
"""How much work is taken ahead of the threads, by the time that requests took lately."""
_MOST_AHEAD = 256
_GIVE_BACK_SECONDS = 0.25
"""After which a request that was taken ahead and waits for a thread all the same is left to other workers."""
_FIRST_GUESS_SECONDS = 1.0
"""How long a request takes, before one was run: nothing is taken ahead then."""
_PACE_SECONDS = 0.02
_RETRY_SECONDS = 0.5
"""Until the broker is asked again when it did not answer."""
_WATCH_SECONDS = 0.25
"""Between looks at leases, deadlines and cancellations."""


class Worker:
    """Run `app` on what clients send.

    Args:
        app: a WSGI or ASGI app
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        is_asgi: which of the two `app` is; None = told apart by its signature
        threads: requests run at once
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(
        self,
        app: "WSGIApplication | ASGIApp",
        url: str | None = None,
        *,
        is_asgi: bool | None = None,
        threads: int = 4,
        **settings: Any,
    ) -> None:
        self.settings = Settings.build(url, **settings)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._app = app
        self._is_asgi = apps.is_asgi(app) if is_asgi is None else is_asgi
        self._threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state: dict[str, Any] = {}
        self._broker = open_broker(self.settings)
        self._queue = self._broker.queue(self.name)
        self._outbox = Outbox(self._queue, self._forget)
        self._key = b""
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running: dict[str, Job] = {}  # taken and not settled, by entry
        self._room = threading.Condition()  # over `_running`, `_hung` and how far each job is
        self._is_stopping = threading.Event()
        self._is_closed = threading.Event()
        self._seconds_per_request = _FIRST_GUESS_SECONDS
        self._hung = 0
        self._fault: BaseException | None = None

    def run(self) -> None:
        """Take and run requests until `stop`; then finish what runs, and return.

        Raises:
            RuntimeError: it cannot go on: as many views hang as it has threads, or by a fault of its own. The
                process should end and be started anew.
        """
        self._key = queue_key(self.settings.secret or self._secret())
        lifespan = self._start_loop() if self._is_asgi and self._loop is None else None
        helpers = [threading.Thread(target=self._guard, args=(task,)) for task in (self._outbox.run, self._watch)]
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
            self._is_closed.set()
            for _ in range(self._threads + self._hung):
                self._inbox.put(None)
            self._outbox.close()
            for helper in helpers:
                helper.join()
            if lifespan is not None:
                self._stop_loop(lifespan)
            self._leave()
            self._broker.close()
        if self._fault is not None:
            raise RuntimeError("the worker cannot go on; start it anew") from self._fault

    def use_loop(self, loop: asyncio.AbstractEventLoop, state: dict[str, Any]) -> None:
        """Run an ASGI app on this loop, where its own connections and locks belong. Before `run`.

        Args:
            loop: runs, and has taken the app through its lifespan
            state: what the app left there, for its requests
        """
        self._loop, self._state = loop, state

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
            self._is_closed.set()

    def _secret(self) -> str:
        while not self._is_stopping.is_set():
            try:
                return self._broker.secret()
            except BrokerUnavailable as error:
                log.error("%s; trying again", error)
                self._is_stopping.wait(_RETRY_SECONDS)
        return ""

    def _start_loop(self) -> Lifespan:
        """Make an event loop of the worker's own and start the ASGI app on it."""
        loop = self._loop = asyncio.new_event_loop()

        def run() -> None:
            loop.run_forever()
            loop.close()

        threading.Thread(target=run, name="asgi", daemon=True).start()
        lifespan = Lifespan(cast(ASGIApp, self._app), self._state)
        asyncio.run_coroutine_threadsafe(lifespan.start(), self._loop).result()
        return lifespan

    def _stop_loop(self, lifespan: Lifespan) -> None:
        assert self._loop is not None
        try:
            asyncio.run_coroutine_threadsafe(lifespan.stop(), self._loop).result(self.settings.drain)
        except TimeoutError:
            log.error("the application did not end its lifespan within %g s", self.settings.drain)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _leave(self) -> None:
        try:
            self._queue.leave()
        except BrokerUnavailable as error:
            log.warning("the worker ends without a word to the broker: %s", error)

    # Taking.

    def _take(self) -> None:
        with self._room:
            free = self._threads + self._ahead() - len(self._running)
            if free <= 0:
                self._room.wait(_WAIT_SECONDS)
                return
        try:
            taken = self._queue.take(free, _WAIT_SECONDS)
        except BrokerUnavailable as error:
            log.warning("no requests taken: %s", error)
            self._is_stopping.wait(_RETRY_SECONDS)
            return
        # What is in `_running` still runs here: its lease ran out while the broker was away.
        jobs = [job for item in taken if item.entry not in self._running and (job := self._check(item)) is not None]
        with contextlib.suppress(BrokerUnavailable):  # the watch asks again
            self._note_cancelled([job for job in jobs if job.taken.age > _WATCH_SECONDS])
        for job in jobs:
            if self._loop is not None and self._is_asgi:
                job.task = asyncio.run_coroutine_threadsafe(self._run_asgi(job), self._loop)
            else:
                self._inbox.put(job)

    def _ahead(self) -> int:
        """Return how many to take that no thread is free for. For a thread that is in a long request, none."""
        long_ago = time.monotonic() - _AHEAD_SECONDS
        stuck = sum(0.0 < job.began_at < long_ago and not job.is_over for job in self._running.values())
        return max(0, min(_MOST_AHEAD, int(_AHEAD_SECONDS / self._seconds_per_request) * (self._threads - stuck)))

    def _check(self, taken: Taken) -> Job | None:
        """Return what is to be run; what cannot be is answered or set aside here."""
        try:
            request = decode_request(taken.payload, self._key)
        except (ValueError, KeyError, TypeError) as error:
            log.error("set aside a request that is not ours: %s", error)
            self._set_aside(taken)
            return None
        progress = Progress.NOTHING
        if taken.delivery_count > 1:
            try:
                progress = self._queue.progress(request)
                if progress is Progress.COMPLETE:  # all that its worker did not come to is to say so
                    self._queue.settle([], [taken])
                    return None
            except BrokerUnavailable as error:
                log.warning("%s %s is left to another worker: %s", request.method, request.path, error)
                return None
        answer = Answer(request, self.settings, has_begun=progress is Progress.BEGUN)
        # An answer that has begun is gone on with, however long ago it was asked for.
        is_timeless = request.reply_to == LIFECYCLE_CHANNEL or progress is Progress.BEGUN
        age = 0.0 if is_timeless else taken.age
        deadline = time.monotonic() + self.settings.request_timeout - age
        job = Job(self._outbox, taken, request, answer, deadline)
        if taken.delivery_count > self.settings.max_deliveries:
            count = taken.delivery_count - 1
            log.error("set aside %s %s: its workers died %d times", request.method, request.path, count)
            job.refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
            self._set_aside(taken)
            return None
        self._running[taken.entry] = job
        if age <= self.settings.request_timeout:
            return job
        job.is_over = True
        job.refuse(HTTPStatus.GATEWAY_TIMEOUT)
        return None

    def _set_aside(self, taken: Taken) -> None:
        try:
            self._queue.set_aside(taken)
        except BrokerUnavailable as error:
            log.warning("not set aside, so it will come again: %s", error)

    # Running.

    def _start_runner(self) -> None:
        # A daemon, because a view that hangs must not keep the process from ending.
        threading.Thread(target=self._run_views, name="views", daemon=True).start()

    def _run_views(self) -> None:
        while (job := self._inbox.get()) is not None and not self._is_closed.is_set():
            if self._may_begin(job):
                environ = build_environ(job.request, job.taken.delivery_count)
                run_wsgi(cast("WSGIApplication", self._app), environ, job, self._wait_for_outbox)
                self._note_end(job)
                if job.is_given_up:
                    with self._room:
                        self._hung -= 1
                    return  # another thread took this one's place

    async def _run_asgi(self, job: Job) -> None:
        if self._may_begin(job):
            scope = build_scope(job.request, job.taken.delivery_count, self._state)
            await run_asgi(cast(ASGIApp, self._app), scope, job.request.body, job, self._pace)
            self._note_end(job)

    def _wait_for_outbox(self) -> None:
        while self._outbox.is_full:
            time.sleep(_PACE_SECONDS)

    async def _pace(self) -> None:
        while self._outbox.is_full:  # noqa: ASYNC110 - it is emptied by another thread
            await asyncio.sleep(_PACE_SECONDS)

    def _may_begin(self, job: Job) -> bool:
        with self._room:
            if job.is_answered:
                return False  # it is another worker's by now
            job.began_at = time.monotonic()
        if job.began_at > job.deadline:
            job.refuse(HTTPStatus.GATEWAY_TIMEOUT)
        elif not job.is_wanted:
            job.end("cancelled")
        else:
            return True
        job.is_over = True
        return False

    def _note_end(self, job: Job) -> None:
        """Note that the application returned. From here on the job is not given up any more."""
        self._seconds_per_request += (time.monotonic() - job.began_at - self._seconds_per_request) * 0.1
        with self._room:
            job.is_over = True

    def _forget(self, done: Sequence[Job]) -> None:
        with self._room:
            for job in done:
                self._running.pop(job.taken.entry, None)
            self._room.notify()

    # Watching.

    def _watch(self) -> None:
        """Give back what waits too long, renew leases, note cancellations, answer 504 for views that hang."""
        renew_at = 0.0
        while not self._is_closed.wait(_WATCH_SECONDS):
            late = self._drop_late()
            jobs = list(self._running.values())
            now = time.monotonic()
            try:
                self._queue.give_back([job.taken for job in late])
                if now >= renew_at:
                    renew_at = now + self.settings.lease / 3
                    gone = self._queue.renew({job.taken.entry: job.request for job in jobs})
                    self._drop([job for job in map(self._running.get, gone) if job is not None])
                self._note_cancelled(jobs)
            except BrokerUnavailable as error:
                log.warning("leases not renewed: %s", error)
                renew_at = 0.0
            for job in jobs:
                if job.began_at and not job.is_started and now - job.began_at > self.settings.request_timeout:
                    self._give_up(job)

    def _note_cancelled(self, jobs: Sequence[Job]) -> None:
        for job, is_cancelled in zip(jobs, self._queue.cancelled([job.request for job in jobs]), strict=True):
            job.is_wanted = job.is_wanted and not is_cancelled

    def _drop_late(self) -> list[Job]:
        """Return what waits for a thread for too long; from here on it is not begun."""
        long_ago = time.monotonic() - _GIVE_BACK_SECONDS
        with self._room:
            jobs = self._running.values()
            late = [job for job in jobs if job.taken_at < long_ago and not job.began_at and not job.is_over]
            self._drop(late)
        return late

    def _drop(self, jobs: Sequence[Job]) -> None:
        """Publish no more for requests that are another worker's: it has answered after this one seemed dead, or
        it is to begin them.
        """
        for job in jobs:
            job.is_wanted, job.is_answered = False, True
        self._forget(jobs)

    def _give_up(self, job: Job) -> None:
        with self._room:
            if job.is_over or job.is_given_up:
                return
            job.is_given_up, job.is_wanted = True, False
            self._hung += job.task is None
        job.refuse(HTTPStatus.GATEWAY_TIMEOUT)
        request, limit = job.request, self.settings.request_timeout
        log.error("%s %s has not begun to answer for %g s; its client is told 504", request.method, request.path, limit)
        if job.task is not None:
            job.task.cancel()
            return
        self._start_runner()
        if self._hung >= self._threads:
            log.critical("%d views hang, as many as there are threads; the worker ends", self._hung)
            self._fault = TimeoutError(f"{self._hung} views hang")
            self._is_stopping.set()

    def _finish(self) -> None:
        """Wait until everything that was taken is answered, for `drain` seconds; the rest another worker runs."""
        deadline = time.monotonic() + self.settings.drain
        with self._room:
            while self._running and not self._is_closed.is_set() and time.monotonic() < deadline:
                self._room.wait(_WATCH_SECONDS)
        if self._running:
            log.error("%d requests were not finished; another worker runs them", len(self._running))
