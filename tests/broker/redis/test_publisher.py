"""Publishing to Redis through every fault: a position or an exception, in time, and never twice."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import redis

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.broker.redis.publisher import RedisBroker
from pubsub_mw.broker.redis.scripts import Scripts
from pubsub_mw.errors import BrokerUnavailable, PublishError
from pubsub_mw.model import Channel, HistoryPage, Position
from pubsub_mw.publisher import AsyncPublisher, Publisher
from tests.broker.follow import draft
from tests.tools.clock import MS, eventually
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

TIMEOUT = 400 * MS
IN_TIME = 2 * TIMEOUT + 1_000 * MS
"""A publication is to fail within; the second is for a machine that stalls."""
ROOM = Channel("room:1")


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that may be broken, also in the ways that only its debug commands know."""
    options = ["--enable-debug-command", "yes", "--loading-process-events-interval-bytes", "1024"]
    with RedisServer(*options, "--rdbcompression", "no") as server:
        yield server


@pytest.fixture
def proxy(own_redis: RedisServer, tcp_proxy: Callable[[int], TcpProxy]) -> TcpProxy:
    return tcp_proxy(own_redis.port)


@pytest.fixture
def publisher(proxy: TcpProxy) -> Iterator[Publisher]:
    publisher = Publisher(f"redis://{proxy.address}/0", publish_timeout=TIMEOUT)
    yield publisher
    publisher.close()


def data_of(url: str, channel: Channel = ROOM) -> list[object]:
    """Return what history holds, read by a broker of its own."""

    async def read() -> HistoryPage | Exception:
        broker = open_async_broker(Publisher(url).settings)
        try:
            (page,) = await broker.read([(channel, 0)], page_bytes=1 << 30)
        finally:
            await broker.close()
        return page

    page = asyncio.run(read())
    assert isinstance(page, HistoryPage)
    assert [item.position.offset for item in page.publications] == list(
        range(page.top.offset - len(page.publications) + 1, page.top.offset + 1)
    )
    return [orjson.loads(item.frame)["data"] for item in page.publications]


# What can happen to Redis. Each name has a way in and a way out.


class Fault:
    def __init__(self, server: RedisServer, proxy: TcpProxy) -> None:
        self.server = server
        self.proxy = proxy

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        self.server.kill()
        yield
        self.server.start()

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        self.proxy.refuse()
        self.proxy.reset()
        yield
        self.proxy.accept()

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        self.proxy.blackhole()
        yield
        self.proxy.pass_through()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self.proxy.freeze()
        yield
        self.proxy.pass_through()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.server.pause()
        yield
        self.server.resume()

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        self.proxy.latency(TIMEOUT)
        yield
        self.proxy.latency(0)

    @contextlib.contextmanager
    def out_of_memory(self) -> Iterator[None]:
        self.server.cli("CONFIG", "SET", "maxmemory", 1)
        yield
        self.server.cli("CONFIG", "SET", "maxmemory", 0)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        self.server.cli("REPLICAOF", "127.0.0.1", 1)
        yield
        self.server.cli("REPLICAOF", "NO", "ONE")

    @contextlib.contextmanager
    def paused_for_writes(self) -> Iterator[None]:
        self.server.cli("CLIENT", "PAUSE", 60_000, "WRITE")
        yield
        self.server.cli("CLIENT", "UNPAUSE")

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        for number in range(100):
            self.server.cli("SET", f"filler:{number}", "x" * 2_000)
        self.server.cli("CONFIG", "SET", "key-load-delay", int(10_000_000 * MS))
        with ThreadPoolExecutor(1) as pool:
            reload = pool.submit(self.server.cli, "DEBUG", "RELOAD")

            def is_loading() -> bool:
                try:
                    self.server.cli("GET", "filler:1")
                except redis.BusyLoadingError:
                    return True
                return False

            eventually(is_loading)
            yield
            self.server.cli("CONFIG", "SET", "key-load-delay", 0)
            reload.result()


SILENT = ["black_hole", "frozen", "stopped", "slow", "paused_for_writes"]
LOUD = ["killed", "refused", "out_of_memory", "read_only", "loading"]

