"""Compare a worker with gunicorn, on the same Flask views and on one core.

    python -m benchmarks.requests [--rounds 5] [--requests 20000]

Both get the same request by the way that is theirs: gunicorn by keep-alive HTTP from `wrk`, the worker from its queue,
where the requests of many connections were accepted before (claims set), each connection's waiting for one another. The
time of the worker goes on until every answer is published on its connection's channel and every request acknowledged.
What is measured has one core to itself; `wrk` and Redis have the other. The rounds alternate. Two ratios come out: of
the requests per second, and of the processor time per request of the process that runs the views, which holds also
where other programs want the same core. Needs redis-server, wrk and two cores.
"""

import argparse
import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import redis

from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import Acceptance, Accepted, Offer
from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.broker.redis.reader import AsyncRedisBroker
from pubsub_mw.grants import queue_key
from pubsub_mw.model import ConnectionId, Handshake, Request, channel_of_connection
from pubsub_mw.settings import Settings
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer

_PROJECT = Path(__file__).parents[1]
_APP = "benchmarks.view:app"
_SECRET = "a secret of thirty-two bytes or more"
_VIEWS = {
    "hello": ("GET", "/hello", b"", 200),
    "json": ("POST", "/rooms/42/messages", b'{"text":"hello, how are you?"}', 201),
}
_CONNECTIONS = 500
_OURS, _THEIRS = 0, 1  # cores: of what is measured, of what drives it
_WRK = """
wrk.method = "%s"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
wrk.headers["Cookie"] = "session=%s"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a worker with gunicorn on the same Flask view.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000, help="per round, for the worker")
    parser.add_argument("--seconds", type=int, default=3, help="per round, for gunicorn")
    parser.add_argument("--threads", type=int, default=4, help="of the worker and of gunicorn")
    options = parser.parse_args()
    for tool in ("redis-server", "wrk", "taskset"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    os.sched_setaffinity(0, {_THEIRS})
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        settings = Settings.build(
            server.url, environ={}, secret=_SECRET, queue_size=1_000_000, request_timeout=3_600, requests="/*"
        )
        port, gunicorn = stack.enter_context(run_gunicorn(options.threads))
        worker = stack.enter_context(run_worker(settings, options.threads))
        for view in _VIEWS:
            ours: list[Measured] = []
            theirs: list[Measured] = []
            for number in range(options.rounds):
                with timed(gunicorn, theirs) as count:
                    count.append(measure_gunicorn(view, port, options.seconds))
                os.kill(worker, signal.SIGSTOP)
                try:
                    accept(view, settings, options.requests, f"{view}{number}")
                finally:
                    os.kill(worker, signal.SIGCONT)
                with timed(worker, ours) as count:
                    wait_until_empty(settings)
                    count.append(options.requests)
                check_answers(view, server, settings, options.requests, f"{view}{number}")
                print(f"{view}: gunicorn {theirs[-1]}, worker {ours[-1]}", flush=True)
            rate = median(one.rate for one in ours) / median(one.rate for one in theirs)
            cost = median(one.cost for one in theirs) / median(one.cost for one in ours)
            print(
                f"{view}: ratio {rate:.2f} in requests per second, {cost:.2f} in requests per second of the processor"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one side."""

    rate: float  # requests per second
    cost: float  # seconds of the processor per request

    def __str__(self) -> str:
        return f"{self.rate:,.0f}/s ({self.cost * 1e6:.0f} us of the processor each)"


@contextmanager
def timed(process: int, into: list[Measured]) -> Iterator[list[int]]:
    """Measure what `process` does meanwhile; the block puts into its list how many requests that were."""
    count: list[int] = []
    began_at, used = time.monotonic(), processor_seconds(process)
    yield count
    seconds = time.monotonic() - began_at
    into.append(Measured(count[0] / seconds, (processor_seconds(process) - used) / count[0]))


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def run_gunicorn(threads: int) -> Iterator[tuple[int, int]]:
    """Start gunicorn, and yield its port and the id of the process that runs the app."""
    port = free_port()
    command = ["gunicorn", _APP, "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", str(threads)]
    with process([sys.executable, "-m", *command, "--keep-alive", "60", "--log-level", "warning"], {}) as arbiter:
        wait_until_served(port)
        yield port, child_of(arbiter, b"gunicorn")


