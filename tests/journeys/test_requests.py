"""The second journey, with the processes of a deployment: from a client into a view, and the answer back."""

import asyncio
import base64
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_sentinel import RedisGroup
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served

pytestmark = pytest.mark.anyio

Connect = Callable[..., Awaitable[RawClient]]

SECRET = "a secret of thirty-two bytes or more"
ENDS = ("response", "response_end")
SHORT_LEASE = {"PUBSUB_LEASE": str(1_000 * MS)}
"""For tests in which a worker dies; elsewhere none runs out on a machine that stalls."""


class Site:
    """A deployment: realtime servers and workers that share a Redis, and what its views wrote down."""

    def __init__(self, processes: Processes, redis_server: RedisServer, prefix: str, directory: Path) -> None:
        self._processes = processes
        self.redis = redis_server
        self.prefix = prefix
        self._runs = directory / "runs"
        self._gate = directory / "gate"
        self.env = {
            "PUBSUB_URL": redis_server.url,
            "PUBSUB_PREFIX": prefix,
            "PUBSUB_SECRET": SECRET,
            "PUBSUB_REQUESTS": "/*",
            "PUBSUB_LEASE": str(20_000 * MS),
            "PUBSUB_DRAIN": "1",
            "RUNS": str(self._runs),
            "GATE": str(self._gate),
        }

    def server(self, **settings: str) -> Served:
        return self._processes.uvicorn(env=self.env | settings)

    def servers(self) -> list[Served]:
        """Two of them, which start at the same time."""
        servers = [self._processes.uvicorn(env=self.env, wait=False) for _ in range(2)]
        return [server.wait_until_ready() for server in servers]

    def worker(self, *options: str, app: str = "tests.apps.answering:app", **settings: str) -> Served:
        return self._processes.pubsub_mw("worker", app, *options, env=self.env | settings)

    def whole(self, app: str, **settings: str) -> Served:
        """App, realtime endpoint and worker in one process."""
        return self._processes.pubsub_mw("serve", app, env=self.env | settings, ready_path="/realtime/health")

    def runs(self, event: str = "run") -> list[dict[str, Any]]:
        lines = self._runs.read_text().splitlines() if self._runs.exists() else []
        return [run for run in map(json.loads, lines) if run["event"] == event]

    def open_gate(self, by: int = 1) -> None:
        with self._gate.open("ab") as gate:
            gate.write(b"." * by)

    def shut_gate(self) -> None:
        self._gate.write_bytes(b"")

    def dump(self) -> bytes:
        """Everything that this deployment has in Redis, names of keys included."""
        with redis.Redis(port=self.redis.port) as client:
            client.config_set("rdbcompression", "no")
            return b"".join(key + (client.dump(key) or b"") for key in client.keys(f"{self.prefix}*"))


@pytest.fixture
def site(processes: Processes, redis_server: RedisServer, prefix: str, tmp_path: Path) -> Iterator[Site]:
    site = Site(processes, redis_server, prefix, tmp_path)
    yield site
    site.open_gate(1_000)


def realtime(served: Served) -> str:
    return f"{served.ws_url}/realtime/"


async def send(client: RawClient, id: str, path: str, **fields: Any) -> None:  # noqa: A002
    await client.send({"type": "request", "id": id, "method": "GET", "path": path, **fields})


def frames_of(client: RawClient, id: str) -> list[Frame]:  # noqa: A002
    return [frame for frame in client.received if frame.get("id") == id]


async def answer(client: RawClient, id: str, timeout: float = 10_000 * MS) -> Frame:  # noqa: A002
    """Wait for the end of an answer, or for its refusal."""

    def is_there() -> Frame | None:
        return next((frame for frame in frames_of(client, id) if frame["type"] in (*ENDS, "error")), None)

    frame = await eventually_async(is_there, timeout, f"no answer to {id}")
    assert frame is not None
    return frame


def body(frame: Frame) -> bytes:
    text = frame.get("body", "")
    return base64.b64decode(text) if frame.get("encoding") == "base64" else text.encode()


