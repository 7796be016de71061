"""What a broker promises. Every test runs against each engine."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import orjson
import pytest

from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import Broker
from pubsub_mw.errors import SettingsError
from pubsub_mw.model import START_TAG, Channel, HistoryPage, Position, Publication
from pubsub_mw.settings import Settings
from tests.broker.follow import draft, following
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.redis_server import RedisServer

Make = Callable[..., Settings]

ROOM = Channel("room:1")
NEWS = Channel("news")
MUCH = 1 << 30


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest, prefix: str) -> Make:
    """Make settings of an engine, all of whose brokers in one test meet."""
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    return lambda **overrides: Settings.build(url, environ={}, prefix=prefix, **overrides)


@pytest.fixture
def broker(make: Make) -> Iterator[Broker]:
    broker = open_broker(make())
    yield broker
    broker.close()


def publish(broker: Broker, settings: Settings, channel: str, data: object = None, **options: Any) -> Position:
    (position,) = broker.publish([draft(settings, channel, data, **options)])
    return position


def read(settings: Settings, channel: Channel, since: int | None, page_bytes: int = MUCH) -> HistoryPage:
    """Read from an event loop of its own: only asynchronous code reads history."""
    return asyncio.run(read_async(settings, channel, since, page_bytes))


async def publish_async(
    broker: Broker, settings: Settings, channel: str, data: object = None, **options: Any
) -> Position:
    """Publish from a thread, as a view does."""
    return await asyncio.to_thread(publish, broker, settings, channel, data, **options)


async def read_async(settings: Settings, channel: Channel, since: int | None, page_bytes: int = MUCH) -> HistoryPage:
    broker = open_async_broker(settings)
    try:
        (page,) = await broker.read([(channel, since)], page_bytes=page_bytes)
    finally:
        await broker.close()
    assert isinstance(page, HistoryPage)
    return page


def data_of(publications: tuple[Publication, ...] | list[Publication]) -> list[object]:
    return [orjson.loads(item.frame)["data"] for item in publications]


def wait(seconds: float) -> None:
    """Let a time to live pass, of what reading would keep alive."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > until)


# Positions.


def test_offsets_count_from_one_in_one_epoch(broker: Broker, make: Make) -> None:
    positions = [publish(broker, make(), ROOM, number) for number in range(5)]
    assert [position.offset for position in positions] == [1, 2, 3, 4, 5]
    assert len({position.epoch for position in positions}) == 1
    assert len({position.tag for position in positions}) == 5
    assert [Position.parse(str(position)) for position in positions] == positions


def test_channels_count_for_themselves(broker: Broker, make: Make) -> None:
    publish(broker, make(), ROOM)
    assert publish(broker, make(), NEWS).offset == 1
    assert publish(broker, make(), ROOM).offset == 2


def test_the_position_of_a_channel_is_that_of_its_last_publication(broker: Broker, make: Make) -> None:
    for _ in range(3):
        position = publish(broker, make(), ROOM)
        assert broker.position(ROOM) == position


def test_an_untouched_channel_has_a_position_from_which_nothing_is_missed(broker: Broker, make: Make) -> None:
    before = broker.position(ROOM)
    assert (before.offset, before.tag) == (0, START_TAG)
    assert broker.position(ROOM) == before
    publish(broker, make(), ROOM)
    (first,) = read(make(), ROOM, 0).publications
    assert first.follows(before)


def test_every_publication_follows_the_one_before(broker: Broker, make: Make) -> None:
    for number in range(10):
        publish(broker, make(), ROOM, number)
    publications = read(make(), ROOM, 0).publications
    for before, after in pairwise(publications):
        assert after.follows(before.position)


def test_the_payload_is_the_finished_frame(broker: Broker, make: Make) -> None:
    position = publish(broker, make(), ROOM, {"text": "hé\n"}, exclude="c1")
    (item,) = read(make(), ROOM, 0).publications
    assert orjson.loads(item.frame) == {
        "type": "message",
        "channel": ROOM,
        "event": "message",
        "data": {"text": "hé\n"},
        "position": str(position),
    }
    assert (item.position, item.exclude) == (position, "c1")


# Atomicity.