@contextmanager
def run_worker(settings: Settings, threads: int) -> Iterator[int]:
    """Start a worker, and yield the id of the process that runs the app."""
    env = {"PUBSUB_URL": settings.url, "PUBSUB_SECRET": _SECRET, "PUBSUB_REQUEST_TIMEOUT": "3600"}
    command = [str(Path(sys.executable).with_name("pubsub-mw")), "worker", _APP, "--threads", str(threads)]
    with process(command, env) as supervisor:
        accept("hello", settings, 200, "warm")
        wait_until_empty(settings)
        yield child_of(supervisor, b"spawn_main")


@contextmanager
def process(command: list[str], env: dict[str, str]) -> Iterator[int]:
    pinned = ["taskset", "-c", str(_OURS), *command]
    started = subprocess.Popen(pinned, env={**os.environ, **env}, stderr=subprocess.DEVNULL, cwd=_PROJECT)
    try:
        yield started.pid
    finally:
        started.terminate()
        started.wait(30)


def child_of(parent: int, command: bytes) -> int:
    """Return the id of the only child that runs `command`."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            is_child = int(path.read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and command in path.with_name("cmdline").read_bytes():
                return int(path.parent.name)
        except OSError:
            continue  # it ended
    raise SystemExit(f"{command.decode()} did not start")


def wait_until_served(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def measure_gunicorn(view: str, port: int, seconds: int) -> int:
    """Return how many requests were answered."""
    method, path, body, _ = _VIEWS[view]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK % (method, body.decode(), "a" * 80))
        script.flush()
        command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", script.name, f"http://127.0.0.1:{port}{path}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(said)
    found = re.search(r"(\d+) requests in", said)
    assert found is not None, said
    return int(found[1])


def accept(view: str, settings: Settings, count: int, name: str) -> None:
    """Store requests as the realtime server does."""

    async def store() -> None:
        broker, key = AsyncRedisBroker(settings), queue_key(_SECRET)

        for begin in range(0, count, 256):
            requests = [
                build(view, ConnectionId(f"{name}-{number % _CONNECTIONS}"), str(number))
                for number in range(begin, min(begin + 256, count))
            ]
            offers = [
                Offer(
                    connection=request.connection,
                    request_id=request.id,
                    payload=encode_request(request, key),
                    reply_to=request.reply_to,
                )
                for request in requests
            ]
            for accepted in await broker.accept(offers):
                assert isinstance(accepted, Accepted), accepted
                assert accepted.acceptance is Acceptance.STORED, accepted
        await broker.close()

    asyncio.run(store())


def build(view: str, connection: ConnectionId, request_id: str) -> Request:
    method, path, body, _ = _VIEWS[view]
    handshake = Handshake(
        headers=(
            ("host", "site.example"),
            ("origin", "https://site.example"),
            ("cookie", "session=" + "a" * 80),
            ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
            ("accept-encoding", "gzip, deflate, br"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-version", "13"),
        ),
        scheme="https",
        address="192.0.2.1",
    )
    return Request(
        connection=connection,
        user=None,
        transport="websocket",
        id=request_id,
        method=method,
        path=path,
        query="",
        headers=(("content-type", "application/json"),),
        body=body,
        handshake=handshake,
        reply_to=channel_of_connection(connection),
    )


def wait_until_empty(settings: Settings) -> None:
    stream, waiting, *_ = Keyspace(settings.prefix).lanes
    with redis.Redis.from_url(settings.url) as client:
        deadline = time.monotonic() + 120
        while client.xlen(stream) + client.xlen(waiting):
            if time.monotonic() > deadline:
                raise SystemExit("the worker does not answer")
            time.sleep(0.005)


def check_answers(view: str, server: RedisServer, settings: Settings, count: int, name: str) -> None:
    """Every request has one answer, which the view made."""
    keyspace = Keyspace(settings.prefix)
    with redis.Redis(port=server.port) as client:
        found = 0
        for number in range(_CONNECTIONS):
            channel = channel_of_connection(ConnectionId(f"{name}-{number}"))
            for payload in client.lrange(keyspace.history(channel), 0, -1):
                found += b'"status":%d' % _VIEWS[view][3] in payload
    assert found == count, f"{found} answers to {count} requests"


if __name__ == "__main__":
    main()
