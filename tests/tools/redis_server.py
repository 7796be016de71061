"""Run a private redis-server, and break it.

In:     options as on redis-server's command line
Out:    `url` of a server that answers, on a port that stays the same through restarts
Owns:   one process, and a directory in /tmp with its log, its socket and, when asked for, its files
Never:  touches another Redis; leaves its process behind after `stop`
"""

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.tools.clock import MS, eventually
from tests.tools.ports import free_port

__all__ = ["RedisServer"]


class RedisServer:
    """A Redis of one's own. It keeps nothing over a restart unless `options` say so, e.g. `"--appendonly", "yes"`."""

    def __init__(self, *options: str) -> None:
        # Not pytest's tmp_path: the path of a unix socket has room for about a hundred characters.
        self.directory = Path(tempfile.mkdtemp(prefix="pubsub-redis-"))
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self.directory}/redis.sock?db=0"
        self._options = ("--save", "", "--appendonly", "no", *options)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        if self._process is not None:
            raise RuntimeError("this Redis runs already")
        for _ in range(5):
            self._launch()
            if self._is_ready():
                return self
            if "Address already in use" not in self.log:
                break
        raise AssertionError(f"redis-server did not start:\n{self.log[-2000:]}")

    def _launch(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--unixsocket", str(self.directory / "redis.sock"), "--logfile", str(self.directory / "log")]
        (self.directory / "log").unlink(missing_ok=True)
        # A session of its own: Ctrl-C at the terminal is for pytest, which then stops its servers in order.
        self._process = subprocess.Popen([*command, *self._options], start_new_session=True)

    def _is_ready(self) -> bool:
        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                return True
            try:
                return bool(self.cli("PING"))
            except (redis.ConnectionError, redis.TimeoutError):
                return False  # not listening yet, or still loading its files

        eventually(answers, 10_000 * MS, "redis-server does not answer")
        if self.is_running:
            return True
        self._process = None
        return False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("this Redis does not run")
        return self._process.pid

    @property
    def log(self) -> str:
        """What Redis wrote since it was last started."""
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def cli(self, *args: str | int | float | bytes) -> Any:
        """Send one command on a connection of its own, as redis-cli would, and return the reply as text."""
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=self.port, decode_responses=True, socket_timeout=5, retry=once) as client:
            return client.execute_command(*args)

    def stop(self) -> None:
        """End it in order, so that it saves what it was told to save."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Start it again on the same port, after `stop`, after `kill`, or in one step as a deploy does."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop its process: connections stay open and nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
