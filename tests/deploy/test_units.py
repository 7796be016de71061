"""The systemd units, the Compose file and the Dockerfile, as far as that goes without starting any."""

import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pubsub_mw.cli import main
from pubsub_mw.settings import Settings
from tests.tools.nginx import CONFIGURATION
from tests.tools.servers import PROJECT

DEPLOY = PROJECT / "docs" / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


class Unit(RawConfigParser):
    """A unit file: a key may come several times, and names have capitals."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=["="], interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read_string(path.read_text())

    @property
    def command(self) -> list[str]:
        return shlex.split(self["Service"]["ExecStart"].replace("%i", "8001"))


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_has_nothing_to_say_about_a_unit(path: Path, tmp_path: Path) -> None:
    """With a program at the place that it names. Where there is no systemd, its checks are left to the other tests."""
    analyze = shutil.which("systemd-analyze")
    text = path.read_text()
    assert "/srv/myapp/venv/bin/" in text
    copy = tmp_path / path.name.replace("@", "@8001")
    copy.write_text(text.replace("/srv/myapp/venv/bin", str(Path(sys.executable).parent)))
    if analyze is None:
        assert {"Unit", "Service", "Install"} <= set(Unit(copy))
        return
    said = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True, check=False)
    assert said.stderr + said.stdout == ""
    exposure = subprocess.run([analyze, "security", "--offline=true", str(copy)], capture_output=True, text=True)
    level = re.search(r"exposure level for \S+: ([\d.]+)", exposure.stdout)
    assert level
    assert float(level[1]) < 2


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_comes_back_and_is_given_the_time_that_its_drain_takes(path: Path) -> None:
    unit = Unit(path)
    command = unit.command
    drain = float(command[command.index("--drain") + 1]) if "--drain" in command else Settings().drain
    if "gunicorn" in command[0]:
        drain = 30  # gunicorn's own graceful_timeout

    assert unit["Service"]["Restart"] == "always"
    assert unit["Service"]["KillMode"] == "mixed", "the main process tells the others"
    assert seconds(unit["Service"]["TimeoutStopSec"]) >= drain + 5


def test_all_units_read_one_environment_which_holds_settings_that_exist() -> None:
    assert {Unit(path)["Service"]["EnvironmentFile"] for path in UNITS} == {"/etc/myapp.env"}
    check_settings(re.findall(r"(?m)^(\w+)=", (DEPLOY / "systemd" / "myapp.env").read_text()))


def test_compose_starts_what_the_units_start() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    commands = {name: service.get("command") for name, service in services.items() if "build" in service}
    image = (DEPLOY / "Dockerfile").read_text()
    commands["app"] = yaml.safe_load(image.rpartition("CMD ")[2])

    assert {name: essence(command) for name, command in commands.items()} == {
        re.sub(r"myapp-?|@|\.service", "", path.name) or "app": essence(Unit(path).command) for path in UNITS
    }
    for command in commands.values():
        check_options(command)
    check_settings([name for name in services["worker"]["environment"] if name.startswith("PUBSUB_")])
    assert seconds(services["realtime"]["stop_grace_period"]) >= Settings().drain + 5


def test_ports_are_those_that_nginx_passes_to_and_open_on_the_loopback_alone() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    passed = set(re.findall(r"(?m)^ +server (127\.0\.0\.1:\d+)", CONFIGURATION.read_text()))

    assert {port.rpartition(":")[0] for port in ports} == passed
    for path in UNITS:
        check_options(Unit(path).command)


def essence(command: list[str]) -> list[str]:
    """Without where it listens, which is another place in a container."""
    words = iter(Path(command[0]).name if index == 0 else word for index, word in enumerate(command))
    return [word for word in words if word not in ("--host", "--bind", "--port") or not next(words)]


def check_options(command: list[str]) -> None:
    if Path(command[0]).name == "pubsub-mw":
        found = main.commands[command[1]]
        known = {name for option in found.params if isinstance(option, click.Option) for name in option.opts}
        assert {word for word in command if word.startswith("--")} <= known


def check_settings(names: list[Any]) -> None:
    assert names
    assert {name.removeprefix("PUBSUB_").lower() for name in names} <= set(Settings.__dataclass_fields__)
