"""Run and inspect everything from the command line: `pubsub-mw --help`.

In:     arguments, and `PUBSUB_*` of the environment
Out:    servers; publications sent and shown; a diagnosis
Owns:   what belongs to the server rather than the ASGI app: protocol classes, frame size, open files, TCP_USER_TIMEOUT,
        how many are accepted at once, a bound on shutdown
Never:  shows a traceback for what the user can mend; puts a secret on the screen
"""

import asyncio
import contextlib
import copy
import dataclasses
import difflib
import errno
import importlib.util
import json
import logging
import logging.config
import os
import resource
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.supervisors import ChangeReload, Multiprocess

from pubsub_mw import __version__
from pubsub_mw.apps import load_app
from pubsub_mw.asgi import for_worker, with_realtime
from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.client import Connection, Gap, connect
from pubsub_mw.errors import PubSubError
from pubsub_mw.grants import GrantVerifier
from pubsub_mw.model import ConnectionId, Position, check_channel
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.metrics import SIBLINGS_VARIABLE
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.socket import USER_TIMEOUT_MS
from pubsub_mw.realtime.subscription import Subscription
from pubsub_mw.realtime.uvicorn_protocol import HTTPProtocol, WebSocketProtocol, WithoutQuery
from pubsub_mw.settings import Settings
from pubsub_mw.worker import Worker
from pubsub_mw.worker.processes import run_until_signal, supervise

__all__ = ["main", "serving"]

log = logging.getLogger("pubsub_mw")

_APP_VARIABLE = "PUBSUB_APP"
"""Carries the app's name to server processes, which import it themselves."""

_ACCEPTS_PER_TURN = 8
"""libuv takes one connection from a socket in a turn of the loop, however many wait, and when everybody comes back that
turn costs as much as a tenth of the connection. So the listening socket is watched under as many descriptors."""

_GRACE_SECONDS = 3
"""After the drain, for what still runs; then it is cancelled."""

_MANY_FILES = 65_536
"""Below this a server says at its start how many connections it can hold."""

_PORT = click.IntRange(0, 65_535)

_DEFAULT_SERVER = "http://127.0.0.1:8000/realtime"


