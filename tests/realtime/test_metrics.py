"""What Prometheus is told: each number moves by what happened, and by nothing else."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.exceptions import InvalidStatus

from pubsub_mw.asgi import with_realtime
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime.metrics import BOUND_SECONDS
from tests.realtime.conftest import SECRET, Site
from tests.realtime.serving import Servers
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.raw_stream import RawStream
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]
OpenStream = Callable[..., Awaitable[RawStream]]
Scrape = dict[str, float]

DOCS = Path(__file__).parents[2] / "docs" / "deploy.md"
UNCERTAIN = ("process_", "pubsub_event_loop", "pubsub_history_reads")
"""These move by themselves."""


def parse(text: str) -> Scrape:
    """Return each sample's value, by its name and labels as Prometheus writes them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


class Monitor:
    """Someone who scrapes."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/metrics"
        self.last: Scrape = {}

    async def scrape(self) -> Scrape:
        async with httpx.AsyncClient(timeout=10_000 * MS, trust_env=False) as http:
            answer = await http.get(self.url)
        assert answer.status_code == 200, answer.text
        return parse(answer.text)

    async def moved(self, expected: Scrape) -> None:
        """Wait until what moved since the last time is `expected`; names are given without `pubsub_`."""
        told: Scrape = {}

        async def is_so() -> bool:
            now = await self.scrape()
            certain = [name for name in now if not name.startswith(UNCERTAIN)]
            told.clear()
            told.update({name: now[name] - self.last.get(name, 0) for name in certain})
            if {name: by for name, by in told.items() if by} == wanted:
                self.last = now
                return True
            return False

        wanted = {f"pubsub_{name}": by for name, by in expected.items()}
        try:
            await eventually_async(is_so, 5_000 * MS)
        except AssertionError as error:
            raise AssertionError(f"moved: { {name: by for name, by in told.items() if by} }") from error


def site_app(environ: dict[str, object], start_response: Callable[..., object]) -> list[bytes]:  # noqa: ARG001
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with Servers() as servers:
        yield servers


async def test_each_counter_moves_by_what_happened(
    servers: Servers, raw_client: Open, raw_stream: OpenStream, url: str, prefix: str
) -> None:
    settings = {"prefix": prefix, "secret": SECRET, "requests": "/rooms/*", "channel_linger": 0}
    server = await servers.start(lambda: with_realtime(site_app, url=url, **settings))
    monitor = Monitor(f"{server.url}/realtime")
    publisher = await asyncio.to_thread(Publisher, url, prefix=prefix, secret=SECRET)
    await eventually_async(lambda: is_up(monitor))
    monitor.last = await monitor.scrape()

    # Three transports.
    client = await raw_client(server.ws_url)
    await client.hello(channels={"room": None})
    await client.recv("subscribed", "room")
    await monitor.moved(
        {
            'connections{transport="websocket"}': 1,
            'connections_opened_total{transport="websocket"}': 1,
            "channels": 2,
            "subscriptions": 2,
        }
    )
    stream = await raw_stream(f"{server.url}/realtime/events?channel=room")
    await monitor.moved(
        {
            'connections{transport="sse"}': 1,
            'connections_opened_total{transport="sse"}': 1,
            "channels": 1,
            "subscriptions": 2,
        }
    )
    async with httpx.AsyncClient(timeout=10_000 * MS, trust_env=False) as http:
        poll = f"{server.url}/realtime/poll"
        cursor = (await http.get(poll, params={"channel": "room", "wait": "0"})).json()["cursor"]
        polled: Scrape = {
            'connections_opened_total{transport="longpoll"}': 1,
            'connections_closed_total{code="client"}': 1,
        }
        await monitor.moved(polled)

        # A publication, which the poll recovers.
        await asyncio.to_thread(publisher.publish, "room", "hello")
        assert (await client.recv("message"))["data"] == "hello"
        assert (await stream.recv()).data == "hello"
        answer = (await http.get(poll, params={"channel": "room", "wait": "0", "cursor": cursor})).json()
        assert [frame["data"] for frame in answer["frames"]] == ["hello"]
    await monitor.moved(polled | {"publications_delivered_total": 2, 'recoveries_total{recovered="true"}': 1})

    # Somebody comes back, from a position of another time.
    back = await raw_client(server.ws_url)
    await back.hello(channels={"room": "other.1.1"})
    assert (await back.recv("subscribed"))["recovered"] is False
    await back.close()
    await monitor.moved(
        {
            'connections_opened_total{transport="websocket"}': 1,
            'connections_closed_total{code="client"}': 1,
            'recoveries_total{recovered="false"}': 1,
        }
    )

    # Requests, and who is turned away.
    await client.send({"type": "request", "id": "1", "method": "GET", "path": "/rooms/1"})
    assert (await client.recv("response"))["status"] == 200
    await client.send({"type": "request", "id": "2", "method": "GET", "path": "/admin"})
    assert (await client.recv("error"))["code"] == "forbidden"
    with pytest.raises(InvalidStatus):
        await raw_client(server.ws_url, origin="https://elsewhere.example")
    await monitor.moved(
        {
            "publications_delivered_total": 1,
            "requests_accepted_total": 1,
            "requests_answered_total": 1,
            'requests_refused_total{code="forbidden"}': 1,
            'connections_refused_total{code="forbidden"}': 1,
        }
    )

    # The end.
    await stream.close()
    await client.close()
    await monitor.moved(
        {
            'connections{transport="websocket"}': -1,
            'connections{transport="sse"}': -1,
            'connections_closed_total{code="client"}': 2,
            "channels": -3,
            "subscriptions": -4,
        }
    )
    await asyncio.to_thread(publisher.close)


async def is_up(monitor: Monitor) -> bool:
    return (await monitor.scrape())["pubsub_broker_up"] == 1


async def test_a_client_that_is_cut_for_reading_too_slowly_is_counted(
    serve_realtime: Serve, raw_client: Open, prefix: str
) -> None:
    site = await serve_realtime(send_queue_bytes=65_536)
    publisher = await asyncio.to_thread(Publisher, "memory://", prefix=prefix, secret=SECRET)
    client = await raw_client(site.ws_url)
    await client.hello(channels={"room": None})
    await client.recv("subscribed")
    client.pause()
    monitor = Monitor(site.url)

    async def is_cut() -> bool:
        publisher.publish("room", "x" * 500_000)
        return (await monitor.scrape())['pubsub_connections_closed_total{code="3002"}'] == 1

    await eventually_async(is_cut)
    assert (await monitor.scrape())['pubsub_connections{transport="websocket"}'] == 0


async def test_while_redis_is_gone_it_says_so_at_once_and_then_which_gaps_were_told(
    serve_app: Serve, raw_client: Open, own_redis: RedisServer, prefix: str
) -> None:
    settings = {"prefix": prefix, "secret": SECRET, "probe_interval": 50 * MS, "probe_timeout": 300 * MS}
    site = await serve_app(await asyncio.to_thread(partial(Realtime, own_redis.url, **settings)))
    publisher = await asyncio.to_thread(Publisher, own_redis.url, prefix=prefix, secret=SECRET)
    monitor = Monitor(site.url)
    await eventually_async(lambda: is_up(monitor))
    client = await raw_client(site.ws_url)
    await client.hello(channels={"room": None})
    await client.recv("subscribed")
    await asyncio.to_thread(publisher.publish, "room", 1)
    await client.recv("message")
    assert (await monitor.scrape())['pubsub_queue_requests{state="ready"}'] == 0

    await asyncio.to_thread(own_redis.kill)

    async def is_down() -> bool:
        return not await is_up(monitor)

    await eventually_async(is_down)
    told = await monitor.scrape()
    assert told['pubsub_connections{transport="websocket"}'] == 1
    assert not [name for name in told if name.startswith("pubsub_queue_requests")]

    await asyncio.to_thread(own_redis.start)
    await client.recv("gap")
    told = await monitor.scrape()
    assert {name: count for name, count in told.items() if name.startswith("pubsub_gaps_total") and count} == {
        'pubsub_gaps_total{reason="epoch"}': 1
    }
    assert told["pubsub_history_read_failures_total"] <= told["pubsub_history_reads_total"]
    await eventually_async(lambda: is_up(monitor))
    await asyncio.to_thread(publisher.close)


async def test_a_redis_that_hangs_holds_up_a_scrape_no_longer_than_its_bound(
    serve_app: Serve, own_redis: RedisServer, prefix: str
) -> None:
    site = await serve_app(await asyncio.to_thread(partial(Realtime, own_redis.url, prefix=prefix, secret=SECRET)))
    monitor = Monitor(site.url)
    await eventually_async(lambda: is_up(monitor))
    own_redis.pause()
    try:
        began = time.monotonic()
        told = await monitor.scrape()
        assert time.monotonic() - began < BOUND_SECONDS + 1_000 * MS
        assert "pubsub_channels" in told
        assert 'pubsub_queue_requests{state="ready"}' not in told
    finally:
        own_redis.resume()


async def test_a_broker_that_never_answered_leaves_what_is_known_without_it(serve_app: Serve, prefix: str) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    site = await serve_app(await asyncio.to_thread(partial(Realtime, url, prefix=prefix, broker_timeout=200 * MS)))
    told = await Monitor(site.url).scrape()
    assert told["pubsub_broker_up"] == 0
    assert told['pubsub_build_info{version="0.1.0"}'] == 1
    assert 'pubsub_connections_refused_total{code="unavailable"}' in told
    assert "pubsub_channels" not in told


async def test_the_form_is_the_one_that_is_asked_for_and_head_is_without_it(serve_realtime: Serve) -> None:
    site = await serve_realtime()
    async with httpx.AsyncClient(base_url=site.url, trust_env=False) as http:
        plain = await http.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert plain.headers["cache-control"] == "no-store"
        asked = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        open_metrics = await http.get("/metrics", headers=asked)
        assert open_metrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        names = {family.name for family in parse_openmetrics(open_metrics.text)}  # type: ignore[no-untyped-call]
        assert {"pubsub_connections_opened", "pubsub_event_loop_lag_seconds"} <= names
        head = await http.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == plain.headers["content-type"]
        assert (await http.post("/metrics")).status_code == 405


async def test_two_in_one_process_count_for_themselves_and_leave_the_applications_registry_alone(
    serve_app: Serve, raw_client: Open, prefix: str
) -> None:
    settings = [{"prefix": f"{prefix}-{name}", "secret": SECRET} for name in ("a", "b")]
    mounts = [await asyncio.to_thread(partial(Realtime, "memory://", **each)) for each in settings]
    site = await serve_app(Starlette(routes=[Mount("/a", mounts[0]), Mount("/b", mounts[1])]))
    await (await raw_client(f"{site.ws_url}/a/")).hello()
    opened = 'pubsub_connections_opened_total{transport="websocket"}'
    assert [(await Monitor(f"{site.url}/{name}").scrape())[opened] for name in ("a", "b")] == [1, 0]
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("pubsub")]
    for mount in mounts:
        await mount.stop()


async def test_a_stuck_event_loop_shows(serve_realtime: Serve) -> None:
    site = await serve_realtime()
    monitor = Monitor(site.url)
    name = "pubsub_event_loop_lag_seconds"

    async def has_begun() -> bool:
        return (await monitor.scrape())[f"{name}_count"] > 0

    await eventually_async(has_begun)
    before = await monitor.scrape()
    time.sleep(0.6)  # noqa: ASYNC251 - that is the point

    async def is_seen() -> bool:
        now = await monitor.scrape()
        late = now[f"{name}_count"] - now[name + '_bucket{le="0.25"}']
        return late > before[f"{name}_count"] - before[name + '_bucket{le="0.25"}'] and now[f"{name}_sum"] > 0.3

    await eventually_async(is_seen)


async def test_no_name_of_a_channel_or_a_user_is_told(serve_realtime: Serve, raw_client: Open, prefix: str) -> None:
    site = await serve_realtime()
    publisher = await asyncio.to_thread(Publisher, "memory://", prefix=prefix, secret=SECRET)
    client = await raw_client(site.ws_url)
    connected = await client.hello(grant=publisher.grant("canary-user"), channels={"canary-room": None})
    await client.recv("subscribed", "canary-room")
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"{site.url}/metrics")).text
    assert "canary" not in text
    assert connected["connection"] not in text
    assert "127.0.0.1" not in text


async def test_every_name_is_documented(serve_realtime: Serve) -> None:
    site = await serve_realtime()
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"{site.url}/metrics")).text
    docs = DOCS.read_text()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE pubsub")}
    assert not [name for name in names if f"`{name}" not in docs]
    assert len(names) > 15


async def test_whichever_of_several_processes_is_asked_it_tells_of_all(
    processes: Processes, raw_client: Open, redis_server: RedisServer, prefix: str
) -> None:
    env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}
    args = ("--workers", "2", "--drain", "0")
    server = await asyncio.to_thread(
        partial(processes.pubsub_mw, "realtime", *args, env=env, ready_path="/realtime/health")
    )
    monitor = Monitor(f"{server.url}/realtime")

    async def by_process(count: int) -> dict[str, float]:
        """Return the connections of each process, once there are `count`."""

        async def look() -> dict[str, float] | None:
            told = await monitor.scrape()
            name = 'pubsub_connections{process="'
            here = {
                key.removeprefix(name).partition('"')[0]: value
                for key, value in told.items()
                if key.startswith(name) and 'transport="websocket"' in key
            }
            assert sum('state="ready"' in key for key in told) == 1, "of the broker, and so told once"
            return here if len(here) == 2 and sum(here.values()) == count else None

        found = await eventually_async(look)
        assert found is not None
        return found

    assert set((await by_process(0)).values()) == {0}
    clients = [await raw_client(f"{server.ws_url}/realtime/") for _ in range(12)]
    for client in clients:
        await client.hello()
    before = await by_process(12)
    for _ in range(6):
        assert await by_process(12) == before, "whichever was asked"
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(monitor.url, headers={"accept": "application/openmetrics-text;version=1.0.0"})
    families = parse_openmetrics(answer.text)  # type: ignore[no-untyped-call]
    lag = next(family for family in families if family.name == "pubsub_event_loop_lag_seconds")
    assert {sample.labels["process"] for sample in lag.samples} == set(before)

    # One is killed; another one takes its place, and what it held is not told any more.
    killed, kept = before
    os.kill(int(killed), signal.SIGKILL)
    after = await by_process(int(before[kept]))
    assert killed not in after
    assert after[kept] == before[kept]
    server.send_signal(signal.SIGTERM)
    await eventually_async(lambda: server.exit_code is not None, 10_000 * MS)
    assert "Traceback" not in server.log
