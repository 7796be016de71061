"""Keep one process's pub/sub link to Redis, and know when it does not deliver.

In:     channels to follow; Redis's pub/sub
Out:    publications, confirmations and losses, to one listener
Owns:   one raw connection at a time; it is read as it arrives, without a task, and written by one task; both end
        together
Never:  lets a new connection pass for the old one: each loss and each confirmation is told, so that the listener
        reads from history what went by in between

redis-py connects and shakes hands, as the url says. Then its socket is taken over: it would take a turn of the event
loop for each message, while here all that one read of the socket brings is parsed and handed on at once.

A PING proves nothing about delivery, so the link proves itself: a message published over another connection each
`probe_interval` has to come back within `probe_timeout`. `redis.asyncio.PubSub` is not used because it reconnects
without saying so, and breaks when one task subscribes while another reads (redis-py#2540, #3941).
"""

import asyncio
import itertools
import logging
import math
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, NoReturn, cast

import hiredis
import redis

from pubsub_mw.broker.interface import Key, Listener
from pubsub_mw.broker.presence import decode_notice
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.broker.redis.scripts import pack
from pubsub_mw.broker.redis.servers import AsyncServers
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel
from pubsub_mw.settings import Settings

__all__ = ["RedisSubscriber"]

log = logging.getLogger("pubsub_mw")

_FIRST_DELAY, _LAST_DELAY = 0.05, 1.0
"""Seconds between attempts to connect; doubled each time, with full jitter."""

_NAMES_PER_COMMAND = 1_000

_FEED_BYTES = 8_192
"""hiredis moves up all that it has left each time it has used a KB: of 256 KB at once, that is most of its work."""


class _Link(asyncio.Protocol):
    """The socket to Redis, once it is connected.

    Args:
        receive: called when something arrived, with the replies that are whole now

    Attributes:
        ended: gets an exception when the link is gone
        is_writable: unset while Redis takes nothing more
    """

    def __init__(self, transport: asyncio.Transport, receive: Callable[[Iterable[Any]], None]) -> None:
        self.transport = transport
        self.ended: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self.is_writable = asyncio.Event()
        self.is_writable.set()
        self._reader = hiredis.Reader(protocolError=redis.ConnectionError, replyError=redis.ResponseError)
        self._receive = receive
        transport.set_protocol(self)

    def pause_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        try:
            self._receive(self._replies(data))
        except Exception as problem:  # noqa: BLE001 - whatever it is, the owner of the link sees it
            self.end(problem)

    def _replies(self, data: bytes) -> Iterable[Any]:
        pieces = [data[start : start + _FEED_BYTES] for start in range(0, len(data), _FEED_BYTES)]
        return itertools.chain.from_iterable(map(self._parse, pieces))

    def _parse(self, piece: bytes) -> Iterator[Any]:
        self._reader.feed(piece)
        return iter(self._reader.gets, False)

    def pause_writing(self) -> None:
        self.is_writable.clear()

    def resume_writing(self) -> None:
        self.is_writable.set()

    def connection_lost(self, problem: Exception | None) -> None:
        self.end(problem or redis.ConnectionError("Redis closed the connection"))

    def end(self, problem: Exception) -> None:
        """Close the socket, whatever is still to be written; the first problem counts."""
        self.transport.abort()
        if not self.ended.done():
            self.ended.set_exception(problem)