def test_concurrent_threads_leave_no_hole_and_no_double(make: Make) -> None:
    settings = make(history_size=2_000)
    broker = open_broker(settings)
    threads, each = 32, 25
    start = threading.Barrier(threads)

    def work(number: int) -> list[Position]:
        start.wait()
        return [publish(broker, settings, ROOM, [number, count]) for count in range(each)]

    with ThreadPoolExecutor(threads) as pool:
        positions = [position for made in pool.map(work, range(threads)) for position in made]
    broker.close()
    assert sorted(position.offset for position in positions) == list(range(1, threads * each + 1))
    publications = read(settings, ROOM, 0).publications
    assert {item.position for item in publications} == set(positions)
    data = data_of(publications)
    assert sorted(data, key=repr) == sorted(([t, c] for t in range(threads) for c in range(each)), key=repr)
    for number in range(threads):  # in order for each thread
        assert [item for item in data if isinstance(item, list) and item[0] == number] == [
            [number, count] for count in range(each)
        ]


@pytest.mark.anyio
async def test_concurrent_tasks_leave_no_hole_and_no_double(make: Make) -> None:
    settings = make(history_size=500)
    broker = open_async_broker(settings)
    made = await asyncio.gather(*(broker.publish([draft(settings, ROOM, number)]) for number in range(200)))
    assert sorted(position.offset for (position,) in made) == list(range(1, 201))
    (page,) = await broker.read([(ROOM, 0)], page_bytes=MUCH)
    assert isinstance(page, HistoryPage)
    assert sorted(data_of(page.publications), key=repr) == sorted(range(200), key=repr)
    await broker.close()


@pytest.mark.anyio
async def test_synchronous_and_asynchronous_doors_lead_to_the_same_room(broker: Broker, make: Make) -> None:
    other = open_async_broker(make())
    first = await publish_async(broker, make(), ROOM, "sync")
    (second,) = await other.publish([draft(make(), ROOM, "async")])
    third = await publish_async(broker, make(), ROOM, "sync")
    assert [position.offset for position in (first, second, third)] == [1, 2, 3]
    assert await asyncio.to_thread(broker.secret) == await other.secret()
    await other.close()


def test_many_are_published_in_order_over_channels(broker: Broker, make: Make) -> None:
    drafts = [draft(make(), channel) for channel in (ROOM, NEWS, ROOM, NEWS, ROOM)]
    positions = broker.publish(drafts)
    assert [position.offset for position in positions] == [1, 1, 2, 2, 3]
    assert [position.tag for position in positions] == [item.tag for item in drafts]


