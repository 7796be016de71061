"""The command line, as real processes: what it serves, what it prints, and how it stops."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from pubsub_mw.apps import load_app
from pubsub_mw.cli import main
from pubsub_mw.client import connect
from pubsub_mw.model import Position
from pubsub_mw.publisher import Publisher
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served

pytestmark = pytest.mark.timeout(60)

OpenClient = Callable[..., Awaitable[RawClient]]

COMMAND = str(Path(sys.executable).with_name("pubsub-mw"))
SECRET = "s" * 32

WSGI = """
def app(environ, start_response):
    if environ["PATH_INFO"] == "/publish":
        environ["pubsub.publish"]("room:1", "from the view")
    answer = "version 1"
    if environ["PATH_INFO"] == "/grant":
        answer = environ["pubsub.publisher"].grant(user="7", channels=["private-1"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer.encode()]

def create():
    return app
"""

ASGI = """
async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    await scope["pubsub.publish"]("room:1", "from the view")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"version 1"})
"""


TOGETHER = """
from asgi_site import application
from pubsub_mw.asgi import with_realtime

async def told(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        print("started the app inside", flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    await application(scope, receive, send)

app = with_realtime(told)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody's apps are."""
    (tmp_path / "wsgi_site.py").write_text(WSGI)
    (tmp_path / "asgi_site.py").write_text(ASGI)
    (tmp_path / "together_site.py").write_text(TOGETHER)
    return tmp_path


def run(
    *args: str, cwd: Path | None = None, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PUBSUB_")}
    return subprocess.run(
        [COMMAND, *args],
        cwd=cwd,
        input=stdin,
        env={**inherited, **(env or {})},
        capture_output=True,
        text=True,
        timeout=20,
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, and the reason is the last line, without a traceback."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("Error: ")
    for word in words:
        assert word in last


async def listening(raw_client: OpenClient, server: Served, channel: str = "room:1") -> RawClient:
    client = await raw_client(f"{server.ws_url}/realtime/")
    await client.hello(channels={channel: None})
    await client.recv("subscribed")
    return client


def publish_all(url: str, prefix: str, items: list[tuple[str, object]]) -> list[Position]:
    publisher = Publisher(url, prefix=prefix)
    try:
        return [publisher.publish(channel, data) for channel, data in items]
    finally:
        publisher.close()


# serve


@pytest.mark.anyio
@pytest.mark.parametrize(
    "app", ["wsgi_site:app", "wsgi_site", "wsgi_site:create()", "asgi_site", "asgi_site:application"]
)
async def test_serve_runs_any_app_with_realtime_beside_it(
    app: str, folder: Path, processes: Processes, raw_client: OpenClient
) -> None:
    server = processes.pubsub_mw("serve", app, cwd=folder)
    client = await listening(raw_client, server)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{server.url}/publish")).text == "version 1"
        assert (await http.get(f"{server.url}/realtime/health")).json()["status"] == "ok"

    assert (await client.recv("message"))["data"] == "from the view"
    assert f"Listening on http://127.0.0.1:{server.port}, realtime at /realtime" in server.log


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("nothing_here:app", ["nothing_here"]),
        ("wsgi_site.nothing:app", ["wsgi_site.nothing"]),
        ("wsgi_site:nothing", ["wsgi_site", "nothing"]),
        ("wsgi_site:app.nothing", ["app.nothing"]),
        ("json", ["app or application"]),
        ("./wsgi_site.py", ["./wsgi_site.py", "myapp:app"]),
        (":app", ["':app'", "myapp:app"]),
    ],
)
def test_an_app_that_is_not_there_is_one_sentence(app: str, words: list[str], folder: Path) -> None:
    assert_one_sentence(run("serve", app, "--port", "0", cwd=folder), *words)


def test_an_app_that_fails_to_import_shows_where(folder: Path) -> None:
    (folder / "broken.py").write_text("import nothing_here\n")
    done = run("serve", "broken", "--port", "0", cwd=folder)
    assert done.returncode == 1
    assert 'broken.py", line 1' in done.stderr


def test_an_app_is_found_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    app = load_app("wsgi_site:app")
    assert load_app("wsgi_site") is app
    assert load_app("wsgi_site:create()") is app
    assert load_app("json:JSONDecoder.decode") is json.JSONDecoder.decode


def test_a_port_that_is_taken_is_one_sentence(folder: Path, processes: Processes) -> None:
    first = processes.pubsub_mw("serve", "wsgi_site:app", cwd=folder)
    for command in (["serve", "wsgi_site:app"], ["realtime", "--url", "redis://127.0.0.1:1/0"]):
        done = run(*command, "--port", str(first.port), cwd=folder)
        assert_one_sentence(done, str(first.port), "already in use", "--port")


def test_an_address_that_is_not_ours_is_one_sentence(folder: Path) -> None:
    assert_one_sentence(run("serve", "wsgi_site:app", "--host", "192.0.2.1", cwd=folder), "192.0.2.1", "--host")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["serve", "wsgi_site:app", "--workers", "2"], ["Redis"]),
        (["serve", "wsgi_site:app", "--workers", "2", "--reload", "--url", "redis://127.0.0.1/0"], ["--reload"]),
        (["serve", "wsgi_site:app", "--url", "amqp://127.0.0.1"], ["amqp"]),
        (["serve", "wsgi_site:app", "--drain", "-1"], ["drain"]),
        (["serve", "wsgi_site:app", "--port", "65536"], ["65535"]),
        (["serve", "wsgi_site.py"], ["myapp:app"]),
        (["realtime"], ["broker", "pubsub-mw serve"]),
        (["publish", "room:1", "x"], ["memory://", "PUBSUB_URL"]),
        (["publish", "no such name", "x", "--url", "redis://127.0.0.1/0"], ["no such name"]),
        (["publish", "room:1", "x", "--url", "redis://127.0.0.1:1/0"], ["room:1", "refused"]),
        (["tail", "room:1", "room:2", "--position", "a.1.b"], ["one channel"]),
        (["tail", "room:1", "--position", "?", "--url", "redis://127.0.0.1/0"], ["position"]),
        (["tail", "no such name", "--url", "redis://127.0.0.1/0"], ["no such name"]),
        (["tail", "room:1", "--server", "nowhere"], ["nowhere", "ws://"]),
        (["doctor", "--url", "redis://127.0.0.1:port/0"], ["redis://127.0.0.1:port/0"]),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_sentence_that_says_what_to_do(args: list[str], words: list[str], folder: Path) -> None:
    assert_one_sentence(run(*args, cwd=folder), *words)


@pytest.mark.parametrize("command", ["doctor", "realtime --url redis://127.0.0.1:1/0"])
def test_a_public_key_that_is_none_is_one_sentence(command: str) -> None:
    done = run(*command.split(), env={"PUBSUB_GRANT_PUBLIC_KEY": "no PEM"})
    assert_one_sentence(done, "grant_public_key", "PEM")


def test_every_command_helps() -> None:
    for name, command in main.commands.items():
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0
        assert (command.help or "").splitlines()[0] in " ".join(shown.output.split())
        assert all(option.help for option in command.params if option.param_type_name == "option")
    assert "PUBSUB_URL" in CliRunner().invoke(main, ["-h"]).output
    assert "pubsub-mw" in run("--version").stdout


@pytest.mark.anyio
async def test_reload_takes_the_new_source_and_clients_come_back_as_who_they_were(
    folder: Path, processes: Processes, raw_client: OpenClient
) -> None:
    server = processes.pubsub_mw("serve", "wsgi_site:app", "--reload", cwd=folder, ready_path="/")
    async with httpx.AsyncClient(base_url=server.url) as http:
        grant = (await http.get("/grant")).text
        watched = await listening(raw_client, server)
        async with connect(f"{server.url}/realtime", grant=grant) as connection:
            subscription = await connection.subscribe("private-1")
            id_before = connection.id
            told = await edit_until_told(folder / "wsgi_site.py", watched)
            assert (told["code"], told["reason"]) == (3001, "this server is going away; another one takes over")
            assert isinstance(told["retry"], float)
            assert 0 <= told["retry"] <= 2
            assert (await watched.closed())[0] == 3001

            async def is_back() -> bool:
                return connection.state == "connected" and (await http.get("/")).text == "version 2 is longer"

            await eventually_async(is_back, 10_000 * MS)
            assert (connection.id, connection.user) == (id_before, "7")
            await connection.publish("private-1", "nobody may")  # and its grant says no more than before
            assert subscription.channel == "private-1"
            assert connection.state == "connected"
            async with connect(f"{server.url}/realtime", grant=grant) as another:
                await another.subscribe("private-1")


async def edit_until_told(source: Path, client: RawClient) -> dict[str, object]:
    """Change a source file, once more if the change came before the reloader watched."""
    for attempt in range(5):
        text = WSGI.replace("version 1", "version 2 is longer") + "\n" * attempt
        await asyncio.to_thread(source.write_text, text)
        with contextlib.suppress(AssertionError):
            return await client.recv("disconnect", timeout=3000 * MS)
    raise AssertionError("nothing was reloaded")


# Stopping


@pytest.fixture
def crowded(redis_server: RedisServer, prefix: str, processes: Processes) -> Callable[..., Served]:
    """Start `pubsub-mw realtime`, whose queues may hold more than the kernel does."""

    def start(*args: str) -> Served:
        env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}
        env |= {"PUBSUB_SEND_QUEUE_BYTES": "100_000_000"}
        return processes.pubsub_mw("realtime", *args, env=env, ready_path="/realtime/health")

    return start


