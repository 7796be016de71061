"""Read history from Redis, and publish to it, from an event loop.

In:     channels and offsets; drafts
Out:    pages of history, positions; or `BrokerUnavailable` within `broker_timeout` / `publish_timeout`
Owns:   a stack of idle connections, each with one exchange under way at most
Never:  gives a connection back whose exchange was cut short, by a timeout or a cancellation: another caller would
        read the replies that were left (redis-py CVE-2023-28858)
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.asyncio.connection import Connection

from pubsub_mw.broker.interface import Acceptance, Accepted, Key, Listener, Offer, answer_key
from pubsub_mw.broker.presence import PresenceCall, Present
from pubsub_mw.broker.redis.queue import GROUP
from pubsub_mw.broker.redis.scripts import Call, Scripts, pack
from pubsub_mw.broker.redis.servers import AsyncServers, NotMaster, refuse_replica
from pubsub_mw.broker.redis.subscriber import RedisSubscriber
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, ConnectionId, Draft, HistoryPage, Position
from pubsub_mw.settings import Settings

__all__ = ["AsyncRedisBroker"]

_MAX_CONNECTIONS = 32
"""Exchanges under way at once; further ones wait, within their own time."""


_REPORTS_PER_CALL = 500
"""Connections of a dead server that one script call reports, so that it does not hold up Redis."""


class AsyncRedisBroker:
    """`AsyncBroker` on one Redis server, or on the master that its sentinels name, for one event loop.

    Attributes:
        servers: where the url leads to
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._scripts = Scripts(settings)
        self.servers = AsyncServers(settings)
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._keeping: list[tuple[str, ...]] = []  # goes along with each probe

    async def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish all of `drafts` in one round trip, in order; see `Broker.publish`."""
        replies = await self._run(
            lambda is_retry: self._scripts.publish(drafts, is_retry=is_retry), self._settings.publish_timeout
        )
        for reply in replies:
            if isinstance(reply, redis.RedisError):
                raise self._fault(reply) from reply
        return Scripts.positions_from(replies)

    async def read(
        self, wanted: Sequence[tuple[Channel, int | None]], *, page_bytes: int
    ) -> list[HistoryPage | Exception]:
        """Read several channels in one round trip; see `AsyncBroker.read`."""
        replies = await self._run(
            lambda _: [self._scripts.read(channel, since, page_bytes) for channel, since in wanted],
            self._settings.broker_timeout,
        )
        return [self._page(reply, since) for reply, (_, since) in zip(replies, wanted, strict=True)]

    def _page(self, reply: Any, since: int | None) -> HistoryPage | Exception:
        if isinstance(reply, redis.RedisError):
            return self._fault(reply)
        try:
            return Scripts.page_from(reply, since)
        except BrokerUnavailable as error:
            return error

    async def secret(self) -> str:
        """Return the secret kept under `<prefix>:secret`, made if there is none.

        From then on it is put back if Redis loses it: else what starts later would make another, and refuse what was
        signed with this one.
        """
        key = self._scripts.keyspace.secret
        _, secret = await self._run(
            lambda _: [("SET", key, secrets.token_hex(32), "NX"), ("GET", key)], self._settings.broker_timeout
        )
        if not isinstance(secret, bytes):
            raise self._fault(secret)
        self._keeping = [("SET", key, secret.decode(), "NX")]
        return secret.decode()

    async def revoke(self, identity: str, subject: str, at: float, news: Draft) -> None:
        """Remember a revocation and tell the realtime servers; see `Broker.revoke`."""
        replies = await self._run(
            lambda is_retry: self._scripts.revoke(identity, subject, at, news, is_retry=is_retry),
            self._settings.broker_timeout,
        )
        for reply in replies:
            if isinstance(reply, redis.RedisError):
                raise self._fault(reply) from reply

    async def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
        """Return what was revoked; see `AsyncBroker.revoked`."""
        calls = [("HGETALL", self._scripts.keyspace.revoked(identity)) for identity in identities]
        replies = await self._run(lambda _: calls, self._settings.broker_timeout)
        for reply in replies:
            if isinstance(reply, redis.RedisError):
                raise self._fault(reply) from reply
        return [
            {subject.decode(): float(at) for subject, at in zip(reply[::2], reply[1::2], strict=True)}
            for reply in replies
        ]

    async def put_ticket(self, ticket: str, token: str, seconds: float) -> None:
        """Keep a token; see `AsyncBroker.put_ticket`."""
        await self.command("SET", self._scripts.keyspace.ticket(ticket), token, "PX", str(round(seconds * 1_000)))

    async def take_ticket(self, ticket: str) -> str | None:
        """Take a token; see `AsyncBroker.take_ticket`."""
        token = await self.command("GETDEL", self._scripts.keyspace.ticket(ticket))
        return token.decode() if isinstance(token, bytes) else None

    async def accept(self, offers: Sequence[Offer]) -> list[Accepted | Exception]:
        """Store requests; see `AsyncBroker.accept`."""
        settings, calls = self._settings, list[Call | tuple[Any, ...]]()
        limits = (settings.queue_size, settings.in_flight, settings.request_backlog)
        for offer in offers:
            calls.append(self._scripts.accept(offer, *limits))
            calls.append(("GET", self._scripts.keyspace.idempotency(offer.reply_to, answer_key(offer.request_id))))
        replies = await self._run(lambda _: calls, settings.publish_timeout)
        return [self._accepted(*pair) for pair in zip(replies[::2], replies[1::2], strict=True)]

    def _accepted(self, reply: Any, position: Any) -> Accepted | Exception:
        for item in (reply, position):
            if isinstance(item, redis.RedisError):
                return self._fault(item)
        try:
            return Accepted(Acceptance(reply), Scripts.position_from(position) if position else None)
        except BrokerUnavailable as error:
            return error

    async def report_begin(
        self, server: str, connection: ConnectionId, begin: bytes, end: bytes, *, takes_over: bool
    ) -> None:
        """Report a connection; see `AsyncBroker.report_begin`."""
        await self._call(self._scripts.connection_begin(connection, server, begin, end, takes_over=takes_over))

    async def report_end(self, server: str, connection: ConnectionId) -> None:
        """Report the end of a connection; see `AsyncBroker.report_end`."""
        await self._call(self._scripts.connection_end(connection, server))

    async def keep_lease(self, server: str, lease: float) -> bool:
        """Keep a server's lease; see `AsyncBroker.keep_lease`."""
        reported, lapsed = await self._call(self._scripts.server_lease(server, lease, _REPORTS_PER_CALL))
        while reported >= _REPORTS_PER_CALL:
            reported, _ = await self._call(self._scripts.server_lease(server, lease, _REPORTS_PER_CALL))
        return not lapsed

    async def _call(self, call: Call | tuple[Any, ...]) -> Any:
        (reply,) = await self._run(lambda _: [call], self._settings.broker_timeout)
        if isinstance(reply, redis.RedisError):
            raise self._fault(reply) from reply
        return reply

    async def cancel(self, connection: ConnectionId, request_id: str) -> bool:
        """Note that an answer is not wanted any more; see `AsyncBroker.cancel`."""
        return bool(await self._call(self._scripts.cancel(connection, request_id, is_answered=False)))

    async def withdraw(self, connection: ConnectionId, request_id: str) -> None:
        """Take a request out that was answered without a worker; see `AsyncBroker.withdraw`."""
        await self._call(self._scripts.cancel(connection, request_id, is_answered=True))

    async def queue_counts(self) -> dict[str, int]:
        """Count the requests in the queue; see `AsyncBroker.queue_counts`."""
        stored, waiting, *_ = self._scripts.keyspace.lanes
        calls = [("XLEN", stored), ("XLEN", waiting), ("XPENDING", stored, GROUP)]
        replies = await self._run(lambda _: calls, self._settings.broker_timeout)
        for reply in replies:
            if isinstance(reply, redis.RedisError) and "NOGROUP" not in str(reply):  # there was no worker yet
                raise self._fault(reply) from reply
        size, waits, pending = replies
        running = pending[0] if isinstance(pending, list) else 0
        return {"ready": max(0, size - running), "running": running, "waiting": waits}

    async def command(self, *arguments: str | bytes) -> Any:
        """Run one command and return its reply. Usually not what you want: it is for diagnosis."""
        return await self._call(arguments)

    async def _probe(self, channel: bytes) -> None:
        """Publish what the link has to hear, and put back what Redis may have lost."""
        published, *_ = await self._run(
            lambda _: [("PUBLISH", channel, b""), *self._keeping], self._settings.broker_timeout
        )
        if isinstance(published, redis.RedisError):
            raise self._fault(published) from published

    async def presence(self, calls: Sequence[PresenceCall]) -> list[Present | Exception]:
        """Change who is on several channels in one round trip; see `AsyncBroker.presence`."""
        replies = await self._run(
            lambda _: [self._scripts.presence(call) for call in calls], self._settings.broker_timeout
        )
        return [self._present(reply) for reply in replies]

    def _present(self, reply: Any) -> Present | Exception:
        if isinstance(reply, redis.RedisError):
            return self._fault(reply)
        try:
            return Scripts.present_from(reply)
        except ValueError as error:
            return error

    def subscriber(self, listener: Listener[Key]) -> RedisSubscriber[Key]:
        """Make the process's pub/sub link; the caller runs it."""
        return RedisSubscriber(self._settings, listener, self.servers, self._probe)

    def _fault(self, said: object) -> BrokerUnavailable:
        return BrokerUnavailable(f"Redis at {self._settings.safe_url}: {said}")

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _run(self, build: Callable[[bool], Sequence[Call | tuple[Any, ...]]], seconds: float) -> list[Any]:
        try:
            async with asyncio.timeout(seconds), self._slots:
                try:
                    return await self._round_trip(build(False))
                except redis.ConnectionError:
                    # A broken link says nothing about whether the commands had arrived.
                    return await self._round_trip(build(True))
        except (redis.RedisError, OSError) as error:  # asyncio's TimeoutError is an OSError
            if isinstance(error, (redis.TimeoutError, TimeoutError)):
                await self.close()  # the idle connections went the same way, and may be as dead
            reason = str(error) or f"no answer within {seconds:g} s"
            raise self._fault(reason) from error

    async def _round_trip(self, calls: Sequence[Call | tuple[Any, ...]]) -> list[Any]:
        await self.servers.refresh()
        connection = self._idle.pop() if self._idle else await self.servers.connect()
        try:
            is_fit = connection.is_connected and self.servers.is_current(connection)
            if not is_fit or await connection.can_read():
                await connection.disconnect(nowait=True)
                connection = await self.servers.connect()
            commands = [call.by_digest() if isinstance(call, Call) else call for call in calls]
            replies = await self._exchange(connection, commands)
            unknown = [
                index for index, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)
            ]
            if unknown:
                sources = [call.by_source() for call in (calls[index] for index in unknown) if isinstance(call, Call)]
                for index, reply in zip(unknown, await self._exchange(connection, sources), strict=True):
                    replies[index] = reply
            refuse_replica(replies)
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, NotMaster):
                await self.close()  # the idle connections lead there, too
            raise
        self._idle.append(connection)
        return replies

    @staticmethod
    async def _exchange(connection: Connection, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        try:
            await connection.send_packed_command(pack(commands), check_health=False)
        except RuntimeError as error:  # uvloop's word for a transport that has closed since it was looked at
            raise redis.ConnectionError(str(error)) from error
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except redis.ResponseError as error:
                replies.append(error)
        return replies
