"""Who is on a channel, as the broker knows it. Every test runs against each engine, unless it says otherwise."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.broker.presence import Change, Notice, PresenceCall, Present, Roster, Verb, decode_notice
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.errors import BrokerUnavailable, ChannelError
from pubsub_mw.model import Channel, ConnectionId
from pubsub_mw.publisher import AsyncPublisher, Publisher
from pubsub_mw.settings import Settings
from tests.broker.follow import following
from tests.tools.clock import eventually_async
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]

ROOM = Channel("presence-room:1")
OTHER = Channel("presence-room:2")


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest, prefix: str) -> Make:
    """Make settings of an engine, all of whose brokers in one test meet."""
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
        open_broker(Settings.build(url, environ={})).close()  # loads the engine before there is an event loop
    return lambda **overrides: Settings.build(url, environ={}, prefix=prefix, **overrides)


@pytest.fixture
def make_on_redis(redis_server: RedisServer, prefix: str) -> Make:
    return lambda **overrides: Settings.build(redis_server.url, environ={}, prefix=prefix, **overrides)


def enter(connection: str, user: str, nonce: str = "n", info: bytes = b"null") -> Change:
    return Change(verb=Verb.ENTER, connection=ConnectionId(connection), nonce=nonce, user=user, info=info)


def stay(connection: str, user: str, nonce: str = "n", info: bytes = b"null") -> Change:
    return Change(verb=Verb.STAY, connection=ConnectionId(connection), nonce=nonce, user=user, info=info)


def leave(connection: str, user: str, nonce: str = "n", after: float = 0.0) -> Change:
    return Change(
        verb=Verb.LEAVE, connection=ConnectionId(connection), nonce=nonce, user=user, info=b"null", after=after
    )


class Caller:
    """One realtime server's calls, which always ask for all users unless told what is known."""

    def __init__(self, broker: AsyncBroker) -> None:
        self.broker = broker

    async def say(self, *changes: Change, known: Present | None = None, channel: Channel = ROOM) -> Present:
        epoch, number = (known.epoch, known.number) if known is not None else ("", 0)
        (present,) = await self.broker.presence(
            [PresenceCall(channel=channel, epoch=epoch, number=number, changes=changes)]
        )
        assert isinstance(present, Present), present
        return present

    async def users(self, channel: Channel = ROOM) -> dict[str, bytes]:
        present = await self.say(channel=channel)
        assert present.users is not None
        return dict(present.users)


@asynccontextmanager
async def calling(settings: Settings) -> AsyncIterator[Caller]:
    broker = open_async_broker(settings)
    try:
        yield Caller(broker)
    finally:
        await broker.close()


async def test_nobody_is_on_a_channel_that_nobody_entered(make: Make) -> None:
    async with calling(make()) as caller:
        assert await caller.users() == {}


async def test_a_user_is_there_once_over_all_connections(make: Make) -> None:
    async with calling(make()) as caller:
        await caller.say(enter("c1", "ann", info=b'{"name":"Ann"}'), enter("c2", "ann", info=b'{"name":"Ann"}'))
        await caller.say(enter("c3", "bob"))
        assert await caller.users() == {"ann": b'{"name":"Ann"}', "bob": b"null"}
        assert await caller.users(OTHER) == {}


async def test_a_user_comes_with_the_first_connection_and_goes_with_the_last(make: Make) -> None:
    async with calling(make()) as caller, following(make(), ROOM) as recorder:
        await caller.say(enter("c1", "ann", info=b"1"), enter("c2", "ann", info=b"1"))
        await caller.say(leave("c1", "ann"))
        assert await caller.users() == {"ann": b"1"}
        present = await caller.say(leave("c2", "ann"))
        assert present.users == {}
        await eventually_async(lambda: len(recorder.notices) == 2)
        epoch = recorder.notices[0][1].epoch
        assert recorder.notices == [
            (ROOM, Notice(epoch, 1, True, "ann", b"1")),
            (ROOM, Notice(epoch, 2, False, "ann", b"1")),
        ]
        assert not recorder.publications


