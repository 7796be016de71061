"""Connect to the Redis server that the url names, or to the master that its sentinels name.

In:     settings
Out:    connections, ready for commands, to the server that takes writes
Owns:   the forms of the url; which master sentinels named last, and whom of them to ask first
Never:  believes a sentinel alone: the server has to say itself that it is a master; waits for a silent sentinel longer
        than its share of the time

Source: redis.io, "Guidelines for Redis clients with support for Redis Sentinel".

redis-py's own `Sentinel` is not used. It asks one that is down eleven times, for seconds, before the next one, and
gives up at the first that refuses; it does not ask the master for its role; and a client of it stays with the old
master until that closes the connection, ten seconds after `SENTINEL FAILOVER`. What is published there meanwhile is
lost. So here sentinels are asked again each `probe_interval`.

What there is to do is written once, as coroutines. For threads their parts block, and `at_once` runs them.
"""

import asyncio
import functools
import math
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlencode

import redis
import redis.asyncio.connection
import redis.asyncio.retry
from redis.backoff import NoBackoff

from pubsub_mw.errors import BrokerUnavailable, SettingsError
from pubsub_mw.settings import Settings

__all__ = ["AsyncServers", "NotMaster", "Servers", "SyncServers", "at_once", "left", "refuse_replica"]

T = TypeVar("T")

_SENTINEL_URL = re.compile(
    r"(rediss?)\+sentinel://([^/?#]*@)?([^/?#@]+)/([^/?#]+)(?:/([0-9]*))?(?:\?([^#]*))?"  # .../name/database?options
)
_SHARES_OF_PATIENCE = 10
"""When all sentinels were silent, each for its share of the time, so many shares pass before one is asked again."""


class NotMaster(redis.ConnectionError):
    """The server takes no writes; it is a replica now, or always was."""


class Servers:
    """Where the url leads to.

    Args:
        library: the module of redis-py whose connections are to be made
        options: of each of them

    Attributes:
        master: host and port, as a sentinel named it last; None = there are no sentinels, or none was asked yet

    Raises:
        SettingsError: the url is malformed, or has an option that no connection knows.
    """

    def __init__(self, settings: Settings, library: Any, options: dict[str, Any]) -> None:
        self.master: tuple[str, int] | None = None
        self._interval = settings.probe_interval
        self._ask_at = 0.0
        self._silent_count = 0
        url, self._name, sentinels = settings.url, "", list[str]()
        form = "redis://user:password@host:6379/0"
        try:
            if url.partition("://")[0].endswith("+sentinel"):
                form = "redis+sentinel://user:password@host:26379,host:26379/mymaster/0"
                url, self._name, sentinels = _split(url)
            self._new_connection = _factory(library, url, {}, options)
            # Whom to ask first comes first.
            self._sentinels = tuple(_factory(library, each, {"port": 26_379}, options) for each in sentinels)
        except (ValueError, TypeError) as error:
            # Without the cause, whose text may show a part of the password.
            wrong = "is malformed" if isinstance(error, ValueError) else "has an option that does not exist"
            raise SettingsError(f"url {settings.safe_url!r} {wrong}; it may be {form}") from None
        # One may be asked again, then all of them, and then it is the master's turn.
        self._share = min(settings.publish_timeout, settings.broker_timeout) / (len(self._sentinels) + 2)

    def is_current(self, connection: Any) -> bool:
        """Whether the connection leads to the server that is to be used, as far as is known."""
        return not self._sentinels or (connection.host, connection.port) == self.master

    async def refresh(self, deadline: float = math.inf) -> None:
        """Ask who is the master, if it is time to: a server that is none any more may not say so."""
        if self.master is None or time.monotonic() < self._ask_at:
            return
        self._ask_at = time.monotonic() + self._interval  # already now: who needs a connection meanwhile does not ask
        sentinel = self._sentinels[0]
        answer = await self._ask(sentinel, deadline)
        if isinstance(answer, str):
            self._silent_count += 1
            if self._silent_count >= len(self._sentinels):
                self._ask_at += _SHARES_OF_PATIENCE * self._share
        else:
            self._silent_count = 0
            self._rank(sentinel, is_first=True)
            self.master = answer

    async def connect(self, deadline: float = math.inf) -> Any:
        """Return a connection to the server that takes writes, used by nobody else, which never retries by itself.

        Args:
            deadline: by `time.monotonic`; on an event loop the caller's own

        Raises:
            BrokerUnavailable: no sentinel leads to a master; the text says who said what.
        """
        if not self._sentinels:
            connection = self._new_connection()
            await self._reply(connection, (), deadline)
            return connection
        said = dict[object, str]()
        for sentinel in self._sentinels:
            address = await self._ask(sentinel, deadline)
            if isinstance(address, str):
                said[sentinel] = address
            elif address not in said:
                connection = self._new_connection(host=address[0], port=address[1])
                try:
                    # Not ROLE, which is among the dangerous commands that a user of ours need not have.
                    if b"master" not in await self._reply(connection, ("HELLO",), deadline):
                        raise NotMaster("it says that it is a replica")
                except (redis.RedisError, OSError) as error:
                    await self._close(connection)
                    said[address] = f"{_address(sentinel)} names {address[0]}:{address[1]} ({error})"
                else:
                    self._rank(sentinel, is_first=True)
                    self.master = address
                    return connection
        cure = "correct the url, start the sentinels, or wait for a failover"
        raise BrokerUnavailable(f"sentinels lead to no master {self._name!r}: {'; '.join(said.values())}; {cure}")

    async def _ask(self, sentinel: Callable[..., Any], deadline: float) -> tuple[str, int] | str:
        """Return the address that a sentinel names, or what is wrong with it."""
        self._rank(sentinel, is_first=False)  # until it has answered, also if this is cancelled
        connection, until = sentinel(), min(deadline, time.monotonic() + self._share)
        try:
            reply = await self._reply(connection, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name), until)
        except (redis.RedisError, OSError) as error:
            return f"{_address(sentinel)} does not answer ({str(error) or 'in time'})"
        await self._close(connection)
        if reply is None:
            return f"{_address(sentinel)} knows no master of that name, see its SENTINEL MASTERS"
        self._ask_at = time.monotonic() + self._interval
        return reply[0].decode(), int(reply[1])

    def _rank(self, sentinel: Callable[..., Any], *, is_first: bool) -> None:
        others = tuple(other for other in self._sentinels if other is not sentinel)
        self._sentinels = (sentinel, *others) if is_first else (*others, sentinel)

    async def _reply(self, connection: Any, command: tuple[str, ...], until: float) -> Any:
        """Connect, and return the reply to a command if there is one; close the connection if that fails."""
        try:
            return await self._exchange(connection, command, until)
        except BaseException:
            await self._close(connection)
            raise

    async def _exchange(self, connection: Any, command: tuple[str, ...], until: float) -> Any:
        raise NotImplementedError

    async def _close(self, connection: Any) -> None:
        raise NotImplementedError


