"""Compile the load generator and the reference server, and run the load generator.

In:     a `Server`, and what to do with it, as options of `native/loadgen.c`
Out:    the JSON object that it printed, as a dict
Owns:   `benchmarks/build/`, where everything that is made or installed goes
Never:  believes a number from a run that lost, doubled or misordered anything: `Wrong` is raised
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

__all__ = ["BUILD", "PAYLOAD_BYTES", "Server", "Wrong", "compiled", "drive", "hold", "payload_text", "with_places"]

BUILD = Path(__file__).parent / "build"
PAYLOAD_BYTES = 128

# What stands in a payload until the bytes 1 to 4, as many as there are digits, take its place: channel, sequence, time.
_CHANNEL, _SEQUENCE, _TIME, _TAG = "99999983", "88888883", "7777777777777773", "66666663"
CHANNEL, TAG = _CHANNEL, _TAG


class Wrong(Exception):
    """A server lost, doubled or misordered something, refused clients, or did not answer in time."""


@dataclass(kw_only=True)
class Server:
    """A server that runs, and how to talk to it.

    Attributes:
        name: as in the table
        port: of its WebSockets
        pids: of its processes, without Redis
        dialect: arguments of the load generator: what a client says
        publish_port: where publications are written to
        build: a payload -> the bytes that publish it, with places for the digits
        publishing: more arguments of the load generator, about that connection
        redis_port: of the Redis that it uses, if any
        beside: ids of processes that do their part on the other core: Redis, a publisher
    """

    name: str
    port: int
    pids: list[int]
    dialect: list[str]
    publish_port: int
    build: Callable[[str], bytes]
    publishing: list[str] = field(default_factory=list)
    redis_port: int | None = None
    beside: list[int] = field(default_factory=list)


def compiled(name: str) -> Path:
    """Return the program made from `native/<name>.c`, made anew where the source is newer."""
    source, program = Path(__file__).parent / "native" / f"{name}.c", BUILD / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        if shutil.which("cc") is None:
            raise SystemExit("a C compiler is needed: apt install gcc libc6-dev")
        BUILD.mkdir(exist_ok=True)
        # Made beside and moved: somebody else may be running the old one, or making the same.
        new = BUILD / f"{name}.{os.getpid()}"
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", new, source], check=True)
        new.rename(program)
    return program


def payload_text(size: int = PAYLOAD_BYTES) -> str:
    """Return a payload of so many bytes with the mark that the load generator checks."""
    mark = f"~S{_SEQUENCE}{_CHANNEL}{_TIME}"
    return mark + "x" * (size - len(mark))


def with_places(publication: bytes) -> bytes:
    """Put the places where digits go instead of the numbers that `payload_text`, `CHANNEL` and `TAG` hold."""
    for number, byte in ((_CHANNEL, b"\1"), (_SEQUENCE, b"\2"), (_TIME, b"\3"), (_TAG, b"\4")):
        publication = publication.replace(number.encode(), byte * len(number))
    return publication


def drive(server: Server, *options: str | int | float, payload: int = PAYLOAD_BYTES) -> dict[str, Any]:
    """Run the load generator against `server` until it is done.

    Raises:
        Wrong: what arrived is not what was published.
    """
    with _template(server, payload) as publishing:
        command = [str(compiled("loadgen")), *_address(server), *publishing, *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Wrong(f"{server.name}: {done.stderr}{done.stdout}")
    return cast(dict[str, Any], json.loads(done.stdout))


@contextmanager
def hold(server: Server, *options: str | int | float) -> Iterator[dict[str, Any]]:
    """Keep clients subscribed in the block; yields how many there are and how long it took, and after it all that was.

    Raises:
        Wrong: not all could subscribe, or some were closed meanwhile.
    """
    command = [str(compiled("loadgen")), *_address(server), "--mode", "hold", *map(str, options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            said = json.loads(line or "{}")
            if "subscribed" not in said:
                raise Wrong(f"{server.name}: {line}")
            yield said
        finally:
            process.stdin.close()
        said |= json.loads(process.stdout.read())
        if not said["ok"]:
            raise Wrong(f"{server.name}: {said}")


def _address(server: Server) -> list[str]:
    pids = [argument for pid in server.pids for argument in ("--pid", str(pid))]
    beside = [argument for pid in server.beside for argument in ("--beside", str(pid))]
    return ["--port", str(server.port), *server.dialect, *pids, *beside]


@contextmanager
def _template(server: Server, payload: int) -> Iterator[list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".template") as file:
        file.write(with_places(server.build(payload_text(payload))))
        file.flush()
        yield ["--publish-port", str(server.publish_port), "--publish-template", file.name, *server.publishing]
