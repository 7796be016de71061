"""Compare a worker with gunicorn, on the same Flask views and on one core.

    python -m benchmarks.requests [--rounds 5] [--requests 20000]

Both get the same request by the way that is theirs: gunicorn by keep-alive HTTP from `wrk`, the worker from its queue,
where the requests of many connections were accepted before (claims set). The time of the worker goes on until every
answer is published on its connection's channel and every request acknowledged. What is measured has one core to itself;
`wrk` and Redis have the other. The rounds alternate. Needs redis-server, wrk and two cores.
"""

import argparse
import asyncio
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
        gunicorn_port = stack.enter_context(run_gunicorn(options.threads))
        worker = stack.enter_context(run_worker(settings, options.threads))
        for view in _VIEWS:
            ours: list[float] = []
            theirs: list[float] = []
            for number in range(options.rounds):
                theirs.append(measure_gunicorn(view, gunicorn_port, options.seconds))
                ours.append(measure_worker(view, server, settings, worker, options.requests, f"{view}{number}"))
                print(f"{view}: gunicorn {theirs[-1]:,.0f}/s, worker {ours[-1]:,.0f}/s", flush=True)
            gunicorn, own = statistics.median(theirs), statistics.median(ours)
            print(f"{view}: medians: gunicorn {gunicorn:,.0f}/s, worker {own:,.0f}/s; ratio {own / gunicorn:.2f}")


@contextmanager
def run_gunicorn(threads: int) -> Iterator[int]:
    port = free_port()
    command = ["gunicorn", _APP, "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", str(threads)]
    with process([sys.executable, "-m", *command, "--keep-alive", "60", "--log-level", "warning"], {}):
        wait_until_served(port)
        yield port


@contextmanager
def run_worker(settings: Settings, threads: int) -> Iterator[int]:
    """Start a worker, and yield the id of the process that runs the app."""
    env = {"PUBSUB_URL": settings.url, "PUBSUB_SECRET": _SECRET, "PUBSUB_REQUEST_TIMEOUT": "3600"}
    command = [str(Path(sys.executable).with_name("pubsub-mw")), "worker", _APP, "--threads", str(threads)]
    with process(command, env) as supervisor:
        accept("hello", settings, 200, "warm")
        wait_until_empty(settings)
        yield worker_of(supervisor)


@contextmanager
def process(command: list[str], env: dict[str, str]) -> Iterator[int]:
    pinned = ["taskset", "-c", str(_OURS), *command]
    started = subprocess.Popen(pinned, env={**os.environ, **env}, stderr=subprocess.DEVNULL, cwd=_PROJECT)
    try:
        yield started.pid
    finally:
        started.terminate()
        started.wait(30)


def worker_of(supervisor: int) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        parent = int(path.read_text().rpartition(")")[2].split()[1])
        if parent == supervisor and b"spawn_main" in path.with_name("cmdline").read_bytes():
            return int(path.parent.name)
    raise SystemExit("the worker did not start")


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


def measure_gunicorn(view: str, port: int, seconds: int) -> float:
    method, path, body, _ = _VIEWS[view]
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK % (method, body.decode(), "a" * 80))
        script.flush()
        command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", script.name, f"http://127.0.0.1:{port}{path}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(said)
    found = re.search(r"Requests/sec:\s*([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


def measure_worker(view: str, server: RedisServer, settings: Settings, worker: int, count: int, name: str) -> float:
    os.kill(worker, signal.SIGSTOP)
    try:
        accept(view, settings, count, name)
    finally:
        os.kill(worker, signal.SIGCONT)
    began_at = time.monotonic()
    wait_until_empty(settings)
    taken = time.monotonic() - began_at
    check_answers(view, server, settings, count, name)
    return count / taken


def accept(view: str, settings: Settings, count: int, name: str) -> None:
    """Store requests as the realtime server does."""

    async def store() -> None:
        broker, key = AsyncRedisBroker(settings), queue_key(_SECRET)

        async def one(number: int) -> None:
            connection = ConnectionId(f"{name}-{number % _CONNECTIONS}")
            request = build(view, connection, str(number))
            offer = Offer(
                connection=connection,
                request_id=request.id,
                payload=encode_request(request, key),
                reply_to=request.reply_to,
            )
            (accepted,) = await broker.accept([offer])
            assert isinstance(accepted, Accepted)
            assert accepted.acceptance is Acceptance.STORED

        for begin in range(0, count, 64):
            await asyncio.gather(*(one(number) for number in range(begin, min(begin + 64, count))))
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
    stream = Keyspace(settings.prefix).requests
    with redis.Redis.from_url(settings.url) as client:
        deadline = time.monotonic() + 120
        while client.xlen(stream):
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
            for _, entry in client.xrange(keyspace.history(channel)):
                found += b'"status":%d' % _VIEWS[view][3] in entry[b"p"]
    assert found == count, f"{found} answers to {count} requests"


if __name__ == "__main__":
    main()
