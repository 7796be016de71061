"""Measure what a deployment is planned with, and say what a million connections take.

    python -m benchmarks.constants [--connections 10000]

Per connection: memory of the process, of the kernel and of Redis, CPU time to connect and for each ping. Per
publication: CPU time of Redis, alone and for each realtime process that listens. Per delivery: CPU time of the realtime
process, bytes on the wire.
"""

import argparse
import json
import time
from pathlib import Path

import redis

from benchmarks.loadgen import BUILD, PAYLOAD_BYTES, drive, hold
from benchmarks.scenarios import cpu_seconds, resident_bytes, wait_until_quiet
from benchmarks.servers import ALONE, ours, take_core
from pubsub_mw import Publisher
from tests.tools.redis_server import RedisServer

__all__ = ["main", "slab_bytes"]

_SECRET = "a secret of thirty-two bytes or more"
_HEADERS_BYTES = 40 + 14  # IPv4, TCP, Ethernet
_PAYLOAD = "x" * PAYLOAD_BYTES
Constants = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.constants", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--alone", action="store_true", help=ALONE)
    options = parser.parse_args()
    take_core(options.alone)
    constants = of_connections(options.connections) | of_publications() | of_deliveries(options.connections)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "constants.json").write_text(json.dumps(constants, indent=1))
    for name, value in constants.items():
        print(f"{name}: {value:,.2f}")
    for connections in (1_000_000, 10_000_000):
        print("\n".join(["", *plan(connections, constants)]))


def of_connections(count: int) -> Constants:
    with ours(ping_interval=2) as server, redis.Redis(port=server.redis_port or 0) as client:
        drive(server, "--mode", "connect", "--connections", 20)
        wait_until_quiet(server)
        remembered = client.info("memory")["used_memory"]
        resident, kernel, spent = resident_bytes(server), slab_bytes(), cpu_seconds(server)
        with hold(server, "--connections", count, "--timeout", 60) as said:
            connecting = cpu_seconds(server) - spent
            time.sleep(1)
            held, kernel_held = resident_bytes(server), slab_bytes()
            remembered = client.info("memory")["used_memory"] - remembered
            began, spent = time.monotonic(), cpu_seconds(server)
            time.sleep(6)
            pinging, seconds = cpu_seconds(server) - spent, time.monotonic() - began
    return {
        "KB of the process per connection": (held - resident) / count / 1024,
        "KB of the kernel per connection": (kernel_held - kernel) / (2 * count) / 1024,  # both ends are here
        "KB of Redis per connection": remembered / count / 1024,
        "connects/s": count / said["connect_seconds"],
        "µs of CPU to connect": connecting / count * 1e6,
        "µs of CPU per ping and pong": pinging / (count * seconds / 2) * 1e6,
    }


def of_publications(count: int = 20_000, listeners: int = 10) -> Constants:
    with RedisServer() as broker, redis.Redis(port=broker.port) as client:
        publisher = Publisher(broker.url, secret=_SECRET)

        def cost() -> float:
            before = _redis_cpu(client)
            for _ in range(count // 100):
                publisher.many([("bench", _PAYLOAD)] * 100)
            return (_redis_cpu(client) - before) / count * 1e6

        cost()
        alone = cost()
        subscribers = [client.pubsub() for _ in range(listeners)]
        for subscriber in subscribers:
            subscriber.subscribe("pubsub:{bench}:p")
        heard = cost()
        for subscriber in subscribers:
            subscriber.close()
    return {
        "µs of Redis per publication": alone,
        "µs of Redis more for each process that listens": (heard - alone) / listeners,
    }


def of_deliveries(count: int) -> Constants:
    with ours() as server:
        # With many sockets a delivery costs more: their state in the kernel is not in the processor's caches.
        many = drive(server, "--connections", count, "--seconds", 2, "--nap", 50, "--sources", 16, "--timeout", 60)
        wait_until_quiet(server)
        options = ("--connections", 1_000, "--seconds", 1, "--nap", 50)
        said = drive(server, *options, "--warm-up", 20)
        wait_until_quiet(server)
        alone = drive(server, *options, "--channels", 1_000, "--burst", 1_000, "--stop", "--warm-up", 1)
    frame = said["bytes_per_second"] / said["per_second"]
    return {
        "µs of CPU per delivery": many["server_us_per_delivery"],
        "µs of CPU per publication": alone["server_us_per_delivery"] - said["server_us_per_delivery"],
        f"bytes of a frame with {PAYLOAD_BYTES} of payload": frame,
        "bytes of a delivery on the wire": frame + 4 + _HEADERS_BYTES,
    }


def plan(connections: int, constants: Constants) -> list[str]:
    """Say on paper what so many connections take, in rooms of 100 that each publish once in 10 s."""
    processes = connections / 50_000
    publications = connections / 100 / 10
    deliveries = publications * 100
    pings = connections / 25
    memory = connections * (
        constants["KB of the process per connection"] + constants["KB of the kernel per connection"]
    )
    # A room's 100 members are spread over the processes, so that nearly as many of those listen to it.
    listening = processes * (1 - (1 - 1 / processes) ** 100)
    cores = deliveries * constants["µs of CPU per delivery"] / 1e6
    cores += pings * constants["µs of CPU per ping and pong"] / 1e6
    redis_cores = publications * constants["µs of Redis per publication"] / 1e6
    redis_cores += publications * listening * constants["µs of Redis more for each process that listens"] / 1e6
    cores += publications * listening * constants["µs of CPU per publication"] / 1e6
    gigabits = deliveries * constants["bytes of a delivery on the wire"] * 8 / 1e9
    everybody = constants["µs of CPU per delivery"] * 50_000 / 1e6
    return [
        f"{connections:,} connections, 50,000 in a process: {processes:,.0f} processes",
        f"  memory: {memory / 1024**2:,.0f} GB, that of the kernel included",
        f"  in rooms of 100, each published to once in 10 s: {deliveries:,.0f} deliveries/s, {pings:,.0f} pings/s",
        f"    busy cores of realtime servers: {cores:,.1f}; {cores / processes * 100:.0f} % of each process",
        f"    {listening:,.0f} processes hear each room; busy cores of Redis: {redis_cores:,.2f}",
        f"    bandwidth: {gigabits:,.1f} Gbit/s",
        f"  one publication to everybody: each process is busy for {everybody:.2f} s",
        f"  everybody connects anew: {connections / processes / constants['connects/s']:,.0f} s",
    ]


def slab_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Slab:")), 0)


def _redis_cpu(client: "redis.Redis") -> float:
    used = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


if __name__ == "__main__":
    main()
