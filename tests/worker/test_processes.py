"""Several worker processes and the one that keeps them running."""

import os
import signal
from pathlib import Path

import pytest

from tests.tools.clock import MS, eventually
from tests.tools.redis_server import RedisServer
from tests.tools.servers import PROJECT, Processes, Served

TAKES = "takes requests"


@pytest.fixture
def env(redis_server: RedisServer, prefix: str) -> dict[str, str]:
    return {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": "s" * 32, "PUBSUB_DRAIN": "2"}


def start(processes: Processes, env: dict[str, str], count: int, *options: str, cwd: Path | None = None) -> Served:
    """Run workers on an app that tells in the log when it is imported; wait until all take requests."""
    app = "tests.apps.answering:app" if cwd is None else "site_app:app"
    options = ("--processes", str(count), *options)
    worker = processes.pubsub_mw("worker", app, *options, env=env, cwd=cwd or PROJECT)
    eventually(lambda: worker.log.count(TAKES) == count, 15_000 * MS)
    return worker


def running(worker: Served) -> list[int]:
    """Ids of the processes that run the app."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it ended
        if parent == worker.pid and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_is_replaced_and_the_others_are_left_alone(
    processes: Processes, env: dict[str, str], number: int
) -> None:
    worker = start(processes, env, 2)
    before = running(worker)
    os.kill(before[0], number)
    eventually(lambda: worker.log.count(TAKES) == 3, 15_000 * MS)
    after = running(worker)
    assert len(after) == 2
    assert before[1] in after
    assert before[0] not in after


def test_all_end_with_the_one_that_supervises(processes: Processes, env: dict[str, str]) -> None:
    worker = start(processes, env, 2)
    pids = running(worker)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert not any(map(is_alive, pids))


def test_all_end_also_when_the_one_that_supervises_is_killed(processes: Processes, env: dict[str, str]) -> None:
    worker = start(processes, env, 2)
    pids = running(worker)
    os.kill(worker.pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)), 10_000 * MS)


def test_a_process_that_does_not_end_is_killed(processes: Processes, env: dict[str, str]) -> None:
    worker = start(processes, env | {"PUBSUB_DRAIN": "0"}, 1)
    (pid,) = running(worker)
    os.kill(pid, signal.SIGSTOP)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(15_000 * MS) == 0
    assert not is_alive(pid)
    assert "did not end" in worker.log


def test_a_changed_source_file_starts_all_anew(processes: Processes, env: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "site_app.py"
    text = "print('version {}', flush=True)\ndef app(environ, start_response):\n    return []\n"
    source.write_text(text.format(1))
    worker = start(processes, env, 2, "--reload", cwd=tmp_path)
    before = set(running(worker))

    def is_noticed() -> bool:
        source.write_text(text.format(2))  # again and again, since the watch may not have begun
        return "a source file changed" in worker.log

    eventually(is_noticed, 10_000 * MS)
    eventually(lambda: worker.log.count("version 2") >= 2, 15_000 * MS)
    assert not before & set(running(worker))


def test_an_app_that_is_not_there_is_said_in_a_sentence(processes: Processes, env: dict[str, str]) -> None:
    worker = processes.pubsub_mw("worker", "nowhere:app", env=env)
    assert worker.wait() == 1
    assert "there is no module 'nowhere'" in worker.log
    assert "Traceback" not in worker.log


def test_a_worker_without_a_broker_that_others_reach_says_so(processes: Processes) -> None:
    worker = processes.pubsub_mw("worker", "tests.apps.answering:app")
    assert worker.wait() == 2
    assert "redis://" in worker.log
