"""Measure a mass reconnect: all clients come back at once, with positions on a few hot channels.

    python -m benchmarks.reconnect [--clients 10000] [--channels 10] [--rounds 3]

Beside it, in turn, the same clients without positions. Each client that comes back has missed `--missed` publications,
which it must get, in order, before it counts as caught up; meanwhile each channel is published to, once a second.
Counted in Redis: the reads of history (`LRANGE`) and all script calls.
"""

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.loadgen import BUILD, PAYLOAD_BYTES, Server, drive
from benchmarks.scenarios import wait_until_quiet
from benchmarks.servers import ALONE, commands_of, ours, publisher_of, take_core
from pubsub_mw import Publisher
from pubsub_mw.broker.redis.scripts import PUBLICATIONS_PER_CALL

__all__ = ["main"]

_KEPT_BEFORE = 40
_SECONDS_BETWEEN = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reconnect", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--channels", type=int, default=10)
    parser.add_argument("--per-client", type=int, default=1, help="channels that each listens to")
    parser.add_argument("--missed", type=int, default=10, help="publications that each channel had meanwhile")
    parser.add_argument("--window", type=int, default=1_000, help="handshakes under way at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=ALONE)
    options = parser.parse_args()
    take_core(options.alone)
    rows = []
    with ours() as server:
        channels = Channels(server, options.channels)
        channels.publish(_KEPT_BEFORE)
        for _ in range(options.rounds):
            for is_resuming in (False, True):
                row = measure(server, channels, options, is_resuming)
                rows.append(row)
                print(json.dumps(row), flush=True)
    with (BUILD / "reconnect.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name, part in (("without positions", rows[::2]), ("with positions", rows[1::2])):
        seconds = statistics.median(row["seconds"] for row in part)
        print(f"{name}: median {seconds:.2f} s, {max(row['history_reads'] for row in part)} reads of history at most")


class Channels:
    """The hot channels: what was published to each, and the positions."""

    def __init__(self, server: Server, count: int) -> None:
        self._publisher: Publisher = publisher_of(server)
        self._count = count
        self.sequence = 0
        self.positions: list[str] = []

    def publish(self, times: int = 1) -> None:
        """Publish to each channel, in turn, as often; one round trip for each turn."""
        for _ in range(times):
            self.sequence += 1
            at = time.monotonic_ns() % 10**16
            marks = [f"~S{self.sequence:08}{channel:08}{at:016}" for channel in range(self._count)]
            items = [
                (f"bench:{channel:08}", mark + "x" * (PAYLOAD_BYTES - len(mark))) for channel, mark in enumerate(marks)
            ]
            self.positions = [str(position) for position in self._publisher.many(items)]

    @contextmanager
    def hot(self) -> Iterator[None]:
        """Publish in the block, once a second."""
        stop = threading.Event()

        def go_on() -> None:
            while not stop.wait(_SECONDS_BETWEEN):
                self.publish()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def measure(server: Server, channels: Channels, options: argparse.Namespace, is_resuming: bool) -> dict[str, Any]:
    arguments: list[str | int | float] = ["--mode", "connect", "--connections", options.clients, "--timeout", 90]
    arguments += ["--channels", options.channels, "--per-connection", options.per_client, "--window", options.window]
    arguments += ["--sources", 16]
    with tempfile.NamedTemporaryFile("w", suffix=".positions") as file:
        file.writelines(f'"{position}" {channels.sequence + 1}\n' for position in channels.positions)
        file.flush()
        channels.publish(options.missed)
        arguments += ["--positions", file.name, "--replay", options.missed] if is_resuming else ["--from-anywhere"]
        before = commands_of(server)
        sequence = channels.sequence
        with channels.hot():
            said = drive(server, *arguments)
        after = commands_of(server)
    wait_until_quiet(server)
    calls_of_publishing = math.ceil(options.channels / PUBLICATIONS_PER_CALL)
    scripts = after["evalsha"] - before["evalsha"] - (channels.sequence - sequence) * calls_of_publishing
    return {
        "with_positions": is_resuming,
        "clients": options.clients,
        "channels": options.channels,
        "per_client": options.per_client,
        "missed": options.missed,
        "seconds": said["caught_up_seconds"],
        "connect_seconds": said["connect_seconds"],
        "history_reads": after.get("lrange", 0) - before.get("lrange", 0),
        "script_calls": scripts,
        "connect_p99_ms": said["connect_ms"]["p99"],
    }


if __name__ == "__main__":
    main()
