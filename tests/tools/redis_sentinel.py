"""Run a Redis that fails over: two servers, one the other's replica, and three sentinels that watch them.

In:     which of them is to be killed, paused or promoted
Out:    `url`, which names the sentinels, and `master`, as most of them see it
Owns:   five processes, each on a port of its own
Never:  lets a test wait for the patience of production: what sentinels do every few seconds they do many times a second
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen

import redis

from tests.tools.clock import MS, eventually
from tests.tools.redis_server import RedisServer

__all__ = ["NAME", "RedisGroup", "SentinelServer", "is_following"]

NAME = "mymaster"
QUORUM = 2

# Milliseconds; by default one second and more. Redis 6.2 does not know the command, and takes its time.
_HASTE = {"INFO-PERIOD": 200, "PUBLISH-PERIOD": 200, "ASK-PERIOD": 200, "TILT-PERIOD": 1_000}
# An old master that lives is left alone four times as long; by default eight seconds.
_LEISURE = {"PUBLISH-PERIOD": 1_000}


def is_following(server: RedisServer) -> bool:
    """Whether it is a replica that has all that its master had."""
    try:
        role = server.cli("ROLE")
    except redis.ConnectionError:
        return False  # whoever is made a replica closes all connections
    return bool(role[0] == "slave" and role[3] == "connected")


class SentinelServer(RedisServer):
    """One sentinel that watches the server at `port`. Alone it promotes nobody."""

    def __init__(self, port: int, name: str = NAME) -> None:
        super().__init__()
        self._name = name
        self._watched = port

    def _launch(self) -> None:
        # A file, because a sentinel writes down what it learns. It is read anew when the sentinel starts again.
        config = self.directory / "sentinel.conf"
        if not config.exists():
            config.write_text(self._config(config.parent))
        command = ["redis-server", str(config), "--sentinel"]
        self._process = Popen(command, start_new_session=True)

    def _config(self, directory: Path) -> str:
        return f"""
            port {self.port}
            bind 127.0.0.1
            dir {directory}
            logfile {directory}/log
            sentinel monitor {self._name} 127.0.0.1 {self._watched} {QUORUM}
            sentinel down-after-milliseconds {self._name} {round(500_000 * MS)}
            sentinel failover-timeout {self._name} {round(2_000_000 * MS)}
        """

    def pace(self, periods: Mapping[str, int]) -> None:
        with suppress(redis.ResponseError):
            self.cli("SENTINEL", "DEBUG", *(item for pair in periods.items() for item in pair))

    def watch(self, port: int) -> None:
        """Watch this one instead, whatever became of the other."""
        self.cli("SENTINEL", "REMOVE", self._name)
        self.cli("SENTINEL", "MONITOR", self._name, "127.0.0.1", port, QUORUM)

    def names(self) -> int:
        """The port of the master that it would send a client to."""
        return int(self.cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1])

    def knows_all(self) -> bool:
        """Whether it has found the replica and the other sentinels, without which nothing fails over."""
        state = self.cli("SENTINEL", "MASTER", NAME)
        facts = state if isinstance(state, dict) else dict(zip(state[::2], state[1::2], strict=True))
        return (int(facts["num-slaves"]), int(facts["num-other-sentinels"])) == (1, 2)


class RedisGroup:
    """Two servers and three sentinels.

    Attributes:
        servers: the first master, and its replica
        sentinels: three, in the order of the url
    """

    def __init__(self) -> None:
        # Without disk a master waits for more replicas first, and then a second before it sends what is new.
        options = ("--repl-diskless-sync", "no")
        first = RedisServer(*options)
        self.servers = [first, RedisServer(*options, "--replicaof", "127.0.0.1", str(first.port))]
        self.sentinels = [SentinelServer(first.port) for _ in range(3)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{item.port}' for item in self.sentinels)}/{NAME}/0"

    @property
    def master(self) -> RedisServer:
        """The server that every running sentinel names, once they agree."""
        names = {item.names() for item in self.sentinels if item.is_running}
        assert len(names) == 1, f"they name {names}"
        return next(server for server in self.servers if server.port in names)

    @property
    def other(self) -> RedisServer:
        """The server that is not the master."""
        (other,) = (server for server in self.servers if server is not self.master)
        return other

    def failover(self) -> None:
        """Have the replica promoted, as an operator would. The old master goes on for a while as if nothing were."""
        self.sentinels[0].cli("SENTINEL", "FAILOVER", NAME)

    def wait_for(self, server: RedisServer, timeout: float = 10_000 * MS) -> None:
        """Wait until all sentinels name `server`."""
        eventually(lambda: self.master is server, timeout, "no failover")

    def wait_for_replica(self) -> None:
        """Wait until the other server follows the master, and has all of it.

        It says that it is connected up to a second before it is sent anything.
        """
        eventually(lambda: is_following(self.other), 15_000 * MS, "it does not follow")

        def has_all() -> bool:
            with redis.Redis(port=self.master.port, single_connection_client=True) as client:
                try:
                    client.set("written", "to be waited for")
                except redis.ResponseError:
                    return False  # min-replicas-to-write
                return bool(client.wait(1, round(1_000_000 * MS)))

        eventually(has_all, 15_000 * MS, "it does not get what is written")

    def start(self) -> "RedisGroup":
        for server in self.servers:
            self._stack.callback(server.close)
            server.start()
        eventually(lambda: is_following(self.servers[1]))
        for sentinel in self.sentinels:
            self._stack.callback(sentinel.close)
            sentinel.start()
            sentinel.pace(_HASTE)
        eventually(lambda: all(sentinel.knows_all() for sentinel in self.sentinels))
        for sentinel in self.sentinels:
            sentinel.pace(_LEISURE)
        self.wait_for_replica()
        return self

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "RedisGroup":
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()
