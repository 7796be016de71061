"""Install and start the servers that others wrote.

In:     a name
Out:    a `Server` that answers, pinned to the core that is measured; or why there is none
Owns:   `build/python`, `build/node_modules` and `build/debian`, where pip, npm and apt put what is installed
Never:  installs anything into the system: Debian's packages are only unpacked

Each serves in one process, without compression, as its documentation shows it. What takes publications over Redis is
given what its own publisher would send, without the publisher's time.
"""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.loadgen import BUILD, CHANNEL, Server
from benchmarks.servers import OTHERS, descendants, process, resp
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer

__all__ = ["PEERS", "Missing", "install"]

_HERE = Path(__file__).parent
_PYTHON, _NODE, _DEBIAN = BUILD / "python", BUILD / "node_modules", BUILD / "debian"
_PYTHON_PACKAGES = [
    *("channels>=4.3", "channels-redis>=4.3", "django>=5.2,<6", "python-socketio>=5.14", "websockets>=15", "uvloop"),
    # channels-redis opens a connection for each client, of which redis-py 8 allows a hundred.
    "redis>=5,<8",
    *("starlette>=1.0.1", "uvicorn>=0.40", "httptools"),
]
_NODE_PACKAGES = ["ws@8", "socket.io@4", "@socket.io/redis-adapter@8", "redis@5"]
_DEBIAN_PACKAGES = ["nginx", "libnginx-mod-nchan", "nats-server"]


class Missing(Exception):
    """This peer cannot be measured here, and why."""


def install() -> None:
    """Bring what is not there yet; what cannot be brought is named where it is started."""
    BUILD.mkdir(exist_ok=True)
    if not _PYTHON.exists():
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(_PYTHON), *_PYTHON_PACKAGES])
    if not _NODE.exists() and shutil.which("npm"):
        _run(["npm", "install", "--silent", "--no-save", "--prefix", str(BUILD), *_NODE_PACKAGES])
    if not _DEBIAN.exists() and shutil.which("apt-get"):
        archives = BUILD / "archives"
        archives.mkdir(exist_ok=True)
        for package in _DEBIAN_PACKAGES:
            _run(["apt-get", "download", "-qq", package], cwd=archives)
        for archive in archives.glob("*.deb"):
            _run(["dpkg", "-x", str(archive), str(_DEBIAN)])


def _run(command: list[str], cwd: Path | None = None) -> None:
    print(f"$ {' '.join(command)}", file=sys.stderr)
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr[-2000:], file=sys.stderr)


def _program(path: str) -> str:
    program = _DEBIAN / path
    if not program.exists():
        raise Missing("apt-get download brought no package with it")
    return str(program)


@contextmanager
def nchan() -> Iterator[Server]:
    port, nginx = free_port(), _program("usr/sbin/nginx")
    configuration = BUILD / "nginx.conf"
    configuration.write_text((_HERE / "nginx.conf").read_text() % {"port": port, "root": _DEBIAN, "build": BUILD})
    with process(
        "nchan", [nginx, "-p", str(BUILD), "-c", str(configuration), "-e", str(BUILD / "nchan.log")], port
    ) as pid:
        yield Server(
            name="nchan",
            port=port,
            pids=descendants(pid),
            dialect=["--path", "/sub/{channel}"],
            publish_port=port,
            build=lambda payload: (
                f"POST /pub/{CHANNEL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n{payload}".encode()
            ),
            publishing=["--reply-error", "HTTP/1.1 4"],
        )


@contextmanager
def nats() -> Iterator[Server]:
    port, publish_port, program = free_port(), free_port(), _program("usr/sbin/nats-server")
    configuration = BUILD / "nats.conf"
    configuration.write_text((_HERE / "nats.conf").read_text() % {"port": port, "publish_port": publish_port})
    connect = 'CONNECT {"verbose":false,"pedantic":false,"protocol":1}\r\n'
    with process("nats", [program, "-c", str(configuration)], port) as pid:
        yield Server(
            name="nats-server",
            port=port,
            pids=[pid],
            dialect=[
                *("--binary", "--stream", "--hello", connect + "{items}PING\r\n", "--item", "SUB b.{channel} 1\r\n"),
                *("--joiner", "", "--ready", "PONG\r\n", "--ping", "PING\r\n", "--pong", "PONG\r\n"),
            ],
            publish_port=publish_port,
            build=lambda payload: f"PUB b.{CHANNEL} {len(payload)}\r\n{payload}\r\n".encode(),
            publishing=["--publish-hello", connect, "--reply-error", "-ERR"],
        )


@contextmanager
def node_ws() -> Iterator[Server]:
    port, publish_port = free_port(), free_port()
    with process("ws", [*_node("ws.js"), str(port), str(publish_port)], port, _NODE_ENV) as pid:
        yield _taking_lines("Node ws", port, pid, publish_port, ready="")


