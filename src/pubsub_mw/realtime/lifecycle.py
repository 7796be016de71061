"""Report to the application which connections begin and end.

In:     connections that begin and break
Out:    `POST <lifecycle>` in the request queue, each begin and each end once
Owns:   this server's lease; which connections it holds, for the reports; one timer per one that broke a moment ago
Never:  puts cookies into a report: it is kept in the broker for as long as the connection lives

The body is JSON: `event` ("connect" or "disconnect"), `connection`, `user` (text or null). The report of the end is
made when a connection begins and kept in the broker, so that another server can hand it in when this one is killed
(`presence_ttl` later at most). A connection that is resumed within `lifecycle_grace`, anywhere, has not ended.

What is said about one connection is said in order: one report waits for the one before. A server that finds that its
lease had run out enters all its connections again: those that were reported as ended have begun anew.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Coroutine
from functools import partial
from typing import NoReturn

from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.grants import queue_key
from pubsub_mw.model import LIFECYCLE_CHANNEL, ConnectionId, Handshake, Request
from pubsub_mw.settings import Settings

__all__ = ["Lifecycle"]

log = logging.getLogger("pubsub_mw")

_KEPT_HEADERS = ("host", "origin", "user-agent")
_Held = tuple[str | None, str, Handshake]
"""A connection's user, transport and handshake."""


class Lifecycle:
    """The reports of one process. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, settings: Settings, secret: str) -> None:
        self._broker = broker
        self._settings = settings
        self._key = queue_key(secret)
        self._server = secrets.token_urlsafe(12)
        self._held: dict[ConnectionId, _Held] = {}
        self._broken: dict[ConnectionId, asyncio.TimerHandle] = {}
        self._last: dict[ConnectionId, asyncio.Task[None]] = {}  # what is being said about a connection

    def begin(self, connection: ConnectionId, user: str | None, transport: str, handshake: Handshake) -> None:
        """Note that a connection began or was resumed here, or that it is known by now whose it is."""
        if self._settings.lifecycle:
            self._cancel(connection)
            self._held[connection] = (user, transport, handshake)
            self._spawn(connection, partial(self._begin, connection, self._held[connection], takes_over=True))

    def end(self, connection: ConnectionId) -> None:
        """Note that a connection broke or was closed."""
        if self._settings.lifecycle:
            self._cancel(connection)
            self._broken[connection] = asyncio.get_running_loop().call_later(
                self._settings.lifecycle_grace, self._on_grace_over, connection
            )

    def stop(self) -> None:
        """Say nothing more: what is not said by now another server says, or the next one."""
        for timer in self._broken.values():
            timer.cancel()
        for task in self._last.values():
            task.cancel()

    async def run(self) -> NoReturn:
        """Keep the lease, for ever."""
        while True:
            try:
                if not await self._broker.keep_lease(self._server, self._settings.presence_ttl):
                    for connection, held in self._held.items():
                        if connection not in self._broken:
                            self._spawn(connection, partial(self._begin, connection, held, takes_over=False))
            except BrokerUnavailable as error:
                log.warning("lease not kept: %s", error)
            await asyncio.sleep(self._settings.presence_ttl / 3)

    def _cancel(self, connection: ConnectionId) -> None:
        timer = self._broken.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _on_grace_over(self, connection: ConnectionId) -> None:
        del self._broken[connection]
        del self._held[connection]
        self._spawn(connection, partial(self._broker.report_end, self._server, connection))

    def _report(self, event: str, connection: ConnectionId, held: _Held) -> bytes:
        user, transport, handshake = held
        headers = tuple((name, value) for name, value in handshake.headers if name in _KEPT_HEADERS)
        request = Request(
            connection=connection,
            user=user,
            transport=transport,
            id=f"{event}-{secrets.token_urlsafe(12)}",
            method="POST",
            path=self._settings.lifecycle,
            query="",
            headers=(("content-type", "application/json"),),
            body=json.dumps({"event": event, "connection": connection, "user": user}).encode(),
            handshake=Handshake(headers=headers, scheme=handshake.scheme, address=handshake.address),
            reply_to=LIFECYCLE_CHANNEL,
        )
        return encode_request(request, self._key)

    def _spawn(self, connection: ConnectionId, say: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.create_task(self._say(connection, say, self._last.get(connection)))
        self._last[connection] = task
        task.add_done_callback(lambda _: self._done(connection, task))

    async def _say(
        self,
        connection: ConnectionId,
        say: Callable[[], Coroutine[None, None, None]],
        before: "asyncio.Task[None] | None",
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        while True:
            try:
                await say()
                return
            except BrokerUnavailable as error:
                log.warning("connection %s is reported later: %s", connection, error)
                await asyncio.sleep(self._settings.presence_ttl / 3)

    def _done(self, connection: ConnectionId, task: "asyncio.Task[None]") -> None:
        if self._last.get(connection) is task:
            del self._last[connection]
        if not task.cancelled() and task.exception() is not None:
            log.error("a lifecycle report was lost by a fault of the server", exc_info=task.exception())

    async def _begin(self, connection: ConnectionId, held: _Held, *, takes_over: bool) -> None:
        begin, end = (self._report(event, connection, held) for event in ("connect", "disconnect"))
        # One that broke while the broker was away may be somewhere else by now.
        takes_over = takes_over and connection in self._held and connection not in self._broken
        await self._broker.report_begin(self._server, connection, begin, end, takes_over=takes_over)
