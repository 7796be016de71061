"""Through sentinels: the master is found, and found anew, and nobody waits for ever or goes on with an old one."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pubsub_mw.broker.engines import open_async_broker, open_broker
from pubsub_mw.broker.redis.diagnosis import Finding, Level, diagnose
from pubsub_mw.broker.redis.servers import AsyncServers, SyncServers
from pubsub_mw.errors import BrokerUnavailable, PublishError, SettingsError
from pubsub_mw.model import Channel, HistoryPage, Position
from pubsub_mw.publisher import Publisher
from pubsub_mw.settings import Settings
from tests.broker.follow import draft, following
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.ports import free_port
from tests.tools.redis_sentinel import NAME, RedisGroup, SentinelServer, is_following
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

ROOM, NEWS = Channel("room:1"), Channel("news")
TIMEOUT = 1_000 * MS
SOON = 10_000 * MS
"""A failover takes half a second until it is begun, and a second or two until all sentinels know of it."""

Proxy = Callable[[int], TcpProxy]
Pair = tuple[RedisServer, RedisServer]


@pytest.fixture
def group() -> Iterator[RedisGroup]:
    """One to be broken."""
    with RedisGroup() as group:
        yield group


def build(url: str, prefix: str, **overrides: float) -> Settings:
    timing = {"probe_interval": 50 * MS, "publish_timeout": TIMEOUT, "broker_timeout": 2_000 * MS}
    return Settings.build(url, environ={}, prefix=prefix, **{**timing, **overrides})


def through(*ports: int, name: str = NAME, options: str = "") -> str:
    return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{name}/0{options}"


def publisher_of(settings: Settings) -> Publisher:
    return Publisher(**settings.overrides())


def position_at(server: RedisServer, prefix: str) -> Position:
    """Return the position of `ROOM` as that server has it."""
    return Position.parse(server.cli("GET", f"{prefix}:{{{ROOM}}}") or "e.0.0")


# Failovers.


@pytest.mark.parametrize("how", ["killed", "told to", "frozen"])
def test_publishers_raise_in_time_and_succeed_again(how: str, group: RedisGroup, prefix: str) -> None:
    publisher = publisher_of(build(group.url, prefix))
    publisher.publish(ROOM, "before")
    group.wait_for_replica()
    old, new = group.master, group.other
    {"killed": old.kill, "told to": group.failover, "frozen": old.pause}[how]()
    slowest = 0.0

    def is_published() -> bool:
        nonlocal slowest
        began = time.monotonic()
        try:
            publisher.publish(ROOM, "after")
        except PublishError:
            return False
        finally:
            slowest = max(slowest, time.monotonic() - began)
        return position_at(new, prefix).offset > 1

    group.wait_for(new, SOON)
    eventually(is_published, 5_000 * MS)
    assert slowest < 2 * TIMEOUT + 500 * MS
    if how == "told to":
        # The old one takes writes for a while yet, and would have taken ours.
        assert old.cli("ROLE")[0] == "master"
        assert publisher.publish(ROOM, "there") == position_at(new, prefix)
    publisher.close()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["killed", "told to", "frozen"])
async def test_the_link_goes_over_to_the_new_master(how: str, group: RedisGroup, prefix: str) -> None:
    settings = build(group.url, prefix, probe_timeout=TIMEOUT)
    broker = open_async_broker(settings)
    async with following(settings, ROOM, NEWS) as recorder:
        await broker.publish([draft(settings, ROOM, "before")])
        await eventually_async(lambda: recorder.data(ROOM) == ["before"])
        group.wait_for_replica()
        old, new = group.master, group.other
        {"killed": old.kill, "told to": group.failover, "frozen": old.pause}[how]()
        await eventually_async(lambda: group.master is new, SOON)
        live = f"{prefix}:{{{ROOM}}}:p"
        await eventually_async(lambda: bool(new.cli("PUBSUB", "NUMSUB", live)[1]), 5_000 * MS)
        await recorder.confirmed(ROOM, NEWS)
        assert "lost" in recorder.told
        await eventually_async(lambda: recorder.subscriber.is_up)
        await broker.publish([draft(settings, ROOM, "after")])
        await eventually_async(lambda: recorder.data(ROOM)[-1] == "after")
        if how == "told to":
            assert old.cli("PUBSUB", "NUMSUB", live)[1] == 0, "nobody listens at the old one"
            assert old.cli("ROLE")[0] == "master", "it did not end the link"
    await broker.close()


@pytest.mark.anyio
async def test_history_is_not_read_from_a_master_of_old(group: RedisGroup, prefix: str) -> None:
    """Which answers for seconds as if it still were one, and then as a replica that can be read."""
    settings = build(group.url, prefix)
    broker = open_async_broker(settings)
    old, new = group.master, group.other
    await broker.publish([draft(settings, ROOM, "before")])
    group.wait_for_replica()
    group.failover()
    await eventually_async(lambda: group.master is new, SOON)
    fresh = open_async_broker(settings)
    await fresh.publish([draft(settings, ROOM, "after")])

    async def is_read() -> bool:
        (page,) = await broker.read([(ROOM, 0)], page_bytes=1 << 20)
        assert isinstance(page, HistoryPage)
        return page.top.offset == 2

    await eventually_async(is_read, 2_000 * MS)
    assert old.cli("ROLE")[0] == "master", "it does not know yet, and keeps its clients"
    await eventually_async(lambda: is_following(old), SOON)
    assert await is_read()
    await broker.close()
    await fresh.close()


def test_a_request_is_taken_from_the_new_master(group: RedisGroup, prefix: str) -> None:
    settings = build(group.url, prefix)
    broker = open_broker(settings)
    queue = broker.queue("w")
    assert queue.take(1, 10 * MS) == []
    group.wait_for_replica()
    group.master.kill()
    with pytest.raises(BrokerUnavailable):
        queue.take(1, 10 * MS)

    def takes() -> bool:
        try:
            return queue.take(1, 10 * MS) == []
        except BrokerUnavailable:
            return False

    eventually(takes, SOON)
    broker.close()


# Sentinels that are no help. Here one is enough, which is told what to believe.

FAULTS = (
    "refused",
    "frozen",
    "black hole",
    "no sentinel",
    "another name",
    "password",
    "names a replica",
    "names nobody",
)
COMPLAINTS = {
    "refused": r"127.0.0.1:\d+ does not answer \(Error 111 ",
    "frozen": r"127.0.0.1:\d+ does not answer \((in time|Timeout )",
    "black hole": r"127.0.0.1:\d+ does not answer \((in time|Timeout )",
    "no sentinel": r"127.0.0.1:\d+ does not answer \(unknown command 'SENTINEL'",
    "another name": r"127.0.0.1:\d+ knows no master of that name, see its SENTINEL MASTERS",
    "password": r"127.0.0.1:\d+ does not answer \(Authentication required",
    "names a replica": r"127.0.0.1:\d+ names 127.0.0.1:\d+ \(it says that it is a replica\)",
    "names nobody": r"127.0.0.1:\d+ names 127.0.0.1:\d+ \(Error 111 ",
}


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A master and its replica, which nobody watches."""
    with (
        RedisServer("--repl-diskless-sync", "no") as old,
        RedisServer("--replicaof", "127.0.0.1", str(old.port)) as new,
    ):
        eventually(lambda: is_following(new))
        yield old, new