def position(frame: Frame) -> int:
    return int(frame["position"].split(".")[1])


async def resume(connect: Connect, url: str, hello: Frame, at: str | None = None) -> tuple[RawClient, Frame]:
    """Come back as the same connection, having received everything up to `at`."""
    client = await connect(url)
    channels = {} if at is None else {f"#connection-{hello['connection']}": at}
    return client, await client.hello(resume=hello["resume"], channels=channels)


# What a view sees, and what a client gets.


async def test_a_view_runs_as_if_by_http_and_its_answer_comes_back(site: Site, raw_client: Connect) -> None:
    _, server = site.worker(), site.server()
    headers = {"Cookie": "session=canary-of-the-handshake", "X-Forwarded-For": "203.0.113.9"}
    client = await raw_client(realtime(server), origin=server.url, headers=headers)
    await client.hello()
    content = bytes(range(256))
    await client.send(
        {
            "type": "request",
            "id": "1",
            "method": "POST",
            "path": "/echo?a=1&b=%20",
            "headers": {"Content-Type": "application/octet-stream", "X-CSRFToken": "t", "Host": "evil.example"},
            "body": base64.b64encode(content).decode(),
            "encoding": "base64",
        }
    )
    frame = await answer(client, "1")
    assert (frame["type"], frame["status"]) == ("response", 200)
    assert frame["headers"] == {"content-type": "application/json"}
    seen = json.loads(body(frame))
    assert seen["method"] == "POST"
    assert seen["query"] == "a=1&b=%20"
    assert base64.b64decode(seen["body"]) == content
    assert seen["cookies"] == {"session": "canary-of-the-handshake"}
    assert seen["headers"]["Host"] == server.url.removeprefix("http://")
    assert seen["headers"]["Origin"] == server.url
    assert seen["headers"]["X-Csrftoken"] == "t"
    assert (seen["address"], seen["scheme"], seen["user"]) == ("203.0.113.9", "http", None)


async def test_the_cookies_of_a_connection_are_in_redis_only_until_its_request_is_answered(
    site: Site, raw_client: Connect
) -> None:
    server = site.server()
    client = await raw_client(realtime(server), origin=server.url, headers={"Cookie": "session=canary"})
    await client.hello()
    await send(client, "1", "/run")
    await eventually_async(lambda: b"canary" in site.dump())
    site.worker()
    await answer(client, "1")
    await eventually_async(lambda: b"canary" not in site.dump())
    assert "canary" not in server.log


async def test_a_cookie_that_a_view_sets_is_in_no_frame_and_nowhere_in_redis(site: Site, raw_client: Connect) -> None:
    worker, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/cookie")
    assert (await answer(client, "1"))["body"] == "set"
    for canary in ("canary", "of-the-view"):
        assert canary not in json.dumps(client.received)
        assert canary.encode() not in site.dump()
        assert canary not in server.log
    assert "set a cookie" in worker.log
    assert "of-the-view" not in worker.log


async def test_a_path_that_is_not_allowed_never_gets_into_the_queue(site: Site, raw_client: Connect) -> None:
    server = site.server(PUBSUB_REQUESTS="/rooms/* /echo")
    client = await raw_client(realtime(server))
    await client.hello()
    paths = [
        "/admin",
        "/echo/",
        "/rooms/../admin",
        "/rooms/%2e%2e/admin",
        "/rooms/..%2fadmin",
        "//admin",
        "/rooms/\x00",
    ]
    for number, path in enumerate(paths):
        await send(client, str(number), path)
        assert (await answer(client, str(number)))["code"] in ("forbidden", "bad_frame")
    assert site.redis.cli("EXISTS", f"{site.prefix}:{{requests}}:q") == 0