async def test_who_knows_what_was_before_is_answered_with_the_notices_alone(make: Make) -> None:
    async with calling(make()) as caller, following(make(), ROOM) as recorder:
        first = await caller.say(enter("c1", "ann"))
        second = await caller.say(enter("c2", "bob"), enter("c3", "bob"), known=first)
        assert second.users is None
        assert second.notices == (Notice(first.epoch, first.number + 1, True, "bob", b"null"),)
        assert (second.epoch, second.number) == (first.epoch, first.number + 1)
        nothing = await caller.say(known=second)
        assert (nothing.users, nothing.notices) == (None, ())
        behind = await caller.say(known=first)
        assert (behind.users, behind.notices) == ({"ann": b"null", "bob": b"null"}, ())
        await eventually_async(lambda: [notice.user for _, notice in recorder.notices] == ["ann", "bob"])


async def test_a_channel_that_emptied_begins_a_new_epoch(make: Make) -> None:
    async with calling(make()) as caller:
        first = await caller.say(enter("c1", "ann"))
        await caller.say(leave("c1", "ann"))
        second = await caller.say(enter("c1", "ann"), known=first)
        assert second.epoch != first.epoch
        assert second.users == {"ann": b"null"}


async def test_a_connection_that_was_entered_elsewhere_is_left_alone_by_who_had_it_before(make: Make) -> None:
    async with calling(make()) as old, calling(make()) as new, following(make(), ROOM) as recorder:
        await old.say(enter("c1", "ann", nonce="old"))
        await new.say(enter("c1", "ann", nonce="new"))
        await old.say(stay("c1", "ann", nonce="old"))
        present = await old.say(leave("c1", "ann", nonce="old"))
        assert present.users == {"ann": b"null"}
        assert (await new.say(leave("c1", "ann", nonce="new"))).users == {}
        await eventually_async(lambda: [notice.is_join for _, notice in recorder.notices] == [True, False])


async def test_a_connection_that_becomes_another_users_counts_for_that_one(make: Make) -> None:
    async with calling(make()) as caller, following(make(), ROOM) as recorder:
        await caller.say(enter("c1", "ann", nonce="1"), enter("c2", "ann", nonce="2"))
        await caller.say(enter("c1", "bob", nonce="3"))
        assert (await caller.users()).keys() == {"ann", "bob"}
        await caller.say(enter("c2", "bob", nonce="4"))
        assert (await caller.users()).keys() == {"bob"}
        await eventually_async(
            lambda: (
                [(item.is_join, item.user) for _, item in recorder.notices]
                == [(True, "ann"), (True, "bob"), (False, "ann")]
            )
        )


async def test_a_lease_that_is_not_renewed_ends(make: Make) -> None:
    settings = make(presence_ttl=0.8)
    async with calling(settings) as caller, following(settings, ROOM) as recorder:
        known = await caller.say(enter("c1", "dead"), enter("c2", "live"))

        async def is_gone() -> bool:
            nonlocal known
            answer = await caller.say(stay("c2", "live"), known=known)
            assert answer.users is None
            known = answer
            return [notice.user for notice in answer.notices] == ["dead"]

        await eventually_async(is_gone)
        assert (await caller.users()).keys() == {"live"}
        await eventually_async(lambda: len(recorder.notices) == 3)
        assert recorder.notices[2][1] == Notice(known.epoch, known.number, False, "dead", b"null")


async def test_a_lease_is_renewed_even_when_it_was_over_unless_somebody_noticed(make: Make) -> None:
    settings = make(presence_ttl=0.1)
    async with calling(settings) as caller, calling(make(presence_ttl=60)) as witness:
        known = await caller.say(enter("c1", "ann"))
        # Two channels, entered at the same time: when the one is seen to be over, so is the other.
        await caller.say(enter("c1", "ann"), channel=OTHER)

        async def is_over() -> bool:
            return await witness.users(OTHER) == {}

        await eventually_async(is_over)
        present = await caller.say(stay("c1", "ann"), known=known)
        assert (present.users, present.notices) == (None, ())