def test_any_number_is_published_in_order_and_in_one_go(make: Make) -> None:
    settings = make(history_size=300)
    broker = open_broker(settings)
    drafts = [draft(settings, (ROOM, NEWS, Channel("b"))[number % 3], number) for number in range(400)]
    positions = broker.publish(drafts)
    assert [position.tag for position in positions] == [item.tag for item in drafts]
    assert [position.offset for position in positions] == [1 + number // 3 for number in range(400)]
    assert data_of(read(settings, ROOM, 0).publications) == list(range(0, 400, 3))
    broker.close()


def test_the_secret_is_made_once(broker: Broker, make: Make) -> None:
    secret = broker.secret()
    assert len(secret) >= 32
    assert broker.secret() == secret
    assert open_broker(make()).secret() == secret


# History.


def test_history_keeps_the_newest_of_its_size(make: Make) -> None:
    settings = make(history_size=3)
    broker = open_broker(settings)
    for number in range(1, 8):
        publish(broker, settings, ROOM, number)
    page = read(settings, ROOM, 0)
    assert data_of(page.publications) == [5, 6, 7]
    assert page.top.offset == 7
    assert page.is_complete
    broker.close()


def test_a_number_keeps_so_many_from_then_on(broker: Broker, make: Make) -> None:
    for number in range(1, 6):
        publish(broker, make(), ROOM, number)
    publish(broker, make(), ROOM, 6, history=2)
    assert data_of(read(make(), ROOM, 0).publications) == [5, 6]
    publish(broker, make(), ROOM, 7)
    assert data_of(read(make(), ROOM, 0).publications) == [5, 6, 7]


def test_a_connections_own_channel_keeps_more(make: Make) -> None:
    settings = make(history_size=2, private_history_size=4)
    broker = open_broker(settings)
    own = Channel("#connection-c1")
    for number in range(6):
        publish(broker, settings, own, number)
    assert data_of(read(settings, own, 0).publications) == [2, 3, 4, 5]
    broker.close()


def test_what_is_not_kept_uses_its_offset_and_leaves_no_data(broker: Broker, make: Make) -> None:
    publish(broker, make(), ROOM, "one")
    secret = publish(broker, make(), ROOM, "canary", history=False)
    publish(broker, make(), ROOM, "three")
    one, two, three = read(make(), ROOM, 0).publications
    assert (two.position, two.frame) == (secret, b"")
    assert data_of([one, three]) == ["one", "three"]
    assert two.follows(one.position)
    assert three.follows(two.position)


def test_history_expires_before_the_position_does(make: Make) -> None:
    settings = make(history_ttl=400 * MS, position_ttl=60)
    broker = open_broker(settings)
    position = publish(broker, settings, ROOM, "gone soon")
    assert data_of(read(settings, ROOM, 0).publications) == ["gone soon"]
    eventually(lambda: not read(settings, ROOM, 0).publications)
    page = read(settings, ROOM, 0)
    assert page.top == position
    assert page.is_complete
    after = publish(broker, settings, ROOM, "next")
    assert (after.epoch, after.offset) == (position.epoch, 2)
    (item,) = read(settings, ROOM, 0).publications
    assert item.follows(position)
    broker.close()


def test_a_publication_prolongs_the_history_before_it(make: Make) -> None:
    settings = make(history_ttl=400 * MS, position_ttl=60)
    broker = open_broker(settings)
    began = time.monotonic()
    publish(broker, settings, ROOM, 1)
    wait(250 * MS)
    publish(broker, settings, ROOM, 2)
    wait(250 * MS)
    page = read(settings, ROOM, 0)
    if time.monotonic() - began < 600 * MS:  # else this machine was too slow to tell
        assert data_of(page.publications) == [1, 2]
    broker.close()


def test_a_channel_whose_position_expired_starts_a_new_epoch(make: Make) -> None:
    settings = make(history_ttl=400 * MS, position_ttl=400 * MS)
    broker = open_broker(settings)
    before = publish(broker, settings, ROOM, "old")
    wait(450 * MS)
    after = publish(broker, settings, ROOM, "new")
    assert after.offset == 1
    assert after.epoch != before.epoch
    assert data_of(read(settings, ROOM, 0).publications) == ["new"]
    broker.close()


def test_whoever_asks_now_and_then_keeps_the_position_alive(make: Make) -> None:
    ttl = 400 * MS
    settings = make(history_ttl=50 * MS, position_ttl=ttl)
    broker = open_broker(settings)
    looked_at = time.monotonic()
    position, until = publish(broker, settings, ROOM), looked_at + 2 * ttl
    while (now := time.monotonic()) < until:
        found = broker.position(ROOM)
        if time.monotonic() - looked_at > ttl / 3:  # this machine stalled, and did not ask now and then: begin anew
            now = time.monotonic()
            position, until = publish(broker, settings, ROOM), now + 2 * ttl
        else:
            assert found == position
        looked_at = now
    broker.close()


# Reading.


def test_a_read_gives_what_came_after_an_offset(broker: Broker, make: Make) -> None:
    for number in range(1, 6):
        publish(broker, make(), ROOM, number)
    for since in range(7):
        page = read(make(), ROOM, since)
        assert data_of(page.publications) == list(range(since + 1, 6))
        assert (page.top.offset, page.is_complete) == (5, True)


def test_a_read_of_the_top_gives_no_publication(broker: Broker, make: Make) -> None:
    position = publish(broker, make(), ROOM)
    assert read(make(), ROOM, None) == HistoryPage(top=position, publications=(), is_complete=True)


def test_pages_put_together_are_the_whole(broker: Broker, make: Make) -> None:
    broker.publish([draft(make(), ROOM, "x" * 100 + str(number)) for number in range(60)])
    for page_bytes in (1, 500, 4_000):
        since, seen, pages = 0, list[object](), 0
        while True:
            page = read(make(), ROOM, since, page_bytes)
            assert page.publications, "at least one, however large"
            seen += data_of(page.publications)
            since = page.publications[-1].position.offset
            pages += 1
            if page.is_complete:
                break
        assert seen == ["x" * 100 + str(number) for number in range(60)]
        assert pages == pytest.approx(60 * 230 / max(230, page_bytes), rel=0.4)


@pytest.mark.anyio
async def test_several_channels_are_read_at_once_in_order(broker: Broker, make: Make) -> None:
    for channel, count in ((ROOM, 2), (NEWS, 3)):
        for number in range(count):
            await publish_async(broker, make(), channel, [channel, number])
    other = open_async_broker(make())
    pages = await other.read([(NEWS, 1), (Channel("new"), 0), (ROOM, None), (NEWS, 0)], page_bytes=MUCH)
    await other.close()
    assert [page.top.offset for page in pages if isinstance(page, HistoryPage)] == [3, 0, 2, 3]
    assert [len(page.publications) for page in pages if isinstance(page, HistoryPage)] == [2, 0, 0, 3]


# Idempotency.


def test_an_idempotency_key_publishes_once(broker: Broker, make: Make) -> None:
    first = publish(broker, make(), ROOM, "first", idempotency_key="k 1}")
    publish(broker, make(), ROOM, "between")
    assert publish(broker, make(), ROOM, "again", idempotency_key="k 1}") == first
    assert data_of(read(make(), ROOM, 0).publications) == ["first", "between"]
    assert broker.position(ROOM).offset == 2


def test_an_idempotency_key_counts_for_one_channel(broker: Broker, make: Make) -> None:
    publish(broker, make(), ROOM, idempotency_key="k")
    publish(broker, make(), NEWS)
    assert publish(broker, make(), NEWS, idempotency_key="k").offset == 2


def test_an_idempotency_key_counts_within_one_round_trip_too(broker: Broker, make: Make) -> None:
    drafts = [draft(make(), ROOM, number, idempotency_key="k") for number in range(3)]
    assert len(set(broker.publish(drafts))) == 1
    assert broker.position(ROOM).offset == 1


def test_an_idempotency_key_is_forgotten_after_its_time(make: Make) -> None:
    settings = make(idempotency_ttl=100 * MS)
    broker = open_broker(settings)
    first = publish(broker, settings, ROOM, idempotency_key="k")
    again = eventually(lambda: (p := publish(broker, settings, ROOM, idempotency_key="k")) != first and p)
    assert isinstance(again, Position)
    assert (again.epoch, again.offset) == (first.epoch, 2)
    broker.close()


def test_an_idempotency_key_publishes_once_whoever_races(make: Make) -> None:
    settings = make()
    broker = open_broker(settings)
    start = threading.Barrier(16)

    def work(number: int) -> Position:
        start.wait()
        return publish(broker, settings, ROOM, number, idempotency_key="k")

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(work, range(16)))) == 1
    assert broker.position(ROOM).offset == 1
    broker.close()


