"""Listen with many clients and publish meanwhile, and find out whether anything was lost, doubled or misordered.

In:     WebSocket urls of servers; channels; a publisher
Out:    what each client received and was told; what each publication became
Owns:   the check: on a channel every position follows the one before, or the client was told
Never:  believes the server: positions are compared with each other, and data with what publishers were answered
"""

import asyncio
import contextlib
import gc
import json
import random
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from pubsub_mw import AsyncPublisher, PublishError
from tests.tools.clock import MS, eventually_async

__all__ = ["TRANSPORTS", "Listener", "Publishing", "closing", "listeners", "run"]


TRANSPORTS = ("websocket", "sse", "longpoll")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a journey on a loop without debugging, which would cost most of the time.

    A client that is cut off while it connects leaves its socket to the garbage collector, once in hundreds of times;
    which of all that clients here are made of does is not known. It is collected here, so that no later test answers
    for it.
    """
    asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextlib.asynccontextmanager
async def closing(publisher: AsyncPublisher) -> AsyncIterator[AsyncPublisher]:
    """Give the publisher's connections back, also where a test fails."""
    try:
        yield publisher
    finally:
        await publisher.close()


@dataclass
class Heard:
    """What a client knows of one channel."""

    position: str | None = None  # the last one received
    got: dict[str, Any] = field(default_factory=dict)  # position -> data
    told: list[str] = field(default_factory=list)
    is_listening: bool = False


