"""Hold very many idle connections in one process, and publish to all of them while others ping.

    python -m benchmarks.crowd [--connections 100000] [--set ping_interval=25 fan_out_slice=1000]

Where a process may not open so many files: `python -m benchmarks.machine benchmarks.crowd`.
"""

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.constants import slab_bytes
from benchmarks.loadgen import BUILD, Server, drive, hold
from benchmarks.scenarios import cpu_seconds, resident_bytes, wait_until_quiet
from benchmarks.servers import ALONE, commands_of, ours, settings_of, take_core

__all__ = ["main"]

_PINGERS, _PING_SECONDS = 50, 20
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[100_000])
    parser.add_argument("--intervals", type=float, default=3.4, help="of pings, for which they are held; 0: not at all")
    parser.add_argument("--seconds", type=float, default=30, help="of one fan-out after the other; 0: none")
    parser.add_argument("--channels", type=int, default=1, help="among them; with more than one only held")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of the server's settings")
    parser.add_argument("--alone", action="store_true", help=ALONE)
    options = parser.parse_args()
    take_core(options.alone)
    settings = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in options.set)}
    for count in options.connections:
        with ours(**settings) as server:
            drive(server, "--mode", "connect", "--connections", 20)
            wait_until_quiet(server)
            if options.intervals:
                seconds = options.intervals * settings_of("redis://localhost", **settings).ping_interval
                save(held(server, count, options.channels, seconds) | settings)
            if options.seconds and options.channels == 1:
                save(fan_outs(server, count, options.seconds) | settings)


def held(server: Server, count: int, channels: int, seconds: float) -> Row:
    resident, kernel, spent = resident_bytes(server), slab_bytes(), cpu_seconds(server)
    with hold(server, *_among(count), "--channels", channels) as said:
        connecting = cpu_seconds(server) - spent
        print(f"{count:,} connected in {said['connect_seconds']:.0f} s", flush=True)
        row: Row = {
            "KB of the process per connection": (resident_bytes(server) - resident) / count / 1024,
            "KB of the kernel per connection": (slab_bytes() - kernel) / (2 * count) / 1024,  # both ends are here
        }
        began, spent = time.monotonic(), cpu_seconds(server)
        time.sleep(seconds)
        row["share of a core for pings"] = (cpu_seconds(server) - spent) / (time.monotonic() - began)
        row["ping_ms"] = _pings(server, _PING_SECONDS)
        row["held by the server"] = _connections(server)
        row["files of the server"] = len(list(Path(f"/proc/{server.pids[0]}/fd").iterdir()))
        row["KB of the process per connection, then"] = (resident_bytes(server) - resident) / count / 1024
    wait_until_quiet(server)
    return row | {
        "held by the clients": said["subscribed"],
        "closed": said["closed"],
        "seconds held": seconds,
        "pings answered per connection": said["pings_answered"] / count,
        "connects/s": count / said["connect_seconds"],
        "µs of CPU to connect": connecting / count * 1e6,
        "MB of the process when all have left": resident_bytes(server) / 2**20,
    }


def fan_outs(server: Server, count: int, seconds: float) -> Row:
    """One follows the other; the others ping from a process of their own, so that only the server can keep them."""
    with ThreadPoolExecutor() as pool:
        before = commands_of(server).get("evalsha", 0)
        crowd = pool.submit(drive, server, *_among(count), "--seconds", seconds + 10, "--warm-up", 1, "--nap", 50)
        while commands_of(server).get("evalsha", 0) == before and not crowd.done():
            time.sleep(0.2)
        others = _pings(server, seconds)
        said = crowd.result()
    wait_until_quiet(server)
    keys = ("messages", "deliveries", "per_second", "server_us_per_delivery", "latency_ms", "burst_ms")
    return {"subscribers": count, "ping_ms": others} | {key: said[key] for key in keys}


def save(row: Row) -> None:
    print(json.dumps(row, indent=1, ensure_ascii=False), flush=True)
    with (BUILD / "crowd.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.time()} | row) + "\n")


def _among(count: int) -> list[str | int | float]:
    return ["--connections", count, "--sources", 16, "--timeout", 60 + count / 200]


def _pings(server: Server, seconds: float) -> dict[str, float]:
    said = drive(server, "--mode", "ping", "--connections", 0, "--pingers", _PINGERS, "--seconds", seconds)
    pings: dict[str, float] = said["ping_ms"]
    return pings


def _connections(server: Server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/realtime/health", timeout=10) as answer:
        return int(json.load(answer)["connections"])


if __name__ == "__main__":
    main()
