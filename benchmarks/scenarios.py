"""Measure one thing of one server.

In:     a `Server` that runs
Out:    a value and all that the load generator said
Owns:   what is done, how often, with how many clients
Never:  compares; `run.py` does
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loadgen import Server, Wrong, drive, hold

__all__ = ["SCENARIOS", "Result", "Scenario", "cpu_seconds", "resident_bytes", "wait_until_quiet"]

_SUBSCRIBERS = 1_000
_IDLE = 5_000
_QUIET_SECONDS = 120
_NAP = ("--nap", 50)
"""Where only the rate counts: a write need not wake the load generator, nor would it wake a distant client."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """Attributes:
    title: as a column of the table
    unit: of `value`
    is_rate: more is better, and ratios say how much of the reference's it is
    measure: a server and how long, in seconds -> the result, with `value`
    pairs: measured several times in a row, in turn with the reference: what a ratio is made of
    """

    title: str
    unit: str
    is_rate: bool
    measure: Callable[[Server, float], Result]
    pairs: bool = True


def fan_out(server: Server, seconds: float) -> Result:
    """One channel, 1,000 subscribers, one message at a time: the next is published when all have got the last."""
    said = drive(server, *_NAP, "--connections", _SUBSCRIBERS, "--seconds", seconds, "--warm-up", 20)
    return said | {"value": said["per_second"]}


def backlog(server: Server, seconds: float) -> Result:
    """64 messages wait: published while the server is stopped by SIGSTOP; timed from SIGCONT to the last delivery."""
    options = ("--connections", _SUBSCRIBERS, "--burst", 64, "--stop", "--seconds", seconds, "--warm-up", 1)
    said = drive(server, *_NAP, *options, "--timeout", 60)
    return said | {"value": said["per_second"]}


def bursts(server: Server, seconds: float) -> Result:
    """The same 64 in one pipeline, to a server that runs."""
    options = ("--connections", _SUBSCRIBERS, "--burst", 64, "--seconds", seconds, "--warm-up", 1)
    said = drive(server, *_NAP, *options, "--timeout", 60)
    return said | {"value": said["per_second"]}


def channels(server: Server, seconds: float) -> Result:
    """1,000 channels of one subscriber each; one message to each waits, published as in `backlog`."""
    options = (
        "--connections",
        _SUBSCRIBERS,
        "--channels",
        _SUBSCRIBERS,
        "--burst",
        _SUBSCRIBERS,
        "--stop",
        "--warm-up",
        1,
    )
    said = drive(server, *_NAP, *options, "--seconds", seconds, "--timeout", 60)
    return said | {"value": said["per_second"]}


def latency(server: Server, seconds: float) -> Result:
    """20 messages per second to 1,000 subscribers, whatever happens; from the write of the publisher to each read."""
    options = ("--mode", "rate", "--rate", 20, "--connections", _SUBSCRIBERS)
    said = drive(server, *options, "--seconds", 4 * seconds, "--timeout", 60)
    return said | {"value": said["latency_ms"]["p99"]}


def connects(server: Server, seconds: float) -> Result:
    """5,000 connect and subscribe, 100 at a time."""
    del seconds
    said = drive(server, "--mode", "connect", "--connections", _IDLE, "--timeout", 60)
    wait_until_quiet(server)
    return said | {"value": said["connects_per_second"]}


def memory(server: Server, seconds: float) -> Result:
    """Resident memory at 5,000 idle subscribed connections, less that at none, for each; Redis is not counted."""
    del seconds
    drive(server, "--mode", "connect", "--connections", 20)
    wait_until_quiet(server)
    before = resident_bytes(server)
    with hold(server, "--connections", _IDLE, "--timeout", 60) as said:
        time.sleep(1)
        held = resident_bytes(server)
    wait_until_quiet(server)
    return said | {"value": (held - before) / _IDLE / 1024, "before": before, "held": held}


SCENARIOS = {
    "memory": Scenario("KB per idle connection", "KB", False, memory, pairs=False),
    "connects": Scenario("connects/s", "/s", True, connects, pairs=False),
    "fan-out": Scenario("1,000 subscribers, one message at a time", "/s", True, fan_out),
    "backlog": Scenario("the same, 64 waiting", "/s", True, backlog),
    "bursts": Scenario("the same, bursts of 64", "/s", True, bursts),
    "channels": Scenario("1,000 channels of 1 subscriber", "/s", True, channels),
    "latency": Scenario("p99 at 20 msg/s", "ms", False, latency, pairs=False),
}
"""In the order in which they are run: memory first, while the server's is untouched."""


def resident_bytes(server: Server) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(server: Server) -> float:
    ticks = 0
    for pid in server.pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(server: Server) -> None:
    """Wait until the server has closed what the clients left, and has done what it does then."""
    deadline = time.monotonic() + _QUIET_SECONDS
    busy = True
    while busy or _connections_of(server.port):
        if time.monotonic() > deadline:
            raise Wrong(f"{server.name} does not come to rest after its connections are gone")
        spent = cpu_seconds(server)
        time.sleep(0.2)
        busy = cpu_seconds(server) - spent > 0.05


def _connections_of(port: int) -> int:
    """How many sockets a server has on its port: established, or closed by the client alone."""
    rows = (line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(local.endswith(f":{port:04X}") and state in ("01", "08") for local, _, state in rows)
