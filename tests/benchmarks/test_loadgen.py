"""The load generator finds out what a server does wrong, and what it measures of ours is right."""

import json

import pytest

from benchmarks.loadgen import Wrong, drive
from benchmarks.servers import ours, reference

_SMALL = ("--connections", 10, "--messages", 20, "--warm-up", 0, "--settle", 0.05, "--timeout", 1)


@pytest.mark.parametrize(
    ("fault", "finding"), [("lose:55", "lost"), ("double:55", "doubled"), ("misorder:55", "misordered")]
)
def test_a_server_that_is_wrong_has_no_number(fault: str, finding: str) -> None:
    with (
        reference("C", "--fault", fault) as server,
        pytest.raises(Wrong) as caught,
    ):
        drive(server, *_SMALL, "--burst", 20)
    said = json.loads(str(caught.value).partition("{")[2].join(("{", "")))
    assert said[finding] > 0
    assert [said[name] for name in ("lost", "doubled", "misordered") if name != finding] == [0, 0]


@pytest.mark.parametrize("joining", [(), ("--join",)])
def test_a_server_that_is_right_has_one(joining: tuple[str, ...]) -> None:
    with reference("C", *joining) as server:
        said = drive(server, *_SMALL, "--burst", 4, "--channels", 2)
    assert said["deliveries"] == 5 * 20
    assert said["per_second"] > 0


def test_of_what_waits_for_a_stopped_server_nothing_is_lost() -> None:
    with reference() as server:
        said = drive(server, *_SMALL, "--burst", 20, "--stop")
    assert said["deliveries"] == 10 * 20


def test_our_server_is_right() -> None:
    with ours() as server:
        said = drive(server, *_SMALL, "--burst", 4, "--channels", 4, "--per-connection", 2, "--timeout", 10)
    assert said["deliveries"] == 5 * 20
