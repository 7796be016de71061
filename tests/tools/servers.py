"""Run the programs of a deployment as processes, and end them for certain.

In:     what a user types: `uvicorn pubsub_mw.asgi:app`, `gunicorn app:app`, `pubsub-mw serve ...`, with an environment
Out:    `Served`: its url, its log so far, its signals
Owns:   the processes it started, each in a process group of its own with one log file
Never:  leaves a process or a zombie behind; hands a test's own PUBSUB_* variables to a process
"""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port

__all__ = ["Processes", "Served"]

PROJECT = Path(__file__).parents[2]
_LOG_TAIL_CHARS = 4000


class Served:
    """One process that serves `port`, started and answering."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log_path: Path,
        env: Mapping[str, str],
        cwd: Path,
        ready_path: str | None,
    ) -> None:
        self.command = list(command)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.ws_url = f"ws://127.0.0.1:{port}"
        self._log_path = log_path
        self._ready_path = ready_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """What it has written so far, standard error included."""
        return self._log_path.read_text(errors="replace")

    def tail(self) -> str:
        return f"$ {' '.join(self.command)}\n{self.log[-_LOG_TAIL_CHARS:]}"

    def wait_until_ready(self, timeout: float = 15_000 * MS) -> "Served":
        """Wait until it answers; a process that ends instead fails the test with the end of its log."""

        def answers() -> bool:
            if self.exit_code is not None:
                raise RuntimeError(f"the process ended with {self.exit_code} before it served:\n{self.tail()}")
            return self._answers()

        try:
            eventually(answers, timeout)
        except AssertionError as error:
            raise AssertionError(f"port {self.port} did not answer within {timeout:g} s:\n{self.tail()}") from error
        return self

    def _answers(self) -> bool:
        try:
            if self._ready_path is None:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return True
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
            try:
                connection.request("GET", self._ready_path)
                return connection.getresponse().status < 500
            finally:
                connection.close()
        except (OSError, http.client.HTTPException):
            return False

    def wait_for_log(self, text: str, timeout: float = 10_000 * MS) -> None:
        eventually(lambda: text in self.log, timeout, f"{text!r} is not in the log:\n{self.tail()}")

    def send_signal(self, number: int) -> None:
        """To the main process alone, as systemd or a container does."""
        self._process.send_signal(number)

    def pause(self) -> None:
        """Stop the main process and its children: connections stay open, nothing answers."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_group(signal.SIGCONT)

    def kill(self) -> None:
        """End it and its children at once, and reap it."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout: float = 10_000 * MS) -> int:
        """Wait for it to end by itself; its exit code. One that does not end fails the test with the end of its log."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.tail()}") from None

    def stop(self, deadline: float = 10_000 * MS) -> int:
        """SIGTERM, and SIGKILL to the whole group after `deadline`. Its exit code tells which of them it took."""
        self.ask_to_stop()
        return self.end(deadline)

    def ask_to_stop(self) -> None:
        """SIGTERM, also to one that is paused; nothing if it has ended."""
        if self.exit_code is None:
            self.resume()
            self.send_signal(signal.SIGTERM)

    def end(self, deadline: float = 10_000 * MS) -> int:
        """Wait for one that was asked to stop, as `stop` does."""
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            pass
        self.kill()
        return self._process.returncode

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # all gone; PermissionError is what macOS says of a group of zombies


class Processes:
    """Start processes of one test; `close` kills them, newest first.

    Every start waits until the process answers; with `wait=False` it does not, and several start at the same time.
    In an async test waiting holds the event loop for about half a second; where something in the loop must go on
    meanwhile, use `await asyncio.to_thread(processes.uvicorn, ...)`.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pubsub-processes-"))
        self.started: list[Served] = []

    def start(
        self,
        command: Sequence[str],
        *,
        port: int,
        env: Mapping[str, str] | None = None,
        cwd: Path = PROJECT,
        ready_path: str | None = None,
        wait: bool = True,
    ) -> Served:
        """Run `command`, which serves `port`. Ready: `ready_path` answers below 500, or else the port accepts."""
        log_path = self._directory / f"{len(self.started)}.log"
        served = Served(command, port=port, log_path=log_path, env=_environment(env), cwd=cwd, ready_path=ready_path)
        self.started.append(served)
        return served.wait_until_ready() if wait else served

    def uvicorn(
        self,
        app: str = "pubsub_mw.asgi:app",
        *args: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        cwd: Path = PROJECT,
        ready_path: str | None = "/realtime/health",
        wait: bool = True,
    ) -> Served:
        port = port or free_port()
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), *args]
        return self.start(command, port=port, env=env, cwd=cwd, ready_path=ready_path, wait=wait)

    def gunicorn(
        self,
        app: str,
        *args: str,
        workers: int = 2,
        preload: bool = False,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        cwd: Path = PROJECT,
        ready_path: str | None = None,
        wait: bool = True,
    ) -> Served:
        port = port or free_port()
        command = [sys.executable, "-m", "gunicorn", app, "--bind", f"127.0.0.1:{port}", "--workers", str(workers)]
        command += ["--worker-tmp-dir", str(self._directory), *(["--preload"] if preload else []), *args]
        return self.start(command, port=port, env=env, cwd=cwd, ready_path=ready_path, wait=wait)

    def pubsub_mw(
        self,
        subcommand: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        cwd: Path = PROJECT,
        ready_path: str | None = None,
        wait: bool = True,
    ) -> Served:
        """Run the installed `pubsub-mw` command; `--port` is added for the commands that serve."""
        serves = subcommand in {"serve", "realtime", "demo"}
        port = port or free_port()
        command = [str(Path(sys.executable).with_name("pubsub-mw")), subcommand, *args]
        command += ["--port", str(port)] if serves else []
        return self.start(command, port=port, env=env, cwd=cwd, ready_path=ready_path, wait=wait and serves)

    def logs(self) -> str:
        return "\n".join(served.tail() for served in self.started)

    def close(self) -> None:
        """Kill them: how they stop when they are asked to is for tests of that, and takes each its time."""
        for served in reversed(self.started):
            served.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(given: Mapping[str, str] | None) -> dict[str, str]:
    """The test's environment without its settings, which are for `given` alone to set."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PUBSUB_")}
    return {**inherited, "PYTHONUNBUFFERED": "1", **(given or {})}
