"""The hub under schedules in which everything that can be late is late, and most that can break breaks."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pubsub_mw.broker.presence import Notice
from pubsub_mw.broker.redis.reader import AsyncRedisBroker
from pubsub_mw.drafts import build_draft
from pubsub_mw.errors import CloseCode
from pubsub_mw.model import Channel, ConnectionId, Position
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.send_queue import Batch, SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.realtime.hub_world import HARSH_STEPS, KIND_STEPS, Client, World, spin
from tests.realtime.virtual_loop import run_virtually
from tests.tools.clock import eventually_async
from tests.tools.redis_server import RedisServer

TIGHT = {
    "channel_linger": 0,
    "recovery_page_bytes": 1_024,
    "recovery_buffer": 4,
    "resync_batch": 2,
    "resync_concurrency": 2,
    "fan_out_slice": 1,
    "fan_out_bytes": 1_024,
    "send_queue_bytes": 1_024,
}

NO_CHECK = 86_400
"""A `check_interval` that never comes, so that it cannot heal what should not have been broken."""


def play(steps: list[tuple[str, int]], *, clients: int = 3, channels: int = 2, **overrides: Any) -> World:
    """Play `steps`, let everything arrive, and check that nothing is missing."""

    async def main() -> World:
        world = World(Settings.build(environ={}, **{**TIGHT, **overrides}), clients=clients, channels=channels)
        async with world.running():
            await world.play(steps)
            await world.settle()
        return world

    return run_virtually(main)


def schedules(steps: tuple[str, ...]) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(steps), st.integers(0, 400)), max_size=60)


@given(schedules(KIND_STEPS))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_while_history_holds_everybody_gets_everything_once_and_nobody_is_told(steps: list[tuple[str, int]]) -> None:
    world = play(steps, history_size=1_000, check_interval=NO_CHECK)
    assert not [reason for client in world.clients for reason in client.told]


@given(schedules(HARSH_STEPS), st.integers(1, 12))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_when_the_broker_loses_data_everybody_gets_the_next_or_is_told(
    steps: list[tuple[str, int]], history_size: int
) -> None:
    play(steps, history_size=history_size)


@pytest.mark.parametrize("seed", range(12))
def test_long_schedules_lose_and_double_nothing(seed: int) -> None:
    chance = random.Random(seed)
    names = HARSH_STEPS if seed % 2 else KIND_STEPS
    steps = [(chance.choice(names), chance.randrange(400)) for _ in range(500)]
    overrides = {"history_size": 5 if seed % 4 == 1 else 1_000, "check_interval": 25 if seed % 2 else NO_CHECK}
    world = play(steps, clients=4, **overrides)
    if names is KIND_STEPS:
        assert not [reason for client in world.clients for reason in client.told]


def on_a_world(
    scenario: Callable[[World], Awaitable[None]],
    *,
    clients: int = 2,
    channels: int = 1,
    low_bytes: int = 10_000,
    **overrides: Any,
) -> None:
    """Run `scenario` on a world with one channel, or more."""

    async def main() -> None:
        world = World(
            Settings.build(environ={}, **{**TIGHT, "history_size": 1_000, **overrides}),
            clients=clients,
            channels=channels,
            queue_bytes=1_000_000,
            low_bytes=low_bytes,
        )
        async with world.running():
            await scenario(world)

    run_virtually(main)


def frames(client: Client, kind: str = "") -> list[str]:
    """What waits for a client, in short, as `<type> <offset or reason>`; then it has read it."""
    short = []
    for raw in client.queue.take_nowait():
        frame = json.loads(raw)
        rest = frame.get("reason", frame.get("recovered", frame.get("data", frame.get("code"))))
        short.append(f"{frame['type']} {rest}")
        client.take(raw)
    return [text for text in short if text.startswith(kind)]


async def go_live(world: World, client: Client, position: Position | None = None) -> list[str]:
    """Subscribe and let everything happen."""
    client.subscribe(world.channels[0], position)
    await flow(world)
    return frames(client)


async def flow(world: World) -> None:
    """Let everything that is under way arrive."""
    for _ in range(3):
        world.broker.link.move_up(99)
        world.broker.link.move_down(99)
        await spin()
        for index in range(len(world.broker.reads)):
            world.broker.end_read(index)
        await spin()


def test_a_new_subscriber_is_told_where_it_begins_and_gets_what_follows() -> None:
    async def scenario(world: World) -> None:
        (channel,), client = world.channels, world.clients[0]
        world.publish(channel)
        assert await go_live(world, client) == ["subscribed None"]
        world.publish(channel)
        await flow(world)
        assert frames(client) == ["message 2"]

    on_a_world(scenario)


def test_nothing_is_read_before_the_broker_confirmed_that_it_follows_the_channel() -> None:
    async def scenario(world: World) -> None:
        world.clients[0].subscribe(world.channels[0], None)
        await spin()
        world.broker.link.move_up(1)
        await spin()
        assert not world.broker.reads
        world.broker.link.move_down(1)
        await spin()
        assert len(world.broker.reads) == 1

    on_a_world(scenario)


def test_what_comes_live_during_a_read_is_neither_lost_nor_doubled() -> None:
    async def scenario(world: World) -> None:
        (channel,), (early, late) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        await go_live(world, early)
        for _ in range(3):
            world.publish(channel)
        await flow(world)
        late.positions[channel] = start
        late.subscribe(channel, start)
        await spin()
        world.broker.begin_read(0)
        await spin()
        world.publish(channel)
        world.publish(channel)
        world.broker.link.move_down(99)
        world.broker.end_read(0)
        await spin()
        assert frames(late) == ["subscribed True", *(f"message {n}" for n in range(1, 6))]
        assert frames(early) == [f"message {n}" for n in range(1, 6)]

    on_a_world(scenario)


def test_nobody_is_told_of_a_loss_because_somebody_else_needs_many_pages() -> None:
    async def scenario(world: World) -> None:
        (channel,), (near, far) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        for _ in range(50):
            world.publish(channel, size=100)
        near.positions[channel] = world.broker.engine.position(channel)
        far.positions[channel] = start
        for _ in range(5):
            world.publish(channel, size=100)
        near.subscribe(channel, near.positions[channel])
        far.subscribe(channel, start)
        for _ in range(20):
            await flow(world)
        assert frames(near) == ["subscribed True", *(f"message {n}" for n in range(51, 56))]
        assert frames(far) == ["subscribed True", *(f"message {n}" for n in range(1, 56))]

    on_a_world(scenario)


def test_who_is_live_is_brought_forward_after_a_broken_link_before_who_is_far_behind() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, far) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        for _ in range(200):
            world.publish(channel, size=100)
        await go_live(world, live)
        world.broker.link.break_off()
        world.publish(channel)
        far.positions[channel] = start
        far.subscribe(channel, start)
        await flow(world)
        assert frames(live) == ["message 201"]
        for _ in range(60):
            await flow(world)
        assert frames(far) == ["subscribed True", *(f"message {n}" for n in range(1, 202))]

    on_a_world(scenario, low_bytes=100_000)


def test_a_flush_during_a_read_is_told_once_and_doubles_nothing() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, late) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        world.publish(channel)
        await go_live(world, live)
        late.positions[channel] = start
        late.subscribe(channel, start)
        await spin()
        world.broker.begin_read(0)  # its answer knows of one publication
        await spin()
        world.publish(channel)
        world.broker.link.move_down(99)  # the second goes live
        world.broker.link.keeps_over_loss = True
        world.broker.engine.lose()
        world.publish(channel)
        world.broker.link.move_down(99)
        await flow(world)
        assert frames(live) == ["message 2", "gap epoch"]
        assert frames(late)[-1] in ("gap epoch", "subscribed False")
        world.publish(channel)
        await flow(world)
        assert frames(live) == frames(late) == ["message 4"]

    on_a_world(scenario)


def test_a_confirmation_during_a_read_has_history_read_once_more() -> None:
    """A channel left and asked for again is confirmed twice; between the two it was not followed for a moment."""

    async def scenario(world: World) -> None:
        (channel,), (first, _) = world.channels, world.clients
        link = world.broker.link
        first.subscribe(channel, None)
        link.move_up(1)
        first.unsubscribe(channel)
        first.subscribe(channel, None)
        link.move_down(1)
        await spin()
        world.broker.begin_read(0)
        await spin()
        link.move_up(1)  # not followed any more ...
        world.publish(channel)
        link.move_up(1)  # ... and again
        link.move_down(99)
        await flow(world)
        assert frames(first) in (["subscribed None"], ["subscribed None", "message 1"])
        assert world.is_complete(first), world.story(first)

    on_a_world(scenario)


def test_a_channel_without_history_tells_a_late_client_once() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, late) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        await go_live(world, live)
        world.publish(channel, is_kept=False)
        await flow(world)
        late.positions[channel] = start
        late.subscribe(channel, start)
        for _ in range(10):
            # History is always one publication ahead of the link.
            await spin()
            world.publish(channel, is_kept=False)
            world.broker.end_read(0)
            await spin()
            world.broker.link.move_down(99)
            await asyncio.sleep(0.02)
        await flow(world)
        told = [text for text in frames(late) if not text.startswith("message")]
        assert told == ["subscribed False"]

    on_a_world(scenario)


def test_a_link_lost_during_a_read_makes_the_answer_worthless() -> None:
    async def scenario(world: World) -> None:
        (channel,), (client, _) = world.channels, world.clients
        client.subscribe(channel, None)
        world.broker.link.move_up(1)
        world.broker.link.move_down(1)
        await spin()
        world.broker.begin_read(0)
        await spin()
        world.publish(channel)
        world.broker.link.break_off()
        world.broker.end_read(0)
        await spin()
        assert frames(client) == []
        await flow(world)
        assert frames(client) == ["subscribed None"]
        assert world.is_complete(client)

    on_a_world(scenario)


def test_a_link_that_lost_everything_in_silence_is_made_good_when_it_is_broken_off() -> None:
    async def scenario(world: World) -> None:
        (channel,), (client, _) = world.channels, world.clients
        await go_live(world, client)
        world.broker.link.go_dark()
        for _ in range(12):
            world.publish(channel)
        await flow(world)
        assert frames(client) == []
        world.broker.link.break_off()
        await flow(world)
        assert frames(client) == [f"message {n}" for n in range(1, 13)]

    on_a_world(scenario)


def test_after_a_broken_link_one_read_serves_everybody() -> None:
    async def scenario(world: World) -> None:
        (channel,) = world.channels
        for client in world.clients:
            await go_live(world, client)
        before = world.broker.read_count
        world.broker.link.break_off()
        for _ in range(3):
            world.publish(channel)
        await flow(world)
        for client in world.clients:
            assert frames(client) == [f"message {n}" for n in range(1, 4)]
        assert world.broker.read_count == before + 1

    on_a_world(scenario, clients=50)


def test_those_who_come_back_one_after_another_to_a_channel_in_use_cost_one_read() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, *clients) = world.channels, world.clients
        await go_live(world, live)
        start = live.positions[channel]
        for _ in range(3):
            world.publish(channel)
        await flow(world)
        before = world.broker.read_count
        for number, client in enumerate(clients):
            client.positions[channel] = start
            told = await go_live(world, client, start)
            assert told == ["subscribed True", *(f"message {n}" for n in range(1, number + 4))]
            world.publish(channel)
            await flow(world)
        assert world.broker.read_count == before + 1
        await asyncio.sleep(3)
        assert not world.hub._windows
        assert frames(live) == [f"message {n}" for n in range(1, 23)]

    on_a_world(scenario, clients=20, recovery_page_bytes=100_000)


def test_what_comes_for_the_only_one_who_is_live_is_kept_for_those_who_come_back_too() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, *clients) = world.channels, world.clients
        await go_live(world, live)
        start = live.positions[channel]
        world.publish(channel)
        await flow(world)
        before = world.broker.read_count
        for number, client in enumerate(clients):
            client.positions[channel] = start
            assert await go_live(world, client, start) == [
                "subscribed True",
                *(f"message {n}" for n in range(1, number + 2)),
            ]
            client.drop()
            world.publish(channel)
            await flow(world)
        assert world.broker.read_count == before + 1
        assert world.hub.publications_delivered == 1 + len(clients)

    on_a_world(scenario, clients=6, recovery_page_bytes=100_000)


def test_many_channels_of_one_client_each_go_out_in_slices_too_and_in_order() -> None:
    async def scenario(world: World) -> None:
        (client,) = world.clients
        for channel in world.channels:
            client.subscribe(channel, None)
        await flow(world)
        client.read()
        for channels in (world.channels, world.channels[::-1]):
            for channel in channels:
                world.publish(channel)
            world.broker.link.move_down(10)
        assert len(frames(client)) == 6, "both of three channels; of the seven others even the first is to come"
        await flow(world)
        assert len(frames(client)) == 14

    on_a_world(scenario, clients=1, channels=10, fan_out_slice=3)


@pytest.mark.parametrize("sole", [True, False])
def test_what_is_not_kept_is_not_told_from_a_window_either(sole: bool) -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, other, *clients) = world.channels, world.clients
        await go_live(world, live)
        if not sole:
            await go_live(world, other)
        start = live.positions[channel]
        world.publish(channel)
        await flow(world)
        told = []
        for client, is_kept in zip(clients, (False, True, True), strict=True):
            client.positions[channel] = start
            told.append(await go_live(world, client, start))
            client.drop()
            world.publish(channel, is_kept=is_kept)
            await flow(world)
        assert told == [["subscribed True", "message 1"], ["subscribed False"], ["subscribed False"]]

    on_a_world(scenario, clients=5, recovery_page_bytes=100_000)


def test_a_window_is_no_way_around_a_loss() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, first, second, third) = world.channels, world.clients
        await go_live(world, live)
        start = live.positions[channel]
        world.publish(channel)
        await flow(world)
        first.positions[channel] = second.positions[channel] = third.positions[channel] = start
        await go_live(world, first, start)
        world.broker.link.break_off()
        world.broker.engine.lose()
        await flow(world)
        assert frames(live) == ["message 1", "gap epoch"]
        assert await go_live(world, second, start) == ["subscribed False"]
        world.publish(channel)
        await flow(world)
        assert await go_live(world, third, start) == ["subscribed False"]
        assert frames(second) == ["message 2"]

    on_a_world(scenario, clients=4, recovery_page_bytes=100_000)


@pytest.mark.anyio
async def test_a_mass_reconnect_costs_redis_one_read_per_channel(own_redis: RedisServer) -> None:
    options = Settings.build(own_redis.url, environ={}, check_interval=NO_CHECK)
    broker = AsyncRedisBroker(options)
    channels = [Channel(f"room:{number}") for number in range(10)]
    starts = await broker.publish([build_draft(options, channel, 0) for channel in channels])
    for number in range(1, 21):
        await broker.publish([build_draft(options, channel, number) for channel in channels])
    hub = Hub(broker, options)
    running = asyncio.create_task(hub.run())
    await broker.read([(channels[0], None)], page_bytes=1)  # from now on Redis knows the script
    before = _script_calls(own_redis)
    queues: list[SendQueue] = []
    for wave in range(20):
        settled = []
        for number in range(50):
            queues.append(SendQueue(1 << 20, 1 << 18))
            settled.append(asyncio.get_running_loop().create_future())
            channel, start = channels[number % 10], starts[number % 10]
            client = ConnectionId(f"c{wave}-{number}")
            hub.subscribe(Subscription(channel, client, queues[-1], start, settled=settled[-1]))
        assert all(await asyncio.gather(*settled))
        # The channels are hot: each moves on between two waves.
        delivered = hub.publications_delivered
        await broker.publish([build_draft(options, channel, 21 + wave) for channel in channels])
        await eventually_async(partial(_has_delivered, hub, delivered + 50 * (wave + 1)))
    publications = 20 * 10
    assert _script_calls(own_redis) - before <= publications + 10
    for queue in queues:
        told = [json.loads(frame) for frame in queue.take_nowait()]
        assert told[0]["recovered"] is True
        assert [frame["data"] for frame in told[1:]] == list(range(1, 41))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await broker.close()


def _has_delivered(hub: Hub, count: int) -> bool:
    return hub.publications_delivered >= count


def _script_calls(server: RedisServer) -> int:
    stats = server.cli("INFO", "commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))


def test_more_live_publications_than_are_remembered_during_a_read_are_read_again() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, late) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        await go_live(world, live)
        late.positions[channel] = start
        late.subscribe(channel, start)
        world.publish(channel)
        await spin()
        world.broker.begin_read(0)
        await spin()
        for _ in range(int(world.settings.recovery_buffer) * 3):
            world.publish(channel)
        world.broker.link.move_down(99)
        await flow(world)
        await asyncio.sleep(0.02)
        await flow(world)
        assert frames(late) == ["subscribed True", *(f"message {n}" for n in range(1, 14))]
        assert frames(live) == [f"message {n}" for n in range(1, 14)]

    on_a_world(scenario)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_what_comes_while_a_broken_link_is_made_good_waits_for_no_further_publication(count: int) -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, _) = world.channels, world.clients
        await go_live(world, live)
        world.broker.link.break_off()
        world.broker.link.move_up(1)
        world.broker.link.move_down(1)
        await spin()
        world.broker.begin_read(0)
        await spin()
        for _ in range(count):
            world.publish(channel)
        world.broker.link.move_down(99)
        world.broker.end_read(0)
        await spin()
        for _ in range(5):
            await flow(world)
        assert frames(live) == [f"message {n}" for n in range(1, count + 1)]

    on_a_world(scenario)


@pytest.mark.parametrize(("is_kept", "told"), [(True, "message 1"), (False, "gap trimmed")])
def test_a_second_confirmation_has_history_read_again(is_kept: bool, told: str) -> None:
    """The channel was left and asked for again, and the broker hears of it only after it answered the first time."""

    async def scenario(world: World) -> None:
        (channel,), (client, _) = world.channels, world.clients
        link = world.broker.link
        client.subscribe(channel, None)
        link.move_up(1)
        client.unsubscribe(channel)
        client.subscribe(channel, None)
        link.move_down(1)
        await spin()
        world.broker.end_read(0)
        await spin()
        assert frames(client) == ["subscribed None"]
        link.move_up(1)
        world.publish(channel, is_kept=is_kept)
        link.move_up(1)
        await flow(world)
        assert frames(client) == [told]

    on_a_world(scenario)


def test_who_waits_for_others_to_come_up_is_not_told_that_the_broker_is_silent() -> None:
    async def scenario(world: World) -> None:
        (channel,), (near, far) = world.channels, world.clients
        far.positions[channel] = world.broker.engine.position(channel)
        for _ in range(150):
            world.publish(channel, size=100)
        near.positions[channel] = world.broker.engine.position(channel)
        world.publish(channel)
        began = asyncio.get_running_loop().time()
        near.subscribe(channel, near.positions[channel])
        far.subscribe(channel, far.positions[channel])
        while not near.queue.waiting_bytes:
            await asyncio.sleep(world.settings.broker_timeout / 5)
            await flow(world)
        assert asyncio.get_running_loop().time() - began > 2 * world.settings.broker_timeout
        assert frames(near) == ["subscribed True", "message 151"]

    on_a_world(scenario, low_bytes=1_000_000)


def test_who_is_excluded_gets_it_neither_live_nor_from_history() -> None:
    async def scenario(world: World) -> None:
        (channel,), (author, other) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        await go_live(world, other)
        world.publish(channel, exclude=author.id)
        world.publish(channel)
        author.positions[channel] = start
        assert await go_live(world, author, start) == ["subscribed True", "message 2"]
        world.publish(channel, exclude=author.id)
        await flow(world)
        assert frames(author) == []
        assert frames(other) == ["message 1", "message 2", "message 3"]
        world.broker.link.break_off()
        world.publish(channel, exclude=author.id)
        world.publish(channel)
        await flow(world)
        assert frames(author) == ["message 5"]
        assert frames(other) == ["message 4", "message 5"]

    on_a_world(scenario)


@pytest.mark.parametrize("is_reading", [False, True])
def test_foreign_bytes_cost_nobody_a_publication(is_reading: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, late) = world.channels, world.clients
        late.positions[channel] = world.broker.engine.position(channel)
        await go_live(world, live)
        if is_reading:
            world.broker.link.break_off()
            world.broker.link.move_up(1)
            world.broker.link.move_down(1)
            late.subscribe(channel, late.positions[channel])
            await spin()
            world.broker.begin_read(0)
            await spin()
        world.publish(channel)
        world.broker.link.offer(channel, b"foreign")
        world.broker.link.offer(channel, b"e.1.t e.x.t  \n{}")
        world.publish(channel)
        for _ in range(5):
            await flow(world)
        assert frames(live) == ["message 1", "message 2"]
        if is_reading:
            assert frames(late) == ["subscribed True", "message 1", "message 2"]

    on_a_world(scenario)
    assert "ours" in caplog.text


def test_what_is_not_kept_reaches_who_is_live_and_is_told_to_who_was_away() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, away) = world.channels, world.clients
        start = world.broker.engine.position(channel)
        await go_live(world, live)
        world.publish(channel, is_kept=False)
        await flow(world)
        assert frames(live) == ["message 1"]
        away.positions[channel] = start
        assert await go_live(world, away, start) == ["subscribed False"]
        world.publish(channel)
        await flow(world)
        assert frames(live) == frames(away) == ["message 2"]

    on_a_world(scenario)


def test_who_is_ahead_of_the_link_is_never_sent_back() -> None:
    """A client comes from another server, whose link is quicker; what it missed was not kept."""

    async def scenario(world: World) -> None:
        (channel,), (live, ahead) = world.channels, world.clients
        await go_live(world, live)
        for _ in range(3):
            world.publish(channel)
        ahead.positions[channel] = world.broker.engine.position(channel)
        world.publish(channel, is_kept=False)
        ahead.subscribe(channel, ahead.positions[channel])
        await spin()
        world.broker.end_read(0)
        await spin()
        assert frames(ahead) == ["subscribed False"]
        await flow(world)
        await asyncio.sleep(0.02)
        await flow(world)
        world.publish(channel)
        await flow(world)
        assert frames(ahead) == ["message 5"]
        assert frames(live) == [f"message {n}" for n in range(1, 6)]

    on_a_world(scenario)


def test_what_was_not_kept_while_the_link_was_broken_is_told_to_everybody() -> None:
    async def scenario(world: World) -> None:
        (channel,), (client, _) = world.channels, world.clients
        await go_live(world, client)
        world.broker.link.break_off()
        world.publish(channel, is_kept=False)
        await flow(world)
        assert frames(client) == ["gap trimmed"]

    on_a_world(scenario)


def test_a_slow_client_has_little_more_than_a_page_waiting_however_long_its_history() -> None:
    async def scenario(world: World) -> None:
        (channel,), (slow, _) = world.channels, world.clients
        slow.positions[channel] = world.broker.engine.position(channel)
        for _ in range(500):
            world.publish(channel, size=100)
        slow.subscribe(channel, slow.positions[channel])
        most = 0
        for _ in range(3_000):
            await flow(world)
            most = max(most, slow.queue.waiting_bytes)
            await slow.read_some(1)
            if slow.received.get(channel, [0])[-1:] == [500]:
                break
        assert slow.received[channel] == list(range(1, 501))
        page, frame = world.settings.recovery_page_bytes, 400
        assert most <= world.low_bytes + page + 2 * frame

    on_a_world(scenario, low_bytes=600)


def test_a_slow_client_among_the_live_catches_up_alone_and_holds_up_nobody() -> None:
    async def scenario(world: World) -> None:
        (channel,), (slow, quick) = world.channels, world.clients
        await go_live(world, slow)
        await go_live(world, quick)
        for _ in range(10):
            world.publish(channel, size=100)
        await flow(world)
        frames(quick)
        world.broker.link.break_off()
        world.publish(channel)
        await flow(world)
        assert frames(quick) == ["message 11"]
        assert frames(slow) == [f"message {n}" for n in range(1, 11)]
        await flow(world)
        assert frames(slow) == ["message 11"]

    on_a_world(scenario, low_bytes=600)


def test_a_fan_out_larger_than_a_turn_of_the_loop_goes_on_in_the_next_ones() -> None:
    async def scenario(world: World) -> None:
        (channel,), clients = world.channels, world.clients
        for client in clients:
            await go_live(world, client)
        world.publish(channel)
        world.broker.link.move_down(99)
        reached = []
        for _ in range(6):
            await asyncio.sleep(0)
            reached.append(sum(client.queue.waiting_bytes > 0 for client in clients))
        assert reached == [3, 6, 9, 10, 10, 10]

    on_a_world(scenario, clients=10, fan_out_slice=3)


def test_who_comes_and_goes_during_a_fan_out_gets_what_is_theirs_and_no_more() -> None:
    async def scenario(world: World) -> None:
        (channel,), (*clients, late, back) = world.channels, world.clients
        for client in clients:
            await go_live(world, client)
        back.positions[channel] = world.broker.engine.position(channel)
        world.broker.make_smooth()
        world.publish(channel)
        await asyncio.sleep(0)  # arrives
        await asyncio.sleep(0)  # and goes to the first three
        left = clients[-1]
        left.unsubscribe(channel)
        late.subscribe(channel, None)
        back.subscribe(channel, back.positions[channel])
        world.publish(channel)
        world.publish(channel)
        await asyncio.sleep(1)
        for client in clients[:-1]:
            assert frames(client) == ["message 1", "message 2", "message 3"]
        assert left.queue.waiting_bytes == 0
        assert frames(late) == ["subscribed None", "message 2", "message 3"]
        assert frames(back) == ["subscribed True", "message 1", "message 2", "message 3"]

    on_a_world(scenario, clients=12, fan_out_slice=3)


def test_what_comes_during_a_fan_out_goes_out_as_one() -> None:
    async def scenario(world: World) -> None:
        (channel,), clients = world.channels, world.clients
        put: list[int] = []
        for client in clients:
            client.queue = _Watched(put)
            await go_live(world, client)
        for _ in range(20):
            world.publish(channel)
            world.broker.link.move_down(99)
        await spin()
        assert put == [1] * 10 + [19] * 10

    roomy = {"fan_out_bytes": 1 << 20, "send_queue_bytes": 1 << 20}
    on_a_world(scenario, clients=10, fan_out_slice=3, recovery_buffer=100, **roomy)


def test_a_burst_goes_out_over_several_turns_so_that_no_client_seems_slow() -> None:
    async def scenario(world: World) -> None:
        (channel,), (client,) = world.channels, world.clients
        client.queue = queue = _Watched([])
        await go_live(world, client)
        for _ in range(40):
            world.publish(channel, size=100)
        world.broker.link.move_down(99)
        most = 0
        for _ in range(200):
            most = max(most, queue.waiting_bytes)
            queue.take_nowait()  # as the transport does at the end of a turn
            await asyncio.sleep(0)
        assert most <= world.settings.send_queue_bytes // 2  # the last two parts may share a turn
        assert sum(queue.put) == 40

    on_a_world(scenario, clients=1, fan_out_slice=1_000, fan_out_bytes=1 << 20, recovery_buffer=100)


class _Watched(SendQueue):
    """A send queue that notes how many publications it is given at once."""

    __slots__ = ("put",)

    def __init__(self, put: list[int]) -> None:
        super().__init__(1_000_000, 10_000)
        self.put = put

    def put_batch(self, batch: Batch) -> None:
        self.put.append(len(batch.frames))
        super().put_batch(batch)


def test_the_broker_is_left_unread_while_too_much_waits_for_a_fan_out() -> None:
    async def scenario(world: World) -> None:
        (channel,), clients = world.channels, world.clients
        for client in clients:
            await go_live(world, client)
        for _ in range(40):
            world.publish(channel, size=100)
            world.broker.link.move_down(1)
        was_held = world.broker.link.is_held
        assert was_held
        assert world.hub._waiting_bytes < 2 * world.settings.fan_out_bytes
        for _ in range(40):
            await flow(world)
        assert not world.broker.link.is_held
        for client in clients:
            assert frames(client) == [f"message {n}" for n in range(1, 41)]

    on_a_world(scenario, clients=10, fan_out_slice=3, recovery_buffer=100)


def test_a_link_that_breaks_during_a_fan_out_costs_nobody_a_publication() -> None:
    async def scenario(world: World) -> None:
        (channel,), clients = world.channels, world.clients
        for client in clients:
            await go_live(world, client)
        world.publish(channel)
        world.publish(channel)
        world.broker.link.move_down(1)
        await asyncio.sleep(0)
        world.broker.link.move_down(1)
        world.broker.link.break_off()
        world.publish(channel)
        for _ in range(10):
            await flow(world)
        for client in clients:
            assert frames(client) == ["message 1", "message 2", "message 3"]

    on_a_world(scenario, clients=10, fan_out_slice=3)


def test_a_notice_does_not_overtake_the_fan_out_before_it() -> None:
    async def scenario(world: World) -> None:
        (channel,), clients = world.channels, world.clients
        for client in clients:
            await go_live(world, client)
        told: list[list[bool]] = []
        world.hub.on_presence = lambda _channel, _notice: told.append([c.queue.waiting_bytes > 0 for c in clients])
        world.publish(channel)
        world.broker.link.move_down(1)
        world.hub.on_notice(world.hub._channels[channel], Notice("epoch", 1, True, "ada", b"null"))
        assert told == [[True] * 10]

    on_a_world(scenario, clients=10, fan_out_slice=3)


def test_a_subscription_is_refused_when_the_broker_does_not_answer() -> None:
    async def scenario(world: World) -> None:
        client = world.clients[0]
        client.subscribe(world.channels[0], None)
        await asyncio.sleep(world.settings.broker_timeout * 0.9)
        assert frames(client) == []
        await asyncio.sleep(world.settings.broker_timeout * 0.2)
        assert frames(client) == ["error unavailable"]
        assert world.hub.channel_count == 0
        assert await go_live(world, client) == ["subscribed None"]

    on_a_world(scenario)


def test_a_read_that_fails_is_repeated() -> None:
    async def scenario(world: World) -> None:
        client = world.clients[0]
        client.subscribe(world.channels[0], None)
        world.broker.link.move_up(1)
        world.broker.link.move_down(1)
        for _ in range(3):
            await spin()
            world.broker.end_read(0, fails=True)
            await asyncio.sleep(1)
        assert frames(client) == []
        await flow(world)
        assert frames(client) == ["subscribed None"]

    on_a_world(scenario)


def test_a_client_busy_with_another_channel_is_not_told_that_the_broker_is_silent() -> None:
    async def scenario(world: World) -> None:
        (channel,), client = world.channels, world.clients[0]
        client.positions[channel] = world.broker.engine.position(channel)
        world.publish(channel)
        client.queue.put_recovered_nowait(b'{"type":"filler"}' * 100)
        client.subscribe(channel, client.positions[channel])
        await flow(world)
        await asyncio.sleep(world.settings.broker_timeout * 3)
        client.queue.take_nowait()
        await flow(world)
        assert frames(client) == ["subscribed True", "message 1"]

    on_a_world(scenario, low_bytes=600)


def test_a_client_that_catches_up_on_two_channels_is_left_behind_on_neither() -> None:
    async def scenario(world: World) -> None:
        client, (one, other) = world.clients[0], world.channels
        for channel in world.channels:
            client.positions[channel] = world.broker.engine.position(channel)
            for _ in range(20):
                world.publish(channel, size=100)
        for channel in world.channels:
            client.subscribe(channel, client.positions[channel])
        for _ in range(400):
            await flow(world)
            await client.read_some(1)
        assert client.received[one] == list(range(1, 21))
        assert client.received[other] == list(range(21, 41))

    on_a_world(scenario, clients=1, channels=2, low_bytes=600)


def test_a_tail_that_went_missing_is_found_by_the_check() -> None:
    async def scenario(world: World) -> None:
        (channel,), client = world.channels, world.clients[0]
        await go_live(world, client)
        world.publish(channel)
        await flow(world)
        frames(client)
        world.broker.link.keeps_over_loss = True
        world.broker.engine.lose()
        world.broker.make_smooth()
        await asyncio.sleep(world.settings.check_interval * 1.1)
        assert frames(client) == ["gap epoch"]
        await asyncio.sleep(world.settings.check_interval * 3)
        assert frames(client) == []

    on_a_world(scenario)


def test_a_hub_that_died_and_runs_again_loses_nothing() -> None:
    async def scenario(world: World) -> None:
        (channel,), (live, late) = world.channels, world.clients
        await go_live(world, live)
        start = late.positions[channel] = live.positions[channel]
        world.publish(channel)
        await flow(world)
        late.subscribe(channel, start)
        await spin()
        world.broker.begin_read(0)
        await world.rerun()
        world.publish(channel)
        await flow(world)
        await flow(world)
        assert frames(live) == ["message 1", "message 2"]
        assert frames(late) == ["subscribed True", "message 1", "message 2"]

    on_a_world(scenario)


def test_the_last_one_to_leave_takes_the_channel_along() -> None:
    async def scenario(world: World) -> None:
        (channel,), (first, second) = world.channels, world.clients
        await go_live(world, first)
        await go_live(world, second)
        first.unsubscribe(channel)
        assert world.hub.channel_count == 1
        world.publish(channel)
        await flow(world)
        assert frames(first) == []
        assert frames(second) == ["message 1"]
        second.unsubscribe(channel)
        assert world.hub.channel_count == 0

    on_a_world(scenario)


def test_who_takes_over_a_connection_closes_the_older_one() -> None:
    async def scenario(world: World) -> None:
        older, newer = world.new_queue(), world.new_queue()
        connection = world.clients[0].id
        world.hub.open(connection, older)
        world.hub.open(connection, newer)
        assert older.closed is not None
        assert older.closed[0] is CloseCode.REPLACED
        world.hub.close(connection, older)
        assert world.hub.connection_count == 1
        assert world.hub.send_queues() == [newer]
        world.hub.close(connection, newer)
        assert world.hub.connection_count == 0

    on_a_world(scenario)


def test_a_channel_of_its_own_needs_no_read_while_it_is_fresh() -> None:
    async def scenario(world: World) -> None:
        (channel,), client = world.channels, world.clients[0]
        client.positions[channel] = Position.start()
        subscription = Subscription(
            channel, client.id, client.queue, Position.start(), is_announced=False, is_fresh=True
        )
        world.hub.subscribe(subscription)
        world.broker.link.move_up(1)
        world.broker.link.move_down(1)
        await spin()
        assert world.broker.read_count == 0
        client.positions[channel] = world.broker.engine.position(channel)
        world.publish(channel)
        world.broker.link.break_off()
        world.publish(channel)
        await flow(world)
        assert frames(client) == ["message 1", "message 2"]

    on_a_world(scenario)