async def test_a_lease_that_was_lost_is_entered_anew(make: Make) -> None:
    async with calling(make()) as caller:
        present = await caller.say(stay("c1", "ann", info=b"[1]"))
        assert present.users == {"ann": b"[1]"}


async def test_who_leaves_later_stays_if_the_connection_comes_back(make: Make) -> None:
    settings = make(presence_grace=0.8)
    async with calling(settings) as caller, following(settings, ROOM) as recorder:
        await caller.say(enter("c1", "ann", nonce="1"), enter("c2", "bob", nonce="2"))
        await caller.say(leave("c1", "ann", nonce="1", after=0.8))
        await caller.say(leave("c2", "bob", nonce="2", after=0.8))
        assert (await caller.users()).keys() == {"ann", "bob"}
        await caller.say(enter("c1", "ann", nonce="3"))

        async def is_ann_alone() -> bool:
            return (await caller.users()).keys() == {"ann"}

        await eventually_async(is_ann_alone)
        await eventually_async(
            lambda: [(item.is_join, item.user) for _, item in recorder.notices][2:] == [(False, "bob")]
        )


async def test_a_full_channel_takes_no_further_user_but_further_connections(make: Make) -> None:
    async with calling(make(presence_size=2)) as caller:
        assert (await caller.say(enter("c1", "ann"), enter("c2", "bob"))).accepted == (True, True)
        present = await caller.say(enter("c3", "eve"), enter("c4", "bob"), stay("c5", "eve"))
        assert present.accepted == (False, True, False)
        assert present.users is not None
        assert present.users.keys() == {"ann", "bob"}
        present = await caller.say(leave("c1", "ann"))
        assert (await caller.say(enter("c3", "eve"))).accepted == (True,)


async def test_the_newest_entry_of_a_user_says_what_is_shown_and_a_renewal_does_not(make: Make) -> None:
    async with calling(make()) as caller, following(make(), ROOM) as recorder:
        await caller.say(enter("c1", "ann", info=b"1"), enter("c2", "ann", info=b"2"), stay("c1", "ann", info=b"1"))
        assert await caller.users() == {"ann": b"2"}
        await caller.say(enter("c3", "bob"))
        await eventually_async(lambda: [notice.user for _, notice in recorder.notices] == ["ann", "bob"])


async def test_publishers_ask_who_is_there(make: Make) -> None:
    settings = make()
    publisher = Publisher(**settings.overrides())
    other = AsyncPublisher(**settings.overrides())
    async with calling(settings) as caller:
        await caller.say(enter("c1", "7", info=b'{"name":"\xc3\x84nn"}'), enter("c2", "8"))
        expected = [{"user": "7", "info": {"name": "Änn"}}, {"user": "8", "info": None}]
        # From a thread, as a view does.
        for told in (await asyncio.to_thread(publisher.presence, ROOM), await other.presence(ROOM)):
            assert sorted(told, key=lambda member: str(member["user"])) == expected
        assert await asyncio.to_thread(publisher.presence, OTHER) == await other.presence(OTHER) == []
    publisher.close()
    await other.close()


async def test_publishers_ask_about_presence_channels_alone(make: Make) -> None:
    publisher, other = Publisher(**make().overrides()), AsyncPublisher(**make().overrides())
    for name in ("room:1", "private-room", "#user-7", "presence-{x}"):
        with pytest.raises(ChannelError):
            publisher.presence(name)
        with pytest.raises(ChannelError):
            await other.presence(name)


