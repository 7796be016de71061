"""Publish to Redis from synchronous code.

In:     drafts, from any thread of any process that was forked from this one
Out:    positions, or `BrokerUnavailable` within `publish_timeout`
Owns:   a stack of idle connections, one in use per publishing thread
Never:  retries more than once, and then only so that it does not publish twice as long as history still holds what
        the first try may have stored; starts a thread

redis-py's pools bound each step (wait, connect, write, read) but not their sum, so connections are kept here: one
deadline holds over all steps.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from pubsub_mw.broker.presence import PresenceCall
from pubsub_mw.broker.redis.queue import RedisQueue
from pubsub_mw.broker.redis.scripts import Call, Scripts, pack
from pubsub_mw.broker.redis.servers import NotMaster, SyncServers, at_once, left, refuse_replica
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, Draft, Position
from pubsub_mw.settings import Settings

__all__ = ["RedisBroker"]

_MAX_IDLE = 64
"""Connections kept for later; more are in use when more threads publish at once."""


class RedisBroker:
    """`Broker` on one Redis server, or on the master that its sentinels name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._scripts = Scripts(settings)
        self._servers = SyncServers(settings)
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish all of `drafts` in one round trip, in order.

        Raises:
            BrokerUnavailable: see `Broker`.
        """
        return Scripts.positions_from(self.run(lambda is_retry: self._scripts.publish(drafts, is_retry=is_retry)))

    def position(self, channel: Channel) -> Position:
        """Return the channel's newest position."""
        (reply,) = self.run(lambda _: [self._scripts.read(channel, None, 1)])
        return Scripts.page_from(reply, None).top

    def secret(self) -> str:
        """Return the secret kept under `<prefix>:secret`, made if there is none."""
        key = self._scripts.keyspace.secret
        (secret,) = self.run(lambda _: [("GET", key)])
        if secret is None:
            _, secret = self.run(lambda _: [("SET", key, secrets.token_hex(32), "NX"), ("GET", key)])
        return str(secret.decode())

    def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        """Remember a revocation and tell the realtime servers; see `Broker.revoke`."""
        self.run(lambda is_retry: self._scripts.revoke(identity, subject, at, news, is_retry=is_retry))

    def presence(self, channel: Channel) -> Mapping[str, bytes]:
        """Return user -> info of all who are on the channel."""
        (reply,) = self.run(lambda _: [self._scripts.presence(PresenceCall(channel=channel))])
        return Scripts.present_from(reply).users or {}

    def queue(self, worker: str) -> "RedisQueue":
        """Return the request queue as the worker of that name sees it."""
        return RedisQueue(self, self._settings, worker)

    def close(self) -> None:
        """Close the idle connections; the broker stays usable."""
        while self._idle:
            self._idle.pop().disconnect()

    def run(self, build: Callable[[bool], Sequence[Call | tuple[Any, ...]]], *, wait: float = 0.0) -> list[Any]:
        """Send what `build` makes and return the replies; once more if the link broke, told so by True.

        Args:
            build: makes the commands
            wait: seconds that the commands themselves may block, beyond `publish_timeout`

        Raises:
            BrokerUnavailable: no reply in time, or one of the replies is an error.
        """
        deadline = time.monotonic() + self._settings.publish_timeout + wait
        try:
            try:
                return self._round_trip(build(False), deadline)
            except redis.ConnectionError:
                pass  # a broken link says nothing about whether the commands had arrived
            return self._round_trip(build(True), deadline)
        except redis.RedisError as error:
            raise BrokerUnavailable(f"Redis at {self._settings.safe_url}: {error}") from error
        except OSError as error:
            raise BrokerUnavailable(f"Redis at {self._settings.safe_url} cannot be reached: {error}") from error

    def _round_trip(self, calls: Sequence[Call | tuple[Any, ...]], deadline: float) -> list[Any]:
        connection = self._take(deadline)
        try:
            commands = [call.by_digest() if isinstance(call, Call) else call for call in calls]
            replies = self._exchange(connection, commands, deadline)
            unknown = [
                index for index, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)
            ]
            if unknown:
                sources = [call.by_source() for call in (calls[index] for index in unknown) if isinstance(call, Call)]
                for index, reply in zip(unknown, self._exchange(connection, sources, deadline), strict=True):
                    replies[index] = reply
            refuse_replica(replies)
        except BaseException as error:
            connection.disconnect()
            if isinstance(error, (redis.TimeoutError, NotMaster)):
                self.close()  # the others went the same way, and may be as dead
            raise
        if len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.disconnect()
        for reply in replies:
            if isinstance(reply, redis.RedisError):
                raise reply
        return replies

    @staticmethod
    def _exchange(connection: Any, commands: Sequence[tuple[Any, ...]], deadline: float) -> list[Any]:
        connection.send_packed_command([pack(commands)], check_health=False)
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(connection.read_response(timeout=left(deadline)))
            except redis.ResponseError as error:
                replies.append(error)
        return replies

    def _take(self, deadline: float) -> Any:
        """Return a connected connection that nobody else uses."""
        if self._pid != os.getpid():
            # Forked: the sockets are the parent's. Dropped here, never used and never shut down.
            self._idle, self._pid = [], os.getpid()
        at_once(self._servers.refresh(deadline))
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = None
        if connection is not None:
            try:
                if self._servers.is_current(connection) and not connection.can_read(0):  # else: a stray reply
                    return connection
            except (redis.ConnectionError, OSError):
                pass  # closed while it was idle
            connection.disconnect()
        return at_once(self._servers.connect(deadline))