timed_out = "no answer|[Tt]imeout|timed out|cannot be reached"


@pytest.fixture
def fault(
    request: pytest.FixtureRequest, own_redis: RedisServer, proxy: TcpProxy
) -> "contextlib._GeneratorContextManager[None]":
    made: contextlib._GeneratorContextManager[None] = getattr(Fault(own_redis, proxy), request.param)()
    return made


def refusal(attempt: Callable[[], object], *, within: float) -> PublishError:
    """Return the error of a publication that fails within `within` seconds."""
    began = time.monotonic()
    with pytest.raises(PublishError) as caught:
        attempt()
    took = time.monotonic() - began
    assert took < within, f"took {took / TIMEOUT:.1f} times publish_timeout"
    return caught.value


@pytest.mark.parametrize("fault", [*SILENT, *LOUD], indirect=True)
def test_a_publisher_raises_in_time_through_a_fault_and_recovers_at_once(
    fault: "contextlib._GeneratorContextManager[None]", publisher: Publisher
) -> None:
    assert publisher.publish(ROOM, "before").offset == 1
    with fault:
        for _ in range(2):  # on a connection that was good, and on a new one
            error = refusal(lambda: publisher.publish(ROOM, "during"), within=IN_TIME)
            assert error.channels == (ROOM,)
            assert isinstance(error.__cause__, BrokerUnavailable)
        error = refusal(lambda: publisher.many([(ROOM, 1), ("news", 2)]), within=IN_TIME)
        assert error.channels == (ROOM, "news")
    began = time.monotonic()
    assert publisher.publish(ROOM, "after").offset >= 1
    assert time.monotonic() - began < TIMEOUT


@pytest.mark.parametrize("fault", LOUD, indirect=True)
def test_a_publisher_does_not_wait_where_redis_says_no(
    fault: "contextlib._GeneratorContextManager[None]", proxy: TcpProxy
) -> None:
    publisher = Publisher(f"redis://{proxy.address}/0", publish_timeout=60)
    publisher.publish(ROOM, "before")
    with fault:
        refusal(lambda: publisher.publish(ROOM, "during"), within=5_000 * MS)
    publisher.close()


@pytest.mark.parametrize("fault", [*SILENT, *LOUD], indirect=True)
def test_an_async_publisher_raises_in_time_through_a_fault_and_recovers_at_once(
    fault: "contextlib._GeneratorContextManager[None]", proxy: TcpProxy
) -> None:
    async def refused(publisher: AsyncPublisher) -> None:
        began = time.monotonic()
        with pytest.raises(PublishError) as caught:
            await publisher.publish(ROOM, "during")
        assert time.monotonic() - began < IN_TIME
        assert caught.value.channels == (ROOM,)

    async def scenario() -> None:
        publisher = AsyncPublisher(f"redis://{proxy.address}/0", publish_timeout=TIMEOUT)
        assert (await publisher.publish(ROOM, "before")).offset == 1
        with fault:
            for _ in range(2):
                await refused(publisher)
        began = time.monotonic()
        await publisher.publish(ROOM, "after")
        assert time.monotonic() - began < TIMEOUT
        await publisher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["black_hole", "stopped"], indirect=True)
def test_more_than_the_kernel_takes_is_refused_in_time_too(
    fault: "contextlib._GeneratorContextManager[None]", proxy: TcpProxy
) -> None:
    publisher = Publisher(f"redis://{proxy.address}/0", publish_timeout=TIMEOUT, max_publication_bytes=1 << 26)
    publisher.publish(ROOM, "before")
    with fault:
        refusal(lambda: publisher.publish(ROOM, "x" * (1 << 24)), within=IN_TIME)
    publisher.close()


def test_after_one_timeout_no_other_idle_connection_is_trusted(proxy: TcpProxy) -> None:
    publisher = Publisher(f"redis://{proxy.address}/0", publish_timeout=1_000 * MS)
    start = threading.Barrier(8)

    def publish(_: int) -> None:
        start.wait()
        for number in range(10):
            publisher.publish(ROOM, number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(8)))
    assert proxy.connections > 1
    proxy.blackhole()
    refusal(lambda: publisher.publish(ROOM, "lost"), within=3_000 * MS)
    proxy.pass_through()  # connections that lost bytes stay dark, as after a firewall forgot them
    publisher.publish(ROOM, "found")
    publisher.close()