class RedisSubscriber(Generic[Key]):
    """The link. `run` owns it; the other methods note what is wanted and wake its writer."""

    def __init__(
        self,
        settings: Settings,
        listener: Listener[Key],
        servers: AsyncServers,
        probe: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._servers = servers
        self._listener = listener
        self._send_probe = probe
        self._keyspace = Keyspace(settings.prefix)
        self._probe_channel = self._keyspace.probe(secrets.token_hex(8)).encode()
        self._keys: dict[bytes, Key] = {}  # by the name of the pub/sub channel
        self._commands: list[tuple[bytes, bytes]] = []  # wanted changes not yet sent, in order
        self._wake = asyncio.Event()
        self._link: _Link | None = None
        self._is_paused = False
        self._linked_at = self._heard_at = -math.inf

    @property
    def is_up(self) -> bool:
        return self._link is not None and self._heard_at > self._linked_at

    def subscribe(self, channel: Channel, key: Key) -> None:
        name = self._keyspace.live(channel).encode()
        self._keys[name] = key
        self._request(b"SUBSCRIBE", name)

    def unsubscribe(self, channel: Channel) -> None:
        name = self._keyspace.live(channel).encode()
        self._keys.pop(name, None)
        self._request(b"UNSUBSCRIBE", name)

    def _request(self, command: bytes, name: bytes) -> None:
        # While there is no link nothing is noted: a new one begins with all of `_keys`.
        if self._link is not None:
            self._commands.append((command, name))
            self._wake.set()

    def pause(self) -> None:
        """Leave in Redis what comes from now on. Redis keeps so much, then it ends the link."""
        self._is_paused = True
        if self._link is not None:
            self._link.pause_reading()

    def resume(self) -> None:
        self._is_paused = False
        self._heard_at = max(self._heard_at, asyncio.get_running_loop().time())  # the silence was of our own making
        if self._link is not None:
            self._link.resume_reading()

    async def run(self) -> None:
        """Keep the link, for ever."""
        attempt = 0
        while True:
            connection = None
            try:
                async with asyncio.timeout(self._settings.broker_timeout):
                    connection = await self._servers.connect()
                await self._serve(self._begin(connection), connection)
            except (redis.RedisError, OSError, BrokerUnavailable) as problem:
                if self.is_up:
                    attempt = 0  # not for a link that only stood: one that may not subscribe falls again at once
                delay = random.uniform(0, min(_LAST_DELAY, _FIRST_DELAY * 2**attempt))
                attempt = min(attempt + 1, 16)
                reason = str(problem) or type(problem).__name__
                log.warning("lost the pub/sub link to %s: %s; reconnecting", self._settings.safe_url, reason)
            finally:
                self._end()
                if connection is not None:
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(delay)

    async def _serve(self, link: _Link, connection: Any) -> None:
        """Run the link until a part of it fails, and raise what it failed with."""
        # Not a task group: until Python 3.13 one that is ending already swallows a cancellation from outside.
        parts: list[asyncio.Future[NoReturn]] = [
            link.ended,
            asyncio.create_task(self._write(link)),
            asyncio.create_task(self._probe(connection)),
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for part in parts:
                part.cancel()
            results = await asyncio.gather(*parts, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _begin(self, connection: Any) -> _Link:
        # redis-py offers no other way to the socket that it connected.
        self._link = link = _Link(cast(asyncio.Transport, connection._writer.transport), self._receive)
        if self._is_paused:
            link.pause_reading()
        self._commands = [(b"SUBSCRIBE", name) for name in (self._probe_channel, *self._keys)]
        self._linked_at = self._heard_at = asyncio.get_running_loop().time()
        self._wake.set()
        return link

    def _end(self) -> None:
        link, self._link = self._link, None
        self._commands = []
        if link is not None:
            link.transport.abort()
            self._listener.on_lost()

    async def _write(self, link: _Link) -> NoReturn:
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
                try:
                    link.transport.write(pack([(verb, *[name for _, name in commands[start:end]])]))
                except RuntimeError as error:  # uvloop's word for a transport that has just closed
                    raise BrokerUnavailable(str(error)) from error
                await link.is_writable.wait()
                start = end
            del commands  # not kept until the next wish

    def _receive(self, replies: Iterable[Any]) -> None:
        """Hand on all that has arrived, publications of one channel together."""
        keys, listener = self._keys, self._listener
        arrived: dict[Key, list[bytes]] = {}
        for reply in replies:
            try:
                kind, name, payload = reply
            except TypeError:
                raise reply from None  # Redis refuses, as where a user may not subscribe
            key = keys.get(name)
            if key is not None and kind == b"message" and payload[:1] != b"!":
                if key in arrived:
                    arrived[key].append(payload)
                else:
                    arrived[key] = [payload]
                continue
            if key is None:
                if name == self._probe_channel and kind == b"message":
                    self._heard_at = asyncio.get_running_loop().time()
                continue
            # What is not a publication keeps its place among them.
            if arrived:
                listener.on_publications(arrived)
                arrived = {}
            if kind == b"message":
                self._notice(key, name, payload)
            elif kind == b"subscribe":
                listener.on_subscribed(key)
        if arrived:
            listener.on_publications(arrived)

    def _notice(self, key: Key, name: bytes, payload: bytes) -> None:
        try:
            notice = decode_notice(payload)
        except ValueError as error:
            log.error("ignored %d foreign bytes on the Redis channel %s: %s", len(payload), name.decode(), error)
            return
        self._listener.on_notice(key, notice)

    async def _probe(self, connection: Any) -> NoReturn:
        loop = asyncio.get_running_loop()
        while True:
            next_at = loop.time() + self._settings.probe_interval
            try:
                async with asyncio.timeout_at(next_at):
                    await self._send_probe(self._probe_channel)
            except (BrokerUnavailable, TimeoutError) as error:
                log.debug("probe not sent: %s", error)
            if not self._servers.is_current(connection):
                raise BrokerUnavailable("another server is the master now")
            await asyncio.sleep(next_at - loop.time())
            silence = loop.time() - self._heard_at
            if silence > self._settings.probe_timeout and not self._is_paused:
                raise BrokerUnavailable(f"nothing was delivered for {silence:.1f} s")
