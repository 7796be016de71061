"""Hold the reading order: a file imports only files above it, and each library stays in its rooms."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pubsub_mw"

# From top to bottom a newcomer reads each file with everything it stands on already known. A package's `__init__.py`
# is a file like the others: at the top of its room where it only explains, below it where it is the way in.
ORDER = [
    "errors.py",
    "model.py",
    "settings.py",
    "protocol.py",
    "grants.py",
    "broker/__init__.py",
    "broker/presence.py",
    "broker/interface.py",
    "broker/codec.py",
    "broker/redis/__init__.py",
    "broker/redis/keyspace.py",
    "broker/redis/scripts.py",
    "broker/redis/servers.py",
    "broker/redis/queue.py",
    "broker/redis/publisher.py",
    "broker/redis/subscriber.py",
    "broker/redis/reader.py",
    "broker/redis/diagnosis.py",
    "broker/memory_queue.py",
    "broker/memory.py",
    "broker/engines.py",
    "drafts.py",
    "publisher.py",
    "middleware.py",
    "realtime/send_queue.py",
    "realtime/wheel.py",
    "realtime/socket.py",
    "realtime/subscription.py",
    "realtime/window.py",
    "realtime/hub.py",
    "realtime/presence.py",
    "realtime/control.py",
    "realtime/authorize.py",
    "realtime/lifecycle.py",
    "realtime/request_check.py",
    "realtime/requests.py",
    "realtime/shared.py",
    "realtime/connection.py",
    "realtime/cursor.py",
    "realtime/origin.py",
    "realtime/http.py",
    "realtime/websocket.py",
    "realtime/sse.py",
    "realtime/longpoll.py",
    "realtime/send.py",
    "realtime/publish.py",
    "realtime/script.py",
    "realtime/metrics.py",
    "realtime/uvicorn_protocol.py",
    "realtime/app.py",
    "realtime/__init__.py",
    "apps.py",
    "worker/environ.py",
    "worker/answers.py",
    "worker/wsgi.py",
    "worker/asgi.py",
    "worker/outbox.py",
    "worker/loop.py",
    "worker/processes.py",
    "worker/__init__.py",
    "asgi.py",
    "client/arrivals.py",
    "client/subscription.py",
    "client/channels.py",
    "client/requests.py",
    "client/websocket.py",
    "client/http.py",
    "client/ladder.py",
    "client/connection.py",
    "client/__init__.py",
    "testing.py",
    "__init__.py",
    "cli.py",
]

# The three ways in. They meet in the broker, and never import each other.
DOORS = ("middleware.py", "realtime/", "worker/")

# Where a library may be imported. Those with no place are the applications' business.
PLACES: dict[str, tuple[str, ...]] = {
    "redis": ("broker/redis/",),
    "starlette": ("realtime/", "asgi.py"),
    "prometheus_client": ("realtime/metrics.py",),
    "flask": (),
    "django": (),
}


class Import:
    """One import statement, wherever in the file it stands.

    Attributes:
        names: what it may load, fully dotted; `from a import b` gives both `a.b` and, if that is no module, `a`
    """

    def __init__(self, line: int, *names: str) -> None:
        self.line = line
        self.names = names

    def file(self, root: Path = SOURCE) -> str | None:
        """The file of ours that it loads, relative to `root`."""
        for name in self.names:
            package, *parts = name.split(".")
            if package != "pubsub_mw":
                continue
            path = root.joinpath(*parts)
            for candidate in (path / "__init__.py", path.with_suffix(".py")):
                if candidate.exists():
                    return candidate.relative_to(root).as_posix()
        return None


def imports_of(text: str, package: str) -> Iterator[Import]:
    """Every import in a module of `package`: at the top, for types only, inside functions, and by `import_module`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (Import(node.lineno, f"{origin}.{alias.name}", origin) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(node.lineno, argument.value)


def files() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@functools.cache
def imports_in(file: str) -> list[Import]:
    package = ".".join(["pubsub_mw", *Path(file).parent.parts])
    return list(imports_of((SOURCE / file).read_text(), package))


def is_in(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def test_the_order_names_every_file_once() -> None:
    assert sorted(ORDER) == files()


@pytest.mark.parametrize("file", files())
def test_a_file_imports_only_files_above_it(file: str) -> None:
    above = ORDER[: ORDER.index(file)] if file in ORDER else []
    down = [
        f"{file}:{i.line} imports {i.file()}" for i in imports_in(file) if (target := i.file()) and target not in above
    ]
    assert not down


def test_doors_meet_only_in_the_broker() -> None:
    crossed = [
        f"{file}:{i.line} imports {target}"
        for mine, other in product(DOORS, DOORS)
        if mine != other
        for file in files()
        if is_in(file, (mine,))
        for i in imports_in(file)
        if (target := i.file()) and is_in(target, (other,))
    ]
    assert not crossed


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_only_in_its_rooms(library: str) -> None:
    strays = [
        f"{file}:{i.line}"
        for file in files()
        if not is_in(file, PLACES[library])
        for i in imports_in(file)
        if any(name.split(".")[0] == library for name in i.names)
    ]
    assert not strays


def test_importing_the_package_loads_no_server_and_no_framework() -> None:
    program = "import sys, pubsub_mw; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "pubsub_mw" in loaded
    unwanted = {"starlette", "uvicorn", "flask", "django", "pubsub_mw.realtime", "pubsub_mw.worker"}
    assert not unwanted.intersection(loaded)


def test_every_way_to_import_is_seen() -> None:
    text = """
from typing import TYPE_CHECKING
import pubsub_mw.errors
if TYPE_CHECKING:
    from pubsub_mw.model import Channel
def later():
    from ..errors import PubSubError
    from .. import settings
    from . import interface
    import importlib; importlib.import_module("pubsub_mw.protocol")
"""
    found = [i.file() for i in imports_of(text, "pubsub_mw.broker")]
    assert sorted(filter(None, found)) == [
        "broker/interface.py", "errors.py", "errors.py", "model.py", "protocol.py", "settings.py",
    ]  # fmt: skip
