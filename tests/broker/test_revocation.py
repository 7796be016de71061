"""What the broker remembers of what was revoked. Every test runs against each engine."""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator

import orjson
import pytest
import redis

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.errors import ChannelError, PublishError
from pubsub_mw.model import CONTROL_CHANNEL
from pubsub_mw.publisher import AsyncPublisher, Publisher
from pubsub_mw.settings import Settings
from tests.broker.follow import following
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer

Make = Callable[..., Settings]


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest, prefix: str) -> Make:
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    return lambda **overrides: Settings.build(url, environ={}, prefix=prefix, **overrides)


@pytest.fixture
def publisher(make: Make) -> Iterator[Publisher]:
    publisher = Publisher(**make().overrides())
    yield publisher
    publisher.close()


def revoked(settings: Settings, *identities: str) -> list[dict[str, float]]:
    async def look_up() -> list[dict[str, float]]:
        broker = open_async_broker(settings)
        try:
            return await broker.revoked(identities)
        finally:
            await broker.close()

    return asyncio.run(look_up())


def test_nothing_is_revoked_of_whom_nobody_named(make: Make) -> None:
    assert revoked(make(), "user:7", "connection:c") == [{}, {}]


def test_revocations_are_kept_with_their_time_and_each_under_its_own_identity(publisher: Publisher, make: Make) -> None:
    before = time.time()
    publisher.disconnect(user="7")
    publisher.unsubscribe("private-a", user="7")
    publisher.unsubscribe("private-b", connection="7")
    user, connection, other = revoked(make(), "user:7", "connection:7", "user:77")
    assert set(user) == {"*", "private-a"}
    assert set(connection) == {"private-b"}
    assert other == {}
    assert before <= user["*"] < user["private-a"] < connection["private-b"] <= time.time()


def test_a_later_revocation_takes_the_place_of_an_earlier_one(publisher: Publisher, make: Make) -> None:
    publisher.disconnect(user="7")
    (first,) = revoked(make(), "user:7")
    publisher.disconnect(user="7")
    (second,) = revoked(make(), "user:7")
    assert second["*"] > first["*"]


@pytest.mark.anyio
async def test_revocations_are_told_to_who_follows_the_control_channel(publisher: Publisher, make: Make) -> None:
    async with following(make(), CONTROL_CHANNEL) as recorder:
        await asyncio.to_thread(publisher.disconnect, user="7")
        await asyncio.to_thread(publisher.unsubscribe, "private-a", connection="c")
        await eventually_async(lambda: len(recorder.publications) == 2)
    news = [orjson.loads(item.frame) for _, item in recorder.publications]
    assert [(item["identity"], item["subject"]) for item in news] == [("user:7", "*"), ("connection:c", "private-a")]
    kept = revoked_in_thread = await asyncio.to_thread(revoked, make(), "user:7", "connection:c")
    assert [item["at"] for item in news] == [kept[0]["*"], revoked_in_thread[1]["private-a"]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, TypeError),
        ({"user": "7", "connection": "c"}, TypeError),
        ({"user": ""}, ChannelError),
        ({"user": "a b"}, ChannelError),
        ({"user": "7*"}, ChannelError),
        ({"connection": "c}:m"}, ChannelError),
        ({"connection": "\r\n"}, ChannelError),
    ],
)
def test_who_is_named_badly_is_not_revoked(publisher: Publisher, arguments: dict[str, str], error: type) -> None:
    with pytest.raises(error):
        publisher.disconnect(**arguments)
    with pytest.raises(error):
        publisher.unsubscribe("room", **arguments)


@pytest.mark.parametrize("channel", ["#user-7", "#connection-c", "#control", "a b", ""])
def test_a_subscription_to_an_own_or_impossible_channel_cannot_be_ended(publisher: Publisher, channel: str) -> None:
    with pytest.raises(ChannelError):
        publisher.unsubscribe(channel, user="7")


def test_redis_forgets_a_revocation_after_revocation_ttl(redis_server: RedisServer, prefix: str) -> None:
    publisher = Publisher(redis_server.url, prefix=prefix, revocation_ttl=60)
    publisher.disconnect(user="7")
    assert 55_000 < redis_server.cli("PTTL", f"{prefix}:revoked:user:7") <= 60_000
    publisher.close()


def test_memory_forgets_a_revocation_after_revocation_ttl(prefix: str) -> None:
    publisher = Publisher("memory://", prefix=prefix, revocation_ttl=1)
    publisher.disconnect(user="old")
    until = time.time() + 1.1
    while time.time() < until or revoked(publisher.settings, "user:old") != [{}]:
        publisher.many([("room", None)] * 200)
        assert time.time() < until + 10, "it was never swept"
    publisher.close()


def test_a_revocation_that_redis_does_not_confirm_raises(prefix: str) -> None:
    publisher = Publisher(f"redis://127.0.0.1:{free_port()}/0", prefix=prefix, publish_timeout=500 * MS)
    with pytest.raises(PublishError):
        publisher.disconnect(user="7")


def test_a_revocation_that_fails_half_way_raises_and_is_good_when_repeated(own_redis: RedisServer, prefix: str) -> None:
    publisher = Publisher(own_redis.url, prefix=prefix)
    own_redis.cli("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(PublishError):
        publisher.disconnect(user="7")
    own_redis.cli("CONFIG", "SET", "maxmemory", "0")
    publisher.disconnect(user="7")
    with redis.Redis(port=own_redis.port) as client:
        assert client.hexists(f"{prefix}:revoked:user:7", "*")
    publisher.close()


def test_an_async_publisher_ends_the_same(make: Make) -> None:
    settings = make()

    async def end() -> None:
        publisher = AsyncPublisher(**settings.overrides())
        await publisher.disconnect(user="7")
        await publisher.unsubscribe("room", connection="c1")
        with pytest.raises(TypeError, match="either user= or connection="):
            await publisher.disconnect()
        with pytest.raises(ChannelError):
            await publisher.unsubscribe("#user-7", user="7")
        await publisher.close()

    before = time.time()
    asyncio.run(end())
    users, connections = revoked(settings, "user:7", "connection:c1")
    assert users.keys() == {"*"}
    assert connections.keys() == {"room"}
    assert before <= users["*"] <= time.time()


def test_an_async_publisher_says_that_nothing_was_ended_where_the_broker_is_away() -> None:
    async def end() -> None:
        publisher = AsyncPublisher(f"redis://127.0.0.1:{free_port()}/0", publish_timeout=0.2, broker_timeout=0.2)
        with pytest.raises(PublishError):
            await publisher.disconnect(user="7")
        await publisher.close()

    asyncio.run(end())


def test_an_async_publisher_has_all_that_a_publisher_has() -> None:
    def offered(publisher: type) -> dict[str, list[str]]:
        methods = {name: getattr(publisher, name) for name in vars(publisher) if not name.startswith("_")}
        return {name: list(inspect.signature(method).parameters) for name, method in methods.items()}

    assert offered(AsyncPublisher) == offered(Publisher)
