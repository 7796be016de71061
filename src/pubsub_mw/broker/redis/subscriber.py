"""Keep one process's pub/sub link to Redis, and know when it does not deliver.

In:     channels to follow; Redis's pub/sub
Out:    publications, confirmations and losses, to one listener
Owns:   one raw connection at a time, read by one task and written by one task that end together
Never:  lets a new connection pass for the old one: each loss and each confirmation is told, so that the listener
        reads from history what went by in between

A PING proves nothing about delivery, so the link proves itself: a message published over another connection each
`probe_interval` has to come back within `probe_timeout`. `redis.asyncio.PubSub` is not used because it reconnects
without saying so, and breaks when one task subscribes while another reads (redis-py#2540, #3941).
"""

import asyncio
import logging
import math
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import redis
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pubsub_mw.broker.codec import decode
from pubsub_mw.broker.interface import Listener
from pubsub_mw.broker.presence import decode_notice
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.broker.redis.publisher import connection_factory
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel
from pubsub_mw.settings import Settings

__all__ = ["RedisSubscriber", "new_connection"]

log = logging.getLogger("pubsub_mw")

_FIRST_DELAY, _LAST_DELAY = 0.05, 1.0
"""Seconds between attempts to connect; doubled each time, with full jitter."""

_NAMES_PER_COMMAND = 1_000
_MESSAGES_PER_TURN = 256
"""Messages handled before other tasks of the loop get their turn."""


def new_connection(settings: Settings) -> Connection:
    """Make a connection, not yet connected, that never reconnects or retries by itself.

    Raises:
        SettingsError: the url is malformed.
    """
    options = {
        "retry": Retry(NoBackoff(), 0),
        # On Python 3.11 redis-py's `wait_for` can swallow a cancellation; whoever uses the connection has a deadline.
        "socket_timeout": None,
        "socket_connect_timeout": min(settings.broker_timeout, settings.probe_timeout),
    }
    connection: Connection = connection_factory(settings, parse_url, Connection, options)()
    return connection


class RedisSubscriber:
    """The link. `run` owns it; the other methods note what is wanted and wake its writer."""

    def __init__(self, settings: Settings, listener: Listener, command: Callable[..., Awaitable[Any]]) -> None:
        self._settings = settings
        self._listener = listener
        self._command = command
        self._keyspace = Keyspace(settings.prefix)
        self._probe_channel = self._keyspace.probe(secrets.token_hex(8))
        self._channels: dict[Channel, None] = {}
        self._commands: list[tuple[str, Channel]] = []  # wanted changes not yet sent, in order
        self._wake = asyncio.Event()
        self._is_linked = False
        self._linked_at = self._heard_at = -math.inf

    @property
    def is_up(self) -> bool:
        return self._is_linked and self._heard_at > self._linked_at

    def subscribe(self, channel: Channel) -> None:
        self._channels[channel] = None
        self._request("SUBSCRIBE", channel)

    def unsubscribe(self, channel: Channel) -> None:
        self._channels.pop(channel, None)
        self._request("UNSUBSCRIBE", channel)

    def _request(self, command: str, channel: Channel) -> None:
        # While there is no link nothing is noted: a new one begins with all of `_channels`.
        if self._is_linked:
            self._commands.append((command, channel))
            self._wake.set()

    async def run(self) -> None:
        """Keep the link, for ever."""
        attempt = 0
        while True:
            connection = new_connection(self._settings)
            try:
                async with asyncio.timeout(self._settings.broker_timeout):
                    await connection.connect()  # type: ignore[no-untyped-call]
                self._begin()
                await self._serve(connection)
            except (redis.RedisError, OSError, BrokerUnavailable) as problem:
                if self.is_up:
                    attempt = 0  # not for a link that only stood: one that may not subscribe falls again at once
                delay = random.uniform(0, min(_LAST_DELAY, _FIRST_DELAY * 2**attempt))
                attempt = min(attempt + 1, 16)
                reason = str(problem) or type(problem).__name__
                log.warning("lost the pub/sub link to %s: %s; reconnecting", self._settings.safe_url, reason)
            finally:
                self._end()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(delay)

    async def _serve(self, connection: Connection) -> None:
        """Run the link until a part of it fails, and raise what it failed with."""
        # Not a task group: until Python 3.13 one that is ending already swallows a cancellation from outside.
        tasks = [asyncio.create_task(part) for part in (self._read(connection), self._write(connection), self._probe())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _begin(self) -> None:
        self._is_linked = True
        self._commands = [("SUBSCRIBE", Channel(""))]  # stands for the probe's own channel
        self._commands += [("SUBSCRIBE", channel) for channel in self._channels]
        self._linked_at = self._heard_at = asyncio.get_running_loop().time()
        self._wake.set()

    def _end(self) -> None:
        was_linked, self._is_linked = self._is_linked, False
        self._commands = []
        if was_linked:
            self._listener.on_lost()

    async def _write(self, connection: Connection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._commands = self._commands, []
            start = 0
            while start < len(commands):
                # A run of equal commands becomes one; their order among each other stays.
                end, verb = start, commands[start][0]
                while end < len(commands) and end - start < _NAMES_PER_COMMAND and commands[end][0] == verb:
                    end += 1
                names = [self._keyspace.live(name) if name else self._probe_channel for _, name in commands[start:end]]
                await connection.send_packed_command(
                    b"".join(connection.pack_command(verb, *names)), check_health=False
                )
                start = end

    async def _read(self, connection: Connection) -> None:
        probe = self._probe_channel.encode()
        count = 0
        while True:
            kind, name, payload = await connection.read_response(timeout=math.inf)
            if kind == b"message":
                if name == probe:
                    self._heard_at = asyncio.get_running_loop().time()
                else:
                    self._deliver(name, payload)
            elif kind == b"subscribe" and name != probe:
                channel = self._keyspace.channel_of(name)
                if channel in self._channels:
                    self._listener.on_subscribed(channel)
            count += 1
            if count % _MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _deliver(self, name: bytes, payload: bytes) -> None:
        channel = self._keyspace.channel_of(name)
        try:
            if payload.startswith(b"!"):
                notice = decode_notice(payload)
                if channel is not None:
                    self._listener.on_notice(channel, notice)
                return
            publication = decode(payload)
        except ValueError as error:
            log.error("ignored %d foreign bytes on Redis channel %r: %s", len(payload), name, error)
            return
        if channel is not None:
            self._listener.on_publication(channel, publication)

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            next_at = loop.time() + self._settings.probe_interval
            try:
                async with asyncio.timeout_at(next_at):
                    await self._command("PUBLISH", self._probe_channel, b"")
            except (BrokerUnavailable, TimeoutError) as error:
                log.debug("probe not sent: %s", error)
            await asyncio.sleep(next_at - loop.time())
            silence = loop.time() - self._heard_at
            if silence > self._settings.probe_timeout:
                raise BrokerUnavailable(f"nothing was delivered for {silence:.1f} s")
