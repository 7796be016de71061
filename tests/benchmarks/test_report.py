"""Rounds become figures: medians of ratios, without those that other processes disturbed."""

from typing import Any

from benchmarks.report import table
from benchmarks.run import is_disturbed


def row(server: str, scenario: str, value: float, reference: float = 200.0, **more: Any) -> dict[str, Any]:
    figures = {"server_us_per_delivery": 5.0, "server_cpu_share": 0.97, "others_share": 0.0}
    measured = {"result": {"value": value, **figures, **more}} if value else {"wrong": "lost"}
    return {"server": server, "scenario": scenario, "reference": {"value": reference, **figures}, **measured}


def test_a_ratio_is_the_median_of_rounds_each_to_its_own_reference() -> None:
    rows = [row("nchan", "fan-out", 150), row("nchan", "fan-out", 80, 100), row("nchan", "fan-out", 20)]
    assert table(rows, 5)[3].split(" | ")[:2] == ["| nchan (nginx)", "0.75"]


def test_the_fastest_stands_first_and_what_was_wrong_says_so() -> None:
    rows = [row("ws", "fan-out", 0), row("nchan", "fan-out", 150), row("pubsub-mw", "fan-out", 300)]
    lines = table(rows, 5)
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| **pubsub-mw**",
        "| C, one write per delivery",
        "| nchan (nginx)",
    ]
    assert lines[5].split(" | ")[:2] == ["| Node `ws`", "failed"]


def test_a_server_that_did_not_get_its_core_is_not_counted() -> None:
    slow = row("nchan", "fan-out", 20, server_cpu_share=0.3)
    assert is_disturbed(slow)
    assert table([slow, row("nchan", "fan-out", 150)], 5)[3].split(" | ")[1] == "0.75"


def test_at_a_fixed_rate_others_disturb_unless_the_measurement_comes_first() -> None:
    busy = row("nchan", "latency", 9, others_share=0.5)
    assert is_disturbed(busy)
    assert not is_disturbed(busy | {"alone": True})
