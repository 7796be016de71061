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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
_MAX_FRAME_BYTES = 64 << 20

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
        on_private: called with each publication on the connection's own channels
        open_timeout: seconds for the first connection to stand

    Raises:
        ValueError: not such a url.
        ConnectFailed: (on entering) nobody answered in time.
        ConnectionClosed: (on entering) the server refuses for good, such as by GRANT_INVALID.
    """
    return Connection(_websocket_url(url), grant, dict(headers or {}), on_private, open_timeout)


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
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue(max_waiting)
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: PubSubError | None = None
        self._is_open = True

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next publication.

        Raises:
            SubscriptionRefused: the server ended the subscription.
            ConnectionClosed: the connection ended for good.
        """
        while self._is_open or not self._waiting.empty():
            message = await self._waiting.get()
            if message is not None:
                return message
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def unsubscribe(self) -> None:
        """Stop listening; iteration ends after what has arrived."""
        await self._connection._unsubscribe(self)

    async def _deliver(self, frame: dict[str, Any]) -> None:
        message = Message(self.channel, frame["event"], frame["data"], frame["position"])
        if self._on_message is None:
            # At the bound the socket is not read any more; the server then closes it, and recovery brings the rest.
            await self._waiting.put(message)
        else:
            await _call(self._on_message, message)
        self.position = message.position

    async def _subscribed(self, frame: dict[str, Any]) -> None:
        self.position = frame["position"]
        if not self._answered.done():
            self._answered.set_result(None)
        if frame["recovered"] is False:
            await self._tell_gap(frame["position"], "unrecovered")

    async def _tell_gap(self, position: str, reason: str) -> None:
        self.position = position
        if self._on_gap is None:
            log.warning("%s: something was missed (%s) and there is no on_gap to fetch it anew", self.channel, reason)
        else:
            await _call(self._on_gap, Gap(self.channel, position, reason))

    def _end(self, error: PubSubError | None) -> None:
        self._is_open, self._error = False, error
        if not self._answered.done():
            if error is None:
                self._answered.cancel()
            else:
                self._answered.set_exception(error)
                self._answered.exception()  # whoever still waits gets it; nobody has to
        if not self._waiting.full():
            self._waiting.put_nowait(None)


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
        self._subscriptions: dict[str, Subscription] = {}
        self._socket: Socket | None = None
        self._is_connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._retries: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._attempt = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        connected = asyncio.create_task(self._is_connected.wait())
        await asyncio.wait({self._task, connected}, timeout=self._open_timeout, return_when=asyncio.FIRST_COMPLETED)
        connected.cancel()
        if self._task.done():
            self._task.result()
        if not self._is_connected.is_set():
            await self.close()
            raise ConnectFailed(f"{self._url}: {self._failure or 'no answer'}") from self._failure
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close for good; every subscription's iteration ends."""
        tasks = [task for task in (self._task, *self._retries) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end(None)

    async def subscribe(
        self,
        channel: str,
        on_message: Callable[[Message], object] | None = None,
        *,
        position: str | None = None,
        on_gap: Callable[[Gap], object] | None = None,
        max_waiting: int = 1_000,
    ) -> Subscription:
        """Listen to `channel`; return when the server has agreed.

        Args:
            channel: its name
            on_message: called with each publication, a coroutine function is awaited; None = iterate instead
            position: go on after it
            on_gap: called when something was missed that cannot be told
            max_waiting: publications that may wait for the iteration; beyond it nothing is read from the
                connection, for any of its channels

        Raises:
            SubscriptionRefused: the server does not allow it.
            ConnectionClosed: the connection ended for good.
            ValueError: this connection listens to it already.
        """
        if self.state == "closed":
            raise ConnectionClosed(1000, "the connection was closed here")
        if channel in self._subscriptions:
            raise ValueError(f"this connection listens to {channel} already")
        subscription = Subscription(self, channel, position, on_message, on_gap, max_waiting)
        self._subscriptions[channel] = subscription
        if self._is_connected.is_set():
            await self._send({"type": "subscribe", "channel": channel, "position": position})
        try:
            await subscription._answered
        except BaseException:
            self._subscriptions.pop(channel, None)
            raise
        return subscription

    async def publish(self, channel: str, data: object, *, event: str = "message") -> None:
        """Publish straight to a channel, where the grant allows it. At most once: the server does not confirm it.

        Raises:
            ConnectFailed: there is no connection now.
        """
        if not self._is_connected.is_set():
            raise ConnectFailed("not connected now; try again when state is connected")
        await self._send({"type": "publish", "channel": channel, "event": event, "data": data})

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if self._subscriptions.get(subscription.channel) is subscription:
            del self._subscriptions[subscription.channel]
            subscription._end(None)
            if self._is_connected.is_set():
                await self._send({"type": "unsubscribe", "channel": subscription.channel})

    async def _send(self, frame: dict[str, Any]) -> None:
        if self._socket is not None:
            try:
                await self._socket.send(json.dumps(frame))
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
                    self._failure = error
                    log.info("%s: %s", self._url, str(error) or type(error).__name__)
                finally:
                    self._socket, self.id = None, None
                    self._is_connected.clear()
                self.state = "waiting"
                await asyncio.sleep(max(least, backoff(self._attempt, random.random())))
                self._attempt += 1
        except ConnectionClosed as error:
            self._end(error)
            raise
        except Exception as error:
            self._end(ConnectionClosed(1000, f"the client failed: {error!r}"))
            raise

    async def _session(self) -> float:
        """Live through one socket; return how many seconds the server asks to wait before the next."""
        silence = self._open_timeout
        least = 0.0
        async with open_socket(
            self._url,
            additional_headers=self._headers,
            max_size=_MAX_FRAME_BYTES,
            ping_interval=None,
            compression=None,
            open_timeout=self._open_timeout,
            close_timeout=2,
        ) as socket:
            self._socket = socket
            channels = {name: item.position for name, item in self._subscriptions.items()}
            frame: dict[str, Any] = {"type": "connect", "channels": channels | self._own, "resume": self._resume}
            if self._grant is not None:
                frame["grant"] = await self._fetch_grant()
            # What is asked for from here on goes out as a frame of its own, so nothing may change before this is sent.
            await socket.send(json.dumps({name: value for name, value in frame.items() if value is not None}))
            try:
                while True:
                    async with asyncio.timeout(silence):
                        received = json.loads(await socket.recv())
                    if received["type"] == "connected":
                        silence = received["ping"] + _PONG_SECONDS
                    if received["type"] == "disconnect":
                        least = received["retry"] or 0.0
                    await self._receive(received, set(channels))
            except SocketClosed as closed:
                code = closed.rcvd.code if closed.rcvd is not None else 1006
                if code == CloseCode.GRANT_EXPIRED and callable(self._grant):
                    return least
                if not may_reconnect(code):
                    raise ConnectionClosed(code, closed.rcvd.reason if closed.rcvd else "") from None
        return least

    async def _receive(self, frame: dict[str, Any], asked: set[str]) -> None:
        kind, channel = frame["type"], frame.get("channel", "")
        subscription = self._subscriptions.get(channel)
        if kind == "message":
            if subscription is not None:
                await subscription._deliver(frame)
            elif channel.startswith("#"):
                self._own[channel] = frame["position"]
                if self._on_private is not None:
                    await _call(self._on_private, Message(channel, frame["event"], frame["data"], frame["position"]))
        elif kind == "ping":
            await self._send({"type": "pong"})
        elif kind == "connected":
            await self._connected(frame, asked)
        elif kind == "subscribed":
            if subscription is not None:
                await subscription._subscribed(frame)
            elif channel.startswith("#"):
                self._own[channel] = frame["position"]
        elif kind == "gap":
            if subscription is not None:
                await subscription._tell_gap(frame["position"], frame["reason"])
        elif kind == "unsubscribed":
            if subscription is not None and frame["code"] != "client":
                self._drop(subscription, frame["code"], frame["reason"])
        elif kind == "error":
            await self._refused(frame, subscription)

    async def _connected(self, frame: dict[str, Any], asked: set[str]) -> None:
        own = {f"#connection-{frame['connection']}", f"#user-{frame['user']}"}
        self._own = {channel: position for channel, position in self._own.items() if channel in own}
        self.id, self.user, self._resume = frame["connection"], frame["user"], frame["resume"]
        self.state, self._attempt, self._failure = "connected", 0, None
        self._is_connected.set()
        for channel, subscription in list(self._subscriptions.items()):
            if channel not in asked:
                await self._send({"type": "subscribe", "channel": channel, "position": subscription.position})

    async def _refused(self, frame: dict[str, Any], subscription: Subscription | None) -> None:
        code, message = frame["code"], frame["message"]
        if code == ErrorCode.GRANT_EXPIRED and callable(self._grant) and subscription is None:
            await self._send({"type": "grant", "grant": await self._fetch_grant()})
        elif subscription is None:
            log.warning("the server refused a command: %s (%s)", message, code)
        elif code == ErrorCode.UNAVAILABLE:
            task = asyncio.create_task(self._retry(subscription, self._socket))
            self._retries.add(task)
            task.add_done_callback(self._retries.discard)
        elif code != ErrorCode.ALREADY_SUBSCRIBED:
            self._drop(subscription, code, message)

    async def _retry(self, subscription: Subscription, socket: Socket | None) -> None:
        await asyncio.sleep(backoff(2, random.random()))
        if self._socket is socket and self._subscriptions.get(subscription.channel) is subscription:
            frame = {"type": "subscribe", "channel": subscription.channel, "position": subscription.position}
            await self._send(frame)

    def _drop(self, subscription: Subscription, code: str, message: str) -> None:
        del self._subscriptions[subscription.channel]
        subscription._end(SubscriptionRefused(subscription.channel, code, message))

    def _end(self, error: ConnectionClosed | None) -> None:
        self.state, self.id = "closed", None
        self._is_connected.clear()
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            subscription._end(error)

    async def _fetch_grant(self) -> str:
        if not callable(self._grant):
            assert self._grant is not None
            return self._grant
        try:
            result = self._grant()
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            raise _GrantFailed(f"the grant function failed: {error!r}") from error


class _GrantFailed(Exception):
    """The application's own function for a grant raised."""


async def _call(callback: Callable[[Any], object], value: object) -> None:
    """Call the application; what it raises is logged and stops nothing."""
    try:
        result = callback(value)
        if inspect.isawaitable(result):
            await result
    except Exception:
        log.exception("a callback raised")


def _websocket_url(url: str) -> str:
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise ValueError(f"{url!r} must be the ws://, wss://, http:// or https:// url of a realtime endpoint")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/", parts.query, ""))