# Following.


@pytest.mark.anyio
async def test_a_subscriber_gets_every_publication_once_in_order(broker: Broker, make: Make) -> None:
    async with following(make(), ROOM, NEWS) as recorder:
        for number in range(50):
            await publish_async(broker, make(), ROOM, number)
            await publish_async(broker, make(), NEWS, -number)
        await eventually_async(lambda: len(recorder.publications) >= 100)
        assert recorder.data(ROOM) == list(range(50))
        assert recorder.data(NEWS) == [-number for number in range(50)]
        kept = (await read_async(make(), ROOM, 0)).publications
        assert tuple(item for name, item in recorder.publications if name == ROOM) == kept


@pytest.mark.anyio
async def test_publications_from_many_threads_arrive_in_offset_order(make: Make) -> None:
    settings = make()
    broker = open_broker(settings)
    async with following(settings, ROOM) as recorder:
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(publish, broker, settings, ROOM, number) for number in range(200)]
            await eventually_async(lambda: len(recorder.publications) >= 200)
            assert all(future.result() for future in futures)
        assert [item.position.offset for _, item in recorder.publications] == list(range(1, 201))
    broker.close()


@pytest.mark.anyio
async def test_a_live_publication_is_whole_though_history_keeps_none_of_it(broker: Broker, make: Make) -> None:
    async with following(make(), ROOM) as recorder:
        await publish_async(broker, make(), ROOM, "live", history=False, exclude="c1")
        await eventually_async(lambda: recorder.publications)
        assert recorder.data(ROOM) == ["live"]
        assert recorder.publications[0][1].exclude == "c1"