async def test_large_bodies_come_in_chunks_and_are_the_same(site: Site, raw_client: Connect) -> None:
    _, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    size = 3 << 20
    await send(client, "1", f"/large/{size}")
    await answer(client, "1")
    frames = frames_of(client, "1")
    assert [frame["type"] for frame in frames] == [
        "response_start",
        *["response_chunk"] * (size >> 16),
        "response_end",
    ]
    assert b"".join(map(body, frames)) == bytes(range(256)) * (size // 256)
    assert {frame["encoding"] for frame in frames[1:-1]} == {"base64"}


# Limits.


async def test_a_full_queue_refuses_at_once_and_stores_nothing(site: Site, raw_client: Connect) -> None:
    server = site.server(PUBSUB_QUEUE_SIZE="1")
    one, other = await raw_client(realtime(server)), await raw_client(realtime(server))
    await one.hello()
    await other.hello()
    queue = f"{site.prefix}:{{requests}}:q"
    await send(one, "1", "/run")
    await eventually_async(lambda: site.redis.cli("XLEN", queue) == 1)
    before = site.redis.cli("KEYS", f"{site.prefix}:{{requests}}*")
    await send(other, "2", "/run")
    assert (await answer(other, "2"))["code"] == "busy"
    assert site.redis.cli("XLEN", queue) == 1
    assert sorted(site.redis.cli("KEYS", f"{site.prefix}:{{requests}}*")) == sorted(before)
    site.worker()
    assert (await answer(one, "1"))["status"] == 200
    await send(other, "2", "/run")  # the same id: it was never accepted
    assert (await eventually_async(lambda: frames_of(other, "2")[1:]))[0]["status"] == 200


async def test_a_full_backlog_refuses_and_what_waits_is_answered_in_order(site: Site, raw_client: Connect) -> None:
    server = site.server(PUBSUB_REQUEST_BACKLOG="3")
    client = await raw_client(realtime(server))
    await client.hello()
    for number in range(6):
        await send(client, str(number), "/run")
    assert [(await answer(client, str(number)))["code"] for number in (4, 5)] == ["busy", "busy"]
    site.worker()
    for number in range(4):
        assert (await answer(client, str(number)))["status"] == 200
    assert [run["id"] for run in site.runs()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("in_flight", [1, 3])
async def test_so_many_requests_of_a_connection_run_at_once(site: Site, raw_client: Connect, in_flight: int) -> None:
    _, server = site.worker("--threads", "8"), site.server(PUBSUB_IN_FLIGHT=str(in_flight))
    client = await raw_client(realtime(server))
    await client.hello()
    for number in range(5):
        await send(client, str(number), "/gate")
    await eventually_async(lambda: len(site.runs()) >= in_flight, 10_000 * MS)
    await send(client, "refused", "/../gate")
    await answer(client, "refused")
    assert len(site.runs()) == in_flight
    site.open_gate()
    for number in range(5):
        await answer(client, str(number))
    answered = [frame["id"] for frame in client.received if frame["type"] == "response"]
    assert sorted(answered) == ["0", "1", "2", "3", "4"]
    if in_flight == 1:
        assert answered == sorted(answered)


async def test_a_request_that_no_worker_takes_is_answered_504_in_time(site: Site, raw_client: Connect) -> None:
    settings = {"PUBSUB_REQUEST_TIMEOUT": str(900 * MS), "PUBSUB_REQUEST_GRACE": str(100 * MS)}
    server = site.server(**settings)
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/run")
    assert (await answer(client, "1"))["status"] == 504
    site.worker(**settings)
    queue = f"{site.prefix}:{{requests}}:q"
    await eventually_async(lambda: site.redis.cli("XLEN", queue) == 0, 10_000 * MS)
    assert site.runs() == []
    await send(client, "2", "/run")
    assert (await answer(client, "2"))["status"] == 200
    assert len(frames_of(client, "1")) == 1


# Coming back.


async def test_a_request_sent_again_while_it_runs_is_run_once_and_answered_once(
    site: Site, raw_client: Connect
) -> None:
    site.worker()
    servers = site.servers()
    client = await raw_client(realtime(servers[0]))
    hello = await client.hello()
    await send(client, "1", "/gate")
    await eventually_async(site.runs, 10_000 * MS)
    client.abort()
    back, _ = await resume(raw_client, realtime(servers[1]), hello)
    await send(back, "1", "/gate")
    await send(back, "1", "/gate")
    site.open_gate()
    assert (await answer(back, "1"))["body"] == "1"
    await send(back, "2", "/run")
    await answer(back, "2")
    assert [frame["type"] for frame in frames_of(back, "1")] == ["response"]
    assert [run["id"] for run in site.runs()] == ["1", "2"]


@pytest.mark.parametrize("had_received", [False, True])
async def test_a_request_sent_again_after_it_was_answered_gets_the_stored_answer(
    site: Site, raw_client: Connect, had_received: bool
) -> None:
    _, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    hello = await client.hello()
    await send(client, "1", "/run")
    frame = await answer(client, "1")
    await client.close()
    back, _ = await resume(raw_client, realtime(server), hello, frame["position"] if had_received else None)
    await send(back, "1", "/run")
    assert await answer(back, "1") == frame
    await send(back, "2", "/run")
    await answer(back, "2")
    assert frames_of(back, "1") == [frame]
    assert [run["id"] for run in site.runs()] == ["1", "2"]


async def test_a_stream_goes_on_in_the_middle_on_another_server(site: Site, raw_client: Connect) -> None:
    site.worker()
    servers = site.servers()
    client = await raw_client(realtime(servers[0]))
    hello = await client.hello()
    await send(client, "1", "/stream/10")
    site.open_gate(3)
    await eventually_async(lambda: len(frames_of(client, "1")) == 5, 10_000 * MS)
    client.abort()
    first = frames_of(client, "1")
    site.open_gate(3)
    back, _ = await resume(raw_client, realtime(servers[1]), hello, first[-1]["position"])
    await send(back, "1", "/stream/10")  # it cannot know that its request was stored
    site.open_gate(10)
    await answer(back, "1")
    await send(back, "2", "/run")
    await answer(back, "2")
    frames = [*first, *frames_of(back, "1")]
    assert [frame["type"] for frame in frames] == ["response_start", *["response_chunk"] * 10, "response_end"]
    assert b"".join(map(body, frames)).decode() == "".join(f"{number}," for number in range(10))
    assert [position(frame) for frame in frames] == list(range(1, 13))
    assert len(site.runs()) == 2


async def test_a_stream_that_ended_while_its_client_was_away_is_there_when_it_is_back(
    site: Site, raw_client: Connect
) -> None:
    _, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    hello = await client.hello()
    await send(client, "1", "/stream/6")
    site.open_gate(2)
    await eventually_async(lambda: len(frames_of(client, "1")) == 4, 10_000 * MS)
    await client.close()
    site.open_gate(10)
    await eventually_async(lambda: site.runs("closed"))
    back, _ = await resume(raw_client, realtime(server), hello, frames_of(client, "1")[-1]["position"])
    await send(back, "1", "/stream/6")
    await answer(back, "1")
    await send(back, "2", "/run")
    await answer(back, "2")
    frames = [*frames_of(client, "1"), *frames_of(back, "1")]
    assert b"".join(map(body, frames)) == b"0,1,2,3,4,5,"
    assert [position(frame) for frame in frames] == list(range(1, 9))


async def test_a_cancelled_stream_closes_its_iterator_and_lets_the_next_request_run(
    site: Site, raw_client: Connect
) -> None:
    _, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/stream/1000000")
    site.open_gate(1_000_000)
    await client.recv("response_chunk", timeout=10_000 * MS)
    await send(client, "2", "/run")
    await send(client, "3", "/run")
    await client.send({"type": "cancel", "id": "3"})
    assert (await answer(client, "3"))["code"] == "cancelled"
    await client.send({"type": "cancel", "id": "1"})
    assert (await answer(client, "1"))["error"] == "cancelled"
    assert (await answer(client, "2"))["status"] == 200
    assert await eventually_async(lambda: site.runs("closed"))
    assert [run["id"] for run in site.runs()] == ["1", "2"]


# Workers that die, stop and hang.


async def test_a_worker_that_is_killed_in_the_middle_is_replaced_and_the_view_runs_again(
    site: Site, raw_client: Connect
) -> None:
    site.env |= SHORT_LEASE
    _, server = site.worker("--processes", "2"), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/die")
    frame = await answer(client, "1")
    assert frame["body"] == "2"
    await send(client, "2", "/run")
    await answer(client, "2")
    assert len(frames_of(client, "1")) == 1
    assert [(run["id"], run["delivery_count"]) for run in site.runs()] == [("1", 1), ("1", 2), ("2", 1)]
    first, second, _ = site.runs()
    assert first["pid"] != second["pid"]


async def test_a_stream_whose_worker_is_killed_goes_on_where_it_broke_off_however_long_it_takes(
    site: Site, raw_client: Connect
) -> None:
    lease, ttl, timeout = 700 * MS, 100 * MS, 2_500 * MS
    site.env |= {"PUBSUB_LEASE": str(lease), "PUBSUB_IDEMPOTENCY_TTL": str(ttl)}
    site.env |= {"PUBSUB_REQUEST_TIMEOUT": str(timeout), "PUBSUB_REQUEST_GRACE": "0"}
    worker, server = site.worker("--processes", "2"), site.server()
    await asyncio.to_thread(worker.wait_for_log, "takes requests", 10_000 * MS)
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/stream/6")
    site.open_gate(3)
    await eventually_async(lambda: len(frames_of(client, "1")) == 5, 10_000 * MS)
    await asyncio.sleep(timeout)  # no request that has not begun would still be run
    os.kill(site.runs()[0]["pid"], signal.SIGKILL)
    site.shut_gate()
    site.redis.cli("SET", f"{site.prefix}:old", "1", "PX", round((ttl + timeout) * 1_000))
    await eventually_async(lambda: len(site.runs()) == 2, 10_000 * MS)
    await eventually_async(lambda: not site.redis.cli("EXISTS", f"{site.prefix}:old"), 10_000 * MS)
    site.open_gate(6)
    assert "error" not in await answer(client, "1")
    frames = frames_of(client, "1")
    assert b"".join(map(body, frames)) == b"0,1,2,3,4,5,"
    assert [position(frame) for frame in frames] == list(range(1, 9))


async def test_a_worker_that_seemed_dead_and_wakes_up_is_not_heard(site: Site, raw_client: Connect) -> None:
    site.env |= SHORT_LEASE
    _, server = site.worker(), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/gate")
    (run,) = await eventually_async(site.runs, 10_000 * MS)
    os.kill(run["pid"], signal.SIGSTOP)
    try:
        site.worker()
        await eventually_async(lambda: len(site.runs()) == 2, 10_000 * MS)
        site.open_gate()
        assert (await answer(client, "1"))["body"] == "2"
    finally:
        os.kill(run["pid"], signal.SIGCONT)
    # As many as there are threads, so that the one that woke up has its part in them.
    for number in range(2, 22):
        await send(client, str(number), "/run")
    for number in range(2, 22):
        await answer(client, str(number))
    assert len(frames_of(client, "1")) == 1


async def test_a_worker_all_of_whose_threads_hang_is_started_anew(site: Site, raw_client: Connect) -> None:
    server = site.server()
    worker = site.worker("--threads", "2", PUBSUB_REQUEST_TIMEOUT=str(1_000 * MS))
    await asyncio.to_thread(worker.wait_for_log, "takes requests", 10_000 * MS)
    clients = [await raw_client(realtime(server)) for _ in range(2)]
    for client in clients:
        await client.hello()
        await send(client, "1", "/gate")
    for client in clients:
        assert (await answer(client, "1"))["status"] == 504
    await asyncio.to_thread(worker.wait_for_log, "starting another", 10_000 * MS)
    await eventually_async(lambda: worker.log.count("takes requests") == 2, 10_000 * MS, "no other process takes any")
    await send(clients[0], "2", "/run")
    assert (await answer(clients[0], "2"))["status"] == 200
    hung, after = {run["pid"] for run in site.runs() if run["id"] == "1"}, site.runs()[-1]["pid"]
    assert len(hung) == 1
    assert after not in hung


async def test_a_worker_that_is_told_to_stop_answers_what_it_runs(site: Site, raw_client: Connect) -> None:
    worker, server = site.worker(PUBSUB_DRAIN="10"), site.server()
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/gate")
    await eventually_async(site.runs, 10_000 * MS)
    worker.send_signal(signal.SIGTERM)
    site.open_gate()
    assert (await answer(client, "1"))["body"] == "1"
    assert await asyncio.to_thread(worker.wait) == 0
    assert len(site.runs()) == 1


# The order of a connection, whichever server has it and whatever dies.


async def in_line(client: RawClient, *ids: str, path: str = "/run") -> None:
    """Send requests and wait until the broker has them: until it has answered one that it refuses."""
    for id in ids:  # noqa: A001
        await send(client, id, path)


async def stored(site: Site, count: int) -> None:
    """Wait until so many requests wait in lanes."""
    waiting = f"{site.prefix}:{{requests}}:waiting"
    await eventually_async(lambda: site.redis.cli("XLEN", waiting) == count, 10_000 * MS)


def order_of(site: Site, connection: str) -> list[tuple[str, int]]:
    return [(run["id"], run["delivery_count"]) for run in site.runs() if run["connection"] == connection]


async def test_after_a_reconnect_in_mid_stream_the_next_request_waits_for_the_end_of_the_stream(
    site: Site, raw_client: Connect
) -> None:
    site.worker("--threads", "4")
    servers = site.servers()
    client = await raw_client(realtime(servers[0]))
    hello = await client.hello()
    await send(client, "1", "/stream/6")
    site.open_gate(2)
    await eventually_async(lambda: len(frames_of(client, "1")) == 4, 10_000 * MS)
    client.abort()
    back, _ = await resume(raw_client, realtime(servers[1]), hello, frames_of(client, "1")[-1]["position"])
    await in_line(back, "2", "3")
    await stored(site, 2)
    other = await raw_client(realtime(servers[1]))
    await other.hello()
    await send(other, "x", "/run")  # threads are free, and it overtakes what waits
    await answer(other, "x")
    assert order_of(site, hello["connection"]) == [("1", 1)]
    site.open_gate(10)
    for id in ("1", "2", "3"):  # noqa: A001
        await answer(back, id)
    ends = [frame["id"] for frame in back.received if frame["type"] in ENDS]
    assert ends == ["1", "2", "3"]
    assert order_of(site, hello["connection"]) == [("1", 1), ("2", 1), ("3", 1)]


async def test_what_waits_in_line_survives_the_worker_that_is_killed(site: Site, raw_client: Connect) -> None:
    site.env |= SHORT_LEASE
    _, server = site.worker("--processes", "2"), site.server()
    client = await raw_client(realtime(server))
    hello = await client.hello()
    await send(client, "1", "/die")
    await in_line(client, "2", "3")
    for id in ("1", "2", "3"):  # noqa: A001
        await answer(client, id)
    assert order_of(site, hello["connection"]) == [("1", 1), ("1", 2), ("2", 1), ("3", 1)]
    assert [frame["id"] for frame in client.received if frame["type"] in ENDS] == ["1", "2", "3"]


async def test_what_waits_in_line_survives_the_server_that_is_killed(site: Site, raw_client: Connect) -> None:
    site.worker()
    servers = site.servers()
    client = await raw_client(realtime(servers[0]))
    hello = await client.hello()
    await send(client, "1", "/gate")
    await in_line(client, "2", "3")
    await stored(site, 2)
    servers[0].kill()
    back, _ = await resume(raw_client, realtime(servers[1]), hello)
    await in_line(back, "3", "4")
    await stored(site, 3)
    site.open_gate()
    for id in ("1", "2", "3", "4"):  # noqa: A001
        await answer(back, id)
    assert order_of(site, hello["connection"]) == [(id, 1) for id in ("1", "2", "3", "4")]  # noqa: A001
    assert [frame["id"] for frame in back.received if frame["type"] in ENDS] == ["1", "2", "3", "4"]


async def test_a_redis_that_lost_everything_is_told_and_holds_nobody_up(
    processes: Processes, own_redis: RedisServer, prefix: str, tmp_path: Path, raw_client: Connect
) -> None:
    site = Site(processes, own_redis, prefix, tmp_path)
    settings = {"PUBSUB_REQUEST_TIMEOUT": str(2_500 * MS), "PUBSUB_REQUEST_GRACE": str(200 * MS)}
    worker, server = site.worker("--threads", "4", **settings), site.server(**settings)
    await asyncio.to_thread(worker.wait_for_log, "takes requests", 10_000 * MS)  # what waits for it is answered 504
    client = await raw_client(realtime(server))
    await client.hello()
    await send(client, "1", "/gate")
    await in_line(client, "2", "3")
    await stored(site, 2)
    await eventually_async(site.runs, 10_000 * MS)
    own_redis.kill()
    await asyncio.to_thread(own_redis.start)
    await send(client, "4", "/run")  # does not wait for what was lost
    assert (await answer(client, "4"))["status"] == 200
    for id in ("1", "2", "3"):  # noqa: A001
        assert (await answer(client, id))["status"] == 504
    await in_line(client, "5", "6")
    for id in ("5", "6"):  # noqa: A001
        assert (await answer(client, id))["status"] == 200
    assert [run["id"] for run in site.runs()] == ["1", "4", "5", "6"]
    assert all(len(frames_of(client, str(number))) == 1 for number in range(1, 7))


async def test_requests_go_on_where_redis_failed_over(
    processes: Processes, prefix: str, tmp_path: Path, raw_client: Connect
) -> None:
    with RedisGroup() as group:
        old, new = group.servers
        site = Site(processes, old, prefix, tmp_path)
        site.env["PUBSUB_URL"] = group.url
        worker, server = site.worker(), site.server()
        await asyncio.to_thread(worker.wait_for_log, "takes requests", 10_000 * MS)
        client = await raw_client(realtime(server))
        await client.hello()
        await send(client, "1", "/gate")
        await in_line(client, "2")
        await eventually_async(site.runs, 10_000 * MS)
        await stored(site, 1)
        await asyncio.to_thread(group.wait_for_replica)
        old.kill()
        await asyncio.to_thread(group.wait_for, new)
        site.open_gate()  # the view ends with another Redis than it began with
        assert (await answer(client, "1"))["status"] == 200
        assert (await answer(client, "2"))["status"] == 200
        await send(client, "3", "/run")
        assert (await answer(client, "3"))["status"] == 200
        assert [run["id"] for run in site.runs()] == ["1", "2", "3"]
        assert all(len(frames_of(client, id)) == 1 for id in ("1", "2", "3"))  # noqa: A001


# Apps that are async.


@pytest.mark.parametrize("is_one_process", [False, True])
async def test_a_starlette_app_answers_and_streams(site: Site, raw_client: Connect, is_one_process: bool) -> None:
    if is_one_process:
        server = site.whole("tests.apps.answering_asgi:app")
    else:
        _, server = site.worker(app="tests.apps.answering_asgi:app"), site.server()
    client = await raw_client(realtime(server), origin=server.url, headers={"Cookie": "a=b"})
    await client.hello(channels={"news": None})
    await client.send({"type": "request", "id": "1", "method": "POST", "path": "/echo?q=1", "headers": {}, "body": "ä"})
    seen = json.loads(body(await answer(client, "1")))
    expected = {"is_same_loop": True, "query": "q=1", "cookies": {"a": "b"}, "body": "ä", "delivery_count": 1}
    assert seen == expected
    if is_one_process:
        await eventually_async(lambda: client.messages("news") == ["from a view"])
    await send(client, "2", "/stream")
    await answer(client, "2")
    frames = frames_of(client, "2")
    assert b"".join(map(body, frames)) == b"0,1,2,3,4,"
    assert len(frames) > 2


async def test_a_wsgi_app_and_everything_else_in_one_process(site: Site, raw_client: Connect) -> None:
    server = site.whole("tests.apps.answering:app", PUBSUB_URL="memory://")
    client = await raw_client(realtime(server))
    await client.hello()
    for number in range(20):
        await send(client, str(number), "/run")
    for number in range(20):
        assert (await answer(client, str(number)))["status"] == 200
    server.stop()
    assert "Application shutdown complete" in server.log


# Everything at once.


class Sender:
    """A client that sends its requests, a few ahead, and writes down the answers."""

    def __init__(self, client: RawClient, count: int) -> None:
        self.client = client
        self._count = count

    async def run(self) -> None:
        await self.client.hello()
        for number in range(self._count):
            await eventually_async(partial(self._has_room_for, number), 50_000 * MS)
            await send(self.client, str(number), "/run")
        await eventually_async(lambda: len(self.answered()) >= self._count, 50_000 * MS)

    def _has_room_for(self, number: int) -> bool:
        return number - len(self.answered()) < 8

    def answered(self) -> list[str]:
        return [frame["id"] for frame in self.client.received if frame["type"] in (*ENDS, "error")]


@pytest.mark.timeout(120)
async def test_workers_that_are_killed_and_rolled_lose_nothing_double_nothing_and_mix_up_nothing(
    site: Site, raw_client: Connect
) -> None:
    connections, requests = 50, 200
    site.env |= SHORT_LEASE
    worker, server = site.worker("--processes", "4"), site.server()
    senders = [Sender(await raw_client(realtime(server)), requests) for _ in range(connections)]
    running = asyncio.gather(*(sender.run() for sender in senders))
    total = connections * requests
    rolled: list[int] = []

    async def harm() -> None:
        await reached(0.2)
        for _ in range(2):
            known = {run["pid"] for run in site.runs()}
            os.kill(site.runs()[-1]["pid"], signal.SIGKILL)
            await eventually_async(lambda: {run["pid"] for run in site.runs()} - known, 50_000 * MS)  # noqa: B023
        rolled.extend(children(worker.pid))
        for pid in rolled:
            os.kill(pid, signal.SIGTERM)

    async def reached(part: float) -> None:
        def is_so() -> bool:
            return sum(len(sender.answered()) for sender in senders) >= part * total

        await eventually_async(is_so, 50_000 * MS)

    harming = asyncio.create_task(harm())
    await running
    assert harming.done()
    await harming
    for sender in senders:
        assert sender.answered() == [str(number) for number in range(requests)]
        assert {frame["status"] for frame in sender.client.received if frame["type"] == "response"} == {200}
        assert sender.client.code is None
    runs = site.runs()
    assert len({(run["connection"], run["id"]) for run in runs}) == total
    await eventually_async(lambda: len(set(children(worker.pid)) - set(rolled)) == 4, 10_000 * MS)
    assert len(rolled) == 4
    assert all(run["delivery_count"] > 1 for run in repeated(runs))
    eventually(lambda: site.redis.cli("XLEN", f"{site.prefix}:{{requests}}:q") == 0)


def children(pid: int) -> list[int]:
    """The worker processes of a supervisor: those that run the app, not what multiprocessing keeps beside them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it ended
        if int(fields[1]) == pid and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def repeated(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of a request beyond its first."""
    seen: set[tuple[str, str]] = set()
    again = []
    for run in runs:
        key = (run["connection"], run["id"])
        again += [run] if key in seen else []
        seen.add(key)
    return again
