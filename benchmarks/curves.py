"""Measure how cost grows: with subscribers, channels, payload, processes.

    python -m benchmarks.curves [--curves subscribers channels ...] [--servers pubsub-mw C]

A process may open as many files as `ulimit -n` says, so one server and one load generator hold that many connections at
most; longer curves are for machines with a higher limit.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.loadgen import BUILD, PAYLOAD_BYTES, Server, Wrong, drive
from benchmarks.run import servers
from benchmarks.scenarios import wait_until_quiet
from benchmarks.servers import ALONE, MEASURED, ours, take_core

__all__ = ["CURVES", "Curve", "main"]

Options = list[str | int | float]
_NAP: Options = ["--nap", 50]
_EACH_ITS_OWN = 1_000  # connections of the curve of channels; with more channels than that, each listens to several


@dataclass(frozen=True)
class Curve:
    """Attributes:
    title, axis: of the plot
    points: x -> the load generator's options and the size of a payload
    """

    title: str
    axis: str
    points: dict[int, tuple[Options, int]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--curves", nargs="+", choices=[*CURVES, "processes"], default=[*CURVES, "processes"])
    parser.add_argument("--servers", nargs="+", choices=sorted(servers()), default=["pubsub-mw", "C"])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--alone", action="store_true", help=ALONE)
    options = parser.parse_args()
    take_core(options.alone)
    for name in options.curves:
        save(processes(options.seconds) if name == "processes" else measure(name, options.servers, options.seconds))


def measure(name: str, names: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure the servers in turn at each point: where the speed of the machine drifts, theirs drift together."""
    known = servers()
    with ExitStack() as stack:
        started = {server: stack.enter_context(known[server]()) for server in names}
        for x, (arguments, payload) in CURVES[name].points.items():
            for label, server in started.items():
                if x > _EACH_ITS_OWN and name == "channels" and "--item" not in server.dialect:
                    continue  # a connection to it listens to the one channel that its path names
                yield point(name, label, x, server, [*arguments, "--seconds", seconds], payload)
                wait_until_quiet(server)


def point(name: str, label: str, x: int, server: Server, arguments: Options, payload: int) -> dict[str, Any]:
    row: dict[str, Any] = {"at": time.time(), "curve": name, "server": label, "x": x}
    try:
        row |= drive(server, "--timeout", 60 + x / 200, "--sources", 16, *arguments, payload=payload)
    except Wrong as error:
        row["wrong"] = str(error)
    known = ("curve", "server", "x", "per_second", "server_us_per_delivery", "wrong")
    print({key: row[key] for key in known if key in row}, flush=True)
    return row


def processes(seconds: float) -> Iterator[dict[str, Any]]:
    """One or two processes on the measured core, and two with a core each, where the load generator takes its part."""
    for label, count, cores in (
        ("one core", 1, f"{MEASURED}"),
        ("one core", 2, f"{MEASURED}"),
        ("two cores", 2, "0,1"),
    ):
        with ours(workers=count, cores=cores) as server:
            arguments: Options = ["--connections", 2_000, "--seconds", seconds, *_NAP]
            yield point("processes", label, count, server, arguments, PAYLOAD_BYTES)


def save(rows: Iterator[dict[str, Any]]) -> None:
    BUILD.mkdir(exist_ok=True)
    for row in rows:
        with (BUILD / "curves.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


_MOST = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500


_COUNTS = sorted({min(count, _MOST) for count in (10, 100, 1_000, 5_000, 10_000, 20_000, 50_000, 100_000)})


def _subscribers(count: int) -> Options:
    """One fan-out follows the other; 50 of the connections listen to another channel and ping ten times a second."""
    pingers = 50 if count >= 100 else 0
    return ["--connections", count - pingers, "--pingers", pingers, "--warm-up", 3, *_NAP]


def _channels(count: int) -> Options:
    """1,000 connections that listen to so many channels between them; 1,000 deliveries wait, whatever the number."""
    each, burst = max(1, count // _EACH_ITS_OWN), min(count, _EACH_ITS_OWN)
    return [
        "--connections",
        _EACH_ITS_OWN,
        "--channels",
        count,
        "--per-connection",
        each,
        "--burst",
        burst,
        "--stop",
        *_NAP,
    ]


CURVES = {
    "subscribers": Curve(
        "Fan-out of one channel, one message at a time",
        "subscribers",
        {count: (_subscribers(count), PAYLOAD_BYTES) for count in _COUNTS},
    ),
    "channels": Curve(
        "1,000 deliveries that wait, to 1,000 connections",
        "channels",
        {count: (_channels(count), PAYLOAD_BYTES) for count in (1, 10, 100, 1_000, 10_000, 100_000)},
    ),
    "payload": Curve(
        "Fan-out to 1,000 subscribers, one message at a time",
        "bytes of payload",
        {size: (["--connections", 1_000, *_NAP], size) for size in (64, 256, 1_024, 4_096, 16_384, 65_536)},
    ),
}


if __name__ == "__main__":
    main()