def test_an_error_never_shows_the_password(own_redis: RedisServer) -> None:
    own_redis.cli("CONFIG", "SET", "requirepass", "sesame")
    assert Publisher(f"redis://:sesame@127.0.0.1:{own_redis.port}/0").publish(ROOM, 1).offset == 1
    wrong = Publisher(f"redis://:guesses@127.0.0.1:{own_redis.port}/0")
    text = str(refusal(lambda: wrong.publish(ROOM, 2), within=4_000 * MS))
    assert "guesses" not in text
    assert f"127.0.0.1:{own_redis.port}" in text


def test_a_traceback_does_not_tell_the_same_fault_twice() -> None:
    with pytest.raises(PublishError) as raised:
        Publisher("redis://127.0.0.1:1/0", publish_timeout=1000 * MS).publish("room:1", "x")

    assert "".join(traceback.format_exception(raised.value)).count("ConnectionRefusedError: ") == 1


def test_position_and_grant_raise_in_time_too(publisher: Publisher, proxy: TcpProxy) -> None:
    proxy.blackhole()
    for ask in (lambda: publisher.position(ROOM), lambda: publisher.grant("7")):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            ask()
        assert time.monotonic() - began < IN_TIME


def test_a_secret_is_found_though_redis_takes_no_writes(own_redis: RedisServer) -> None:
    Publisher(own_redis.url).grant("7")
    own_redis.cli("CONFIG", "SET", "maxmemory", 1)
    assert Publisher(own_redis.url).grant("7")


# Never twice.


@pytest.mark.parametrize("options", [{}, {"history": False}, {"history": 1}, {"idempotency_key": "k"}], ids=str)
def test_a_reply_cut_at_any_byte_does_not_publish_twice(
    options: dict[str, Any], publisher: Publisher, proxy: TcpProxy, own_redis: RedisServer
) -> None:
    publisher.publish("news", 0)
    reply = len(str(publisher.publish("other", 0))) + len("$20\r\n\r\n")
    for count in range(0, reply, 3):
        channel = Channel(f"room:{count}")
        publisher.publish(
            channel, "before", **options | ({"idempotency_key": "0"} if "idempotency_key" in options else {})
        )
        accepted = proxy.accepted
        proxy.cut_after(count)
        position = publisher.publish(channel, "cut", **options)
        assert position.offset == 2
        assert proxy.accepted == accepted + 1, "the link did break"
        assert Publisher(own_redis.url).position(channel) == position


def test_a_batch_cut_anywhere_is_published_once_in_order(
    publisher: Publisher, proxy: TcpProxy, own_redis: RedisServer
) -> None:
    publisher.publish("news", 0)
    for count in (0, 10, 30, 45, 60, 75):
        channel = Channel(f"room:{count}")
        accepted = proxy.accepted
        proxy.cut_after(count)
        positions = publisher.many([(channel, number) for number in range(3)])
        assert proxy.accepted == accepted + 1
        assert [position.offset for position in positions] == [1, 2, 3]
        assert data_of(own_redis.url, channel) == [0, 1, 2]


def test_an_async_publisher_does_not_publish_twice_either(proxy: TcpProxy, own_redis: RedisServer) -> None:
    async def scenario() -> None:
        publisher = AsyncPublisher(f"redis://{proxy.address}/0")
        await publisher.publish(ROOM, 0)
        for number, count in enumerate((0, 1, 12, 25), start=1):
            accepted = proxy.accepted
            proxy.cut_after(count)
            assert (await publisher.publish(ROOM, number)).offset == number + 1
            assert proxy.accepted == accepted + 1
        await publisher.close()

    asyncio.run(scenario())
    assert data_of(own_redis.url) == [0, 1, 2, 3, 4]


