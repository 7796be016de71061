"""Compare servers, each with the reference in C measured just before it.

    python -m benchmarks.run [--servers pubsub-mw ...] [--scenarios fan-out ...] [--rounds 3] [--seconds 1.5]

Needs Linux, two cores, redis-server, taskset and a C compiler. Everything is checked while it is measured: a server
that loses, doubles or misorders a message has no number. One core belongs to the server that is measured; the load
generator, which also publishes, and Redis have the other.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.loadgen import BUILD, Server, Wrong
from benchmarks.peers import PEERS, Missing, install
from benchmarks.scenarios import SCENARIOS
from benchmarks.servers import ALONE, ours, reference, take_core

__all__ = ["is_disturbed", "main", "servers"]

REFERENCE = "C"
_TRIES = 3
_LEAST_SHARE = 0.75
_MOST_OTHERS = 0.1
Start = Callable[[], AbstractContextManager[Server]]


def servers(command: str = "") -> dict[str, Start]:
    return {
        REFERENCE: reference,
        "C-joining": lambda: reference("C-joining", "--join"),
        "pubsub-mw": lambda: ours(command),
        **PEERS,
    }


def main() -> None:
    known = servers()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--servers", nargs="+", choices=sorted(known), default=["pubsub-mw"])
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3, help="each with servers started anew")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of the reference and the server in a round")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    parser.add_argument("--alone", action="store_true", help=ALONE)
    parser.add_argument("--command", default="", help="that starts pubsub-mw, with {port}; default: pubsub-mw realtime")
    options = parser.parse_args()
    if set(options.servers) & set(PEERS):
        install()
    take_core(options.alone)
    known = servers(options.command)
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name in options.servers:
            try:
                rows += compare(name, known[name], options)
            except Missing as error:
                print(f"{name} is not measured: {error}", file=sys.stderr)
    print()
    for name in options.servers:
        for scenario in options.scenarios:
            summarise(name, scenario, [row for row in rows if (row["server"], row["scenario"]) == (name, scenario)])


def compare(name: str, start: Start, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the reference and a server in turn, scenario by scenario, with both started anew."""
    found = []
    with reference() as measure, start() as server:
        for scenario in (
            name for name in options.scenarios for _ in range(options.pairs if SCENARIOS[name].pairs else 1)
        ):
            known, seconds, is_alone = SCENARIOS[scenario], options.seconds, options.alone
            for _ in range(_TRIES):
                row: dict[str, Any] = {"at": time.time(), "server": name, "scenario": scenario, "alone": is_alone}
                row["reference"] = known.measure(measure, seconds)
                try:
                    row["result"] = known.measure(server, seconds)
                except Wrong as error:
                    row["wrong"] = str(error)
                    break
                if not is_disturbed(row):
                    break
            found.append(row)
            say(row)
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    return found


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether other processes on the machine had a part in the figure; then it is measured again.

    Where the server is driven as fast as it can be, it must have had its core, else something else was the bottleneck.
    At a fixed rate, others may have used a tenth of a core, unless those that measure come first.
    """
    parts = [row["reference"], row.get("result", row["reference"])]
    if row["scenario"] == "latency":
        return not row.get("alone") and max(part["others_share"] for part in parts) > _MOST_OTHERS
    return bool(min(part.get("server_cpu_share", 1.0) for part in parts) < _LEAST_SHARE)


def say(row: dict[str, Any]) -> None:
    if "wrong" in row:
        print(f"{row['server']} {row['scenario']}: {row['wrong']}", file=sys.stderr)
        return
    unit, mine, its = SCENARIOS[row["scenario"]].unit, row["result"], row["reference"]
    text = f"{row['server']} {row['scenario']}: {mine['value']:,.2f} {unit}, C {its['value']:,.2f} {unit}"
    if its["value"]:
        text += f", ratio {mine['value'] / its['value']:.3f}"
    if is_disturbed(row):
        text += " (disturbed by other processes)"
    for key in ("server_us_per_delivery", "server_cpu_share", "idle_share", "cpu_share", "others_share"):
        if key in mine:
            text += f", {key} {mine[key]:.2f} ({its[key]:.2f})"
    print(text, flush=True)


def summarise(name: str, scenario: str, rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if "result" in row]
    if not good:
        return
    value = statistics.median(row["result"]["value"] for row in good)
    text = f"{name} {scenario}: median {value:,.2f} {SCENARIOS[scenario].unit}"
    ratios = [row["result"]["value"] / row["reference"]["value"] for row in good if row["reference"]["value"]]
    if ratios:
        text += f", median ratio {statistics.median(ratios):.3f} of {len(ratios)}"
    print(text)


if __name__ == "__main__":
    main()