class Listener:
    """One client that comes back after every end, at the next server, from where it had come.

    Args:
        urls: of servers, taken in turn; each poll goes to the next one
        transport: one of `TRANSPORTS`; may be changed, which counts when it comes back the next time
        remembers: whether it gives positions back; one that does not is no client of ours, but shows what a check finds
    """

    def __init__(
        self, urls: Sequence[str], channels: Sequence[str], transport: str = "websocket", *, remembers: bool = True
    ) -> None:
        self._urls = urls
        self.transport = transport
        self._next_url = random.randrange(len(urls))
        self._remembers = remembers
        self._resume: str | None = None
        self._websocket: ClientConnection | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._later: set[asyncio.Task[None]] = set()
        self.heard = {channel: Heard() for channel in channels}
        self.wrong: list[str] = []
        self.connection_count = 0
        self.frame_count = 0
        self._task: asyncio.Task[None] | None = None
        self.start()

    @property
    def is_listening(self) -> bool:
        return all(heard.is_listening for heard in self.heard.values())

    @property
    def told(self) -> list[str]:
        return [reason for heard in self.heard.values() for reason in heard.told]

    def drop(self) -> None:
        """Lose the connection without a word."""
        if self.transport == "websocket" and self._websocket is not None:
            self._websocket.transport.abort()
        elif self._attempt is not None:
            self._attempt.cancel()

    def start(self) -> None:
        """Listen, from where it had come."""
        self._task = asyncio.create_task(self._live())

    async def stop(self) -> None:
        tasks = [task for task in (self._task, self._attempt, *self._later) if task is not None]
        self._task, self._later = None, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for heard in self.heard.values():
            heard.is_listening = False

    async def _live(self) -> None:
        attempts = {"websocket": self._by_websocket, "sse": self._by_stream, "longpoll": self._by_polls}
        while True:
            self._attempt = asyncio.create_task(attempts[self.transport]())
            try:
                await asyncio.wait({self._attempt})
            finally:
                self._attempt.cancel()
            if not self._attempt.cancelled() and self._attempt.exception() is not None:
                self.wrong.append(f"the client failed: {self._attempt.exception()!r}")
            for heard in self.heard.values():
                heard.is_listening = False
            await asyncio.sleep(random.uniform(10, 50) * MS)

    def _url(self) -> str:
        self._next_url += 1
        return self._urls[(self._next_url - 1) % len(self._urls)]

    async def _by_websocket(self) -> None:
        with contextlib.suppress(OSError, ConnectionClosed, InvalidHandshake, TimeoutError, EOFError):
            async with connect_websocket(
                self._url(),
                compression=None,
                ping_interval=None,
                proxy=None,
                open_timeout=2,
                close_timeout=0.1,
                max_size=None,
            ) as websocket:
                self._websocket = websocket
                await self._listen(websocket)

    async def _by_stream(self) -> None:
        """Listen to one stream with `frames=1`, read by a parser that is not ours."""
        positions = self._positions()
        async with self._http() as http:
            with contextlib.suppress(httpx.TransportError):
                url = self._url().replace("ws://", "http://") + "events"
                async with http.stream("GET", url, params=tuple(self._query(positions, frames="1"))) as response:
                    if response.status_code == 200:
                        async for event in EventSource(response).aiter_sse():
                            is_taken = not event.data or self._take(json.loads(event.data), positions)
                            if not is_taken or self.transport != "sse":
                                return

    async def _by_polls(self) -> None:
        positions, cursor = self._positions(), ""
        async with self._http() as http:
            with contextlib.suppress(httpx.TransportError):
                if self._resume is None:
                    hello = {"frames": [{"type": "connect"}]}
                    response = await http.post(self._url().replace("ws://", "http://") + "send", json=hello)
                    if response.status_code != 200:
                        return
                    (connected,) = response.json()["frames"]
                    if not self._take(connected, positions):
                        return
                while self.transport == "longpoll":
                    query = self._query({} if cursor else positions, wait="5")
                    url = self._url().replace("ws://", "http://") + "poll"
                    if cursor:
                        query += [("cursor", cursor), *(("channel", name) for name in positions)]
                    response = await http.get(url, params=tuple(query), headers=self._headers())
                    if response.status_code != 200:
                        return
                    answer = response.json()
                    self.connection_count += not cursor
                    # One after another with nothing in between: a client that dies now has taken all of it or nothing.
                    going_on = [self._take(frame, positions) for frame in answer["frames"]]
                    cursor = answer["cursor"]
                    if not all(going_on):
                        return

    def _http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(2, read=40)
        # Nothing is to be verified, and the certificates of all the world take 20 ms to read, each time.
        return httpx.AsyncClient(timeout=timeout, trust_env=False, verify=False, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._resume}"} if self._resume is not None else {}

    def _positions(self) -> dict[str, str | None]:
        return {name: heard.position if self._remembers else None for name, heard in self.heard.items()}

    @staticmethod
    def _query(positions: dict[str, str | None], **fields: str) -> list[tuple[str, str]]:
        query = [pair for name, at in positions.items() for pair in (("channel", name), ("position", at or ""))]
        return query + list(fields.items())

    async def _listen(self, websocket: ClientConnection) -> None:
        positions = self._positions()
        hello: dict[str, Any] = {"type": "connect", "channels": positions}
        if self._resume is not None:
            hello["resume"] = self._resume
        await websocket.send(json.dumps(hello))
        async for raw in websocket:
            frame = json.loads(raw)
            if frame["type"] == "ping":
                await websocket.send('{"type":"pong"}')
            if not self._take(frame, positions):
                self._later.add(asyncio.create_task(self._ask_again(websocket, frame["channel"], positions)))
            if self.transport != "websocket":
                return

    def _take(self, frame: dict[str, Any], positions: dict[str, str | None]) -> bool:
        """Take one frame; False if its channel is to be asked for again."""
        self.frame_count += 1
        match frame["type"]:
            case "message":
                self._message(self.heard[frame["channel"]], frame)
            case "subscribed" | "gap" if frame["channel"].startswith("#"):
                pass  # of its own, by a poll
            case "subscribed":
                self._subscribed(self.heard[frame["channel"]], frame, positions[frame["channel"]])
            case "gap":
                self._told(self.heard[frame["channel"]], frame["reason"], frame["position"])
            case "connected":
                self._resume = frame["resume"]
                self.connection_count += 1
            case "error" if frame["code"] == "unavailable":
                return False
            case "ping" | "disconnect":
                pass
            case _:
                self.wrong.append(f"unexpected {frame!r:.200}")
        return True

    async def _ask_again(self, websocket: ClientConnection, channel: str, positions: dict[str, str | None]) -> None:
        await asyncio.sleep(200 * MS)
        positions[channel] = self.heard[channel].position
        with contextlib.suppress(ConnectionClosed):
            await websocket.send(
                json.dumps({"type": "subscribe", "channel": channel, "position": self.heard[channel].position})
            )

    def _message(self, heard: Heard, frame: dict[str, Any]) -> None:
        position = frame["position"]
        epoch, offset, _ = position.split(".")
        if heard.position is None:
            self.wrong.append(f"{position} before subscribed")
        else:
            known_epoch, known_offset, _ = heard.position.split(".")
            if (epoch, int(offset)) != (known_epoch, int(known_offset) + 1):
                self.wrong.append(f"{position} after {heard.position}")
        if position in heard.got:
            self.wrong.append(f"{position} twice")
        heard.position = position
        heard.got[position] = frame["data"]

    def _subscribed(self, heard: Heard, frame: dict[str, Any], asked: str | None) -> None:
        if frame["recovered"] is False:
            self._told(heard, "unrecovered", frame["position"])
        elif frame["recovered"] is True and frame["position"] != asked:
            self.wrong.append(f"recovery from {frame['position']} instead of {asked}")
        if heard.position is None or self._remembers:
            heard.position = frame["position"]
        heard.is_listening = True

    def _told(self, heard: Heard, reason: str, position: str) -> None:
        heard.told.append(reason)
        heard.position = position


