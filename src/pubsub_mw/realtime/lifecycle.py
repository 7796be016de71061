"""Report to the application which connections begin and end.

In:     connections that begin and break
Out:    `POST <lifecycle>` in the request queue, each begin and each end once
Owns:   this server's lease; one timer per connection that broke a moment ago
Never:  puts cookies into a report: it is kept in the broker for as long as the connection lives

The body is JSON: `event` ("connect" or "disconnect"), `connection`, `user` (text or null). The report of the end is
made when a connection begins and kept in the broker, so that another server can hand it in when this one is killed
(`presence_ttl` later at most). A connection that is resumed within `lifecycle_grace`, anywhere, has not ended.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Coroutine
from typing import NoReturn

from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.grants import queue_key
from pubsub_mw.model import Channel, ConnectionId, Handshake, Request
from pubsub_mw.settings import Settings

__all__ = ["Lifecycle"]

log = logging.getLogger("pubsub_mw")

_NOWHERE = Channel("#lifecycle")
"""Where the application's answers go; nobody listens."""
_KEPT_HEADERS = ("host", "origin", "user-agent")


class Lifecycle:
    """The reports of one process. `run` is awaited by its one owner."""

    def __init__(self, broker: AsyncBroker, settings: Settings, secret: str) -> None:
        self._broker = broker
        self._settings = settings
        self._key = queue_key(secret)
        self._server = secrets.token_urlsafe(12)
        self._broken: dict[ConnectionId, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, connection: ConnectionId, user: str | None, transport: str, handshake: Handshake) -> None:
        """Note that a connection began or was resumed here."""
        if self._settings.lifecycle:
            self._cancel(connection)
            reports = [
                self._report(event, connection, user, transport, handshake) for event in ("connect", "disconnect")
            ]
            self._spawn(self._begin(connection, *reports))

    def end(self, connection: ConnectionId) -> None:
        """Note that a connection broke or was closed."""
        if self._settings.lifecycle:
            self._cancel(connection)
            loop = asyncio.get_running_loop()
            self._broken[connection] = loop.call_later(
                self._settings.lifecycle_grace, lambda: self._spawn(self._end(connection))
            )

    async def run(self) -> NoReturn:
        """Keep the lease, for ever."""
        while True:
            try:
                await self._broker.keep_lease(self._server, self._settings.presence_ttl)
            except BrokerUnavailable as error:
                log.warning("lease not kept: %s", error)
            await asyncio.sleep(self._settings.presence_ttl / 3)

    def _cancel(self, connection: ConnectionId) -> None:
        timer = self._broken.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _report(
        self, event: str, connection: ConnectionId, user: str | None, transport: str, handshake: Handshake
    ) -> bytes:
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
            reply_to=_NOWHERE,
        )
        return encode_request(request, self._key)

    def _spawn(self, coroutine: "Coroutine[None, None, None]") -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a lifecycle report was lost by a fault of the server", exc_info=task.exception())

    async def _begin(self, connection: ConnectionId, begin: bytes, end: bytes) -> None:
        try:
            await self._broker.report_begin(self._server, connection, begin, end)
        except BrokerUnavailable as error:
            log.error("the begin of connection %s was not reported: %s", connection, error)

    async def _end(self, connection: ConnectionId) -> None:
        self._broken.pop(connection, None)
        while True:
            try:
                await self._broker.report_end(self._server, connection)
                return
            except BrokerUnavailable as error:
                log.warning("the end of connection %s is reported later: %s", connection, error)
                await asyncio.sleep(self._settings.presence_ttl / 3)