def test_a_caller_may_try_again_with_the_same_key(
    publisher: Publisher, proxy: TcpProxy, own_redis: RedisServer
) -> None:
    publisher.publish(ROOM, "before")
    proxy.freeze()
    refusal(lambda: publisher.publish(ROOM, "once", idempotency_key="k"), within=IN_TIME)
    proxy.pass_through()  # what was frozen arrives after all
    eventually(lambda: publisher.position(ROOM).offset == 2)
    assert publisher.publish(ROOM, "once", idempotency_key="k").offset == 2
    assert data_of(own_redis.url) == ["before", "once"]


def test_through_a_link_that_breaks_all_the_time_each_confirmed_publication_is_there_once(
    proxy: TcpProxy, own_redis: RedisServer
) -> None:
    publisher = Publisher(f"redis://{proxy.address}/0", history_size=10_000)
    is_over = threading.Event()

    def break_links() -> None:
        while not is_over.wait(0.015):
            proxy.reset()

    def publish(number: int) -> tuple[int, Position | None]:
        try:
            return number, publisher.publish(ROOM, number)
        except PublishError:
            return number, None

    breaker = threading.Thread(target=break_links)
    breaker.start()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(publish, range(600)))
    is_over.set()
    breaker.join()
    publisher.close()
    kept = data_of(own_redis.url)
    confirmed = {number: position for number, position in results if position is not None}
    assert len(kept) == len(set(map(repr, kept))), "something was published twice"
    assert len(confirmed) > 300
    for number, position in confirmed.items():
        assert kept[position.offset - 1] == number


