"""Listen from Python: services, bots, tests, the command line. The same rules as the browser's client.

In:     a url; channels
Out:    publications, each once and in order over any number of reconnects; told where that cannot be kept
Owns:   one task that connects, reads, and connects again; the position of each channel
Never:  advances a position over what was not handed on; waits for ever on a link that is dead

    async with connect("ws://127.0.0.1:8000/realtime") as connection:
        async for message in await connection.subscribe("room:42"):
            print(message.data)
"""

import asyncio
import inspect
import json
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection as Socket
from websockets.asyncio.client import connect as open_socket
from websockets.exceptions import ConnectionClosed as SocketClosed
from websockets.exceptions import WebSocketException

from pubsub_mw.errors import (
    CloseCode,
    ConnectFailed,
    ConnectionClosed,
    ErrorCode,
    PubSubError,
    SubscriptionRefused,
    may_reconnect,
)

__all__ = ["Connection", "Gap", "Message", "Subscription", "backoff", "connect"]

log = logging.getLogger("pubsub_mw")

_BASE_SECONDS, _CAP_SECONDS = 0.5, 20.0
_PONG_SECONDS = 8.0
"""Beyond the server's ping interval without a frame the link is dead."""
_CLOSE_SECONDS = 2.0
_MAX_FRAME_BYTES = 64 << 20
_MAX_WAITING = 1_000

Grant = str | Callable[[], str | Awaitable[str]]


def backoff(attempt: int, chance: float) -> float:
    """Return how many seconds to wait before attempt `attempt` (from 0), with full jitter; `chance` is 0 to 1."""
    return chance * min(_CAP_SECONDS, _BASE_SECONDS * 2.0 ** min(attempt, 16))


