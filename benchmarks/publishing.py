"""Measure what publishing costs the application: CPU time per publication, round trips to Redis per request.

    python -m benchmarks.publishing [--count 5000]

CPU time is this process's own, of one thread, with Redis on the other core; and that of Redis, for publications to
1,000 channels in turn, each with a full history and one listener. A round trip is one read by Redis from the
application's connection, as Redis counts them (`total_reads_processed`).
"""

import argparse
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.util import setup_testing_defaults

import redis

from benchmarks.loadgen import BUILD, PAYLOAD_BYTES
from benchmarks.servers import MEASURED, OTHERS, resp
from pubsub_mw import Publisher, PubSub
from tests.tools.redis_server import RedisServer

__all__ = ["main"]

_SECRET = "a secret of thirty-two bytes or more"
_TEXT = "x" * PAYLOAD_BYTES
Environ = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.publishing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=5_000, help="publications for each figure")
    options = parser.parse_args()
    os.sched_setaffinity(0, {OTHERS})
    with RedisServer() as broker, redis.Redis(port=broker.port) as client:
        os.sched_setaffinity(0, {MEASURED})
        rows = cpu_times(broker, client, options.count) | redis_times(broker, client) | round_trips(broker, client)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "publishing.json").write_text(json.dumps(rows, indent=1))
    for name, value in rows.items():
        print(f"{name}: {value:.1f}")


def cpu_times(broker: RedisServer, client: "redis.Redis", count: int) -> dict[str, float]:
    """Microseconds of CPU for one publication, in several ways; the last is what anybody pays for a command."""
    publisher = Publisher(broker.url, secret=_SECRET)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "publish, µs of CPU": (lambda: publisher.publish("bench", _TEXT), 1),
        "many, 10 in one round trip, µs of CPU each": (lambda: publisher.many([("bench", _TEXT)] * 10), 10),
        "many, 100 in one round trip, µs of CPU each": (lambda: publisher.many([("bench", _TEXT)] * 100), 100),
        "redis-py's own publish, µs of CPU": (lambda: client.publish("bench", _TEXT), 1),
    }
    found = {}
    for name, (act, each) in ways.items():
        for _ in range(100):
            act()
        began = time.process_time()
        for _ in range(count // each):
            act()
        found[name] = (time.process_time() - began) / (count // each * each) * 1e6
    return found


def redis_times(broker: RedisServer, client: "redis.Redis", count: int = 20_000) -> dict[str, float]:
    """Microseconds of Redis's CPU for one publication, by how many there are in one round trip, and with keys."""
    publisher = Publisher(broker.url, secret=_SECRET)
    names = itertools.cycle([f"bench:{number}" for number in range(1_000)])
    numbers = itertools.count()

    def spent() -> float:
        used = client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def publish(each: int, *, has_key: bool = False) -> float:
        before = spent()
        for _ in range(count // each):
            items = [{"channel": next(names), "data": _TEXT} for _ in range(each)]
            if has_key:
                items = [{**item, "idempotency_key": str(next(numbers))} for item in items]
            publisher.many(items)
        return (spent() - before) / (count // each * each) * 1e6

    for _ in range(6):
        publish(100)
    with listening(broker, [f"pubsub:{{{next(names)}}}:p" for _ in range(1_000)]):
        found = {f"Redis, {each} in one round trip, µs of its CPU each": publish(each) for each in (1, 10, 100)}
        return found | {"Redis, 100 in one round trip, with keys": publish(100, has_key=True)}


@contextmanager
def listening(broker: RedisServer, names: list[str]) -> Iterator[None]:
    """Take what comes on pub/sub channels, and look at nothing."""

    def take() -> None:
        while link.recv(1 << 20):
            pass

    with socket.create_connection(("127.0.0.1", broker.port)) as link:
        link.sendall(resp("SUBSCRIBE", *names))
        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield
        finally:
            link.shutdown(socket.SHUT_RDWR)
            thread.join()


def round_trips(broker: RedisServer, client: "redis.Redis") -> dict[str, float]:
    """Round trips for one WSGI request, by what it does."""

    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        publish = environ["pubsub.publish"]
        what = environ["PATH_INFO"]
        if what == "/once":
            publish("bench", _TEXT)
        elif what == "/later":
            for _ in range(5):
                publish.on_success("bench", _TEXT)
        elif what == "/many":
            publish.many([("bench", _TEXT)] * 5)
        start_response("204 No Content", [])
        return []

    application = PubSub(app, broker.url, secret=_SECRET)

    def request(path: str) -> None:
        environ: Environ = {}
        setup_testing_defaults(environ)
        environ["PATH_INFO"] = path
        result = application(environ, lambda *_: lambda _: None)
        list(result)
        if hasattr(result, "close"):
            result.close()

    def reads() -> int:
        return int(client.info("stats")["total_reads_processed"])

    found = {}
    names = {"/": "nothing", "/once": "publish", "/later": "5 of on_success", "/many": "many of 5"}
    for path, name in names.items():
        request(path)
        before = reads()
        for _ in range(100):
            request(path)
        found[f"round trips of a request with {name}"] = (reads() - before - 1) / 100
    return found


if __name__ == "__main__":
    main()
