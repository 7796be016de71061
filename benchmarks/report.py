"""Make the table and the plots of what was measured.

    python -m benchmarks.report [--plots docs/performance]

In:     `build/results.jsonl`, `build/curves.jsonl`, `build/reconnect.jsonl`, `build/publishing.json`
Out:    Markdown on stdout; with --plots (which needs `pip install --group benchmarks`) an SVG for each curve
Owns:   how several rounds become one figure: the median of the newest `--rounds`
Never:  measures
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.curves import CURVES
from benchmarks.loadgen import BUILD
from benchmarks.run import is_disturbed
from benchmarks.scenarios import SCENARIOS

__all__ = ["main"]

Row = dict[str, Any]
_NAMES = {
    "pubsub-mw": "**pubsub-mw**",
    "C": "C, one write per delivery",
    "C-joining": "C, joining what waits for one socket",
    "nchan": "nchan (nginx)",
    "nats": "nats-server, WebSocket",
    "ws": "Node `ws`",
    "websockets": "websockets `broadcast()`",
    "socketio": "Socket.IO + Redis",
    "python-socketio": "python-socketio + Redis",
    "starlette": "Starlette on uvicorn, a loop of `send`",
    "channels": "Django Channels + Redis",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="the newest so many measurements of each count")
    parser.add_argument("--plots", type=Path, help="a folder to draw into")
    options = parser.parse_args()
    rows = read("results.jsonl")
    print("\n".join(table(rows, options.rounds)))
    print("\n".join(["", *others(rows, options.rounds)]))
    if options.plots:
        draw(read("curves.jsonl"), options.plots)


def read(name: str) -> list[Row]:
    path = BUILD / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(rows: list[Row], server: str, scenario: str, rounds: int) -> list[Row]:
    """The newest rounds; those that other processes disturbed only where there are no others."""
    found = [row for row in rows if (row["server"], row["scenario"]) == (server, scenario) and "result" in row]
    return ([row for row in found if not is_disturbed(row)] or found)[-rounds:]


def median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def ratio_of(row: Row) -> float:
    return float(row["result"]["value"] / row["reference"]["value"])


def table(rows: list[Row], rounds: int) -> list[str]:
    """Servers by rows; ratios to the reference measured beside each, the fastest fan-out first."""
    cells: dict[str, Callable[[str], str]] = {
        "1,000 subscribers, one message at a time": lambda name: ratio(name, "fan-out"),
        "µs of CPU per delivery": lambda name: figure(name, "fan-out", "server_us_per_delivery", "{:.1f}"),
        "64 waiting": lambda name: ratio(name, "backlog"),
        "1,000 channels of 1 subscriber": lambda name: ratio(name, "channels"),
        "p99 at 20 msg/s, ms": lambda name: figure(name, "latency", "value", "{:,.1f}"),
        "KB per idle connection": lambda name: figure(name, "memory", "value", "{:.1f}"),
        "connects/s": lambda name: figure(name, "connects", "value", "{:,.0f}"),
    }

    def beside(scenario: str) -> list[Row]:
        return [row for row in rows if row["scenario"] == scenario and not is_disturbed(row)]

    def ratio(name: str, scenario: str) -> str:
        if name == "C":
            return f"1 ({median(row['reference']['value'] for row in beside(scenario)):,.0f}/s)"
        ratios = [ratio_of(row) for row in newest(rows, name, scenario, rounds)]
        value = median(ratios)
        return (f"{value:.2f}" if value >= 0.1 else f"{value:.3f}") if ratios else wrong(name, scenario)

    def figure(name: str, scenario: str, key: str, form: str) -> str:
        if name == "C":
            return form.format(median(row["reference"][key] for row in beside(scenario)))
        found = newest(rows, name, scenario, rounds)
        return form.format(median(row["result"][key] for row in found)) if found else wrong(name, scenario)

    def wrong(name: str, scenario: str) -> str:
        return "failed" if any((row["server"], row["scenario"]) == (name, scenario) for row in rows) else ""

    def speed(name: str) -> float:
        found = newest(rows, name, "fan-out", rounds)
        return 1.0 if name == "C" else median(map(ratio_of, found)) if found else 0.0

    present = sorted({"C", *(row["server"] for row in rows)}, key=speed, reverse=True)
    lines = ["| server | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in present:
        lines.append(f"| {_NAMES[name]} | " + " | ".join(cell(name) for cell in cells.values()) + " |")
    return lines


def others(rows: list[Row], rounds: int) -> list[str]:
    """What has no place in the table."""
    lines = []
    for row in read("reconnect.jsonl")[-2:]:
        kind = "with positions" if row["with_positions"] else "without positions"
        lines.append(f"reconnect {kind}: {json.dumps(row)}")
    path = BUILD / "publishing.json"
    if path.exists():
        lines += [f"{name}: {value:.1f}" for name, value in json.loads(path.read_text()).items()]
    for scenario in SCENARIOS:
        mine = newest(rows, "pubsub-mw", scenario, rounds)
        if mine:
            ratios = sorted(ratio_of(row) for row in mine if row["reference"]["value"])
            lines.append(f"pubsub-mw {scenario}: {len(mine)} rounds, ratios {[round(value, 2) for value in ratios]}")
    return lines


def draw(rows: list[Row], folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, and nothing in the file depends on when it was made.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "pubsub-mw", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    for name, curve in CURVES.items():
        mine = [row for row in rows if row["curve"] == name and "wrong" not in row]
        if not mine:
            continue
        plot, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
        plot.suptitle(curve.title, fontsize=10)
        for server, colour in (("pubsub-mw", "C0"), ("C", "C7")):
            points: dict[int, list[Row]] = {}
            for row in mine:
                if row["server"] == server:
                    points.setdefault(row["x"], []).append(row)
            style = {"color": colour, "marker": "o", "label": server}
            left.plot(*line(points, lambda row: row["per_second"]), **style)
            right.plot(*line(points, lambda row: row["latency_ms"]["p99"]), **style)
            pinged = {x: found for x, found in points.items() if "ping_ms" in found[0]}
            style |= {"marker": ".", "linestyle": ":", "label": f"{server}: ping of others"}
            if pinged:
                right.plot(*line(pinged, lambda row: row["ping_ms"]["p99"]), **style)
        left.set(xlabel=curve.axis, ylabel="deliveries/s", xscale="log", ylim=(0, None))
        right.set(xlabel=curve.axis, ylabel="p99, ms", xscale="log", yscale="log")
        left.legend(frameon=False)
        right.legend(frameon=False)
        plot.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        pyplot.close(plot)


def line(points: dict[int, list[Row]], figure: Callable[[Row], float]) -> tuple[list[int], list[float]]:
    """The medians at each x, to be plotted."""
    xs = sorted(points)
    return xs, [median(figure(row) for row in points[x]) for x in xs]


if __name__ == "__main__":
    main()