@contextlib.asynccontextmanager
async def listeners(
    count: int, urls: Sequence[str], *channels: str, remembers: bool = True, transports: Sequence[str] = TRANSPORTS
) -> AsyncIterator[list[Listener]]:
    """Have `count` clients listening, by each transport in turn; at the end they stop."""
    clients = [
        Listener(urls, channels, transports[number % len(transports)], remembers=remembers) for number in range(count)
    ]
    try:
        await eventually_async(lambda: all(client.is_listening for client in clients), 10_000 * MS)
        yield clients
    finally:
        for client in clients:
            await client.stop()


class Publishing:
    """Publish numbers to channels in turn, and keep what became of each.

    Attributes:
        accepted: channel -> position -> number, for which a position was returned
        failed: channel -> numbers that raised; each may have been stored all the same
        longest_seconds: that a call took
    """

    def __init__(self, publisher: AsyncPublisher, channels: Sequence[str], per_second: float = 200) -> None:
        self._publisher = publisher
        self._channels = channels
        self._pause = 1 / per_second
        self.accepted: dict[str, dict[str, int]] = defaultdict(dict)
        self.failed: dict[str, list[int]] = defaultdict(list)
        self.longest_seconds = 0.0
        self.count = 0
        self._is_over = False
        self._task: asyncio.Task[None] | None = None

    async def publish(self) -> None:
        """Publish one, and note what became of it."""
        self.count += 1
        channel, began = self._channels[self.count % len(self._channels)], asyncio.get_running_loop().time()
        number = self.count
        try:
            position = await self._publisher.publish(channel, number)
            self.accepted[channel][str(position)] = number
        except PublishError:
            self.failed[channel].append(number)
        self.longest_seconds = max(self.longest_seconds, asyncio.get_running_loop().time() - began)

    def start(self) -> None:
        if self._task is None:
            self._is_over = False
            self._task = asyncio.create_task(self._publish_forever())

    async def __aenter__(self) -> "Publishing":
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            self._is_over = True
            await task

    async def _publish_forever(self) -> None:
        while not self._is_over:
            await self.publish()
            await asyncio.sleep(self._pause)

    async def more(self, count: int = 20, timeout: float = 10_000 * MS) -> None:
        """Wait until `count` more were accepted."""
        wanted = self.accepted_count + count
        await eventually_async(lambda: self.accepted_count >= wanted, timeout, f"{count} more publications")

    @property
    def accepted_count(self) -> int:
        return sum(map(len, self.accepted.values()))

    @property
    def failed_count(self) -> int:
        return sum(map(len, self.failed.values()))

    async def reaches(self, clients: Sequence[Listener], timeout: float = 10_000 * MS) -> None:
        """Wait until every client is at the end of its channels."""

        async def all_there() -> bool:
            tops = {channel: str(await self._publisher.position(channel)) for channel in self._channels}
            return all(heard.position == tops[name] for client in clients for name, heard in client.heard.items())

        try:
            await eventually_async(all_there, timeout)
        except AssertionError:
            tops = {channel: str(await self._publisher.position(channel)) for channel in self._channels}
            states = [{name: heard.position for name, heard in client.heard.items()} for client in clients]
            raise AssertionError(f"clients are at {states}, of {tops}; wrong: {[c.wrong for c in clients]}") from None

    def check(self, clients: Sequence[Listener]) -> None:
        """Nothing wrong, nothing invented; and who was told of no loss has all of it."""
        for client in clients:
            assert not client.wrong, client.wrong[:10]
            for channel, heard in client.heard.items():
                accepted = self.accepted[channel]
                unknown = {at: data for at, data in heard.got.items() if accepted.get(at) != data}
                assert set(unknown.values()) <= set(self.failed[channel]), f"nobody published {unknown}"
                if not heard.told:
                    missing = accepted.keys() - heard.got.keys()
                    assert not missing, f"{len(missing)} of {len(accepted)} missing: {sorted(missing)[:5]}"