@pytest.mark.anyio
async def test_a_server_that_stops_sends_its_clients_away_one_after_another(
    crowded: Callable[..., Served], raw_client: OpenClient, redis_server: RedisServer, prefix: str
) -> None:
    server = crowded("--drain", "2")
    clients = [await listening(raw_client, server) for _ in range(4)]
    stuck = await listening(raw_client, server, "flood")
    stuck.pause()
    await asyncio.to_thread(publish_all, redis_server.url, prefix, [("flood", "x" * 900_000)] * 40)
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    told_at = []
    for client in clients:
        await client.recv("disconnect")
        assert await client.closed() == (3001, "this server is going away; another one takes over")
        told_at.append(time.monotonic() - began)
    await eventually_async(lambda: server.exit_code is not None, 10_000 * MS)

    # Five clients over two seconds, in an order of chance: four of the five moments 0, 0.4, 0.8, 1.2, 1.6.
    assert 1.1 < max(told_at) < 3.5
    assert time.monotonic() - began < 2 + 5
    assert server.exit_code == 0
    retries = [frame["retry"] for client in clients for frame in client.received if frame["type"] == "disconnect"]
    assert len(set(retries)) == len(clients)
    assert all(0 <= retry <= 2 for retry in retries)
    assert "Traceback" not in server.log


