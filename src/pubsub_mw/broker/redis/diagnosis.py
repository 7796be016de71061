"""Find out whether a Redis server will do, and say what to do where it will not.

In:     settings
Out:    findings, each as soon as it is known
Owns:   the checks of `pubsub-mw doctor`
Never:  changes the server: it writes one channel of its own, which expires
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis

from pubsub_mw.broker.presence import Notice
from pubsub_mw.broker.redis.reader import AsyncRedisBroker
from pubsub_mw.errors import BrokerUnavailable
from pubsub_mw.model import Channel, Draft
from pubsub_mw.protocol import message_head
from pubsub_mw.settings import Settings

__all__ = ["Finding", "Level", "diagnose"]

_OLDEST = (6, 2)
_ROUND_TRIPS = 20
_RIGHTS = "-@all +@read +@write +@pubsub +@scripting +@connection +time -@dangerous +info"


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result; `cure` says what to do, empty where nothing is to be done."""

    level: Level
    text: str
    cure: str = ""


async def diagnose(settings: Settings) -> AsyncIterator[Finding]:
    """Check the server at `settings.url`, from the outside in; stop where nothing further can work."""
    broker = AsyncRedisBroker(settings)
    try:
        try:
            info = _parse(await broker.command("INFO"))
        except BrokerUnavailable as error:
            if not isinstance(error.__cause__, redis.exceptions.NoPermissionError):
                parts = "its sentinels, or correct PUBSUB_URL (their addresses, the master's name, sentinel_password)"
                if "+sentinel://" not in settings.url:
                    parts = "or correct PUBSUB_URL (host, port, password, database)"
                yield Finding(Level.FAULT, str(error), f"start Redis, {parts}")
                return
            yield Finding(
                Level.WARNING,
                "this user may not ask for INFO: version, memory and role are not checked",
                "ACL SETUSER <user> +info",
            )
        else:
            yield _version(info)
            yield _policy(info)
            yield _persistence(info)
            yield (role := _role(info))
            if role.level is Level.FAULT:
                return
            if broker.servers.master is not None:
                yield _failover(info, *broker.servers.master)
        try:
            yield await _round_trip(broker, settings)
        except (BrokerUnavailable, TimeoutError) as error:
            own = f"~{settings.prefix}:* &{settings.prefix}:*"
            yield Finding(
                Level.FAULT,
                f"a publication did not come back: {str(error) or 'nothing within broker_timeout'}",
                f"see by INFO why it takes no writes; where it has users: ACL SETUSER <user> {own} {_RIGHTS}",
            )
    finally:
        await broker.close()


def _parse(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines() if ":" in line)
    return {name: value for name, _, value in lines}


def _version(info: dict[str, str]) -> Finding:
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _OLDEST:
        return Finding(Level.FAULT, f"Redis {version} is too old", "use Redis 6.2 or newer, with its latest patches")
    return Finding(Level.OK, f"Redis {version} answers")


def _policy(info: dict[str, str]) -> Finding:
    policy, limit = info.get("maxmemory_policy", "unknown"), int(info.get("maxmemory", "0"))
    if policy == "noeviction":
        return Finding(Level.OK, "maxmemory-policy is noeviction: no history is thrown away")
    if not limit:
        return Finding(Level.OK, f"maxmemory-policy is {policy}, but maxmemory is not set: nothing is evicted")
    return Finding(
        Level.WARNING,
        f"maxmemory-policy is {policy}: Redis may throw away positions, and clients are then told of gaps",
        "CONFIG SET maxmemory-policy noeviction, and watch used_memory",
    )


def _persistence(info: dict[str, str]) -> Finding:
    if info.get("aof_enabled") == "1":
        return Finding(Level.OK, "persistence is on (AOF): history survives a restart")
    return Finding(
        Level.OK, "without AOF a restart of Redis loses history; clients are told, and live delivery goes on"
    )


def _role(info: dict[str, str]) -> Finding:
    if info.get("role") == "master":
        return Finding(Level.OK, "it is a primary: it can be published to")
    return Finding(Level.FAULT, "it is a replica: publishing to it fails", "point PUBSUB_URL at the primary")


def _failover(info: dict[str, str], host: str, port: int) -> Finding:
    replicas = int(info.get("connected_slaves", "0"))
    text = f"sentinels name {host}:{port} as the master; replicas: {replicas}"
    if not replicas:
        return Finding(Level.WARNING, f"{text}, so that none can take over", "start one, with replicaof")
    if replicas > 1 and "min_slaves_good_slaves" not in info:  # which is there where min-replicas-to-write is set
        text += "; one that is relieved or cut off takes publications for a while yet, which are lost"
        return Finding(Level.WARNING, text, "CONFIG SET min-replicas-to-write 1, on every server")
    return Finding(Level.OK, text)


async def _round_trip(broker: AsyncRedisBroker, settings: Settings) -> Finding:
    """Publish and wait for what is delivered, over the same two links a server uses."""
    listener = _Ear()
    subscriber = broker.subscriber(listener)
    channel = Channel(f"doctor:{secrets.token_hex(8)}")
    link = asyncio.create_task(subscriber.run())
    try:
        async with asyncio.timeout(settings.broker_timeout):
            subscriber.subscribe(channel, channel)
            await listener.subscribed.wait()
            times = []
            for _ in range(_ROUND_TRIPS):
                began = time.perf_counter()
                await broker.publish([_draft(channel)])
                await listener.heard.get()
                times.append(time.perf_counter() - began)
    finally:
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)
    median = sorted(times)[_ROUND_TRIPS // 2] * 1_000
    return Finding(Level.OK, f"published and delivered {_ROUND_TRIPS} times, in {median:.1f} ms (median)")


def _draft(channel: Channel) -> Draft:
    return Draft(
        channel=channel,
        tag=secrets.token_hex(4),
        head=message_head(channel, "message", b"null"),
        exclude="",
        idempotency_key="",
        history_size=1,
        is_kept=True,
    )


class _Ear:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self.heard: asyncio.Queue[Any] = asyncio.Queue(_ROUND_TRIPS)

    def on_publications(self, arrived: Mapping[Channel, Sequence[bytes]]) -> None:
        for payloads in arrived.values():
            for payload in payloads:
                self.heard.put_nowait(payload)

    def on_notice(self, key: Channel, notice: Notice) -> None:
        """Nobody is on this channel."""

    def on_subscribed(self, key: Channel) -> None:  # noqa: ARG002 - one channel only
        self.subscribed.set()

    def on_lost(self) -> None:
        self.subscribed.clear()