def test_scripts_that_redis_forgot_are_sent_again(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    for number in range(3):
        assert publisher.publish(ROOM, number).offset == number + 1
        own_redis.cli("SCRIPT", "FLUSH")
    positions = publisher.many([(ROOM, number) for number in range(3, 8)])
    assert [position.offset for position in positions] == [4, 5, 6, 7, 8]
    assert data_of(own_redis.url) == list(range(8))
    publisher.close()


@pytest.mark.parametrize("key", ["", ":h"])
def test_a_channel_that_lost_one_of_its_keys_starts_anew_or_goes_on(own_redis: RedisServer, key: str) -> None:
    publisher = Publisher(own_redis.url)
    before = publisher.publish(ROOM, "old")
    own_redis.cli("DEL", f"pubsub:{{{ROOM}}}{key}")
    after = publisher.publish(ROOM, "new")
    if not key:
        assert after.offset == 1
        assert after.epoch != before.epoch
    else:
        assert (after.epoch, after.offset) == (before.epoch, 2)
    assert data_of(own_redis.url) == ["new"]
    publisher.close()


def test_foreign_values_under_our_keys_are_a_publish_error(redis_server: RedisServer, prefix: str) -> None:
    publisher = Publisher(redis_server.url, prefix=prefix)
    redis_server.cli("SET", f"{prefix}:{{a}}", "foreign")
    redis_server.cli("SET", f"{prefix}:{{b}}:i:k", "foreign")
    redis_server.cli("HSET", f"{prefix}:{{c}}", "not", "a position")
    redis_server.cli("SET", f"{prefix}:{{d}}", "not an epoch.1.t")
    redis_server.cli("SET", f"{prefix}:{{e}}", "e.1.t")
    redis_server.cli("SET", f"{prefix}:{{e}}:h", "not a list")
    for channel, key in (("a", None), ("b", "k"), ("c", None), ("d", None), ("e", None)):
        with pytest.raises(PublishError):
            publisher.publish(channel, 1, idempotency_key=key)
    assert publisher.publish("f", 1).offset == 1
    publisher.close()


def test_a_channel_that_cannot_be_published_to_does_not_keep_the_others_from_it(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    own_redis.cli("HSET", "pubsub:{wrong}", "a", "hash")
    own_redis.cli("SET", "pubsub:{odd}", "foreign")
    for channel, reason in (("wrong", "WRONGTYPE"), ("odd", "arithmetic")):
        with pytest.raises(PublishError, match=reason):
            publisher.many([(ROOM, 1), (channel, 2), (ROOM, 3), ("news", 4)])
    assert data_of(own_redis.url) == [1, 3, 1, 3]
    assert data_of(own_redis.url, Channel("news")) == [4, 4]
    publisher.close()


def test_a_redis_that_is_full_takes_nothing_of_many_and_uses_no_offset_up(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    before = publisher.publish(ROOM, "before")
    # History without its position: what is to be deleted before the channel is published to.
    own_redis.cli("RPUSH", "pubsub:{new}:h", "old")
    own_redis.cli("CONFIG", "SET", "maxmemory", 1)
    for items in ([(ROOM, 1)], [(ROOM, 1), ("other", 2)], [("other", 2), (ROOM, 1)]):
        with pytest.raises(PublishError, match="maxmemory"):
            publisher.many(items)
    own_redis.cli("CONFIG", "SET", "maxmemory", 0)
    assert publisher.position(ROOM) == before
    assert publisher.publish(ROOM, "after").offset == 2
    assert [publisher.publish(channel, 0).offset for channel in ("other", "new")] == [1, 1]
    assert data_of(own_redis.url, Channel("new")) == [0]
    publisher.close()


def test_history_is_trimmed_before_it_is_an_eighth_too_long(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url, history_size=80)
    lengths = set()
    for number in range(300):
        publisher.publish(ROOM, number)
        lengths.add(int(own_redis.cli("LLEN", f"pubsub:{{{ROOM}}}:h")))
        assert data_of(own_redis.url)[-80:] == list(range(max(0, number - 79), number + 1))
    assert max(lengths) == 90
    publisher.publish(ROOM, 300, history=10)
    assert data_of(own_redis.url) == list(range(291, 301))
    publisher.close()


def test_offsets_count_on_beyond_what_is_written_with_an_exponent(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    for offset in (10**14 - 1, 10**15, 2**53 - 2):
        own_redis.cli("SET", f"pubsub:{{{ROOM}}}", f"epoch.{offset}.tag")
        own_redis.cli("DEL", f"pubsub:{{{ROOM}}}:h")
        assert publisher.publish(ROOM, 1).offset == offset + 1
        assert publisher.position(ROOM).offset == offset + 1
        assert data_of(own_redis.url) == [1]
    publisher.close()


@pytest.mark.parametrize("key", ["k", " k 1\n2 3 ", "\0", "ü" * 100], ids=["short", "blanks", "nul", "long"])
def test_an_idempotency_key_may_be_any_text(key: str, own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    first = publisher.publish(ROOM, 1, idempotency_key=key)
    assert publisher.publish(ROOM, 2, idempotency_key=key) == first
    assert publisher.many([{"channel": ROOM, "data": 2, "idempotency_key": key}] * 2) == [first, first]
    assert publisher.publish(ROOM, 2, idempotency_key=key + "0").offset == 2
    publisher.close()


def test_no_script_call_publishes_so_much_that_others_wait_for_it(own_redis: RedisServer) -> None:
    publisher = Publisher(own_redis.url)
    scripts = Scripts(publisher.settings)
    for size, count, calls in ((1, 200, 4), (30_000, 6, 2), (100_000, 3, 3), (1, 1, 1), (1, 0, 0)):
        drafts = [draft(publisher.settings, ROOM, "x" * size) for _ in range(count)]
        assert len(scripts.publish(drafts, is_retry=False)) == calls
        tags = [position.tag for position in publisher.publish_drafts(drafts)]
        assert tags == [item.tag for item in drafts]
    publisher.close()


def test_an_epoch_that_was_lost_is_not_begun_again_by_a_second_try(own_redis: RedisServer) -> None:
    settings = Publisher(own_redis.url).settings
    broker, scripts, item = RedisBroker(settings), Scripts(settings), draft(settings, ROOM)

    def publish(*, is_retry: bool) -> Position:
        return Scripts.positions_from(broker.run(lambda _: scripts.publish([item], is_retry=is_retry)))[0]

    first = publish(is_retry=False)
    assert publish(is_retry=True) == first
    own_redis.cli("FLUSHALL")
    again = publish(is_retry=True)
    assert (again.offset, again.tag) == (first.offset, first.tag)
    assert again.epoch != first.epoch
    broker.close()


@pytest.mark.parametrize(
    "query",
    ["decode_responses=True", "protocol=3", "socket_timeout=1&health_check_interval=1", "client_name=app", "db=0"],
)
def test_options_that_belong_in_a_redis_url_do_not_disturb(redis_server: RedisServer, prefix: str, query: str) -> None:
    url = f"{redis_server.url}?{query}"
    publisher = Publisher(url, prefix=prefix)
    assert [publisher.publish(ROOM, number).offset for number in range(2)] == [1, 2]
    assert publisher.position(ROOM).offset == 2
    assert publisher.grant("7")
    publisher.close()

    async def publish() -> int:
        other = AsyncPublisher(url, prefix=prefix)
        offset = (await other.publish(ROOM, 3)).offset
        await other.close()
        return offset

    assert asyncio.run(publish()) == 3


def test_a_unix_socket_and_another_database_will_do(redis_server: RedisServer, prefix: str) -> None:
    for url in (redis_server.unix_url, redis_server.url.removesuffix("/0") + "/3"):
        publisher = Publisher(url, prefix=prefix)
        assert publisher.publish(ROOM, 1).offset == 1
        publisher.close()


# Forks, threads, greenlets.


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_and_its_parent_do_not_share_a_connection(redis_server: RedisServer, prefix: str) -> None:
    publisher = Publisher(redis_server.url, prefix=prefix)
    publisher.publish(ROOM, "parent")
    child = os.fork()
    if child == 0:
        try:
            is_right = [publisher.publish(ROOM, "child").offset for _ in range(3)] == [2, 3, 4]
            publisher.close()
            del publisher
            gc.collect()
            os._exit(0 if is_right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0) == (child, 0)
    before = redis_server.cli("INFO", "stats")["total_connections_received"]
    assert publisher.publish(ROOM, "parent").offset == 5
    after = redis_server.cli("INFO", "stats")["total_connections_received"]
    assert after == before + 1, "the parent's own connection is alive; the one new is that of INFO"
    publisher.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_concurrent_processes_leave_no_hole_and_no_double(redis_server: RedisServer, prefix: str) -> None:
    publisher = Publisher(redis_server.url, prefix=prefix, history_size=1_000)
    publisher.publish(ROOM, "first")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(number: int) -> None:
        with ThreadPoolExecutor(2) as pool:
            results.put([p.offset for p in pool.map(lambda n: publisher.publish(ROOM, [number, n]), range(100))])

    processes = [context.Process(target=work, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    offsets = [offset for _ in processes for offset in results.get()]
    for process in processes:
        process.join(5)
        assert process.exitcode == 0
    assert sorted(offsets) == list(range(2, 402))
    publisher.close()


def test_many_threads_each_wait_for_their_own_reply(redis_server: RedisServer, prefix: str) -> None:
    publisher = Publisher(redis_server.url, prefix=prefix)
    start = threading.Barrier(32)

    def work(number: int) -> bool:
        start.wait()
        positions = [publisher.publish(f"room:{number}", count) for count in range(20)]
        return [position.offset for position in positions] == list(range(1, 21))

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(work, range(32)))
    publisher.close()


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys, time
import gevent
from pubsub_mw import Publisher

publisher = Publisher(sys.argv[1], prefix=sys.argv[2])
began = time.monotonic()
jobs = [gevent.spawn(publisher.publish, "room:1", number) for number in range(100)]
gevent.joinall(jobs, raise_error=True)
print(sorted(job.value.offset for job in jobs) == list(range(1, 101)), time.monotonic() - began)
"""


def test_greenlets_publish_while_others_wait(
    redis_server: RedisServer, prefix: str, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(redis_server.port)
    proxy.latency(50 * MS)  # one after another they would take 10 s
    command = [sys.executable, "-W", "ignore", "-c", GREENLETS, f"redis://{proxy.address}/0", prefix]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=15_000 * MS, check=False)
    assert ended.stdout.startswith("True "), ended.stderr
    assert float(ended.stdout.split()[1]) < 5_000 * MS