@pytest.fixture
def unhelpful_port(request: pytest.FixtureRequest, pair: Pair, tcp_proxy: Proxy) -> Iterator[int]:
    """Where a sentinel should be."""
    fault: str = request.param
    watched = {"names a replica": pair[1].port, "names nobody": free_port()}.get(fault, pair[0].port)
    with SentinelServer(watched, "another" if fault == "another name" else NAME) as sentinel:
        proxy = tcp_proxy(pair[0].port if fault == "no sentinel" else sentinel.port)
        if fault == "password":
            sentinel.cli("ACL", "SETUSER", "default", "resetpass", ">sesame")
        bend = {"refused": proxy.refuse, "frozen": proxy.freeze, "black hole": proxy.blackhole}
        bend.get(fault, proxy.pass_through)()
        yield proxy.port


@pytest.mark.anyio
@pytest.mark.parametrize("unhelpful_port", FAULTS, indirect=True)
async def test_a_sentinel_that_is_no_help_is_passed_over(unhelpful_port: int, pair: Pair, prefix: str) -> None:
    with SentinelServer(pair[0].port) as sentinel:
        settings = build(through(unhelpful_port, sentinel.port), prefix)
        broker, publisher = open_async_broker(settings), publisher_of(settings)
        ways: list[Callable[[], Awaitable[object]]] = [
            lambda: broker.publish([draft(settings, ROOM)]),
            lambda: asyncio.to_thread(publisher.publish, ROOM, 1),
        ]
        for publish in ways:
            began = time.monotonic()
            await publish()
            assert time.monotonic() - began < TIMEOUT
            began = time.monotonic()
            for _ in range(5):
                await publish()
            assert time.monotonic() - began < TIMEOUT / 3, "it is waited for once"
        assert position_at(pair[0], prefix).offset == 12
        await broker.close()
        publisher.close()


