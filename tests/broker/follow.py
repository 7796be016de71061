"""Follow channels in a test, and remember what was told."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import orjson

import pubsub_mw.broker.redis.reader  # noqa: F401 - an event loop must not be the first to import it
from pubsub_mw.broker.codec import decode
from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.broker.interface import Subscriber
from pubsub_mw.broker.presence import Notice
from pubsub_mw.drafts import build_draft
from pubsub_mw.model import Channel, Draft, Publication
from pubsub_mw.settings import Settings
from tests.tools.clock import eventually_async

__all__ = ["Recorder", "draft", "following"]


def draft(
    settings: Settings,
    channel: str,
    data: object = None,
    *,
    exclude: str | None = None,
    idempotency_key: str | None = None,
    history: bool | int | None = None,
) -> Draft:
    return build_draft(settings, channel, data, exclude=exclude, idempotency_key=idempotency_key, history=history)


class Recorder:
    """A listener.

    Attributes:
        publications, notices: channel and what came on it, as they came
        told: "lost", and the name of each channel that was confirmed, in order
        foreign: payloads that are not ours, and not to be remembered
        calls: how often publications were handed on
    """

    subscriber: Subscriber[str]

    def __init__(self) -> None:
        self.publications: list[tuple[str, Publication]] = []
        self.notices: list[tuple[str, Notice]] = []
        self.told: list[str] = []
        self.foreign: list[bytes] = []
        self.calls = 0

    def on_publications(self, arrived: Mapping[str, Sequence[bytes]]) -> None:
        self.calls += 1
        for channel, payloads in arrived.items():
            self.publications += [(channel, decode(payload)) for payload in payloads if payload not in self.foreign]

    def on_notice(self, channel: str, notice: Notice) -> None:
        self.notices.append((channel, notice))

    def on_subscribed(self, channel: str) -> None:
        self.told.append(channel)

    def on_lost(self) -> None:
        self.told.append("lost")

    def data(self, channel: str) -> list[object]:
        return [orjson.loads(item.frame)["data"] for name, item in self.publications if name == channel]

    async def confirmed(self, *channels: str) -> None:
        """Wait until each of `channels` was confirmed since the link was last lost."""

        def are_confirmed() -> bool:
            lost = len(self.told) - self.told[::-1].index("lost") if "lost" in self.told else 0
            return set(channels) <= set(self.told[lost:])

        await eventually_async(are_confirmed)


@asynccontextmanager
async def following(settings: Settings, *channels: str) -> AsyncIterator[Recorder]:
    """Run a subscriber of its own to `channels`, each confirmed."""
    broker = open_async_broker(settings)
    recorder = Recorder()
    recorder.subscriber = broker.subscriber(recorder)
    for channel in channels:
        recorder.subscriber.subscribe(Channel(channel), channel)
    task = asyncio.create_task(recorder.subscriber.run())
    try:
        await recorder.confirmed(*channels)
        yield recorder
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await broker.close()
