"""See what a test's request published; no broker needed.

In:     a test that makes requests, through the wrapped WSGI app (which Django's own test client passes by)
Out:    the publications, in order
Owns:   an engine that records, in the place of the broker, while `capture` is open
Never:  delivers anything; changes what the application may publish (names, sizes and data are checked as ever)

    from pubsub_mw.testing import capture

    def test_say(client):
        with capture() as published:
            client.post("/rooms/42/messages", json={"text": "hi"})
        assert published[0].channel == "room:42"
        assert published[0].data == {"text": "hi"}
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pubsub_mw.broker.engines import stand_in
from pubsub_mw.broker.memory import MemoryBroker
from pubsub_mw.model import Draft, Position
from pubsub_mw.protocol import message_tail
from pubsub_mw.settings import Settings

__all__ = ["Published", "capture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One publication that would have gone out.

    Attributes:
        channel: its name
        data: as a client would get it, after encoding
        event: what kind it is
        exclude: the connection id that would not get it, or None
        idempotency_key: as given, or None
        position: what the publisher was told
    """

    channel: str
    data: Any
    event: str
    exclude: str | None
    idempotency_key: str | None
    position: Position


@contextlib.contextmanager
def capture() -> Iterator[list[Published]]:
    """Record instead of publishing, in the whole process, for every publisher that exists or is made.

    Idempotency keys hold: the same key twice on a channel is recorded once. Do not nest it.
    """
    recorder = _Recorder(Settings())
    with stand_in(recorder):
        yield recorder.published


class _Recorder(MemoryBroker):
    """A memory broker that nobody listens to, and that remembers everything."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.expect_endpoint()
        self.published: list[Published] = []

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        positions = super().publish(drafts)
        for draft, position in zip(drafts, positions, strict=True):
            if position.tag == draft.tag:  # else its idempotency key was known
                frame = json.loads(draft.head + message_tail)
                self.published.append(
                    Published(
                        channel=frame["channel"],
                        data=frame["data"],
                        event=frame["event"],
                        exclude=draft.exclude or None,
                        idempotency_key=draft.idempotency_key or None,
                        position=position,
                    )
                )
        return positions