class _Group(click.Group):
    """Commands whose expected errors are one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PubSubError, ValueError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pubsub-mw")
def main() -> None:
    """Realtime for Python web applications that stay stateless and synchronous.

    Every setting can be given in the environment as PUBSUB_ + its name, such as PUBSUB_URL=redis://127.0.0.1:6379/0.
    """


_url_option = click.option(
    "--url", help="The broker, such as redis://127.0.0.1:6379/0.  [default: PUBSUB_URL, else memory://]"
)
_host_option = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
_drain_option = click.option(
    "--drain", type=float, help="Seconds over which a stopping server closes its connections.  [default: PUBSUB_DRAIN]"
)
_proxy_option = click.option(
    "--forwarded-allow-ips",
    help="Proxies whose X-Forwarded-* are believed.  [default: FORWARDED_ALLOW_IPS, else 127.0.0.1]",
)


@main.command()
@click.argument("app")
@_url_option
@_host_option
@click.option("--port", type=_PORT, default=8000, show_default=True, help="0 = any free one.")
@click.option("--reload", is_flag=True, help="Start again when a source file changes (development).")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes; needs Redis.")
@_drain_option
@_proxy_option
def serve(
    app: str,
    url: str | None,
    host: str,
    port: int,
    reload: bool,
    workers: int,
    drain: float | None,
    forwarded_allow_ips: str | None,
) -> None:
    """Run APP and the realtime endpoint in one process, at /realtime: for development, and for small sites.

    APP names a WSGI or ASGI app, such as myapp:app, myproject.wsgi:application or myapp:create_app().
    """
    if reload:
        # So that grants and resume tokens outlive the process that made them, and nobody waits for a drain.
        os.environ.setdefault("PUBSUB_SECRET", secrets.token_hex(32))
        os.environ.setdefault("PUBSUB_DRAIN", "0")
    settings = _prepare(url, drain)
    _announce_unknown_variables()
    if workers > 1 and reload:
        raise click.UsageError("--reload works with one process")
    if workers > 1 and settings.url.startswith("memory:"):
        raise click.UsageError("processes meet only in Redis; set PUBSUB_URL or --url to redis://...")
    os.environ[_APP_VARIABLE] = app
    if not reload:
        load_app(app)
    listener = _bind(host, port)
    _announce(listener)
    _run("pubsub_mw.cli:serving", settings, listener, forwarded_allow_ips, workers=workers, reload=reload, factory=True)


@main.command()
@_url_option
@_host_option
@click.option("--port", type=_PORT, default=8001, show_default=True, help="0 = any free one.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes; one per core is enough."
)
@_drain_option
@_proxy_option
def realtime(
    url: str | None, host: str, port: int, workers: int, drain: float | None, forwarded_allow_ips: str | None
) -> None:
    """Run the realtime endpoint alone, at /realtime, beside an app that runs elsewhere.

    Each connection is an open file. As many as the hard limit (ulimit -Hn) allows are used.
    """
    settings = _prepare(url, drain)
    _announce_unknown_variables()
    if settings.url.startswith("memory:"):
        raise click.UsageError(
            "a realtime server of its own needs a broker that the app can reach; "
            "set PUBSUB_URL or --url to redis://..., or use `pubsub-mw serve APP`"
        )
    listener = _bind(host, port)
    _announce(listener)
    _announce_file_limit()
    _run("pubsub_mw.asgi:app", settings, listener, forwarded_allow_ips, workers=workers)


@main.command()
@click.argument("app")
@_url_option
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Started anew if they die.")
@click.option(
    "--threads", type=click.IntRange(1), default=4, show_default=True, help="Requests that each runs at once."
)
@click.option("--reload", is_flag=True, help="Start again when a source file changes (development).")
@click.option("--drain", type=float, help="Seconds to finish what runs when told to stop.  [default: PUBSUB_DRAIN]")
def worker(app: str, url: str | None, processes: int, threads: int, reload: bool, drain: float | None) -> None:
    """Run APP on what clients send over their connections.

    APP names the same WSGI or ASGI app that serves HTTP, such as myapp:app. Restarting workers touches no connection
    and loses no request.
    """
    settings = _prepare(url, drain)
    _announce_unknown_variables()
    if settings.url.startswith("memory:"):
        raise click.UsageError(
            "a worker of its own needs a broker that the realtime server can reach; "
            "set PUBSUB_URL or --url to redis://..., or use `pubsub-mw serve APP`, which has one inside"
        )
    if not reload:
        load_app(app)
    logging.config.dictConfig(_log_config())
    if not (settings.requests or settings.authorize or settings.lifecycle):
        log.warning(
            "nothing will come: PUBSUB_REQUESTS is not set. It lists the paths that clients may request, such as "
            "/rooms/*, and the realtime server goes by it"
        )
    supervise(_work, (app, threads), processes, drain=settings.drain, reload=reload)


def _work(app: str, threads: int) -> None:
    """Be one worker process."""
    logging.config.dictConfig(_log_config())
    run_until_signal(Worker(for_worker(load_app(app)), threads=threads))


@main.command()
@click.option("--port", type=int, default=8000, show_default=True, help="The next free one is taken if it is not free.")
def demo(port: int) -> None:
    """Open the example chat, with everything in this one process."""
    folder = Path(__file__).parents[2] / "examples" / "flask"
    if not (folder / "app.py").exists():
        raise click.ClickException(
            "the examples are in the source checkout, not in the package; clone it and `make demo`"
        )
    if importlib.util.find_spec("flask") is None:
        raise click.ClickException("the demo needs Flask: pip install flask")
    os.environ.update({"PUBSUB_URL": "memory://", "PUBSUB_DRAIN": "0", _APP_VARIABLE: "app:app"})
    sys.path.insert(0, str(folder))
    settings = _prepare(None)
    load_app("app:app")
    while port and not _is_free("127.0.0.1", port):
        port += 1
    listener = _bind("127.0.0.1", port)
    address = click.style(f"{_address(listener)}/", bold=True)
    click.echo(f"\n  The chat is at {address}\n  Open it in two windows and talk. Ctrl+C ends it.\n", err=True)
    _run("pubsub_mw.cli:serving", settings, listener, None, factory=True)


@main.command()
@click.argument("channel")
@click.argument("data")
@_url_option
@click.option("--event", default="message", show_default=True, help="What kind of publication it is.")
@click.option("--text", is_flag=True, help="DATA is text even if it looks like JSON.")
@click.option("--idempotency-key", help="Publishing again with the same key does nothing.")
@click.option("--no-history", is_flag=True, help="Do not keep it for those who are away.")
def publish(
    channel: str, data: str, url: str | None, event: str, text: bool, idempotency_key: str | None, no_history: bool
) -> None:
    """Publish DATA to CHANNEL and print its position.

    DATA is JSON; what is not JSON is taken as text. "-" reads it from standard input.
    """
    settings = _prepare(url)
    if settings.url.startswith("memory:"):
        raise click.UsageError("memory:// ends with this process; set PUBSUB_URL or --url to redis://...")
    content = sys.stdin.read() if data == "-" else data
    value: object = content
    if not text:
        with contextlib.suppress(ValueError):
            value = json.loads(content, parse_constant=int)  # NaN and Infinity, which are none, are text too
    position = Publisher().publish(
        channel, value, event=event, idempotency_key=idempotency_key, history=False if no_history else None
    )
    click.echo(str(position))


_user_option = click.option("--user", help="All connections of this user.")
_connection_option = click.option("--connection", help="This connection alone.")


@main.command()
@_url_option
@_user_option
@_connection_option
def disconnect(url: str | None, user: str | None, connection: str | None) -> None:
    """End live connections, and bar the grants and resume tokens made until now."""
    publisher = _publisher(url, user, connection)
    publisher.disconnect(user=user, connection=connection)


@main.command()
@click.argument("channel")
@_url_option
@_user_option
@_connection_option
def unsubscribe(channel: str, url: str | None, user: str | None, connection: str | None) -> None:
    """End subscriptions to CHANNEL, and bar the grants made until now from it."""
    publisher = _publisher(url, user, connection)
    publisher.unsubscribe(channel, user=user, connection=connection)


def _publisher(url: str | None, user: str | None, connection: str | None) -> Publisher:
    if (user is None) == (connection is None):
        raise click.UsageError("give either --user or --connection")
    if _prepare(url).url.startswith("memory:"):
        raise click.UsageError("memory:// ends with this process; set PUBSUB_URL or --url to redis://...")
    return Publisher()


@main.command()
@click.argument("channels", nargs=-1, required=True)
@_url_option
@click.option(
    "--server",
    help="Listen through a realtime server, as a client does, instead of at the broker.  "
    f"[default for memory://: {_DEFAULT_SERVER}]",
)
@click.option("--grant", help="To show to the server.  [default: PUBSUB_GRANT]", envvar="PUBSUB_GRANT")
@click.option("--position", help="Go on after it; of one channel.")
def tail(
    channels: tuple[str, ...], url: str | None, server: str | None, grant: str | None, position: str | None
) -> None:
    """Print what is published to CHANNELS, one JSON object a line, until Ctrl+C."""
    settings = _prepare(url)
    if position is not None and len(channels) > 1:
        raise click.UsageError("a position belongs to one channel")
    if server is None and settings.url.startswith("memory:"):
        server = _DEFAULT_SERVER
    if server is None:
        frames = _frames_of_broker(channels, settings, position)
    else:
        frames = _frames_of_server(channels, server, grant, position)
    try:
        asyncio.run(_print_frames(frames))
    except KeyboardInterrupt:
        click.echo("", err=True)


@main.command()
@_url_option
def doctor(url: str | None) -> None:
    """Check the broker and the settings, and say what to do about each fault."""
    settings = _prepare(url)
    click.echo(f"broker: {settings.safe_url}")
    colours = {"ok": "green", "warning": "yellow", "fault": "red"}
    faults = 0

    def show(level: str, text: str, cure: str = "") -> None:
        nonlocal faults
        faults += level == "fault"
        click.echo(click.style(f"{level:8}", fg=colours[level]) + text)
        if cure:
            click.echo(" " * 8 + "-> " + cure)

    for text, cure in _unknown_variables():
        show("warning", text, cure)
    if settings.secret is None:
        cure = "set PUBSUB_SECRET to a long random text, the same for every process: openssl rand -hex 32"
        show("warning", "PUBSUB_SECRET is not set: one is made and kept in the broker", cure)
    elif len(settings.secret.encode()) < 32:
        show("warning", "PUBSUB_SECRET is short", "take 32 bytes or more (RFC 7518 3.2): openssl rand -hex 32")
    else:
        show("ok", "PUBSUB_SECRET is set")
    if settings.url.startswith("memory:"):
        text = "memory:// works within one process: `pubsub-mw serve`. Several processes would not hear each other"
        show("warning", text, "for production set PUBSUB_URL=redis://...")
    else:
        from pubsub_mw.broker.redis.diagnosis import diagnose

        async def run() -> None:
            async for finding in diagnose(settings):
                show(finding.level, finding.text, finding.cure)

        asyncio.run(run())
    if faults:
        raise SystemExit(1)


def _variables() -> list[str]:
    return [
        "PUBSUB_GRANT",
        _APP_VARIABLE,
        SIBLINGS_VARIABLE,
        *(f"PUBSUB_{knob.name.upper()}" for knob in dataclasses.fields(Settings)),
    ]


def _unknown_variables() -> Iterator[tuple[str, str]]:
    """Yield what is wrong with each that looks like a setting and is none, and the cure, or ""."""
    for name in sorted(name for name in os.environ if name.startswith("PUBSUB_") and name not in _variables()):
        close = difflib.get_close_matches(name, _variables(), 1)
        yield f"{name} is no setting, and has no effect", f"did you mean {close[0]}?" if close else ""


def _announce_unknown_variables() -> None:
    for text, cure in _unknown_variables():
        click.echo(f"{text}; {cure}" if cure else text, err=True)


def _prepare(url: str | None, drain: float | None = None) -> Settings:
    """Put what was given on the command line where every process finds it, and check all settings."""
    if url is not None:
        os.environ["PUBSUB_URL"] = url
    if drain is not None:
        os.environ["PUBSUB_DRAIN"] = str(drain)
    settings = Settings.build()
    GrantVerifier("", settings.grant_public_key)
    return settings


def serving() -> Callable[..., Awaitable[None]]:
    """Build the ASGI app of `serve`; called in each server process."""
    return with_realtime(load_app(os.environ[_APP_VARIABLE]))


def _run(
    app: str,
    settings: Settings,
    listener: socket.socket,
    forwarded_allow_ips: str | None,
    *,
    workers: int = 1,
    reload: bool = False,
    factory: bool = False,
) -> None:
    _raise_file_limit()
    config = uvicorn.Config(
        app,
        factory=factory,
        workers=workers,
        reload=reload,
        http=HTTPProtocol,
        ws=WebSocketProtocol,
        ws_max_size=settings.max_frame_bytes,
        ws_ping_interval=None,  # the protocol's own ping is seen by clients too
        ws_per_message_deflate=False,  # it takes more memory than all the rest of a connection (uvicorn#1862)
        timeout_graceful_shutdown=_GRACE_SECONDS,
        forwarded_allow_ips=forwarded_allow_ips,
        log_config=_log_config(),
    )
    server = uvicorn.Server(config)
    sockets = [listener, *(listener.dup() for _ in range(_ACCEPTS_PER_TURN - 1))]
    if reload:
        ChangeReload(config, target=server.run, sockets=sockets).run()
    elif workers > 1:
        with tempfile.TemporaryDirectory(prefix="pubsub-mw-") as directory:
            os.environ[SIBLINGS_VARIABLE] = directory
            Multiprocess(config, sockets=sockets).run()
    else:
        # uvicorn dies of the signal once more when it has stopped in good order; with --workers it does not.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            server.run(sockets=sockets)
        except KeyboardInterrupt:
            return  # it has stopped in good order, and passes Ctrl+C on
        if not server.started:
            raise SystemExit(3)


def _raise_file_limit() -> int:
    """Let the processes have as many files open as the system allows: each connection is one. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft  # macOS allows less than it says
    return hard