@pytest.mark.anyio
async def test_while_it_drains_it_is_unhealthy_and_admits_nobody_and_a_second_signal_ends_it_at_once(
    crowded: Callable[..., Served], raw_client: OpenClient
) -> None:
    server = crowded("--drain", "60")
    clients = [await listening(raw_client, server) for _ in range(3)]
    server.send_signal(signal.SIGTERM)
    await eventually_async(lambda: any(client.code == 3001 for client in clients))
    async with httpx.AsyncClient() as http:
        health = await http.get(f"{server.url}/realtime/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refused = await http.get(
            f"{server.url}/realtime/",
            headers={
                "connection": "upgrade",
                "upgrade": "websocket",
                "sec-websocket-version": "13",
                "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            },
        )
        assert refused.status_code == 503
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    await eventually_async(lambda: server.exit_code is not None, 10_000 * MS)
    assert time.monotonic() - began < 5
    for client in clients:
        await client.closed()


@pytest.mark.anyio
async def test_several_workers_share_a_port_and_each_drains(
    crowded: Callable[..., Served], raw_client: OpenClient, redis_server: RedisServer, prefix: str
) -> None:
    server = crowded("--workers", "2", "--drain", "0.5")
    clients = [await listening(raw_client, server) for _ in range(8)]
    await asyncio.to_thread(publish_all, redis_server.url, prefix, [("room:1", "to all")])
    for client in clients:
        assert (await client.recv("message"))["data"] == "to all"
    server.send_signal(signal.SIGTERM)
    for client in clients:
        assert (await client.closed())[0] == 3001
    await eventually_async(lambda: server.exit_code is not None, 10_000 * MS)


@pytest.mark.anyio
async def test_a_server_takes_all_the_files_it_may_have_and_says_how_many(
    env: dict[str, str], processes: Processes, raw_client: OpenClient
) -> None:
    port = free_port()
    script = f"ulimit -Sn 200; ulimit -Hn 1000; exec {COMMAND} realtime --port {port}"
    server = processes.start(["sh", "-c", script], port=port, env=env, ready_path="/realtime/health")
    assert "about 1,000 connections" in server.log
    if hasattr(resource, "prlimit"):
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (1_000, 1_000)
    # On the transport itself, and with nothing in the log that a ticket could be read from.
    client = await raw_client(f"{server.ws_url}/realtime/?ticket=canary")
    await client.hello()
    async with httpx.AsyncClient() as http:
        await http.get(f"{server.url}/realtime/health?ticket=canary")
    server.wait_for_log('"GET /realtime/health HTTP/1.1"')
    assert "canary" not in server.log


@pytest.mark.anyio
async def test_without_its_broker_a_server_starts_says_so_and_recovers(
    own_redis: RedisServer, processes: Processes, raw_client: OpenClient
) -> None:
    own_redis.stop()
    env = {"PUBSUB_URL": own_redis.url}
    server = processes.pubsub_mw("realtime", env=env)
    server.wait_for_log("connections are refused until it answers", 10_000 * MS)
    async with httpx.AsyncClient() as http:

        async def is_healthy() -> bool:
            return (await http.get(f"{server.url}/realtime/health", timeout=10)).status_code == 200

        assert not await is_healthy()
        own_redis.start()
        await eventually_async(is_healthy, 10_000 * MS)
    await listening(raw_client, server)


# publish and tail


@pytest.fixture
def env(redis_server: RedisServer, prefix: str) -> dict[str, str]:
    return {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}


def printed(tail: Served) -> Iterator[tuple[str, object]]:
    for line in tail.log.splitlines():
        if line.startswith("{"):
            frame = json.loads(line)
            yield frame["channel"], frame["data"]


def test_what_is_published_is_shown_by_tail_at_the_broker_and_through_a_server(
    env: dict[str, str], processes: Processes
) -> None:
    server = processes.pubsub_mw("realtime", env=env, ready_path="/realtime/health")
    with_grant = {**env, "PUBSUB_GRANT": Publisher(env["PUBSUB_URL"], secret=SECRET).grant(channels=["private-1"])}
    tails = [
        processes.pubsub_mw("tail", "room:1", "private-1", env=env),
        processes.pubsub_mw("tail", "room:1", "private-1", "--server", f"{server.url}/realtime", env=with_grant),
    ]
    for tail in tails:
        tail.wait_for_log("listening to room:1")
        tail.wait_for_log("listening to private-1")
    positions = [
        run("publish", "room:1", '{"text": "日本"}', "--event", "said", env=env).stdout,
        run("publish", "private-1", "no JSON", env=env).stdout,
        run("publish", "room:1", "42", "--text", env=env).stdout,
        run("publish", "room:1", "-", stdin="[1]\n", env=env).stdout,
        run("publish", "room:1", "NaN", env=env).stdout,
    ]
    said = ("room:1", {"text": "日本"})
    expected = [("private-1", "no JSON"), ("room:1", "42"), ("room:1", "NaN"), ("room:1", [1]), said]
    for tail in tails:
        eventually(lambda tail=tail: sorted(printed(tail), key=str) == expected)  # type: ignore[misc]
        assert all(position.strip() in tail.log for position in positions)
        tail.send_signal(signal.SIGINT)
        assert tail.wait() == 0
        assert "Traceback" not in tail.log


@pytest.mark.parametrize("through_server", [False, True], ids=["broker", "server"])
def test_tail_goes_on_after_a_position(env: dict[str, str], processes: Processes, *, through_server: bool) -> None:
    position, *_ = publish_all(env["PUBSUB_URL"], env["PUBSUB_PREFIX"], [("room:1", number) for number in range(3)])
    args = []
    if through_server:
        server = processes.pubsub_mw("realtime", env=env, ready_path="/realtime/health")
        args = ["--server", f"{server.url}/realtime"]
    tail = processes.pubsub_mw("tail", "room:1", "--position", str(position), *args, env=env)
    eventually(lambda: list(printed(tail)) == [("room:1", 1), ("room:1", 2)])
    lost = processes.pubsub_mw("tail", "room:1", "--position", "0ld.1.x", *args, env=env)
    eventually(lambda: "lost" in lost.log or "missed something" in lost.log)


def test_publishing_with_the_same_key_again_does_nothing(env: dict[str, str]) -> None:
    first, again = (run("publish", "room:1", "1", "--idempotency-key", "k", env=env) for _ in range(2))
    assert first.stdout == again.stdout
    assert first.stdout.count(".") == 2


def test_tail_ends_with_a_sentence_where_a_server_refuses(env: dict[str, str], processes: Processes) -> None:
    server = processes.pubsub_mw("realtime", env=env, ready_path="/realtime/health")
    url = f"{server.url}/realtime"
    assert_one_sentence(run("tail", "private-1", "--server", url), "private-1", "forbidden")
    assert_one_sentence(run("tail", "room:1", "--server", url, "--grant", "no grant"), "3500")


def test_tail_says_when_the_broker_is_away() -> None:
    done = run("tail", "room:1", env={"PUBSUB_URL": "redis://127.0.0.1:1/0", "PUBSUB_BROKER_TIMEOUT": "0.5"})
    assert_one_sentence(done, "room:1", "broker does not answer")


# demo


def test_the_demo_takes_the_next_free_port_and_answers(processes: Processes, tmp_path: Path) -> None:
    demo, second = (
        processes.pubsub_mw("demo", env={"CHAT_DB": str(tmp_path / "chat.sqlite3")}, port=port)
        for port in [free_port()] * 2
    )
    demo.wait_for_log("The chat is at")
    second.wait_for_log("The chat is at")
    address = second.log.split("The chat is at ")[1].split()[0]
    assert address != f"{demo.url}/"
    assert f"{demo.url}/" in demo.log
    for url in (f"{demo.url}/", address):
        page = eventually(lambda url=url: fetch(url))  # type: ignore[misc]
        assert "room" in page


def fetch(url: str) -> str:
    try:
        return httpx.get(url, follow_redirects=True).text
    except httpx.TransportError:
        return ""


def test_ctrl_c_ends_a_server_without_complaint(folder: Path, processes: Processes) -> None:
    served = processes.pubsub_mw("serve", "wsgi_site:app", cwd=folder)

    served.send_signal(signal.SIGINT)

    assert served.wait() == 0
    assert "Aborted" not in served.log
    assert "Traceback" not in served.log


# doctor


@pytest.fixture(scope="module")
def other_redis() -> Iterator[RedisServer]:
    """One whose memory is bounded the wrong way, with users."""
    with RedisServer("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as server:
        yield server


def test_the_doctor_finds_a_healthy_broker_healthy(env: dict[str, str]) -> None:
    done = run("doctor", env=env)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    assert "fault" not in done.stdout
    assert "published and delivered" in done.stdout


@pytest.mark.parametrize(
    ("name", "level", "finding", "cure"),
    [
        ("nobody", "fault", "Error 111", "start Redis"),
        ("eviction", "warning", "allkeys-lru", "noeviction"),
        ("replica", "fault", "it is a replica", "primary"),
        ("wrong password", "fault", "invalid username-password pair", "PUBSUB_URL"),
        ("user without channels", "fault", "did not come back", "ACL SETUSER <user> ~pubsub:* &pubsub:*"),
        ("user without scripts", "fault", "no permissions to run the 'evalsha' command", "+@scripting"),
        ("user without info", "warning", "may not ask for INFO", "+info"),
        ("full", "fault", "used memory > 'maxmemory'", "see by INFO"),
        ("no secret", "warning", "PUBSUB_SECRET is not set", "openssl rand -hex 32"),
        ("short secret", "warning", "PUBSUB_SECRET is short", "32 bytes"),
        ("memory", "warning", "one process", "PUBSUB_URL=redis://"),
    ],
)
def test_the_doctor_names_the_fault_and_its_cure(
    name: str, level: str, finding: str, cure: str, other_redis: RedisServer
) -> None:
    url = other_redis.url
    secret = {"no secret": "", "short secret": "12345"}.get(name, SECRET)
    if name == "nobody":
        url = "redis://127.0.0.1:1/0"
    elif name == "memory":
        url = "memory://"
    elif name == "replica":
        other_redis.cli("REPLICAOF", "127.0.0.1", "1")
    elif name == "full":
        other_redis.cli("CONFIG", "SET", "maxmemory", "1")
    elif name.startswith("user") or name == "wrong password":
        rules = {"user without channels": "resetchannels", "user without scripts": "-@scripting"}.get(name, "-info")
        other_redis.cli("ACL", "SETUSER", "app", "reset", "on", ">open-sesame", "~*", "&*", "+@all", rules)
        password = "open-sesame" if name != "wrong password" else "open-barley"
        url = f"redis://app:{password}@127.0.0.1:{other_redis.port}/0"
    done = run("doctor", "--url", url, env={"PUBSUB_SECRET": secret, "PUBSUB_BROKER_TIMEOUT": "1"})
    other_redis.cli("REPLICAOF", "NO", "ONE")
    other_redis.cli("CONFIG", "SET", "maxmemory", "100mb")

    lines = done.stdout.splitlines()
    (index,) = (index for index, line in enumerate(lines) if line.startswith(level) and finding in line)
    assert cure in lines[index + 1]
    assert done.returncode == (level == "fault")
    assert not any(word in done.stdout + done.stderr for word in ("open-", "12345", SECRET, "Traceback"))


def test_the_doctor_finds_a_setting_that_is_misspelt(env: dict[str, str]) -> None:
    done = run("doctor", env={**env, "PUBSUB_HISTROY_SIZE": "5"})

    assert "PUBSUB_HISTROY_SIZE is no setting, and has no effect" in done.stdout
    assert "did you mean PUBSUB_HISTORY_SIZE?" in done.stdout


@pytest.mark.parametrize("command", ["realtime", "serve wsgi_site:app", "worker wsgi_site:app"])
def test_servers_tell_of_a_setting_that_is_misspelt(command: str, folder: Path, processes: Processes) -> None:
    env = {"PUBSUB_URL": "redis://127.0.0.1:1/0", "PUBSUB_HISTROY_SIZE": "5"}
    process = processes.pubsub_mw(
        *command.split(), *(() if "worker" in command else ("--port", "0")), env=env, cwd=folder
    )
    process.wait_for_log("PUBSUB_HISTROY_SIZE is no setting, and has no effect; did you mean PUBSUB_HISTORY_SIZE?")


def test_a_worker_says_when_nothing_can_come(folder: Path, redis_server: RedisServer, processes: Processes) -> None:
    env = {"PUBSUB_URL": redis_server.url}
    idle = processes.pubsub_mw("worker", "wsgi_site:app", env=env, cwd=folder)
    busy = processes.pubsub_mw("worker", "wsgi_site:app", env={**env, "PUBSUB_REQUESTS": "/*"}, cwd=folder)

    idle.wait_for_log("PUBSUB_REQUESTS is not set")
    busy.wait_for_log("takes requests", 15_000 * MS)
    assert "PUBSUB_REQUESTS" not in busy.log


@pytest.mark.anyio
@pytest.mark.parametrize("app", ["asgi_site", "together_site:app"])
async def test_a_worker_runs_an_asgi_app_as_serve_does_and_nothing_beside_it(
    app: str, folder: Path, redis_server: RedisServer, prefix: str, processes: Processes, raw_client: OpenClient
) -> None:
    env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET, "PUBSUB_REQUESTS": "/*"}
    worker = processes.pubsub_mw("worker", app, env=env, cwd=folder)
    client = await listening(raw_client, processes.pubsub_mw("realtime", env=env))
    await client.send({"type": "request", "id": "1", "method": "GET", "path": "/"})

    assert (await client.recv("response", timeout=15_000 * MS))["body"] == "version 1"
    assert (await client.recv("message"))["data"] == "from the view"
    assert worker.log.count("takes requests") == 1
    assert worker.log.count("started the app inside") == (app != "asgi_site")


def test_the_doctors_cure_for_a_user_is_enough(other_redis: RedisServer) -> None:
    other_redis.cli("ACL", "SETUSER", "ill", "reset", "on", ">pw")
    url = f"redis://ill:pw@127.0.0.1:{other_redis.port}/0"
    ill = run("doctor", "--url", url, env={"PUBSUB_BROKER_TIMEOUT": "1"})
    assert ill.returncode == 1
    cure = ill.stdout.split("ACL SETUSER <user> ~")[1].splitlines()[0].split()
    other_redis.cli("ACL", "SETUSER", "ill", f"~{cure[0]}", *cure[1:])
    well = run("doctor", "--url", url)
    assert well.returncode == 0, well.stdout