@contextmanager
def socketio() -> Iterator[Server]:
    with RedisServer() as broker:
        port = free_port()
        with process("socketio", [*_node("socketio.js"), str(port), str(broker.port)], port, _NODE_ENV) as pid:
            yield _speaking_socketio("Socket.IO + Redis", port, pid, broker, _for_socketio)


@contextmanager
def python_socketio() -> Iterator[Server]:
    with RedisServer() as broker:
        port = free_port()
        with process(
            "python_socketio", [*_python("python_socketio.py"), str(port), str(broker.port)], port, _PYTHON_ENV
        ) as pid:
            yield _speaking_socketio("python-socketio + Redis", port, pid, broker, _for_python_socketio)


@contextmanager
def channels() -> Iterator[Server]:
    with RedisServer() as broker:
        port, publish_port, app = free_port(), free_port(), _python("channels_app.py")
        publisher = [*app, "publish", str(publish_port), str(broker.port)]
        with (
            process("channels", [*app, "serve", str(port), str(broker.port)], port, _PYTHON_ENV) as pid,
            process("channels_publisher", publisher, publish_port, _PYTHON_ENV, str(OTHERS)) as other,
        ):
            server = _taking_lines("Django Channels + Redis", port, pid, publish_port)
            server.publishing = ["--reply-lines", "1"]
            server.beside = [broker.pid, other]
            yield server


@contextmanager
def _python_peer(name: str, script: str) -> Iterator[Server]:
    port, publish_port = free_port(), free_port()
    with process(Path(script).stem, [*_python(script), str(port), str(publish_port)], port, _PYTHON_ENV) as pid:
        yield _taking_lines(name, port, pid, publish_port)


_NODE_ENV = {"NODE_PATH": str(_NODE), "NODE_ENV": "production"}
_PYTHON_ENV = {"PYTHONPATH": str(_PYTHON)}


def _node(script: str) -> list[str]:
    node = shutil.which("node")
    if node is None:
        raise Missing("node is not installed")
    if not _NODE.exists():
        raise Missing("npm could not install it")
    return [node, str(_HERE / script)]


def _python(script: str) -> list[str]:
    if not _PYTHON.exists():
        raise Missing("pip could not install it")
    return [sys.executable, str(_HERE / script)]


def _taking_lines(name: str, port: int, pid: int, publish_port: int, ready: str = "ready") -> Server:
    return Server(
        name=name,
        port=port,
        pids=[pid],
        dialect=["--path", "/{channel}", "--ready", ready],
        publish_port=publish_port,
        build=lambda payload: f"PUB {CHANNEL} {len(payload)}\n{payload}".encode(),
    )


def _speaking_socketio(name: str, port: int, pid: int, broker: RedisServer, build: Callable[[str], bytes]) -> Server:
    return Server(
        name=name,
        port=port,
        pids=[pid],
        dialect=[
            *("--path", "/socket.io/?EIO=4&transport=websocket&channel={channel}", "--hello", "40"),
            *("--ready", '42["ready"]', "--ping", "2", "--pong", "3"),
        ],
        publish_port=broker.port,
        build=build,
        publishing=["--reply-lines", "1", "--reply-error", "-"],
        redis_port=broker.port,
        beside=[broker.pid],
    )


def _for_socketio(payload: str) -> bytes:
    """What `@socket.io/redis-emitter` sends for `io.to(channel).emit("message", payload)`."""
    packet = {"type": 2, "data": ["message", payload], "nsp": "/"}
    message = _msgpack(["emitter", packet, {"rooms": [CHANNEL], "except": [], "flags": {}}])
    return resp("PUBLISH", f"socket.io#/#{CHANNEL}#", message)


def _for_python_socketio(payload: str) -> bytes:
    """What `RedisManager(write_only=True).emit("message", payload, room=channel)` sends."""
    message = {"method": "emit", "event": "message", "data": [payload], "binary": False, "namespace": "/"}
    message |= {"room": CHANNEL, "skip_sid": None, "callback": None, "host_id": "0" * 32}
    return resp("PUBLISH", "socketio", json.dumps(message))


def _msgpack(value: object) -> bytes:
    if isinstance(value, str):
        data = value.encode()
        return b"\xdb" + len(data).to_bytes(4, "big") + data
    if isinstance(value, int):
        return bytes([value])  # 0 to 127
    if isinstance(value, list):
        return bytes([0x90 + len(value)]) + b"".join(map(_msgpack, value))
    assert isinstance(value, dict)
    return bytes([0x80 + len(value)]) + b"".join(_msgpack(key) + _msgpack(item) for key, item in value.items())


PEERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "nchan": nchan,
    "nats": nats,
    "ws": node_ws,
    "socketio": socketio,
    "python-socketio": python_socketio,
    "channels": channels,
    "websockets": functools.partial(_python_peer, "websockets broadcast()", "websockets_broadcast.py"),
    "starlette": functools.partial(_python_peer, "Starlette, a loop of send", "starlette_loop.py"),
}