@dataclass(frozen=True, slots=True)
class Message:
    """A publication as it arrived.

    Attributes:
        channel: its name
        event: what kind it is
        data: any JSON value
        position: its place, as text; give it to `subscribe` to go on after it
    """

    channel: str
    event: str
    data: Any
    position: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Something was missed and cannot be told: fetch the state anew.

    Attributes:
        channel: its name
        position: from which everything follows again
        reason: `epoch`, `ahead`, `forked`, `trimmed`, or `unrecovered` when it showed on subscribing
    """

    channel: str
    position: str
    reason: str


def connect(
    url: str,
    *,
    grant: Grant | None = None,
    headers: Mapping[str, str] | None = None,
    on_private: Callable[[Message], object] | None = None,
    open_timeout: float = 10.0,
) -> "Connection":
    """Return a connection, to be entered with `async with`.

    Args:
        url: of the realtime endpoint: `ws://`, `wss://`, `http://` or `https://`
        grant: its text, or a function (or coroutine function) that returns a fresh one
        headers: to send with the handshake, such as `Cookie` and `Origin`
        on_private: called with each publication on the connection's own channels; a coroutine function is awaited
        open_timeout: seconds for the first connection to stand; later, for each attempt and each call of `grant`

    Raises:
        ValueError: not such a url.
        ConnectFailed: (on entering) nobody answered in time.
        ConnectionClosed: (on entering) the server refuses for good, such as by GRANT_INVALID.
    """
    return Connection(_websocket_url(url), grant, dict(headers or {}), on_private, open_timeout)


class _Arrivals:
    """What arrived and was not handed on yet, in order; at the bound, whoever puts waits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[Message | Gap] = deque()
        self._is_open = True
        self._changed = asyncio.Event()

    async def put(self, item: Message | Gap) -> bool:
        """Append; False if it was closed instead."""
        while self._is_open and len(self._items) >= self._limit:
            await self._change()
        if self._is_open:
            self._items.append(item)
            self._changed.set()
        return self._is_open

    async def take(self) -> Message | Gap | None:
        """Return the next one; None when there will be no more."""
        while not self._items:
            if not self._is_open:
                return None
            await self._change()
        self._changed.set()
        return self._items.popleft()

    def close(self) -> None:
        """Take nothing more. What is here can still be taken."""
        self._is_open = False
        self._changed.set()

    def clear(self) -> None:
        self._items.clear()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Subscription:
    """One channel that the connection listens to. Iterate over it, or give `subscribe` a callback.

    Attributes:
        channel: its name
        position: the last one received, as text; None before the server answered
    """

    def __init__(
        self,
        connection: "Connection",
        channel: str,
        position: str | None,
        on_message: Callable[[Message], object] | None,
        on_gap: Callable[[Gap], object] | None,
        max_waiting: int,
    ) -> None:
        self.channel = channel
        self.position = position
        self._connection = connection
        self._on_message = on_message
        self._on_gap = on_gap
        self._arrivals = _Arrivals(max_waiting)
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: PubSubError | None = None

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next publication.

        Raises:
            SubscriptionRefused: the server ended the subscription.
            ConnectionClosed: the connection ended for good.
            TypeError: its publications go to a callback.
        """
        if self._on_message is not None:
            raise TypeError(f"what comes on {self.channel} goes to on_message; subscribe without it to iterate")
        return await self._next()

    async def unsubscribe(self) -> None:
        """Stop listening. Iteration ends after what has arrived; a callback is not called any more."""
        if self._on_message is not None:
            self._arrivals.clear()
        await self._connection._unsubscribe(self)

    async def _next(self) -> Message:
        while (item := await self._arrivals.take()) is not None:
            if isinstance(item, Message):
                return item
            if self._on_gap is None:
                log.warning("%s: something was missed (%s); give on_gap to fetch it anew", self.channel, item.reason)
            else:
                await _call(self._on_gap, item)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def _call_back(self, on_message: Callable[[Message], object]) -> None:
        """Hand on all that comes; a task of its own, so that a callback may itself wait for this connection."""
        try:
            while True:
                await _call(on_message, await self._next())
        except StopAsyncIteration:
            return
        except PubSubError as error:
            log.warning("%s gets nothing more: %s", self.channel, error)

    async def _deliver(self, item: Message | Gap) -> None:
        # At the bound the socket is not read any more; the server then closes it, and recovery brings the rest.
        if await self._arrivals.put(item):
            self.position = item.position

    async def _subscribed(self, position: str, recovered: bool | None) -> None:
        if not self._answered.done():
            self._answered.set_result(None)
        if recovered is False:
            await self._deliver(Gap(self.channel, position, "unrecovered"))
        self.position = position

    def _end(self, error: PubSubError | None) -> None:
        self._error = error
        self._arrivals.close()
        if not self._answered.done():
            self._answered.set_exception(error or _closed_here())
            self._answered.exception()  # whoever still waits gets it; nobody has to


@dataclass(slots=True)
class _Asked:
    """What the server was last asked for on one channel: to subscribe for `subscription`, or (None) to unsubscribe."""

    subscription: Subscription | None
    is_subscribed: bool = False


class Connection:
    """A connection that stands again by itself after whatever broke it. Made by `connect`.

    Attributes:
        id: as the server knows it, for `exclude`; None while not connected
        user: who the grant says it is
        state: `connecting`, `connected`, `waiting` (for the next attempt) or `closed`
    """

    def __init__(
        self,
        url: str,
        grant: Grant | None,
        headers: dict[str, str],
        on_private: Callable[[Message], object] | None,
        open_timeout: float,
    ) -> None:
        self.id: str | None = None
        self.user: str | None = None
        self.state = "connecting"
        self._url = url
        self._grant = grant
        self._headers = headers
        self._on_private = on_private
        self._open_timeout = open_timeout
        self._resume: str | None = None
        self._own: dict[str, str] = {}  # own channels -> positions
        self._private = _Arrivals(_MAX_WAITING)
        self._subscriptions: dict[str, Subscription] = {}  # what the application wants
        # What the server was asked for on this link. A channel's next command waits for the answer to the last one,
        # so every answer, and every publication, is known to belong to one subscription.
        self._asked: dict[str, _Asked] = {}
        self._socket: Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._helpers: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._closed = asyncio.Event()
        self._error: ConnectionClosed | None = None
        self._failure = "no answer"
        self._attempt = 0
        self._resubscribe_attempt = 0
        self._resubscribing: asyncio.Task[None] | None = None
        self._is_renewing = False  # a second `grant_expired` at once means that the function has no fresh grant

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        if self._on_private is not None:
            self._help(self._call_private(self._on_private))
        try:
            async with asyncio.timeout(self._open_timeout):
                await self._opened.wait()
        except TimeoutError:
            await self.close()
            raise ConnectFailed(f"{self._url}: {self._failure}") from None
        except BaseException:
            await self.close()
            raise
        if self._error is not None:
            await self.close()
            raise self._error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close for good; every subscription's iteration ends."""
        self._end(None)
        tasks = {*self._helpers, *filter(None, [self._task])} - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_closed(self) -> None:
        """Wait until the connection has ended; for who listens by callbacks alone.

        Raises:
            ConnectionClosed: it was not closed here: reconnecting is no use.
        """
        await self._closed.wait()
        if self._error is not None:
            raise self._error

    async def subscribe(
        self,
        channel: str,
        on_message: Callable[[Message], object] | None = None,
        *,
        position: str | None = None,
        on_gap: Callable[[Gap], object] | None = None,
        max_waiting: int = _MAX_WAITING,
    ) -> Subscription:
        """Listen to `channel`; return when the server has agreed.

        Args:
            channel: its name
            on_message: called with each publication, one after another; a coroutine function is awaited. None =
                iterate instead
            position: go on after it
            on_gap: called, in its place among the publications, when something was missed that cannot be told
            max_waiting: publications that may wait for the iteration or the callback; beyond it nothing is read
                from the connection, for any of its channels

        Raises:
            SubscriptionRefused: the server does not allow it.
            ConnectionClosed: the connection ended for good.
            ValueError: this connection listens to it already.
        """
        if self._task is None:
            raise RuntimeError("enter the connection first: async with connect(...) as connection")
        if self.state == "closed":
            raise self._error or _closed_here()
        if channel in self._subscriptions:
            raise ValueError(f"this connection listens to {channel} already")
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting} must be at least 1")
        subscription = Subscription(self, channel, position, on_message, on_gap, max_waiting)
        self._subscriptions[channel] = subscription
        try:
            await self._settle(channel)
            await subscription._answered
        except BaseException:
            await self._unsubscribe(subscription)
            raise
        if on_message is not None:
            self._help(subscription._call_back(on_message))
        return subscription

    async def publish(self, channel: str, data: object, *, event: str = "message") -> None:
        """Publish straight to a channel, where the grant allows it. At most once: the server does not confirm it.

        Raises:
            ConnectFailed: there is no connection now.
            TypeError, ValueError: `data` is not JSON.
        """
        if self.state != "connected":
            raise ConnectFailed("not connected now; try again when state is connected")
        # The id tells a refusal of this from one of a subscription to the same channel.
        await self._send({"type": "publish", "id": "publish", "channel": channel, "event": event, "data": data})

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if self._subscriptions.get(subscription.channel) is subscription:
            del self._subscriptions[subscription.channel]
            subscription._end(None)
            await self._settle(subscription.channel)

    async def _settle(self, channel: str) -> None:
        """Ask the server for what it lacks to be what the application wants."""
        if self.state != "connected":
            return
        wanted, asked = self._subscriptions.get(channel), self._asked.get(channel)
        if asked is None and wanted is not None:
            self._asked[channel] = _Asked(wanted)
            await self._send({"type": "subscribe", "channel": channel, "position": wanted.position})
        elif asked is not None and asked.is_subscribed and asked.subscription is not wanted:
            self._asked[channel] = _Asked(None)
            await self._send({"type": "unsubscribe", "channel": channel})

    async def _send(self, frame: dict[str, Any]) -> None:
        text = json.dumps(frame, allow_nan=False)
        if self._socket is not None:
            try:
                await self._socket.send(text)
            except SocketClosed:
                log.debug("not sent: the link just broke; what still counts is sent on the next one")

    async def _run(self) -> None:
        """Connect and read, again and again, until the server says not to come back."""
        try:
            while True:
                self.state, least = "connecting", 0.0
                try:
                    least = await self._session()
                except (OSError, TimeoutError, WebSocketException, _GrantFailed) as error:
                    self._failure = str(error) or type(error).__name__
                    log.info("%s: %s", self._url, self._failure)
                finally:
                    self._socket, self.id = None, None
                self.state = "waiting"
                await asyncio.sleep(max(least, backoff(self._attempt, random.random())))
                self._attempt += 1
        except ConnectionClosed as error:
            self._end(error)
        except Exception as error:
            log.exception("the client failed")
            self._end(ConnectionClosed(1000, f"the client failed: {error!r}"))

    async def _session(self) -> float:
        """Live through one socket; return how many seconds the server asks to wait before the next."""
        grant = await self._fetch_grant()
        async with open_socket(
            self._url,
            additional_headers=self._headers,
            max_size=_MAX_FRAME_BYTES,
            ping_interval=None,
            compression=None,
            open_timeout=self._open_timeout,
            close_timeout=_CLOSE_SECONDS,
        ) as socket:
            self._socket = socket
            self._asked = {name: _Asked(item) for name, item in self._subscriptions.items()}
            channels = {name: item.position for name, item in self._subscriptions.items()} | self._own
            await self._send({"type": "connect", "grant": grant, "resume": self._resume, "channels": channels})
            silence = self._open_timeout
            try:
                while True:
                    async with asyncio.timeout(silence):
                        frame = json.loads(await socket.recv())
                    if frame["type"] == "connected":
                        silence = frame["ping"] + _PONG_SECONDS
                    if frame["type"] == "disconnect":
                        return self._ended(frame["code"], frame["reason"], frame["retry"] or 0.0)
                    await self._receive(frame)
            except SocketClosed as closed:
                if closed.rcvd is None:
                    return 0.0
                return self._ended(closed.rcvd.code, closed.rcvd.reason, 0.0)
            except TimeoutError:
                socket.transport.abort()  # nobody is there to say goodbye to
                raise

    def _ended(self, code: int, reason: str, retry: float) -> float:
        is_renewable = code == CloseCode.GRANT_EXPIRED and callable(self._grant)
        if not may_reconnect(code) and not is_renewable:
            raise ConnectionClosed(code, reason)
        self._failure = f"closed with {code}: {reason}"
        return retry

    async def _receive(self, frame: dict[str, Any]) -> None:
        kind, channel = frame["type"], frame.get("channel", "")
        asked = self._asked.get(channel)
        subscription = asked.subscription if asked is not None else None
        if kind == "message":
            self._attempt = 0
            message = Message(channel, frame["event"], frame["data"], frame["position"])
            if subscription is not None:
                await subscription._deliver(message)
            elif channel.startswith("#"):
                if self._on_private is not None:
                    await self._private.put(message)
                self._own[channel] = message.position
        elif kind == "ping":
            self._attempt, self._is_renewing = 0, False
            await self._send({"type": "pong"})
        elif kind == "connected":
            await self._connected(frame)
        elif kind == "subscribed":
            await self._subscribed(frame, asked)
        elif kind == "gap":
            if subscription is not None:
                await subscription._deliver(Gap(channel, frame["position"], frame["reason"]))
            elif channel.startswith("#"):
                self._lost_own(channel, frame["position"], frame["reason"])
        elif kind == "unsubscribed" and frame["code"] != "client":
            await self._refused(channel, frame["code"], frame["reason"])
        elif kind == "unsubscribed" or (kind == "error" and frame["code"] == ErrorCode.NOT_SUBSCRIBED):
            self._asked.pop(channel, None)
            await self._settle(channel)
        elif kind == "error":
            await self._error_told(frame)

    async def _connected(self, frame: dict[str, Any]) -> None:
        own = {f"#connection-{frame['connection']}"}
        if frame["user"] is not None:
            own.add(f"#user-{frame['user']}")
        self._own = {channel: position for channel, position in self._own.items() if channel in own}
        self.id, self.user, self._resume = frame["connection"], frame["user"], frame["resume"]
        self.state, self._is_renewing = "connected", False
        self._opened.set()
        await self._settle_all()

    async def _subscribed(self, frame: dict[str, Any], asked: _Asked | None) -> None:
        channel, position = frame["channel"], frame["position"]
        if asked is not None:
            self._resubscribe_attempt = 0
            asked.is_subscribed = True
            await self._settle(channel)  # the application may have left meanwhile
            if asked.subscription is not None:
                await asked.subscription._subscribed(position, frame["recovered"])
        elif channel.startswith("#") and frame["recovered"] is False:
            self._lost_own(channel, position, "unrecovered")
        elif channel.startswith("#"):
            self._own[channel] = position

    def _lost_own(self, channel: str, position: str, reason: str) -> None:
        self._own[channel] = position
        log.warning("%s: something was missed (%s)", channel, reason)

    async def _error_told(self, frame: dict[str, Any]) -> None:
        code, message = frame["code"], frame["message"]
        if frame.get("channel") in self._asked and "id" not in frame:
            await self._refused(frame["channel"], code, message)
        elif code == ErrorCode.GRANT_EXPIRED and callable(self._grant) and not self._is_renewing:
            self._is_renewing = True
            await self._send({"type": "grant", "grant": await self._fetch_grant()})
        else:
            log.warning("the server refused a command: %s (%s)", message, code)

    async def _refused(self, channel: str, code: str, message: str) -> None:
        asked = self._asked.get(channel)
        if asked is None or asked.subscription is None:
            return  # what was asked for since is answered by itself
        del self._asked[channel]
        if code == ErrorCode.UNAVAILABLE:
            if self._resubscribing is None or self._resubscribing.done():
                self._resubscribing = self._help(self._resubscribe())
        elif self._subscriptions.get(channel) is asked.subscription:
            del self._subscriptions[channel]
            asked.subscription._end(SubscriptionRefused(channel, code, message))
        else:
            await self._settle(channel)

    async def _resubscribe(self) -> None:
        await asyncio.sleep(backoff(self._resubscribe_attempt, random.random()))
        self._resubscribe_attempt += 1
        await self._settle_all()

    async def _settle_all(self) -> None:
        for channel in list(self._subscriptions):
            await self._settle(channel)

    def _end(self, error: ConnectionClosed | None) -> None:
        if self.state == "closed":
            return
        self.state, self.id, self._error = "closed", None, error
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            subscription._end(error)
        self._private.close()
        self._opened.set()
        self._closed.set()

    def _help(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the reading; `close` ends it."""
        task = asyncio.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)
        return task

    async def _call_private(self, on_private: Callable[[Message], object]) -> None:
        while (message := await self._private.take()) is not None:
            await _call(on_private, message)

    async def _fetch_grant(self) -> str | None:
        if not callable(self._grant):
            return self._grant
        try:
            async with asyncio.timeout(self._open_timeout):
                result = self._grant()
                return await result if inspect.isawaitable(result) else result
        except Exception as error:
            log.warning("the grant function failed", exc_info=True)
            raise _GrantFailed(f"the grant function failed: {error!r}") from error


class _GrantFailed(Exception):
    """The application's own function for a grant raised, or did not return in time."""


async def _call(callback: Callable[[Any], object], value: object) -> None:
    """Call the application; what it raises is logged and stops nothing."""
    try:
        result = callback(value)
        if inspect.isawaitable(result):
            await result
    except Exception:
        log.exception("a callback raised")


def _closed_here() -> ConnectionClosed:
    return ConnectionClosed(1000, "the connection was closed here")


def _websocket_url(url: str) -> str:
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise ValueError(f"{url!r} must be the ws://, wss://, http:// or https:// url of a realtime endpoint")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/", parts.query, ""))
