"""Who is there, over tabs, servers and their ends: processes of a deployment on one Redis."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pubsub_mw.publisher import Publisher
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served
from tests.tools.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

ROOM = "presence-room:1"
SECRET = "the secret of these tests, long enough"
TTL = 1500 * MS
"""Of a server that is killed; elsewhere none runs out, however slow the machine is."""
GRACE = 1_200 * MS


class Site:
    """Servers on one Redis, and an application that makes grants."""

    def __init__(
        self,
        processes: Processes,
        redis: RedisServer,
        prefix: str,
        connect: Callable[..., Awaitable[RawClient]],
        **settings: object,
    ) -> None:
        self.processes = processes
        self.connect = connect
        self.url = redis.url
        self.settings = {
            "secret": SECRET,
            "prefix": prefix,
            "presence_ttl": 20_000 * MS,
            "presence_grace": GRACE,
            **settings,
        }
        self.publisher = Publisher(redis.url, **self.settings)

    async def server(self, redis_address: str | None = None) -> Served:
        url = self.url if redis_address is None else f"redis://{redis_address}/0"
        env = {f"PUBSUB_{name.upper()}": str(value) for name, value in self.settings.items()} | {"PUBSUB_URL": url}
        return await asyncio.to_thread(self.processes.uvicorn, env=env)

    async def servers(self, count: int) -> list[Served]:
        return list(await asyncio.gather(*[self.server() for _ in range(count)]))

    def grant(self, user: str | None, info: object = None, channels: tuple[str, ...] = ("presence-*",)) -> str:
        return self.publisher.grant(user=user, channels=channels, info=info)

    async def tab(self, server: Served, user: str, info: object = None, resume: str | None = None) -> "Tab":
        client = await self.connect(f"{server.ws_url}/realtime/")
        hello: dict[str, Any] = {} if resume is None else {"resume": resume}
        connected = await client.hello(grant=self.grant(user, info), channels={ROOM: None}, **hello)
        return Tab(client, connected, await client.recv("subscribed", ROOM))

    async def users(self) -> set[str]:
        return {member["user"] for member in await asyncio.to_thread(self.publisher.presence, ROOM)}


class Tab:
    """A client that is on the channel."""

    def __init__(self, client: RawClient, connected: Frame, subscribed: Frame) -> None:
        self.client = client
        self.connected = connected
        self.members = {member["user"]: member["info"] for member in subscribed["members"]}
        assert len(self.members) == len(subscribed["members"]), "a user was told twice"

    def changes(self) -> list[tuple[str, str]]:
        """Every `join` and `leave` so far."""
        frames = [frame for frame in self.client.received if frame["type"] in ("join", "leave")]
        assert all(frame["channel"] == ROOM for frame in frames)
        return [(frame["type"], frame["member"]["user"]) for frame in frames]

    async def told(self, *changes: tuple[str, str], timeout: float = 10_000 * MS) -> None:
        """Wait until exactly these were told, in this order."""
        try:
            await eventually_async(lambda: len(self.changes()) >= len(changes), timeout)
        finally:
            assert self.changes() == [*changes]


@pytest.fixture
def site(
    processes: Processes,
    redis_server: RedisServer,
    prefix: str,
    raw_client: Callable[..., Awaitable[RawClient]],
) -> Site:
    return Site(processes, redis_server, prefix, raw_client)


async def test_tabs_and_servers_make_one_user(site: Site) -> None:
    here, there = await site.servers(2)
    ann = await site.tab(here, "ann", {"name": "Ann"})
    assert ann.members == {"ann": {"name": "Ann"}}
    bob = await site.tab(there, "bob")
    assert bob.members == {"ann": {"name": "Ann"}, "bob": None}
    await ann.told(("join", "bob"))
    tab = await site.tab(there, "ann", {"name": "Ann"})
    assert tab.members == bob.members
    assert await site.users() == {"ann", "bob"}

    await ann.client.send({"type": "unsubscribe", "channel": ROOM})
    await ann.client.recv("unsubscribed", ROOM)
    eve = await site.tab(here, "eve")
    assert eve.members.keys() == {"ann", "bob", "eve"}
    await bob.told(("join", "eve"))
    await tab.client.send({"type": "unsubscribe", "channel": ROOM})
    for other in (bob, eve):
        leave = await other.client.recv("leave", ROOM)
        assert leave == {"type": "leave", "channel": ROOM, "member": {"user": "ann", "info": {"name": "Ann"}}}
    await bob.told(("join", "eve"), ("leave", "ann"))
    assert await site.users() == {"bob", "eve"}


async def test_users_of_a_killed_server_go_when_its_lease_is_over(site: Site) -> None:
    site.settings["presence_ttl"] = TTL
    here, there = await site.servers(2)
    ann, bob = await site.tab(here, "ann"), await site.tab(there, "bob")
    await ann.told(("join", "bob"))
    both = await site.tab(here, "bob")
    carl = await site.tab(there, "carl")
    await both.told(("join", "carl"))
    there.kill()
    killed_at = time.monotonic()
    await ann.told(("join", "bob"), ("join", "carl"), ("leave", "carl"), timeout=TTL + 8_000 * MS)
    assert time.monotonic() - killed_at < TTL + 8_000 * MS
    assert await site.users() == {"ann", "bob"}
    assert bob.members.keys() == {"ann", "bob"}
    assert carl.client.code == 1006


async def test_users_of_the_only_server_go_when_it_is_killed(site: Site) -> None:
    site.settings["presence_ttl"] = TTL
    (server,) = await site.servers(1)
    await site.tab(server, "ann")
    server.kill()

    async def is_empty() -> bool:
        return await site.users() == set()

    await eventually_async(is_empty, TTL + 8_000 * MS)


async def test_a_quick_reconnect_on_another_server_is_neither_leave_nor_join(site: Site) -> None:
    here, there = await site.servers(2)
    eve, ann, bob = [await site.tab(here, name) for name in ("eve", "ann", "bob")]
    fresh = await site.tab(here, "zoe")
    await eve.told(("join", "ann"), ("join", "bob"), ("join", "zoe"))
    for tab in (ann, fresh):
        tab.client.abort()
    resumed = await site.tab(there, "ann", resume=ann.connected["resume"])
    assert resumed.connected["connection"] == ann.connected["connection"]
    assert resumed.members.keys() == {"eve", "ann", "bob", "zoe"}
    again = await site.tab(there, "zoe")  # a new connection of the same user, as after a reload
    bob.client.abort()
    dropped_at = time.monotonic()
    # Their grace was over before his.
    await eve.told(("join", "ann"), ("join", "bob"), ("join", "zoe"), ("leave", "bob"))
    assert time.monotonic() - dropped_at > GRACE * 0.9
    assert resumed.changes() == again.changes() == [("leave", "bob")]


async def test_users_stay_when_their_server_is_killed_and_they_come_back_in_time(site: Site) -> None:
    site.settings["presence_ttl"] = 2 * TTL
    here, there = await site.servers(2)
    eve, ann, bob = [await site.tab(server, name) for server, name in ((there, "eve"), (here, "ann"), (here, "bob"))]
    await eve.told(("join", "ann"), ("join", "bob"))
    here.kill()
    resumed = await site.tab(there, "ann", resume=ann.connected["resume"])
    await eve.told(("join", "ann"), ("join", "bob"), ("leave", "bob"), timeout=TTL + 8_000 * MS)
    assert resumed.changes() == [("leave", "bob")]
    assert bob.members.keys() == {"eve", "ann", "bob"}


@pytest.mark.parametrize("loss", ["cut", "blackhole"])
async def test_what_a_lost_link_to_redis_kept_back_is_told_when_it_is_back(
    site: Site, tcp_proxy: Callable[[int], TcpProxy], redis_server: RedisServer, loss: str
) -> None:
    # Not the lease but the link is what this is about, so the lease outlives it.
    site.settings |= {"presence_ttl": 30.0, "probe_interval": 0.2, "probe_timeout": 0.6, "broker_timeout": 0.5}
    proxy = tcp_proxy(redis_server.port)
    here, there = await asyncio.gather(site.server(proxy.address), site.server())
    ann, bob = await site.tab(here, "ann"), await site.tab(there, "bob")
    await ann.told(("join", "bob"))
    if loss == "cut":
        proxy.refuse()
        proxy.reset()
    else:
        proxy.blackhole()
    carl = await site.tab(there, "carl")
    await bob.client.send({"type": "unsubscribe", "channel": ROOM})
    await carl.told(("leave", "bob"))
    assert carl.members.keys() == {"ann", "bob", "carl"}
    assert ann.changes() == [("join", "bob")]
    proxy.pass_through()
    proxy.accept()
    await eventually_async(lambda: set(ann.changes()[1:]) == {("leave", "bob"), ("join", "carl")}, 10_000 * MS)
    late = await site.tab(here, "late")
    assert late.members.keys() == {"ann", "carl", "late"}
    await carl.told(("leave", "bob"), ("join", "late"))


async def test_everybody_is_found_again_after_redis_lost_its_data(
    processes: Processes,
    own_redis: RedisServer,
    prefix: str,
    raw_client: Callable[..., Awaitable[RawClient]],
) -> None:
    site = Site(processes, own_redis, prefix, raw_client)
    here, there = await site.servers(2)
    ann, bob = await site.tab(here, "ann"), await site.tab(there, "bob")
    await asyncio.to_thread(own_redis.restart)

    async def are_back() -> bool:
        return await site.users() == {"ann", "bob"}

    await eventually_async(are_back, 10_000 * MS)
    eve = await site.tab(here, "eve")
    await eventually_async(lambda: bob.changes()[-1:] == [("join", "eve")])
    assert eve.members.keys() == {"ann", "bob", "eve"}
    for tab in (ann, bob):
        present = dict(tab.members)
        for kind, user in tab.changes():
            assert (user in present) is (kind == "leave")
            if kind == "join":
                present[user] = None
            else:
                del present[user]
        assert present.keys() == {"ann", "bob", "eve"}


async def test_whom_the_application_sends_away_is_gone_at_once(site: Site) -> None:
    site.settings["presence_grace"] = 60.0
    here, there = await site.servers(2)
    ann, bob, eve = [await site.tab(server, name) for server, name in ((here, "ann"), (there, "bob"), (there, "eve"))]
    await ann.told(("join", "bob"), ("join", "eve"))
    await asyncio.to_thread(lambda: site.publisher.disconnect(user="bob"))
    await ann.told(("join", "bob"), ("join", "eve"), ("leave", "bob"))
    await asyncio.to_thread(lambda: site.publisher.unsubscribe(ROOM, user="eve"))
    await ann.told(("join", "bob"), ("join", "eve"), ("leave", "bob"), ("leave", "eve"))
    assert (await eve.client.recv("unsubscribed", ROOM))["code"] == "revoked"
    assert (await bob.client.closed())[0] == 3503


async def test_nobody_can_pass_for_somebody_else(site: Site) -> None:
    (server,) = await site.servers(1)
    ann = await site.tab(server, "ann")

    async def refused(text: str, grant: str | None) -> None:
        client = await site.connect(f"{server.ws_url}/realtime/")
        hello: dict[str, Any] = {} if grant is None else {"grant": grant}
        await client.hello(**hello, user="ann", info={"name": "Ann"})
        await client.send({"type": "subscribe", "channel": ROOM, "user": "bob", "info": 1, "member": {"user": "bob"}})
        error = await client.recv("error", ROOM)
        assert error["code"] == "forbidden"
        assert text in error["message"]

    await refused("no grant", None)
    await refused("no grant", site.grant("eve", channels=("presence-other", "private-*", "room:*")))
    await refused("a presence channel needs a user", site.grant(None))

    eve = await site.connect(f"{server.ws_url}/realtime/")
    grant = site.publisher.grant(user="eve", channels=[ROOM], publish=["presence-*"], info={"name": "Eve"})
    await eve.hello(grant=grant, user="ann")
    await eve.send({"type": "subscribe", "channel": ROOM, "user": "bob", "info": 1, "members": [{"user": "bob"}]})
    subscribed = await eve.recv("subscribed", ROOM)
    told: list[dict[str, Any]] = sorted(subscribed["members"], key=lambda member: str(member["user"]))
    assert told == [{"user": "ann", "info": None}, {"user": "eve", "info": {"name": "Eve"}}]
    forged: list[Frame] = [
        {"type": "join", "channel": ROOM, "member": {"user": "bob", "info": None}},
        {"type": "leave", "channel": ROOM, "member": {"user": "ann", "info": None}},
        {"type": "grant", "grant": site.grant("ann")},
    ]
    for frame in forged:
        await eve.send(frame)
        assert (await eve.recv("error"))["code"] in ("unknown_type", "grant_invalid")
    for data in ("!e 1 + bob\nnull", {"type": "join", "member": {"user": "bob"}}):
        await eve.send({"type": "publish", "channel": ROOM, "event": "join", "data": data})
    for _ in range(2):
        message = await ann.client.recv("message", ROOM)
        assert (message["type"], message["event"]) == ("message", "join")
    await ann.told(("join", "eve"))
    assert await site.users() == {"ann", "eve"}