def _announce_file_limit() -> None:
    """Say how many connections a process may hold, where that is few for a server of its own."""
    files = _raise_file_limit()
    if 0 <= files < _MANY_FILES:
        click.echo(
            f"A process may hold about {files:,} connections, as it may open so many files; "
            "more by ulimit -Hn, or systemd's LimitNOFILE",
            err=True,
        )


def _log_config() -> dict[str, Any]:
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"without_query": {"()": WithoutQuery}}
    config["handlers"]["access"]["filters"] = ["without_query"]
    config["loggers"]["pubsub_mw"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config


def _bind(host: str, port: int) -> socket.socket:
    """Listen, with the socket options that every accepted connection inherits."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        hint = "choose another port by --port" if is_taken else "choose another address by --host"
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from error
    listener.set_inheritable(True)
    return listener


def _announce(listener: socket.socket) -> None:
    click.echo(f"Listening on {_address(listener)}, realtime at /realtime (Ctrl+C to stop)", err=True)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


async def _print_frames(frames: AsyncIterator[dict[str, Any]]) -> None:
    async for frame in frames:
        kind = frame.pop("type")
        if kind == "message":
            click.echo(json.dumps(frame, ensure_ascii=False))
        elif kind == "subscribed":
            note = "" if frame["recovered"] is not False else "; what was missed before is lost"
            click.echo(f"listening to {frame['channel']}{note}", err=True)
        elif kind == "gap":
            click.echo(f"missed something on {frame['channel']} ({frame['reason']})", err=True)
        elif kind == "error":
            channel = f"{frame['channel']}: " if "channel" in frame else ""
            raise click.ClickException(channel + frame["message"])


async def _frames_of_broker(
    channels: tuple[str, ...], settings: Settings, position: str | None
) -> AsyncIterator[dict[str, Any]]:
    """Listen at the broker itself: no server, no permission, the same recovery."""
    since = None if position is None else Position.parse(position)
    names = [check_channel(channel) for channel in channels]
    broker = open_async_broker(settings)
    hub = Hub(broker, settings)
    queue = SendQueue(settings.send_queue_bytes, settings.send_queue_bytes // 4)
    for name in dict.fromkeys(names):
        hub.subscribe(Subscription(name, ConnectionId("tail"), queue, since))
    running = asyncio.create_task(hub.run())
    try:
        while frame := await queue.take():
            yield json.loads(frame)
        raise click.ClickException("what was published could not be printed fast enough")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await broker.close()


async def _frames_of_server(
    channels: tuple[str, ...], server: str, grant: str | None, position: str | None
) -> AsyncIterator[dict[str, Any]]:
    """Listen as a client does."""
    frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1_000)

    async def on_gap(gap: Gap) -> None:
        await frames.put({"type": "gap", "channel": gap.channel, "reason": gap.reason})

    async def follow(connection: Connection, channel: str) -> None:
        try:
            subscription = await connection.subscribe(channel, position=position, on_gap=on_gap)
            await frames.put({"type": "subscribed", "channel": channel, "recovered": None})
            async for message in subscription:
                await frames.put({"type": "message", **dataclasses.asdict(message)})
        except PubSubError as error:
            await frames.put({"type": "error", "message": str(error)})

    async with connect(server, grant=grant) as connection:
        tasks = [asyncio.create_task(follow(connection, channel)) for channel in dict.fromkeys(channels)]
        try:
            while True:
                yield await frames.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