@pytest.mark.anyio
async def test_a_repeated_idempotency_key_delivers_nothing(broker: Broker, make: Make) -> None:
    async with following(make(), ROOM) as recorder:
        for data in ("first", "again"):
            await publish_async(broker, make(), ROOM, data, idempotency_key="k")
        await publish_async(broker, make(), ROOM, "last")
        await eventually_async(lambda: "last" in recorder.data(ROOM))
        assert recorder.data(ROOM) == ["first", "last"]


@pytest.mark.anyio
async def test_an_unsubscribed_channel_is_followed_no_more(broker: Broker, make: Make) -> None:
    third = Channel("third")
    async with following(make(), ROOM, NEWS) as recorder:
        recorder.subscriber.unsubscribe(ROOM)
        recorder.subscriber.subscribe(third, third)
        await recorder.confirmed(third)
        for channel in (ROOM, NEWS, third):
            await publish_async(broker, make(), channel, 1)
        await eventually_async(lambda: recorder.data(third))
        assert [name for name, _ in recorder.publications] == [NEWS, third]


@pytest.mark.anyio
async def test_the_last_wish_for_a_channel_counts(broker: Broker, make: Make) -> None:
    async with following(make()) as recorder:
        await eventually_async(lambda: recorder.subscriber.is_up)
        for _ in range(10):
            recorder.subscriber.subscribe(ROOM, ROOM)
            recorder.subscriber.unsubscribe(ROOM)
        recorder.subscriber.subscribe(ROOM, ROOM)
        recorder.subscriber.subscribe(NEWS, NEWS)
        await recorder.confirmed(ROOM, NEWS)
        await publish_async(broker, make(), ROOM, 1)
        await publish_async(broker, make(), NEWS, 2)
        await eventually_async(lambda: recorder.data(NEWS))
        assert recorder.data(ROOM) == [1]


@pytest.mark.anyio
async def test_two_subscribers_both_get_everything(broker: Broker, make: Make) -> None:
    async with following(make(), ROOM) as one, following(make(), ROOM) as two:
        for number in range(5):
            await publish_async(broker, make(), ROOM, number)
        await eventually_async(lambda: len(one.publications) == len(two.publications) == 5)
        assert one.data(ROOM) == two.data(ROOM) == [0, 1, 2, 3, 4]


@pytest.mark.anyio
async def test_a_subscriber_is_up_while_it_runs_and_not_after(make: Make) -> None:
    async with following(make(probe_interval=20 * MS)) as recorder:
        await eventually_async(lambda: recorder.subscriber.is_up)
    assert not recorder.subscriber.is_up


# Choosing.


@pytest.mark.parametrize(
    "url", ["", "nowhere", "http://127.0.0.1", "redis+cluster://h:1", "redis+other://h:1", "redis:/h", "Redis://h"]
)
def test_a_url_that_names_no_broker_is_refused(url: str) -> None:
    settings = Settings.build(url, environ={})
    for choose in (open_broker, open_async_broker):
        with pytest.raises(SettingsError, match=r"url|not there yet"):
            choose(settings)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame@h:port/0",
        "redis://:sesame#x@h:1/0",
        "redis://:sesame@[h/0",
        "redis://h:99999/0?password=sesame",
        "redis://h:1/0?socket_timeout=soon",
        "redis://h:1/0?nonsense=1",
    ],
)
def test_a_malformed_url_is_refused_when_the_broker_is_built_without_its_secrets(url: str) -> None:
    settings = Settings.build(url, environ={})
    for choose in (open_broker, open_async_broker):
        with pytest.raises(SettingsError) as caught:
            choose(settings)
        assert "sesame" not in str(caught.value)
