"""Carry frames over HTTP: what is sent by POST, what comes by a stream (server-sent events) or by polls.

In:     frames to send
Out:    frames as they arrive; how the link ended
Owns:   one task that reads and one that writes, each with one HTTP/1.1 connection at a time
Never:  connects again; hands on what came for channels that have changed since; asks for more than it hands on

`subscribe` and `unsubscribe` are not sent: they open the stream, or the poll, anew with the channels of now.
"""

import asyncio
import json
import logging
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

import h11

from pubsub_mw.client.websocket import LinkLost
from pubsub_mw.errors import CloseCode

__all__ = ["HttpLink", "open_http"]

log = logging.getLogger("pubsub_mw")

_REFUSALS = {
    "grant_invalid": CloseCode.GRANT_INVALID,
    "grant_expired": CloseCode.GRANT_EXPIRED,
    "revoked": CloseCode.DISCONNECTED,
}
_MAX_FRAMES = 32
"""In one POST; also, how many may wait to be handed on before no more are read."""
_SETTLE_SECONDS = 0.05
"""So that several new channels open the stream anew once."""
_LEAST_WAIT_SECONDS = 1.0
"""A poll that is cut waits half as long the next time, down to this."""

Frame = dict[str, Any]


class _Status(Exception):
    """The server answered with an error."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path}: the server answered {status}")
        self.status = status


class HttpLink:
    """Frames both ways.

    Args:
        url: of the endpoint, with a closing slash
        headers: of every request
        kind: `sse` or `longpoll`
        positions: called for the channels to be asked for, and their positions, between two frames handed on
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], kind: str, positions: Callable[[], Mapping[str, str | None]]
    ) -> None:
        self._url = url
        self._headers = dict(headers)
        self._kind = kind
        self._positions = positions
        self._token: str | None = None
        self._wait_seconds = 25.0
        self._unsent: deque[Frame] = deque()
        self._told: deque[Frame] = deque()  # answers to what was sent
        self._arrived: deque[Frame] = deque()
        self._is_stale = False
        self._problem: LinkLost | None = None
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None

    async def send(self, frame: Mapping[str, Any]) -> None:
        """Send a frame; on a link that just broke it is lost without a word."""
        json.dumps(frame, allow_nan=False)
        if frame["type"] in ("subscribe", "unsubscribe"):
            self._is_stale = True
            self._changed.set()
        elif frame["type"] != "pong":
            self._unsent.append({name: value for name, value in frame.items() if name != "channels"})
            if self._writing is None or self._writing.done():
                self._writing = asyncio.create_task(self._guard(self._write))

    async def receive(self) -> Frame:
        """Return the next frame.

        Raises:
            LinkLost: there will be no more.
        """
        while True:
            if self._told:
                self._changed.set()
                return self._told.popleft()
            if self._is_stale and not self._is_renewing and self._token is not None and self._reading is not None:
                await asyncio.sleep(_SETTLE_SECONDS)
                await self._read_anew()
            if self._arrived:
                self._changed.set()
                return self._arrived.popleft()
            if self._problem is not None:
                raise self._problem
            await self._wait()

    def abort(self) -> None:
        """End the link."""
        self._problem = self._problem or LinkLost("ended here")
        self._changed.set()
        for task in (self._reading, self._writing):
            if task is not None:
                task.cancel()

    async def close(self) -> None:
        """End the link, and wait until that is done."""
        self.abort()
        await asyncio.gather(*filter(None, (self._reading, self._writing)), return_exceptions=True)

    @property
    def _is_renewing(self) -> bool:
        """Whether a fresh grant is on its way. It comes first: without it nothing can be read anew."""
        return any(frame["type"] == "grant" for frame in self._unsent)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _guard(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await work(*args)
        except LinkLost as lost:
            self._problem = lost
        except (OSError, ValueError, h11.ProtocolError, _Status) as error:
            if isinstance(error, _Status) and error.status == 414:
                log.warning("%s: %s: the names of all channels are longer than a url may be there", self._url, error)
            self._problem = LinkLost(str(error) or type(error).__name__)
        except Exception as error:
            log.exception("%s: the link failed", self._url)
            self._problem = LinkLost(f"the link failed: {error!r}")
        self._changed.set()

    # What is sent.

    async def _write(self) -> None:
        limit = _MAX_FRAMES
        while self._unsent:
            while self._told:
                await self._wait()
            frames = [self._unsent[index] for index in range(min(limit, len(self._unsent)))]
            is_greeting = frames[0]["type"] == "connect"
            body = {"transport": self._kind, "frames": frames} | ({} if is_greeting else {"resume": self._token})
            try:
                answer = await self._fetch("POST", "send", body)
            except _Status as refused:
                if refused.status != 413:
                    raise
                if len(frames) == 1:
                    frame = self._unsent.popleft()
                    self._tell(
                        {"type": "error", "id": frame.get("id", ""), "code": "too_large", "message": str(refused)}
                    )
                limit = 1
                continue
            for _ in frames:
                self._unsent.popleft()
            for frame in answer["frames"]:
                await self._answered(frame, is_greeting)

    async def _answered(self, frame: Frame, is_greeting: bool) -> None:
        self._token = frame.get("resume", self._token)
        if is_greeting and frame["type"] == "error":
            raise LinkLost(frame["message"], _REFUSALS.get(frame["code"], CloseCode.BROKER_UNAVAILABLE))
        if is_greeting:
            self._wait_seconds = frame["ping"]
            await self._read_anew()
        if not is_greeting or self._kind == "longpoll":  # connected is who gets something
            self._tell(frame | {"is_aside": True})

    def _tell(self, frame: Frame) -> None:
        self._told.append(frame)
        self._changed.set()

    # What comes.

    async def _read_anew(self) -> None:
        """Read from the positions of now; what was read and not handed on will come again."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._is_stale = False
        self._arrived.clear()
        positions = self._positions()
        channels = [("channel", name) for name in positions]
        places = [("position", position or "") for position in positions.values()]
        read = self._stream if self._kind == "sse" else self._poll
        self._reading = asyncio.create_task(self._guard(read, channels, places))

    async def _stream(self, channels: list[tuple[str, str]], places: list[tuple[str, str]]) -> None:
        query = urlencode([("frames", "1"), *channels, *places])
        async with self._exchange("GET", f"events?{query}") as chunks:
            text = b""
            async for chunk in chunks:
                *events, text = (text + chunk).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: "):
                        await self._arrive(json.loads(event[6:].split(b"\n", 1)[0]))
        raise LinkLost("the stream ended")

    async def _poll(self, channels: list[tuple[str, str]], places: list[tuple[str, str]]) -> None:
        seconds = self._wait_seconds
        while True:
            query = urlencode([("wait", f"{seconds:g}"), *channels, *places])
            try:
                answer = await self._fetch("GET", f"poll?{query}")
            except (OSError, h11.RemoteProtocolError):
                seconds /= 2  # it may have been cut for being idle so long
                if seconds < _LEAST_WAIT_SECONDS:
                    raise
                continue
            places = [("cursor", answer["cursor"])]
            for frame in [*answer["frames"], {"type": "ping"}]:
                await self._arrive(frame)
            # One may say that the grant expired. Who takes it gets a fresh one, without which a poll would be refused.
            while self._arrived or self._is_renewing:
                await self._wait()

    async def _arrive(self, frame: Frame) -> None:
        self._token = frame.get("resume", self._token)
        while len(self._arrived) >= _MAX_FRAMES:
            await self._wait()
        self._arrived.append(frame)
        self._changed.set()

    # HTTP.

    async def _fetch(self, method: str, path: str, body: object = None) -> Any:
        async with self._exchange(method, path, None if body is None else json.dumps(body).encode()) as chunks:
            return json.loads(b"".join([chunk async for chunk in chunks]))

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """Make one request; yield the chunks of the answer's body.

        Raises:
            _Status: the answer is an error.
        """
        url = urlsplit(self._url)
        is_secure = url.scheme == "https"
        context = ssl.create_default_context() if is_secure else None
        port = url.port or (443 if is_secure else 80)
        headers = self._headers | {"Host": url.netloc.rpartition("@")[2], "Connection": "close"}
        if method == "GET":
            headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=context)
        try:
            http = h11.Connection(h11.CLIENT)
            request = h11.Request(method=method, target=f"{url.path}{path}", headers=list(headers.items()))
            events = [request, *([] if body is None else [h11.Data(data=body)]), h11.EndOfMessage()]
            writer.write(b"".join(http.send(event) or b"" for event in events))
            await writer.drain()
            response = await _next_event(http, reader)
            while isinstance(response, h11.InformationalResponse):
                response = await _next_event(http, reader)
            if not isinstance(response, h11.Response):
                raise OSError("the server closed without an answer")
            if not 200 <= response.status_code < 300:
                raise _Status(path.partition("?")[0], response.status_code)
            yield _chunks(http, reader)
        finally:
            writer.transport.abort()


async def _chunks(http: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while isinstance(event := await _next_event(http, reader), h11.Data):
        yield bytes(event.data)


async def _next_event(http: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(65_536))
    return event


@asynccontextmanager
async def open_http(
    url: str, headers: Mapping[str, str], kind: str, positions: Callable[[], Mapping[str, str | None]]
) -> AsyncIterator[HttpLink]:
    """Open a link; the first frame that is sent must be `connect`."""
    link = HttpLink(url.replace("ws", "http", 1), headers, kind, positions)
    try:
        yield link
    finally:
        await link.close()
