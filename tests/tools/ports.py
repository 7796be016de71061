"""Find a TCP port on the loopback that nothing uses and nothing will take by chance.

In:     nothing
Out:    a free port below the kernel's ephemeral range
Owns:   the list of those it gave out: each once, so that nobody is given the port of one that is still to be started,
        or that is down for a moment
Never:  a port the kernel may give to an outgoing connection. Such a port is dangerous for a server that is killed and
        restarted: a client that keeps trying to reach it may be given that very port to call from, connect to itself,
        and hold the port against the restarted server
"""

import random
import socket
from pathlib import Path

__all__ = ["free_port"]

_LOWEST = 15_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_given: set[int] = set()


def free_port() -> int:
    highest = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32_768
    for _ in range(1_000):
        port = random.randrange(_LOWEST, highest)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError(f"no free port between {_LOWEST} and {highest}")