@pytest.mark.parametrize(
    ("unhelpful_port", "complaint"), [(fault, COMPLAINTS[fault]) for fault in FAULTS], indirect=["unhelpful_port"]
)
def test_where_no_master_is_found_the_error_says_why_and_in_time(
    unhelpful_port: int, complaint: str, prefix: str
) -> None:
    settings = build(through(unhelpful_port, unhelpful_port), prefix)

    def publish() -> None:
        open_broker(settings).publish([draft(settings, ROOM)])

    async def publish_async() -> None:
        broker = open_async_broker(settings)
        try:
            await broker.publish([draft(settings, ROOM)])
        finally:
            await broker.close()

    for attempt in (publish, lambda: asyncio.run(publish_async())):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=complaint) as caught:
            attempt()
        assert str(caught.value).startswith("sentinels lead to no master 'mymaster': ")
        assert str(caught.value).endswith("; correct the url, start the sentinels, or wait for a failover")
        assert time.monotonic() - began < TIMEOUT + 500 * MS


@pytest.mark.parametrize("asks_again", [False, True])
def test_a_master_that_was_demoted_and_kept_its_clients_is_left(pair: Pair, prefix: str, *, asks_again: bool) -> None:
    """As by hand. Its refusal to write is noticed, for all connections at once; before that, what sentinels say."""
    old, new = pair
    with SentinelServer(old.port) as sentinel, ThreadPoolExecutor(3) as pool:
        settings = build(through(sentinel.port), prefix, probe_interval=50 * MS if asks_again else 3_600)
        broker = open_broker(settings)
        start = threading.Barrier(3)

        def publish() -> None:
            start.wait()
            broker.publish([draft(settings, ROOM)] * 200)

        for future in [pool.submit(publish) for _ in range(3)]:
            future.result()
        eventually(lambda: position_at(new, prefix) == position_at(old, prefix))
        new.cli("REPLICAOF", "NO", "ONE")
        sentinel.watch(new.port)
        if asks_again:
            # The old one would take writes yet.
            eventually(lambda: broker.publish([draft(settings, ROOM)]) == [position_at(new, prefix)], 2_000 * MS)
        old.cli("REPLICAOF", "127.0.0.1", new.port)
        assert broker.publish([draft(settings, ROOM)]) == [position_at(new, prefix)]
        broker.close()


