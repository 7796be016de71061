"""The tools of the tests, shown to do what tests believe of them."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis
from blockbuster import BlockingError
from playwright.async_api import Page
from redis.backoff import NoBackoff
from redis.retry import Retry
from websockets.asyncio.server import ServerConnection, serve

import pubsub_mw
from tests.tools.browser import PageErrors
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.http_proxy import HttpProxy
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes
from tests.tools.tcp_proxy import TcpProxy

NEVER = Retry(NoBackoff(), 0)
Proxy = Callable[[int], TcpProxy]


class EchoServer:
    """Send back what comes in, and remember it."""

    def __init__(self) -> None:
        self.received = b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65_536):
                    self.received += data
                    connection.sendall(data)
            except OSError:
                pass


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.socket.shutdown(socket.SHUT_RDWR)
    server.socket.close()


def dial(port: int, timeout: float = 2000 * MS) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout)


# The proxy.


def test_proxy_passes_bytes_both_ways_and_a_close_in_order(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    data = os.urandom(3_000_000)
    with dial(proxy.port) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        with client.makefile("rb") as stream:
            assert stream.read(len(data)) == data
            sender.join()
            client.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
    assert (proxy.bytes_up, proxy.bytes_down) == (len(data), len(data))
    eventually(lambda: proxy.connections == 0)


def test_frozen_bytes_arrive_when_it_thaws(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    with dial(proxy.port) as client:
        client.sendall(b"before")
        assert client.recv(6) == b"before"
        proxy.freeze()
        client.sendall(b"frozen")
        client.settimeout(100 * MS)
        with pytest.raises(TimeoutError):
            client.recv(6)
        assert echo.received == b"before"
        proxy.pass_through()
        client.settimeout(2_000 * MS)
        assert client.recv(6) == b"frozen"


def test_a_black_hole_takes_bytes_for_good_and_its_connections_stay_dark(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    with dial(proxy.port) as old, dial(proxy.port) as idle:
        idle.sendall(b"a")
        assert idle.recv(1) == b"a"
        proxy.blackhole()
        for _ in range(20):
            old.sendall(b"x" * 65_536)  # taken, or this would run into its timeout
        with dial(proxy.port) as during:
            during.sendall(b"y")
            eventually(lambda: proxy.connections == 3)
        proxy.pass_through()
        old.sendall(b"z")
        old.settimeout(100 * MS)
        with pytest.raises(TimeoutError):
            old.recv(1)
        idle.sendall(b"b")
        assert idle.recv(1) == b"b"
        with dial(proxy.port) as new:
            new.sendall(b"new")
            assert new.recv(3) == b"new"
    assert echo.received == b"abnew"


def test_reset_ends_open_connections_and_no_others(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    with dial(proxy.port) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with dial(proxy.port) as client:
        client.sendall(b"b")
        assert client.recv(1) == b"b"


def test_refuse_turns_new_connections_away_until_accept(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    with dial(proxy.port) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            dial(proxy.port)
        client.sendall(b"b")
        assert client.recv(1) == b"b"
    proxy.accept()
    with dial(proxy.port) as client:
        client.sendall(b"c")
        assert client.recv(1) == b"c"


def test_latency_holds_bytes_back_for_at_least_so_long(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    proxy.latency(0.05)
    with dial(proxy.port) as client:
        started = time.monotonic()
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        assert time.monotonic() - started >= 0.1


def test_cut_after_passes_exactly_so_many_bytes_down(echo: EchoServer, tcp_proxy: Proxy) -> None:
    proxy = tcp_proxy(echo.port)
    for count in (0, 1, 7):
        proxy.cut_after(count)
        arrived = b""
        with dial(proxy.port) as client:
            client.sendall(b"0123456789")
            for _ in range(count):
                arrived += client.recv(1)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert arrived == b"0123456789"[:count]


def test_a_dead_server_behind_the_proxy_shows_as_a_reset(tcp_proxy: Proxy) -> None:
    with pytest.raises(ConnectionResetError), dial(tcp_proxy(free_port()).port) as client:
        client.recv(1)


# Redis.


@pytest.fixture
async def streaming_server(anyio_backend: object) -> AsyncIterator[int]:  # noqa: ARG001 - it makes the fixture async
    """A server that answers each request with `begin`, and `end` when the client says `go`; its port."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nbegin")
        if await reader.read(2) == b"go":
            writer.write(b"end")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def ask_through(proxy: HttpProxy, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
    return reader, writer


@pytest.mark.anyio
async def test_an_http_proxy_refuses_and_counts_by_transport(streaming_server: int) -> None:
    async with HttpProxy(streaming_server).run() as proxy:
        proxy.refuse("sse")
        reader, writer = await ask_through(proxy, "/realtime/events?channel=a")
        assert (await reader.read()).startswith(b"HTTP/1.1 403")
        writer.close()
        reader, writer = await ask_through(proxy, "/realtime/poll?channel=a")
        assert (await reader.readuntil(b"begin")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert proxy.seen == {"sse": 1, "longpoll": 1}


@pytest.mark.anyio
async def test_an_http_proxy_holds_an_answer_back_until_it_is_complete(streaming_server: int) -> None:
    async with HttpProxy(streaming_server).run() as proxy:
        proxy.held = {"sse"}
        reader, writer = await ask_through(proxy, "/events")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100 * MS):
                await reader.read(1)
        writer.write(b"go")
        assert (await reader.read()).endswith(b"beginend")
        writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["cut", "idle"])
