"""Keep a client connected, over whatever breaks.

In:     a url; channels to listen to and requests to send
Out:    publications, each once and in order over any number of reconnects; answers; told where that cannot be kept
Owns:   one task that connects, reads, and connects again; the resume token, and the positions of its own channels
Never:  advances a position over what was not handed on; waits for ever on a link that is dead
"""

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from pubsub_mw.client.arrivals import Arrivals, call
from pubsub_mw.client.channels import PASSING, Channels
from pubsub_mw.client.http import HttpLink
from pubsub_mw.client.ladder import TRANSPORTS, Ladder, backoff
from pubsub_mw.client.requests import Params, Requests, Response, build_request, is_newer
from pubsub_mw.client.subscription import Gap, Message, Presence, Subscription, closed_here
from pubsub_mw.client.websocket import LinkLost, WebSocketLink, websocket_url
from pubsub_mw.errors import CloseCode, ConnectFailed, ConnectionClosed, ErrorCode, may_reconnect

__all__ = ["Connection", "connect"]

log = logging.getLogger("pubsub_mw")

_PONG_SECONDS = 8.0
"""Beyond the server's ping interval without a frame the link is dead."""
_MAX_WAITING = 1_000

Grant = str | Callable[[], str | Awaitable[str]]


def connect(
    url: str,
    *,
    grant: Grant | None = None,
    headers: Mapping[str, str] | None = None,
    on_private: Callable[[Message], object] | None = None,
    transports: Sequence[str] = TRANSPORTS,
    open_timeout: float = 10.0,
    max_pending: int = 64,
    max_frame_bytes: int = 65_536,
) -> "Connection":
    """Return a connection, to be entered with `async with`.

    Args:
        url: of the realtime endpoint: `ws://`, `wss://`, `http://` or `https://`
        grant: its text, or a function (or coroutine function) that returns a fresh one
        headers: to send with the handshake, such as `Cookie` and `Origin`
        on_private: called with each publication on the connection's own channels; a coroutine function is awaited
        transports: which may be used, the best first
        open_timeout: seconds for the first connection to stand; later, for each attempt and each call of `grant`
        max_pending: requests that may wait while there is no connection; further ones are refused
        max_frame_bytes: the server's setting; a larger request is refused here

    Raises:
        ValueError: not such a url; no such transport.
        ConnectFailed: (on entering) nobody answered in time.
        ConnectionClosed: (on entering) the server refuses for good, such as by GRANT_INVALID.
    """
    if not transports or not set(transports) <= set(TRANSPORTS):
        raise ValueError(f"transports={transports!r} must be some of {', '.join(TRANSPORTS)}")
    return Connection(
        websocket_url(url),
        grant,
        dict(headers or {}),
        on_private,
        tuple(transports),
        open_timeout,
        max_pending,
        max_frame_bytes,
    )


