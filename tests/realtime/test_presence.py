"""What a process tells its connections about who is there, when the broker and the network do what they can."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from pubsub_mw.broker.interface import Key, Listener
from pubsub_mw.broker.memory import AsyncMemoryBroker, MemoryBroker, MemorySubscriber
from pubsub_mw.broker.presence import Change, Notice, PresenceCall, Present, Verb
from pubsub_mw.errors import BrokerUnavailable, ErrorCode, FrameError
from pubsub_mw.model import Channel, ConnectionId
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.presence import Presence
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.settings import Settings
from tests.tools.clock import eventually_async

pytestmark = pytest.mark.anyio

ROOM = Channel("presence-room")


class LossySubscriber(MemorySubscriber[Key]):
    """A pub/sub link that a test makes lose notices or commands, or hold notices back."""

    is_losing = False
    is_deaf = False
    held: list[tuple[str, Notice]] | None = None

    def subscribe(self, channel: Channel, key: Key) -> None:
        if not self.is_deaf:
            super().subscribe(channel, key)

    def offer(self, channel: str, item: bytes | Notice) -> None:
        if isinstance(item, Notice) and self.held is not None:
            self.held.append((channel, item))
        elif isinstance(item, bytes) or not self.is_losing:
            super().offer(channel, item)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for channel, notice in held:
            super().offer(channel, notice)


class WeakBroker(AsyncMemoryBroker):
    """A broker that fails, waits or forgets when a test says so."""

    def __init__(self, engine: MemoryBroker) -> None:
        super().__init__(engine)
        self.engine = engine
        self.link: LossySubscriber[Any] | None = None
        self.is_down = False
        self.loses_answers = False
        self.waiting = 0  # answers that may not go yet
        self.may_ask = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_ask.set()
        self.may_answer.set()

    async def presence(self, calls: Sequence[PresenceCall]) -> list[Present | Exception]:
        await self.may_ask.wait()
        if self.is_down:
            raise BrokerUnavailable("as the test wants")
        answers = await super().presence(calls)
        self.waiting += 1
        await self.may_answer.wait()
        self.waiting -= 1
        if self.loses_answers:
            raise BrokerUnavailable("as the test wants")
        return answers

    def subscriber(self, listener: Listener[Key]) -> LossySubscriber[Key]:
        self.engine.expect_endpoint()
        self.link = link = LossySubscriber(self.engine, listener)
        return link


class Client:
    """One connection's subscription, and what it was told.

    Attributes:
        members: user -> info, as `subscribed` and the frames after it tell; None before
        frames: all of them but those on publications
    """

    def __init__(self, server: "Server", name: str, user: str, info: object = None) -> None:
        self.server = server
        self.user = user
        self.queue = SendQueue(1 << 20, 1 << 18)
        self.subscription = Subscription(ROOM, ConnectionId(name), self.queue, None)
        self.members: dict[str, object] | None = None
        self.frames: list[dict[str, Any]] = []
        server.presence.enter(self.subscription, user, info)

    def read(self) -> "Client":
        for frame in map(orjson.loads, self.queue.take_nowait()):
            self.frames.append(frame)
            if frame["type"] == "subscribed":
                self.members = {member["user"]: member["info"] for member in frame["members"]}
            elif frame["type"] in ("join", "leave"):
                assert self.members is not None, "told of a change before `subscribed`"
                assert (frame["member"]["user"] in self.members) is (frame["type"] == "leave"), "told twice"
                if frame["type"] == "join":
                    self.members[frame["member"]["user"]] = frame["member"]["info"]
                else:
                    del self.members[frame["member"]["user"]]
        return self

    @property
    def changes(self) -> list[tuple[str, str]]:
        return [(f["type"], f["member"]["user"]) for f in self.read().frames if f["type"] in ("join", "leave")]

    def leave(self, after: float = 0.0) -> None:
        self.server.presence.leave(self.subscription, after=after)
        self.server.hub.unsubscribe(self.subscription)

    async def sees(self, *users: str) -> None:
        await eventually_async(lambda: set(self.read().members or ()) == set(users))


class Server:
    """One process."""

    def __init__(self, engine: MemoryBroker, settings: Settings) -> None:
        self.broker = WeakBroker(engine)
        self.hub = Hub(self.broker, settings)
        self.presence = Presence(self.broker, self.hub, settings)

    @property
    def link(self) -> LossySubscriber[Any]:
        assert self.broker.link is not None
        return self.broker.link

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        tasks = [asyncio.create_task(self.hub.run()), asyncio.create_task(self.presence.run())]
        try:
            yield self
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[tuple[Server, Server, Callable[[], set[str]]]]:
    """Two servers on one broker, and who is there."""
    built = Settings.build("memory://", environ={}, **settings)
    engine = MemoryBroker(built)
    async with Server(engine, built).running() as here, Server(engine, built).running() as there:
        yield here, there, lambda: set(engine.presence(ROOM))


async def test_subscribed_tells_who_is_there_oneself_included() -> None:
    async with world() as (here, there, _):
        ann = Client(here, "c1", "ann", {"name": "Ann"})
        await ann.sees("ann")
        bob = Client(there, "c2", "bob")
        await bob.sees("ann", "bob")
        assert bob.members == {"ann": {"name": "Ann"}, "bob": None}
        assert bob.changes == []


async def test_who_comes_and_goes_is_told_once_on_every_server() -> None:
    async with world() as (here, there, _):
        ann, eve = Client(here, "c1", "ann"), Client(there, "c2", "eve")
        await ann.sees("ann", "eve")
        await eve.sees("ann", "eve")
        before = len(ann.changes), len(eve.changes)
        bob, tab = Client(here, "c3", "bob", 1), Client(there, "c4", "bob", 1)
        await ann.sees("ann", "eve", "bob")
        await eve.sees("ann", "eve", "bob")
        await tab.sees("ann", "eve", "bob")
        bob.leave()
        zoe = Client(here, "c5", "zoe")  # told after whatever bob's first leave would have brought
        await ann.sees("ann", "eve", "bob", "zoe")
        tab.leave()
        await ann.sees("ann", "eve", "zoe")
        await eve.sees("ann", "eve", "zoe")
        await zoe.sees("ann", "eve", "zoe")
        expected = [("join", "bob"), ("join", "zoe"), ("leave", "bob")]
        assert ann.changes[before[0] :] == eve.changes[before[1] :] == expected
        assert ann.frames[-1] == {"type": "leave", "channel": ROOM, "member": {"user": "bob", "info": 1}}


async def test_a_second_tab_of_ones_own_is_no_news() -> None:
    async with world() as (here, there, _):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        tabs = [Client(server, f"tab{index}", "ann") for index, server in enumerate((here, there))]
        for tab in tabs:
            await tab.sees("ann")
            tab.leave()
        bob = Client(there, "c2", "bob")
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")
        assert ann.changes == [("join", "bob")]


async def test_a_lost_notice_shows_with_the_next_one() -> None:
    async with world(presence_ttl=3600) as (here, there, _):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        here.link.is_losing = True
        bob, eve = Client(there, "c2", "bob"), Client(there, "c3", "eve")
        await bob.sees("ann", "bob", "eve")
        eve.leave()
        await bob.sees("ann", "bob")
        assert ann.changes == []
        here.link.is_losing = False
        Client(there, "c4", "zoe")
        await ann.sees("ann", "bob", "zoe")
        assert sorted(ann.changes) == [("join", "bob"), ("join", "zoe")]


async def test_a_lost_notice_shows_when_leases_are_renewed() -> None:
    async with world(presence_ttl=0.3) as (here, there, _):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        here.link.is_losing = True
        bob = Client(there, "c2", "bob")
        await bob.sees("ann", "bob")
        await ann.sees("ann", "bob")
        bob.leave()
        await ann.sees("ann")


async def test_what_changed_while_the_link_was_lost_shows_when_it_is_back() -> None:
    async with world(presence_ttl=3600) as (here, there, _):
        ann, eve = Client(here, "c1", "ann"), Client(there, "c2", "eve")
        await ann.sees("ann", "eve")
        await eve.sees("ann", "eve")
        here.link.is_losing = True
        bob = Client(there, "c3", "bob")
        eve.leave()
        await bob.sees("ann", "bob")
        here.link.relink()
        await ann.sees("ann", "bob")


async def test_everybody_is_back_after_the_broker_lost_its_data() -> None:
    async with world(presence_ttl=3600) as (here, there, users):
        ann, bob = Client(here, "c1", "ann"), Client(there, "c2", "bob")
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")
        here.broker.engine.lose()
        await eventually_async(lambda: users() == {"ann", "bob"})
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")


async def test_an_answer_that_notices_overtook_does_not_undo_them() -> None:
    async with world(presence_ttl=3600) as (here, there, users):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        here.link.held = []
        here.broker.may_answer.clear()
        bob = Client(there, "c2", "bob")
        await bob.sees("ann", "bob")
        tab = Client(here, "c3", "ann")  # what is known here is behind, so all users are told: bob among them
        await eventually_async(lambda: here.broker.waiting)
        bob.leave()
        await eventually_async(lambda: users() == {"ann"})
        here.link.release()
        await eventually_async(lambda: ann.changes == [("join", "bob"), ("leave", "bob")])
        here.broker.may_answer.set()
        await tab.sees("ann")
        assert ann.changes == [("join", "bob"), ("leave", "bob")]
        assert tab.changes == []


async def test_a_broker_that_went_back_to_an_older_state_is_read_anew_when_the_link_is() -> None:
    async with world(presence_ttl=3600) as (here, _, users):

        def enter(user: str) -> None:
            change = Change(verb=Verb.ENTER, connection=ConnectionId(user), nonce="n", user=user, info=b"null")
            engine.change_presence(PresenceCall(channel=ROOM, changes=(change,)))

        engine = here.broker.engine
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        older = copy.deepcopy(engine._rosters)
        enter("bob")
        await ann.sees("ann", "bob")
        engine._rosters = older
        here.link.is_losing = True
        enter("eve")  # under bob's number
        here.link.relink()
        await ann.sees("ann", "eve")
        assert users() == {"ann", "eve"}


async def test_a_server_that_dies_is_noticed_by_another_one() -> None:
    async with world(presence_ttl=0.3) as (here, there, users):
        ann, bob = Client(here, "c1", "ann"), Client(there, "c2", "bob")
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")
        there.broker.may_ask.clear()  # nothing comes from there any more
        await ann.sees("ann")
        assert users() == {"ann"}
        there.broker.may_ask.set()  # it was only paused
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")


async def test_who_comes_back_within_the_grace_on_another_server_has_not_been_away() -> None:
    async with world(presence_ttl=3600) as (here, there, _):
        eve, ann, bob = Client(here, "c1", "eve"), Client(here, "c2", "ann"), Client(here, "c3", "bob")
        await eve.sees("eve", "ann", "bob")
        told = len(eve.changes)
        ann.leave(after=0.2)
        bob.leave(after=0.2)
        again = Client(there, "c2", "ann")
        await again.sees("eve", "ann", "bob")
        await eve.sees("eve", "ann")  # bob's grace began after ann's
        assert eve.changes[told:] == [("leave", "bob")]


async def test_a_server_alone_lets_its_last_user_go_after_the_grace() -> None:
    async with world(presence_ttl=3600) as (here, _, users):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        ann.leave(after=0.1)
        await eventually_async(lambda: users() == set())


async def test_a_client_is_told_when_the_broker_does_not_answer_and_is_not_there() -> None:
    async with world(presence_ttl=3600) as (here, _, users):
        here.broker.loses_answers = True
        ann = Client(here, "c1", "ann")
        await eventually_async(lambda: ann.read().frames)
        assert [(frame["type"], frame["code"]) for frame in ann.frames] == [("error", ErrorCode.UNAVAILABLE)]
        assert not ann.subscription.is_open
        here.broker.loses_answers = False
        await eventually_async(lambda: users() == set())
        again = Client(here, "c1", "ann")
        await again.sees("ann")
        assert here.hub.channel_count == 1


async def test_a_lease_outlives_a_broker_that_is_away_for_less() -> None:
    async with world(presence_ttl=1.5) as (here, there, _):
        ann, bob = Client(here, "c1", "ann"), Client(there, "c2", "bob")
        await ann.sees("ann", "bob")
        await bob.sees("ann", "bob")
        told = len(ann.changes)
        here.broker.is_down = True
        eve = Client(here, "c3", "eve")
        await eventually_async(lambda: eve.read().frames)
        here.broker.is_down = False
        zoe = Client(there, "c4", "zoe")
        await zoe.sees("ann", "bob", "zoe")
        await ann.sees("ann", "bob", "zoe")
        assert ann.changes[told:] == [("join", "zoe")]


async def test_who_unsubscribes_before_being_entered_never_begins() -> None:
    async with world() as (here, there, users):
        bob = Client(there, "c2", "bob")
        await bob.sees("bob")
        here.broker.may_answer.clear()
        ann = Client(here, "c1", "ann")
        await bob.sees("ann", "bob")
        ann.leave()
        here.broker.may_answer.set()
        await bob.sees("bob")
        assert ann.read().frames == []
        assert users() == {"bob"}
        assert here.hub.channel_count == 0


async def test_who_the_hub_refuses_is_gone_at_once() -> None:
    async with world(broker_timeout=0.8, presence_ttl=3600) as (here, there, _):
        bob = Client(there, "c2", "bob")
        await bob.sees("bob")
        here.link.is_deaf = True
        ann = Client(here, "c1", "ann")
        await bob.sees("ann", "bob")
        await bob.sees("bob")
        assert [frame.get("code") for frame in ann.read().frames] == [ErrorCode.UNAVAILABLE]


async def test_a_full_channel_refuses_a_further_user() -> None:
    async with world(presence_size=1) as (here, there, users):
        ann = Client(here, "c1", "ann")
        await ann.sees("ann")
        bob = Client(there, "c2", "bob")
        await eventually_async(lambda: bob.read().frames)
        assert [(frame["type"], frame["code"]) for frame in bob.frames] == [("error", ErrorCode.BUSY)]
        assert users() == {"ann"}
        tab = Client(there, "c3", "ann")
        await tab.sees("ann")


async def test_info_that_is_too_large_is_refused() -> None:
    async with world(max_info_bytes=10) as (here, _, users):
        with pytest.raises(FrameError) as caught:
            Client(here, "c1", "ann", "x" * 9)
        assert caught.value.code is ErrorCode.TOO_LARGE
        ann = Client(here, "c1", "ann", "x" * 8)
        await ann.sees("ann")
        assert users() == {"ann"}


async def test_many_come_and_go_and_everybody_knows_in_the_end() -> None:
    async with world(presence_ttl=0.6) as (here, there, users):
        servers = (here, there)
        clients = [Client(servers[index % 2], f"c{index}", f"u{index // 3}") for index in range(600)]
        for index, client in enumerate(clients):
            here.link.is_losing = index % 7 == 0
            if index % 2:
                client.leave(after=0.1 if index % 5 else 0.0)
            if index % 50 == 0:
                await asyncio.sleep(0)
        here.link.is_losing = False
        left = {client.user for index, client in enumerate(clients) if index % 2 == 0}
        await eventually_async(lambda: users() == left)
        for index in (0, 2, 596, 598):
            await clients[index].sees(*left)