async def test_an_http_proxy_cuts_what_it_is_told_to_and_what_is_idle(streaming_server: int, how: str) -> None:
    async with HttpProxy(streaming_server).run() as proxy:
        reader, writer = await ask_through(proxy, "/events")
        await reader.readuntil(b"begin")
        if how == "cut":
            proxy.cut("longpoll")
            proxy.cut("sse")
        else:
            proxy.idle_seconds = 50 * MS
        async with asyncio.timeout(5000 * MS):
            assert await reader.read() == b""
        writer.close()


def test_redis_keeps_its_port_through_a_kill_and_starts_empty(own_redis: RedisServer) -> None:
    own_redis.cli("SET", "key", "value")
    port, first = own_redis.port, own_redis.pid
    own_redis.kill()
    with pytest.raises(redis.ConnectionError):
        own_redis.cli("PING")
    own_redis.start()
    assert (own_redis.port, own_redis.cli("GET", "key")) == (port, None)
    assert own_redis.pid != first


def test_redis_keeps_its_data_when_told_to() -> None:
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        server.cli("SET", "key", "value")
        server.kill()
        server.start()
        assert server.cli("GET", "key") == "value"


def test_a_paused_redis_accepts_and_does_not_answer(own_redis: RedisServer) -> None:
    with redis.Redis(port=own_redis.port, socket_timeout=500 * MS, retry=NEVER) as client:
        assert client.ping()
        own_redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_redis.resume()
        assert client.ping()


def test_redis_answers_on_its_unix_socket(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.unix_url) as client:
        assert client.ping()


def test_a_redis_that_cannot_start_shows_its_log() -> None:
    server = RedisServer("--maxmemory-policy", "nonsense")
    try:
        with pytest.raises(AssertionError, match="did not start"):
            server.start()
        assert not server.is_running
    finally:
        server.close()


# Processes.


def test_a_process_that_ends_early_fails_with_the_end_of_its_log(processes: Processes) -> None:
    command = [sys.executable, "-c", "import sys; print('why it failed'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3 .*why it failed"):
        processes.start(command, port=free_port())


def test_a_process_that_never_serves_fails_with_its_log(processes: Processes) -> None:
    command = [sys.executable, "-uc", "import time; print('busy'); time.sleep(60)"]
    served = processes.start(command, port=free_port(), wait=False)
    with pytest.raises(AssertionError, match=r"(?s)did not answer .*busy"):
        served.wait_until_ready(500 * MS)