@pytest.mark.parametrize("seed", range(10))
async def test_both_engines_do_the_same_and_notices_tell_it_all(make_on_redis: Make, seed: int) -> None:
    dice = random.Random(seed)
    settings = make_on_redis(presence_size=4, presence_ttl=60)
    roster, known = Roster("e"), Present(epoch="", number=0, accepted=(), notices=(), users=None)
    told: dict[str, bytes] = {}
    async with calling(settings) as caller:
        for _ in range(60):
            changes = tuple(
                Change(
                    verb=dice.choice([*Verb]),
                    connection=ConnectionId(f"c{dice.randrange(6)}"),
                    nonce=f"n{dice.randrange(2)}",
                    user=f"u{dice.randrange(5)}",
                    info=b"%d" % dice.randrange(3),
                )
                for _ in range(dice.randrange(4))
            )
            answer = await caller.say(*changes, known=known)
            if not roster.users:
                roster = Roster("e")
            expected, notices = roster.apply(PresenceCall(channel=ROOM, changes=changes), now=0.0, ttl=60, size=4)
            assert answer.accepted == expected.accepted
            if answer.users is not None:
                told = dict(answer.users)
            else:
                assert {(item.is_join, item.user) for item in answer.notices} == {
                    (item.is_join, item.user) for item in notices
                }
                for notice in answer.notices:
                    told.pop(notice.user, None)
                    told |= {notice.user: notice.info} if notice.is_join else {}
            assert told.keys() == roster.users.keys()
            assert (await caller.users()) == roster.users
            known = answer


async def test_everything_in_redis_expires_when_all_servers_die(
    make_on_redis: Make, redis_server: RedisServer, prefix: str
) -> None:
    async with calling(make_on_redis(presence_ttl=0.1, presence_grace=0.1)) as caller:
        await caller.say(enter("c1", "ann"))
        assert len(redis_server.cli("KEYS", f"{prefix}:*")) == 3
        await eventually_async(lambda: redis_server.cli("KEYS", f"{prefix}:*") == [])


@pytest.mark.parametrize("lost", range(3))
async def test_a_key_that_redis_lost_is_made_anew_by_renewals(
    make_on_redis: Make, redis_server: RedisServer, prefix: str, lost: int
) -> None:
    async with calling(make_on_redis()) as caller:
        await caller.say(enter("c1", "ann"), enter("c2", "ann"), enter("c3", "bob"))
        redis_server.cli("DEL", Keyspace(prefix).presence(ROOM)[lost])
        await caller.say(stay("c1", "ann"), stay("c2", "ann"), stay("c3", "bob"))
        assert (await caller.users()).keys() == {"ann", "bob"}
        assert (await caller.say(leave("c1", "ann"), leave("c2", "ann"), leave("c3", "bob"))).users == {}


async def test_what_is_not_ours_under_a_key_of_ours_is_an_error_of_that_channel_alone(
    make_on_redis: Make, redis_server: RedisServer, prefix: str
) -> None:
    settings = make_on_redis()
    for key in Keyspace(prefix).presence(ROOM):
        redis_server.cli("SET", key, "x")
    broker = open_async_broker(settings)
    wrong, right = await broker.presence([PresenceCall(channel=ROOM), PresenceCall(channel=OTHER)])
    assert isinstance(wrong, BrokerUnavailable)
    assert isinstance(right, Present)
    await broker.close()


async def test_bytes_that_are_no_notice_are_ignored(
    make_on_redis: Make, redis_server: RedisServer, prefix: str
) -> None:
    async with calling(make_on_redis()) as caller, following(make_on_redis(), ROOM) as recorder:
        for payload in (b"!", b"!a b + u\n", b"!e 1 * u\nnull", b"!\xff 1 + u\n1", b"!e 1 + u v\n1"):
            redis_server.cli("PUBLISH", Keyspace(prefix).live(ROOM), payload)
        await caller.say(enter("c1", "ann"))
        await eventually_async(lambda: [notice.user for _, notice in recorder.notices] == ["ann"])
        assert not recorder.publications


def test_a_publication_is_no_notice() -> None:
    with pytest.raises(ValueError, match="not a notice"):
        decode_notice(b"e.1.t 0 + x\n{}")