class Connection:
    """A connection that stands again by itself after whatever broke it. Made by `connect`.

    Attributes:
        id: as the server knows it, for `exclude`; None while not connected
        user: who the grant says it is
        state: `connecting`, `connected`, `waiting` (for the next attempt) or `closed`
        transport: `websocket`, `sse` or `longpoll`: the one that is tried, or used
    """

    def __init__(
        self,
        url: str,
        grant: Grant | None,
        headers: dict[str, str],
        on_private: Callable[[Message], object] | None,
        transports: tuple[str, ...],
        open_timeout: float,
        max_pending: int,
        max_frame_bytes: int,
    ) -> None:
        self.id: str | None = None
        self.user: str | None = None
        self.state = "connecting"
        self._url = url
        self._grant = grant
        self._headers = headers
        self._on_private = on_private
        self._open_timeout = open_timeout
        self._max_frame_bytes = max_frame_bytes
        self._resume: str | None = None
        self._resumed_id: str | None = None  # which connection `_resume` restores
        self._own: dict[str, str] = {}  # own channels -> positions
        self._private = Arrivals[Message](_MAX_WAITING)
        self._channels = Channels(self._send)
        self._requests = Requests(self._send, lambda frame: self._help(self._send(frame)), max_pending)
        self._ladder = Ladder(url, headers, transports)
        self._climbing: asyncio.Task[None] | None = None
        self._link: WebSocketLink | HttpLink | None = None
        self._task: asyncio.Task[None] | None = None
        self._helpers: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._closed = asyncio.Event()
        self._error: ConnectionClosed | None = None
        self._failure = "no answer"
        self._attempt = 0
        self._settle_attempt = 0
        self._settling: asyncio.Task[None] | None = None
        self._is_renewing = False  # a second `grant_expired` at once means that the function has no fresh grant

    @property
    def transport(self) -> str:
        return self._ladder.transport

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
        """Close for good; every subscription's iteration ends, and what was not answered is rejected."""
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
        on_members: Callable[[Presence], object] | None = None,
        max_waiting: int = _MAX_WAITING,
    ) -> Subscription:
        """Listen to `channel`; return when the server has agreed.

        Args:
            channel: its name
            on_message: called with each publication, one after another; a coroutine function is awaited. None =
                iterate instead
            position: go on after it
            on_gap: called, in its place among the publications, when something was missed that cannot be told
            on_members: called, in its place, when who is there on a presence channel has changed or is told anew
            max_waiting: publications that may wait for the iteration or the callback; beyond it nothing is read
                from the connection, for any of its channels

        Raises:
            SubscriptionRefused: the server does not allow it; `#` begins the connection's own, see `on_private`.
            ConnectionClosed: the connection ended for good.
            ValueError: this connection listens to it already.
        """
        self._expect_open()
        if self._channels.is_wanted(channel):
            raise ValueError(f"this connection listens to {channel} already")
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting} must be at least 1")
        leave = self._channels.remove
        subscription = Subscription(channel, position, leave, on_message, on_gap, on_members, max_waiting)
        try:
            await self._channels.add(subscription)
            await subscription.answered()
        except BaseException:
            await leave(subscription)
            raise
        if on_message is not None:
            self._help(subscription.call_back(on_message))
        return subscription

    async def fetch(
        self,
        path: str,
        *,
        method: str | None = None,
        params: Params | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | str | None = None,
        json: object = None,
        timeout: float | None = None,
        wait: bool = True,
    ) -> Response:
        """Request a path of the app through the connection; return when its answer begins.

        Requests go out in the order of the calls. One that is not answered when the link breaks is sent again under
        the same id. Cancelling the task cancels the request.

        Args:
            path: with or without a query string
            method: None = GET, or POST if there is a body
            params: added to the query string
            headers: those that the server lets through, see `docs/requests.md`
            body: bytes, or text, which is sent as UTF-8
            json: any JSON value, as the body
            timeout: seconds until the answer begins; None = as long as it takes
            wait: False = raise at once if there is no connection

        Raises:
            RequestFailed: it was refused, or its answer is lost; `code` says why, and whether it may have run.
            RequestTimeout: no answer in time. It is a `RequestFailed` and a `TimeoutError`.
            ConnectionClosed: the connection ended for good before.
            ValueError: not a path; a body and JSON.
        """
        self._expect_open()
        frame = build_request(path, method, params, headers, body, json, self._max_frame_bytes)
        return await self._requests.fetch(frame, timeout, wait)

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

    def _expect_open(self) -> None:
        if self._task is None:
            raise RuntimeError("enter the connection first: async with connect(...) as connection")
        if self.state == "closed":
            raise self._error or closed_here()

    # What is sent.

    async def _send(self, frame: Mapping[str, Any]) -> None:
        if self._link is not None:
            await self._link.send(frame)

    def _settle_later(self) -> None:
        """Ask again, after a while, for what was refused for now."""
        if self._settling is None or self._settling.done():
            self._settling = self._help(self._settle_after(backoff(self._settle_attempt, random.random())))
            self._settle_attempt += 1

    async def _settle_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.state == "connected":
            await self._channels.settle()
            await self._requests.go_on()

    # One link after another.

    async def _run(self) -> None:
        """Connect and read, again and again, until the server says not to come back."""
        try:
            while True:
                self.state, least = "connecting", 0.0
                try:
                    least = await self._session()
                except (OSError, TimeoutError, LinkLost, _GrantFailed) as error:
                    self._ladder.fall()
                    self._failure = str(error) or type(error).__name__
                    log.info("%s: %s", self._url, self._failure)
                finally:
                    self._link, self.id = None, None
                    if self._climbing is not None:
                        self._climbing.cancel()
                    self._channels.pause()
                    self._requests.pause()
                self.state = "waiting"
                await asyncio.sleep(max(least, backoff(self._attempt, random.random())))
                self._attempt += 1
        except ConnectionClosed as error:
            self._end(error)
        except Exception as error:
            log.exception("the client failed")
            self._end(ConnectionClosed(1000, f"the client failed: {error!r}"))

    async def _session(self) -> float:
        """Live through one link; return how many seconds the server asks to wait before the next."""
        grant = await self._fetch_grant()
        # At first, all of them have to find room in that time.
        silence = self._open_timeout / (1 if self._opened.is_set() else len(self._ladder.transports))
        async with self._ladder.open(silence, self._positions) as link:
            self._link = link
            channels = self._positions()
            await self._send({"type": "connect", "grant": grant, "resume": self._resume, "channels": channels})
            try:
                while True:
                    async with asyncio.timeout(silence):
                        frame = await link.receive()
                    if frame["type"] == "connected":
                        silence = frame["ping"] + _PONG_SECONDS
                    if frame["type"] == "disconnect":
                        return self._ended(frame["code"], frame["reason"], frame["retry"] or 0.0)
                    await self._receive(frame)
            except LinkLost as lost:
                if lost.code is None:
                    raise
                return self._ended(lost.code, str(lost), 0.0)
            except TimeoutError:
                link.abort()  # nobody is there to say goodbye to
                raise

    def _positions(self) -> dict[str, str | None]:
        return self._channels.positions() | self._own

    async def _climb(self) -> None:
        await self._ladder.climb(self._open_timeout)
        if self._link is not None:
            self._link.abort()

    def _ended(self, code: int, reason: str, retry: float) -> float:
        is_renewable = code == CloseCode.GRANT_EXPIRED and callable(self._grant)
        if not may_reconnect(code) and not is_renewable:
            raise ConnectionClosed(code, reason)
        if code == CloseCode.MESSAGE_TOO_BIG:
            self._requests.abandon(reason)  # never send it again
        if code < 3000:
            self._ladder.fall()
        self._failure = f"closed with {code}: {reason}"
        return retry

    # What comes.

    async def _receive(self, frame: dict[str, Any]) -> None:
        kind, channel = frame["type"], frame.get("channel", "")
        if kind == "ping":
            self._attempt, self._is_renewing = 0, False
            self._ladder.delivered()
            await self._send({"type": "pong"})
        elif kind == "connected":
            await self._connected(frame)
        elif kind == "accepted":
            self._resume = frame.get("resume", self._resume)
        elif kind.startswith("response"):
            self._attempt = self._settle_attempt = 0
            await self._requests.receive(frame)
            if "is_aside" not in frame:  # else it is not in its place among what comes on that channel
                self._advance_own(f"#connection-{self.id}", frame["position"])
        elif kind == "error" and frame["code"] != ErrorCode.NOT_SUBSCRIBED:
            await self._error_told(frame)
        elif channel.startswith("#"):
            await self._receive_own(frame)
        elif channel:
            if kind == "message":
                self._attempt = 0
            elif kind == "subscribed":
                self._settle_attempt = 0
            await self._channels.receive(frame)

    async def _receive_own(self, frame: dict[str, Any]) -> None:
        kind, channel, position = frame["type"], frame["channel"], frame["position"]
        if kind == "message":
            self._attempt = 0
            if self._on_private is not None:
                await self._private.put(Message(channel, frame["event"], frame["data"], position))
            self._advance_own(channel, position)
        elif kind == "gap" or frame["recovered"] is False:
            self._own[channel] = position
            reason = frame.get("reason", "unrecovered")
            log.warning("%s: something was missed (%s)", channel, reason)
            if channel == f"#connection-{self.id}":
                self._requests.abandon(f"its answer may be among what was missed ({reason})")
        else:
            self._own[channel] = position

    async def _connected(self, frame: dict[str, Any]) -> None:
        own = {f"#connection-{frame['connection']}"}
        if frame["user"] is not None:
            own.add(f"#user-{frame['user']}")
        self._own = {channel: position for channel, position in self._own.items() if channel in own}
        self.id, self.user, self._resume = frame["connection"], frame["user"], frame["resume"]
        if self._resumed_id not in (None, self.id):
            self._requests.abandon("the connection was not resumed")
        self._resumed_id = self.id
        if not self._ladder.is_on_top and self.state != "connected":
            self._climbing = self._help(self._climb())
        self.state, self._is_renewing = "connected", False
        self._opened.set()
        await self._channels.settle()
        await self._requests.begin()

    def _advance_own(self, channel: str, position: str) -> None:
        if is_newer(position, self._own.get(channel)):  # not an answer that was sent again
            self._own[channel] = position

    async def _error_told(self, frame: dict[str, Any]) -> None:
        code, message = frame["code"], frame["message"]
        if "id" in frame and frame["id"] != "publish":
            if self._requests.refuse(frame) == ErrorCode.UNAVAILABLE:
                self._settle_later()
        elif self._channels.is_asked(frame.get("channel")) and "id" not in frame:
            await self._channels.refuse(frame["channel"], code, message)
            if code in PASSING:
                self._settle_later()
            elif self.transport == "longpoll":  # where each poll asks for all of its channels
                await self._send({"type": "unsubscribe", "channel": frame["channel"]})
        elif code == ErrorCode.GRANT_EXPIRED and "id" not in frame and callable(self._grant) and not self._is_renewing:
            self._is_renewing = True
            await self._send({"type": "grant", "grant": await self._fetch_grant()})
            await self._channels.settle()
        else:
            log.warning("the server refused a command: %s (%s)", message, code)

    def _end(self, error: ConnectionClosed | None) -> None:
        if self.state == "closed":
            return
        self.state, self.id, self._error = "closed", None, error
        self._channels.end(error)
        self._requests.pause()
        self._requests.abandon(str(error or closed_here()), is_over=True)
        self._private.close()
        self._opened.set()
        self._closed.set()

    # What runs beside.

    def _help(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the reading; `close` ends it."""
        task = asyncio.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)
        return task

    async def _call_private(self, on_private: Callable[[Message], object]) -> None:
        while (message := await self._private.take()) is not None:
            await call(on_private, message)

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
