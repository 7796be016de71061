"""Listen by server-sent events as the standard says, and know nothing else of the project.

In:     a url; headers
Out:    the events, in order; the last id; how the response began and that it ended
Owns:   one HTTP response and the one task that reads it
Never:  imports `pubsub_mw`; splits lines or fields itself: that is done by `httpx-sse`, which is not ours
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any

import httpx
from httpx_sse._decoders import SSEDecoder, SSELineDecoder

from tests.tools.clock import MS
from tests.tools.raw_client import Frame

__all__ = ["Event", "RawStream"]


@dataclass(frozen=True)
class Event:
    """What a page is told: `id` is the last one, whether or not it came with this event."""

    event: str
    data: str
    id: str

    @property
    def frame(self) -> Frame:
        frame: Frame = json.loads(self.data)
        return frame


class RawStream:
    """One stream. Get it through the `raw_stream` fixture.

    Attributes:
        status, headers: of the response
        body: of a response that is no stream
        events: all that came so far
        last_id: what an EventSource would come back with
        retry: seconds, or None
        raw_bytes: how many came
    """

    def __init__(self, client: httpx.AsyncClient, response: httpx.Response) -> None:
        self._client = client
        self._response = response
        self.status = response.status_code
        self.headers = response.headers
        self.body = ""
        self.events: list[Event] = []
        self.last_id = ""
        self.retry: float | None = None
        self.raw_bytes = 0
        self.has_ended = False
        self._next = 0
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read(), name="raw stream")

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        params: Any = None,
        headers: Mapping[str, str] | None = None,
        ssl: SSLContext | None = None,
        timeout: float = 10_000 * MS,
    ) -> "RawStream":
        client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, read=None), trust_env=False, verify=ssl or False)
        request = client.build_request("GET", url, params=params, headers=dict(headers or {}))
        async with asyncio.timeout(timeout):
            response = await client.send(request, stream=True)
        stream = cls(client, response)
        if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
            await stream._reader
        return stream

    async def recv(self, matches: Callable[[Event], bool] = lambda _: True, timeout: float = 10_000 * MS) -> Event:
        """Return the next event that `matches`, passing over others."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                while True:
                    while self._next < len(self.events):
                        self._next += 1
                        if matches(self.events[self._next - 1]):
                            return self.events[self._next - 1]
                    if self.has_ended:
                        raise AssertionError(f"the stream ended; {self._story()}")
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"nothing that fits within {timeout:g} s; {self._story()}") from None

    async def frame(self, type: str | None = None, channel: str | None = None, timeout: float = 10_000 * MS) -> Frame:  # noqa: A002
        """Return the next frame of `frames=1` of this type and channel; pings are passed over."""

        def matches(event: Event) -> bool:
            frame = event.frame
            is_wanted = type in (None, frame["type"]) and channel in (None, frame.get("channel"))
            return is_wanted and (type == "ping" or frame["type"] != "ping")

        return (await self.recv(matches, timeout)).frame

    async def ended(self, timeout: float = 10_000 * MS) -> None:
        """Wait until the server has ended the stream."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self.has_ended)

    async def close(self) -> None:
        """Go as a tab that is closed."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._response.aclose()
        await self._client.aclose()

    async def _read(self) -> None:
        lines, decoder = SSELineDecoder(), SSEDecoder()
        is_stream = self.headers.get("content-type", "").startswith("text/event-stream")
        try:
            async for text in self._response.aiter_text():
                self.raw_bytes += len(text.encode())
                if not is_stream:
                    self.body += text
                    continue
                async with self._changed:
                    for line in lines.decode(text):
                        has_data = bool(decoder._data)
                        event = decoder.decode(line)
                        if event is not None:
                            self.last_id = event.id
                            self.retry = self.retry if event.retry is None else event.retry / 1_000
                            if has_data:  # the standard: without data nothing is dispatched
                                self.events.append(Event(event.event, event.data, event.id))
                    self._changed.notify_all()
        except httpx.TransportError:
            pass  # cut off: it has ended all the same
        finally:
            async with self._changed:
                self.has_ended = True
                self._changed.notify_all()

    def _story(self) -> str:
        return "received: " + (", ".join(str(event)[:300] for event in self.events[-20:]) or "nothing")