@pytest.mark.anyio
async def test_history_is_not_read_from_a_replica_whatever_connections_are_left(pair: Pair, prefix: str) -> None:
    """A replica answers reads, with what it has, and relays what its master publishes: nothing else would show it."""
    old, new = pair
    with SentinelServer(old.port) as sentinel:
        settings = build(through(sentinel.port), prefix)
        broker = open_async_broker(settings)
        async with following(settings, ROOM) as recorder:
            await asyncio.gather(*(broker.publish([draft(settings, ROOM)]) for _ in range(5)))
            await eventually_async(lambda: position_at(new, prefix) == position_at(old, prefix))
            new.cli("REPLICAOF", "NO", "ONE")
            old.cli("REPLICAOF", "127.0.0.1", free_port())  # cut off from the new master
            sentinel.watch(new.port)
            await eventually_async(lambda: "lost" in recorder.told)
            await recorder.confirmed(ROOM)
            assert new.cli("PUBSUB", "NUMSUB", f"{prefix}:{{{ROOM}}}:p")[1] == 1
            await broker.publish([draft(settings, ROOM, "new")])
            await eventually_async(lambda: recorder.data(ROOM)[-1:] == ["new"])
            pages = await asyncio.gather(*(broker.read([(ROOM, 0)], page_bytes=1 << 20) for _ in range(5)))
            assert [page.top for (page,) in pages if isinstance(page, HistoryPage)] == [position_at(new, prefix)] * 5
        await broker.close()


def test_after_a_sentinel_that_falls_silent_another_one_is_believed(pair: Pair, tcp_proxy: Proxy, prefix: str) -> None:
    old, new = pair
    with SentinelServer(old.port) as first, SentinelServer(old.port) as second:
        proxy = tcp_proxy(first.port)
        settings = build(through(proxy.port, second.port), prefix)
        broker = open_broker(settings)
        broker.publish([draft(settings, ROOM)])
        proxy.blackhole()
        new.cli("REPLICAOF", "NO", "ONE")
        second.watch(new.port)
        eventually(lambda: broker.publish([draft(settings, ROOM)]) == [position_at(new, prefix)], 5 * TIMEOUT)
        broker.close()


def test_sentinels_that_are_gone_cost_little_while_the_master_is_there(
    pair: Pair, tcp_proxy: Proxy, prefix: str
) -> None:
    with SentinelServer(pair[0].port) as sentinel:
        proxy = tcp_proxy(sentinel.port)
        settings = build(through(proxy.port), prefix)
        broker = open_broker(settings)
        broker.publish([draft(settings, ROOM)])
        proxy.freeze()
        durations, until = [], time.monotonic() + 2 * TIMEOUT
        while time.monotonic() < until:
            began = time.monotonic()
            broker.publish([draft(settings, ROOM)])
            durations.append(time.monotonic() - began)
        assert max(durations) < TIMEOUT
        assert sum(duration > TIMEOUT / 3 for duration in durations) == 1, "they are asked seldom"
        broker.close()


# The url.


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("redis+sentinel://h:1", "is malformed"),
        ("redis+sentinel://h:1/", "is malformed"),
        ("redis+sentinel:///mymaster", "is malformed"),
        ("redis+sentinel://h:1,/mymaster", "is malformed"),
        ("redis+sentinel://:26379/mymaster", "is malformed"),
        ("redis+sentinel://h:port/mymaster", "is malformed"),
        ("redis+sentinel://h:1,i:99999/mymaster", "is malformed"),
        ("redis+sentinel://h:1/mymaster/zero", "is malformed"),
        ("redis+sentinel://h:1/mymaster/0/1", "is malformed"),
        ("redis+sentinel://:sesame#x@h:1/mymaster", "is malformed"),
        ("redis+sentinel://h:1/mymaster?socket_timeout=soon&password=sesame", "is malformed"),
        ("redis+sentinel://h:1/mymaster?nonsense=1", "option that does not exist"),
        ("redis+sentinel://h:1/mymaster?sentinel_nonsense=1&sentinel_password=sesame", "option that does not exist"),
        ("redis+sentinel://h:1/mymaster?ssl_ca_certs=/ca.pem", "option that does not exist"),
    ],
)
def test_a_malformed_url_is_refused_with_the_right_form_and_without_its_secrets(url: str, wrong: str) -> None:
    for choose in (open_broker, open_async_broker):
        with pytest.raises(SettingsError, match=wrong) as caught:
            choose(Settings.build(url, environ={}))
        assert "redis+sentinel://user:password@host:26379,host:26379/mymaster/0" in str(caught.value)
        assert "sesame" not in str(caught.value)


