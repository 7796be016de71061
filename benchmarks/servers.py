"""Start the servers that are compared: ours, and the reference in C. The others are in `peers.py`.

In:     nothing but the name
Out:    a `Server` that answers, on a port of its own, pinned to the core that is measured
Owns:   the processes that it started, and the cores: what is measured has one to itself
Never:  leaves a process behind
"""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any

import redis
from redis.connection import Connection

from benchmarks.loadgen import BUILD, CHANNEL, TAG, Server, compiled
from pubsub_mw import Publisher
from pubsub_mw.broker.redis.scripts import Scripts
from pubsub_mw.drafts import build_draft
from pubsub_mw.settings import Settings
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer

__all__ = [
    "ALONE",
    "MEASURED",
    "OTHERS",
    "commands_of",
    "descendants",
    "ours",
    "process",
    "publisher_of",
    "reference",
    "resp",
    "settings_of",
    "take_core",
]

MEASURED, OTHERS = 0, min(1, (os.cpu_count() or 1) - 1)  # cores: of the server, of everything else
CHANNELS = 200_000  # that the reference server has room for
_PROJECT = Path(__file__).parents[1]
_SECRET = "a secret of thirty-two bytes or more"
_STOP_SECONDS = 10


ALONE = "as root: SCHED_RR for all that is started, so that other processes get what it leaves"


def take_core(is_alone: bool) -> None:
    """Keep this process and what it starts on the other core; what is measured is moved to its own.

    A higher priority (`nice`) does not help a process that sleeps and wakes as often as a server and its clients do:
    Linux lets whoever runs finish its slice of 3 ms before it looks who woke up.
    """
    if is_alone:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    os.sched_setaffinity(0, {OTHERS})


@contextmanager
def process(
    name: str, command: list[str], port: int | None, env: dict[str, str] | None = None, cores: str = str(MEASURED)
) -> Iterator[int]:
    """Run a command on the measured core, and yield its id once it listens; what it says goes to `build/<name>.log`."""
    BUILD.mkdir(exist_ok=True)
    variables = {"PYTHONPATH": f"{_PROJECT / 'src'}:{_PROJECT}", **os.environ, **(env or {})}
    with (BUILD / f"{name}.log").open("w") as log:
        started = subprocess.Popen(
            ["taskset", "-c", cores, *command], env=variables, stdout=log, stderr=log, cwd=_PROJECT
        )
        try:
            if port is not None:
                _wait_until_it_listens(name, started, port)
            yield started.pid
        finally:
            children = descendants(started.pid)
            started.terminate()
            try:
                started.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            for child in children:
                if _is_alive(child):
                    os.kill(child, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they did."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def _wait_until_it_listens(name: str, started: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            create_connection(("127.0.0.1", port), 1).close()
        except OSError as error:
            if started.poll() is not None or time.monotonic() > deadline:
                said = (BUILD / f"{name}.log").read_text()[-2000:]
                raise SystemExit(f"{name} did not start:\n{said}") from error
            time.sleep(0.05)
        else:
            return


@contextmanager
def reference(name: str = "C", *arguments: str) -> Iterator[Server]:
    """The server in C; `--join` makes one write of what waits for one socket."""
    port = free_port()
    command = [str(compiled("reference")), "--port", str(port), "--channels", str(CHANNELS), *arguments]
    with process("reference", command, port) as pid:
        yield Server(
            name=name,
            port=port,
            pids=[pid],
            dialect=["--path", "/{channel}"],
            publish_port=port,
            build=lambda payload: f"PUB {CHANNEL} {len(payload)}\n{payload}".encode(),
        )


def resp(*arguments: str | bytes) -> bytes:
    """Return a command as Redis reads it."""
    connection: Any = Connection
    return b"".join(connection().pack_command(*arguments))


def settings_of(url: str, **settings: object) -> Settings:
    return Settings.build(url, environ={}, secret=_SECRET, **settings)


@contextmanager
def ours(command: str = "", workers: int = 1, cores: str = str(MEASURED), **settings: object) -> Iterator[Server]:
    """The realtime server of this checkout, with a Redis of its own; published through `publish.lua`.

    Args:
        command: that starts it, with {port}; default: `pubsub-mw realtime`
        workers: processes
        cores: as for `taskset`
        settings: of the server, as in docs/settings.md
    """
    with RedisServer() as broker:
        port = free_port()
        chosen = settings_of(broker.url, **settings)
        env = {"PUBSUB_URL": broker.url, "PUBSUB_SECRET": _SECRET}
        env |= {f"PUBSUB_{name.upper()}": str(value) for name, value in settings.items()}
        default = f"-c 'from pubsub_mw.cli import main; main()' realtime --port {port} --workers {workers}"
        words = shlex.split(command.format(port=port)) if command else [sys.executable, *shlex.split(default)]
        with process("ours", words, port, env, cores) as pid:
            # Loads the script into Redis, so that its digest is known.
            Publisher(broker.url, secret=_SECRET).publish("bench:warm", None)
            # Of several workers the first process only watches; `multiprocessing` also has one that tracks resources.
            workers_of = [child for child in descendants(pid) if b"spawn_main" in _command_line(child)]
            yield Server(
                name="pubsub-mw",
                port=port,
                pids=workers_of or [pid],
                dialect=[
                    *("--path", "/realtime/", "--hello", '{"type":"connect","channels":{{items}}}'),
                    *("--item", '"bench:{channel}":{position}', "--ready", '"type":"subscribed"', "--ready-each"),
                    *("--ping", '{"type":"ping"}', "--pong", '{"type":"pong"}'),
                ],
                publish_port=broker.port,
                build=lambda payload: _publish_command(chosen, payload),
                publishing=["--reply-lines", "2", "--reply-error", "-"],
                redis_port=broker.port,
                beside=[broker.pid],
            )


def _publish_command(settings: Settings, payload: str) -> bytes:
    draft = dataclasses.replace(build_draft(settings, f"bench:{CHANNEL}", payload), tag=TAG)
    (call,) = Scripts(settings).publish([draft], is_retry=False)
    return resp(*call.by_digest())


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def publisher_of(server: Server) -> Publisher:
    """Return a publisher to the Redis of a server of ours."""
    return Publisher(f"redis://127.0.0.1:{server.redis_port}/0", secret=_SECRET)


def commands_of(server: Server) -> dict[str, int]:
    """Return how often the server's Redis ran each command so far."""
    with redis.Redis(port=server.redis_port or 0) as client:
        return {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in client.info("commandstats").items()}