def test_processes_see_no_settings_but_those_given(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_URL", "redis://elsewhere")
    program = "import os; print(sorted(name for name in os.environ if name.startswith('PUBSUB_')), flush=True)"
    served = processes.start([sys.executable, "-c", program], port=free_port(), env={"PUBSUB_DRAIN": "1"}, wait=False)
    assert served.wait() == 0
    assert served.log.strip() == "['PUBSUB_DRAIN']"


def test_stop_ends_a_process_that_ignores_sigterm_and_its_children(processes: Processes) -> None:
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    served = processes.start([sys.executable, "-c", program], port=free_port(), wait=False)
    child = int(eventually(lambda: served.log))
    assert served.stop(100 * MS) == -signal.SIGKILL
    assert served.exit_code == -signal.SIGKILL
    eventually(lambda: _is_gone(child))


def _is_gone(pid: int) -> bool:
    """Whether it no longer runs: no such process, or a zombie that waits for whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_uvicorn_and_gunicorn_start_with_this_python(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "def wsgi(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [sys.executable.encode()]\n"
    )
    gunicorn = processes.gunicorn("program:wsgi", workers=1, cwd=tmp_path, ready_path="/")
    uvicorn = processes.uvicorn("program:wsgi", "--interface", "wsgi", cwd=tmp_path, ready_path="/")
    assert gunicorn.stop() == 0
    assert "Shutting down" in gunicorn.log
    assert uvicorn.stop() in (0, -signal.SIGTERM)


# The raw client.


@pytest.fixture
async def scripted_server() -> AsyncIterator[str]:
    """A server that greets, pings, echoes, and closes when told to."""

    async def handler(websocket: ServerConnection) -> None:
        await websocket.send('{"type":"connected","connection":"1"}')
        await websocket.send('{"type":"ping"}')
        async for text in websocket:
            if text == "close":
                await websocket.close(3001, "because")
            await websocket.send(text if '"pong"' not in str(text) else '{"type":"seen"}')

    async with serve(handler, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.anyio
async def test_raw_client_answers_pings_and_gives_frames_by_type(scripted_server: str) -> None:
    async with await RawClient.connect(scripted_server) as client:
        await client.send({"type": "message", "channel": "a", "data": 1})
        await client.send({"type": "message", "channel": "b", "data": 2})
        assert (await client.recv("message", "b"))["data"] == 2
        assert (await client.recv())["type"] == "connected"
        await client.recv("seen")
        assert (await client.recv("message"))["data"] == 1
        assert client.messages("a") == [1]
        with pytest.raises(AssertionError, match=r"no subscribed news within .* received: .*connected"):
            await client.recv("subscribed", "news", timeout=20 * MS)


@pytest.mark.anyio
async def test_raw_client_knows_how_it_was_closed(scripted_server: str) -> None:
    async with await RawClient.connect(scripted_server) as client:
        await client.send("close")
        assert await client.closed() == (3001, "because")
        with pytest.raises(AssertionError, match="closed with 3001 'because' before gap"):
            await client.recv("gap")


@pytest.mark.anyio
async def test_raw_client_that_reads_nothing_stops_the_server_from_sending() -> None:
    sent = 0

    async def flood(websocket: ServerConnection) -> None:
        nonlocal sent
        while True:
            await websocket.send(b'{"data":"' + b"x" * 60_000 + b'"}')
            sent += 1

    async with serve(flood, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with await RawClient.connect(f"ws://127.0.0.1:{port}") as client:
            await client.recv()
            client.pause()
            before = -1

            async def has_stalled() -> bool:
                nonlocal before
                previous, before = before, sent
                await asyncio.sleep(0.05)
                return previous == before

            await eventually_async(has_stalled)
            client.resume()
            await eventually_async(lambda: sent > before + 100)
            client.abort()


# The event loop, the clock and the browser.


@pytest.mark.anyio
async def test_a_blocking_call_of_our_code_in_the_event_loop_fails() -> None:
    ours: dict[str, Callable[[float], None]] = {}
    source = "import time\ndef wait(seconds):\n    time.sleep(seconds)\n"
    exec(compile(source, str(Path(pubsub_mw.__file__).with_name("example.py")), "exec"), ours)
    with pytest.raises(BlockingError):
        ours["wait"](0.001)
    await asyncio.to_thread(ours["wait"], 0.001)
    time.sleep(0.001)  # noqa: ASYNC251 - what tests and their tools do is up to them


@pytest.mark.anyio
async def test_async_tests_run_in_debug_mode() -> None:
    assert asyncio.get_running_loop().get_debug()


def test_eventually_says_what_was_still_wrong() -> None:
    def check() -> bool:
        assert [1] == [2]
        return True

    with pytest.raises(AssertionError, match=r"the list: gave up after 0.02 s") as failure:
        eventually(check, 0.02, "the list")
    assert "[1] == [2]" in str(failure.value.__cause__)


@pytest.mark.anyio
async def test_a_page_runs_scripts_and_reports_what_they_do_not_catch(
    browser_page: Page, page_errors: PageErrors
) -> None:
    await browser_page.set_content(
        "<script>console.error('said'); setTimeout(() => { throw Error('thrown') })</script>"
    )
    await eventually_async(lambda: page_errors.uncaught)
    assert "thrown" in page_errors.uncaught.pop()
    assert page_errors.console == ["said"]
    assert await browser_page.evaluate("1 + 1") == 2