def test_each_part_of_the_url_goes_where_it_belongs(prefix: str) -> None:
    url = "rediss+sentinel://app:p%40ss@a:1,[::1],c/my%2Fmaster/3?sentinel_password=s%26&sentinel_username=u&ssl_ca_certs=x"
    for servers in (SyncServers(build(url, prefix)), AsyncServers(build(url, prefix))):
        master = servers._new_connection(host="m", port=2)
        sentinels = [factory() for factory in servers._sentinels]
        assert servers._name == "my/master"
        assert (master.host, master.port, master.db) == ("m", 2, 3)
        assert (master.username, master.password) == ("app", "p@ss")
        assert [(item.host, item.port) for item in sentinels] == [("a", 1), ("::1", 26379), ("c", 26379)]
        for item in sentinels:
            assert (item.username, item.password, item.db) == ("u", "s&", 0)
        assert all("SSL" in type(item).__name__ for item in (master, *sentinels))


def test_passwords_of_the_master_and_of_the_sentinels_are_used(pair: Pair, prefix: str) -> None:
    with SentinelServer(pair[0].port) as sentinel:
        sentinel.cli("ACL", "SETUSER", "asker", "on", ">theirs", "-@all", "+auth", "+sentinel")
        sentinel.cli("ACL", "SETUSER", "default", "off")
        rules = f"~{prefix}:* &{prefix}:* -@all +@read +@write +@pubsub +@scripting +@connection +time -@dangerous"
        pair[0].cli("ACL", "SETUSER", "app", "on", ">ours", *rules.split())
        options = "?sentinel_username=asker&sentinel_password=theirs"
        url = through(sentinel.port, options=options).replace("://", "://app:ours@")
        publisher = Publisher(url, prefix=prefix)
        assert publisher.publish(ROOM, 1).offset == 1
        publisher.close()


# The doctor.


@pytest.mark.anyio
async def test_the_doctor_tells_which_master_it_found(pair: Pair, prefix: str) -> None:
    old, new = pair
    with SentinelServer(old.port) as sentinel, RedisServer("--replicaof", "127.0.0.1", str(old.port)) as third:
        settings = build(through(sentinel.port), prefix)
        eventually(lambda: is_following(third))
        found = f"sentinels name 127.0.0.1:{old.port} as the master; replicas: "
        warning = await failover_finding(settings)
        assert (warning.level, warning.text.startswith(found + "2; one")) == (Level.WARNING, True)
        assert "min-replicas-to-write" in warning.cure
        old.cli("CONFIG", "SET", "min-replicas-to-write", 1)
        assert await failover_finding(settings) == Finding(Level.OK, found + "2")
        old.cli("CONFIG", "SET", "min-replicas-to-write", 0)
        third.stop()
        await eventually_async(lambda: old.cli("ROLE")[2][1:] == [])
        assert await failover_finding(settings) == Finding(Level.OK, found + "1")
        new.stop()
        await eventually_async(lambda: old.cli("ROLE")[2] == [])
        warning = await failover_finding(settings)
        assert (warning.level, warning.text) == (Level.WARNING, found + "0, so that none can take over")


async def failover_finding(settings: Settings) -> Finding:
    findings = [finding async for finding in diagnose(settings)]
    assert Level.FAULT not in {finding.level for finding in findings}
    (finding,) = (finding for finding in findings if "as the master" in finding.text)
    return finding


@pytest.mark.anyio
async def test_the_doctor_says_which_part_of_the_url_to_correct(pair: Pair, prefix: str) -> None:
    with SentinelServer(pair[0].port) as sentinel:
        (finding,) = [finding async for finding in diagnose(build(through(sentinel.port, name="other"), prefix))]
        assert finding.level is Level.FAULT
        assert "lead to no master 'other'" in finding.text
        assert "sentinels" in finding.cure