class SyncServers(Servers):
    """`Servers` for threads: what it does it does at once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, redis.connection, {"retry": redis.retry.Retry(NoBackoff(), 0)})

    async def _exchange(self, connection: Any, command: tuple[str, ...], until: float) -> Any:
        connection.socket_timeout = connection.socket_connect_timeout = left(until)
        connection.connect()
        if command:
            connection.send_command(*command, check_health=False)
            return connection.read_response(timeout=left(until))
        return None

    async def _close(self, connection: Any) -> None:
        connection.disconnect()


class AsyncServers(Servers):
    """`Servers` for an event loop."""

    def __init__(self, settings: Settings) -> None:
        options = {
            "retry": redis.asyncio.retry.Retry(NoBackoff(), 0),
            # On Python 3.11 redis-py's `wait_for` can swallow a cancellation; whoever connects has a deadline.
            "socket_timeout": None,
            "socket_connect_timeout": min(settings.broker_timeout, settings.probe_timeout),
        }
        super().__init__(settings, redis.asyncio.connection, options)

    async def _exchange(self, connection: Any, command: tuple[str, ...], until: float) -> Any:
        async with asyncio.timeout(None if until == math.inf else until - time.monotonic()):
            await connection.connect()
            if command:
                await connection.send_command(*command, check_health=False)
                return await connection.read_response()
        return None

    async def _close(self, connection: Any) -> None:
        await connection.disconnect(nowait=True)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for an event loop, and return its result."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("it waits for an event loop")


def left(deadline: float) -> float:
    """Return the seconds until then.

    Raises:
        redis.TimeoutError: it is over.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise redis.TimeoutError("no answer within publish_timeout")
    return left


def refuse_replica(replies: Sequence[Any]) -> None:
    """Take a server that refuses to write for one that is gone.

    Raises:
        NotMaster: one of the replies says so.
    """
    for reply in replies:
        # Of a script Redis 6.2 says it in the middle of the text.
        if isinstance(reply, redis.ReadOnlyError) or (
            isinstance(reply, redis.ResponseError) and "-READONLY " in str(reply)
        ):
            raise NotMaster(str(reply))


def _split(url: str) -> tuple[str, str, list[str]]:
    """Return a url of the master, but for its address, the name that sentinels know it by, and their urls."""
    form = _SENTINEL_URL.fullmatch(url)
    # A sentinel without a host would be taken for one on this machine.
    if form is None or any(host.startswith(":") or not host for host in form[3].split(",")):
        raise ValueError("malformed")
    scheme, user, hosts, name, database, query = form.groups("")
    options = dict(parse_qsl(query, keep_blank_values=True))
    own = {key: value for key, value in options.items() if not key.startswith("sentinel_")}
    theirs = {key: value for key, value in own.items() if key.startswith("ssl_")}
    theirs |= {key.removeprefix("sentinel_"): value for key, value in options.items() if key not in own}
    sentinels = [f"{scheme}://{host}?{urlencode(theirs)}" for host in hosts.split(",")]
    return f"{scheme}://{user}master/{database}?{urlencode(own)}", unquote(name), sentinels


def _factory(library: Any, url: str, defaults: dict[str, Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return what makes connections to the server that a url names."""
    arguments = {"connection_class": library.Connection, **defaults, **library.parse_url(url), **options}
    # Replies are bytes whatever the url says; `driver_info` would cost two round trips per connection.
    arguments |= {"protocol": 2, "driver_info": None, "decode_responses": False}
    factory = functools.partial(arguments.pop("connection_class"), **arguments)
    factory()  # what is wrong with the options shows now
    return factory


def _address(sentinel: Callable[..., Any]) -> str:
    connection = sentinel()
    return f"{connection.host}:{connection.port}"
