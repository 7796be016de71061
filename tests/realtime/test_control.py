"""The application ends connections and subscriptions, through servers that share nothing but the broker."""

import asyncio
import base64
import json
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.routing import Mount, Router
from starlette.types import ASGIApp

from pubsub_mw.asgi import with_realtime
from pubsub_mw.broker.memory import AsyncMemoryBroker, memory_broker
from pubsub_mw.model import Handshake
from pubsub_mw.publisher import AsyncPublisher, Publisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.settings import Settings
from tests.realtime.serving import Server, Servers
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

SECRET = "a secret of the tests, 32 bytes or more"
PROMPT = 2000 * MS
"""Within which the application's word is to be felt."""
REPLACED, DISCONNECTED, GRANT_INVALID, GRANT_EXPIRED = 3502, 3503, 3500, 3501

Open = Callable[..., Awaitable[RawClient]]


class World:
    """Servers on one broker, the application's publisher, and clients."""

    def __init__(self, url: str, prefix: str, open_client: Open) -> None:
        self.options: dict[str, Any] = {"url": url, "prefix": prefix, "secret": SECRET}
        self.publisher = Publisher(**self.options)
        self._open = open_client
        self.servers = Servers()
        self.a: Server
        self.b: Server

    async def serve(self, **settings: Any) -> Server:
        def build() -> ASGIApp:
            realtime = Realtime(**{**self.options, **settings})
            return Router(routes=[Mount("/realtime", realtime)], lifespan=realtime.router.lifespan_context)

        return await self.servers.start(build)

    def grant(self, user: str | None = "7", *channels: str, **more: Any) -> str:
        return self.publisher.grant(user, channels=channels, **more)

    async def client(self, server: Server | None = None, **hello: Any) -> tuple[RawClient, Frame]:
        client = await self._open((server or self.a).ws_url)
        return client, await client.hello(**hello)

    async def refused(self, server: Server | None = None, **hello: Any) -> int:
        """Connect and return the code of the close that follows."""
        client = await self._open((server or self.a).ws_url)
        await client.send({"type": "connect", **hello})
        code, _ = await client.closed()
        assert not [frame for frame in client.received if frame["type"] == "connected"]
        return code

    async def listener(self, server: Server | None, channel: str, **hello: Any) -> RawClient:
        client, _ = await self.client(server, channels={channel: None}, **hello)
        await client.recv("subscribed", channel)
        return client

    async def say(self, method: str, *args: Any, **kwargs: Any) -> None:
        await asyncio.to_thread(getattr(self.publisher, method), *args, **kwargs)


@pytest.fixture
async def world(redis_server: RedisServer, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    """Two servers on Redis."""
    world = World(redis_server.url, prefix, raw_client)
    async with world.servers:
        world.a, world.b = await asyncio.gather(world.serve(), world.serve())
        yield world
    world.publisher.close()


@pytest.fixture(params=["memory", "redis"])
async def one(request: pytest.FixtureRequest, prefix: str, raw_client: Open) -> AsyncIterator[World]:
    """One server, on each engine."""
    url = "memory://"
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    world = World(url, prefix, raw_client)
    async with world.servers:
        world.a = await world.serve()
        yield world
    world.publisher.close()


# Ending connections.


async def test_a_users_connections_end_on_every_server_and_nobody_elses(world: World) -> None:
    mine = [(await world.client(server, grant=world.grant()))[0] for server in (world.a, world.b, world.b)]
    other, _ = await world.client(world.a, grant=world.grant("77"))
    nobody, _ = await world.client(world.b)
    await world.say("disconnect", user="7")
    for client in mine:
        code, reason = await client.closed(PROMPT)
        assert (code, reason) == (DISCONNECTED, "the application ended this connection")
        assert client.received[-1]["retry"] is None
    for client in (other, nobody):
        await client.send({"type": "subscribe", "channel": "room"})
        await client.recv("subscribed", "room")


async def test_one_connection_ends_and_the_users_others_stay(one: World) -> None:
    first, hello = await one.client(grant=one.grant())
    second, _ = await one.client(grant=one.grant())
    await one.say("disconnect", connection=hello["connection"])
    assert (await first.closed(PROMPT))[0] == DISCONNECTED
    await second.send({"type": "subscribe", "channel": "room"})
    await second.recv("subscribed", "room")


async def test_one_connection_ends_where_the_applications_clock_is_behind_the_realtime_servers(
    one: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mw.publisher.time", SimpleNamespace(time=lambda: time.time() - 60))
    client, hello = await one.client()
    await one.say("disconnect", connection=hello["connection"])
    assert (await client.closed(PROMPT))[0] == DISCONNECTED
    assert await one.refused(resume=hello["resume"]) == DISCONNECTED


async def test_grants_and_resume_tokens_made_before_are_barred_and_grants_made_afterwards_are_good(one: World) -> None:
    old = one.grant()
    client, hello = await one.client(grant=old)
    await one.say("disconnect", user="7")
    await client.closed(PROMPT)
    assert await one.refused(grant=old) == DISCONNECTED
    assert await one.refused(resume=hello["resume"]) == DISCONNECTED
    assert await one.refused(grant=old, resume=hello["resume"]) == DISCONNECTED
    fresh = one.grant()
    _, again = await one.client(grant=fresh)
    assert again["user"] == "7"
    _, again = await one.client(grant=fresh, resume=hello["resume"])
    assert again["user"] == "7"
    assert again["connection"] != hello["connection"], "the token was made before"


async def test_who_was_disconnected_while_offline_is_refused_on_return_by_any_server(world: World) -> None:
    client, hello = await world.client(world.a, grant=world.grant())
    other, other_hello = await world.client(world.a)
    for each in (client, other):
        await each.close()
    await world.say("disconnect", user="7")
    await world.say("disconnect", connection=other_hello["connection"])
    for server in (world.a, world.b):
        assert await world.refused(server, resume=hello["resume"]) == DISCONNECTED
        assert await world.refused(server, resume=other_hello["resume"]) == DISCONNECTED
        await world.client(server)


async def test_a_server_that_starts_later_knows_what_was_ended(world: World) -> None:
    grant = world.grant()
    await world.say("disconnect", user="7")
    assert await world.refused(await world.serve(), grant=grant) == DISCONNECTED


async def test_the_connection_of_a_grant_without_a_user_is_ended_by_its_id(one: World) -> None:
    client, hello = await one.client(grant=one.grant(None, "private-*"))
    await one.say("disconnect", connection=hello["connection"])
    assert (await client.closed(PROMPT))[0] == DISCONNECTED
    assert await one.refused(resume=hello["resume"]) == DISCONNECTED


async def test_an_old_grant_shown_later_on_a_good_connection_is_barred_too(one: World) -> None:
    old = one.grant("7", "private-*")
    await one.say("disconnect", user="7")
    client, _ = await one.client(grant=one.grant("7"))
    await client.send({"type": "grant", "grant": old})
    assert (await client.recv("error"))["code"] == "grant_invalid"
    await client.send({"type": "subscribe", "channel": "private-a", "grant": old})
    assert (await client.recv("error"))["code"] == "grant_invalid"
    await client.send({"type": "subscribe", "channel": "private-a"})
    assert (await client.recv("error", "private-a"))["code"] == "forbidden"


async def test_a_foreign_grant_without_iat_is_good_until_the_user_is_disconnected(one: World) -> None:
    claims = {"sub": "7", "exp": time.time() + 60, "channels": ["private-a"]}
    grant = jwt.encode(claims, SECRET, algorithm="HS256")
    client = await one.listener(None, "private-a", grant=grant)
    await one.say("disconnect", user="7")
    await client.closed(PROMPT)
    assert await one.refused(grant=grant) == DISCONNECTED


async def test_a_barred_grant_shown_on_a_connection_that_was_nobodys_ends_it(one: World) -> None:
    old = one.grant("7", "private-*")
    await one.say("disconnect", user="7")
    for kind in ("grant", "subscribe"):
        client, _ = await one.client()
        await client.send({"type": kind, "grant": old, "channel": "private-a"})
        assert (await client.closed(PROMPT))[0] == DISCONNECTED
        assert not [frame for frame in client.received if frame["type"] == "subscribed"]
    client, _ = await one.client()
    await client.send({"type": "subscribe", "channel": "private-a", "grant": one.grant("7", "private-a")})
    await client.recv("subscribed", "private-a")


async def test_a_channel_that_was_ended_stays_ended_for_a_grant_shown_on_a_connection_that_was_nobodys(
    one: World,
) -> None:
    old = one.grant("7", "private-*")
    await one.say("unsubscribe", "private-a", user="7")
    client, _ = await one.client()
    await client.send({"type": "subscribe", "channel": "private-a", "grant": old})
    assert (await client.recv("error", "private-a"))["code"] == "forbidden"
    await client.send({"type": "subscribe", "channel": "private-b"})
    await client.recv("subscribed", "private-b")


# Ending subscriptions.


async def test_a_grant_for_another_channel_does_not_bring_back_one_that_was_ended(one: World) -> None:
    client = await one.listener(None, "private-a", grant=one.grant("7", "private-*"))
    await one.say("unsubscribe", "private-a", user="7")
    await client.recv("unsubscribed", "private-a", PROMPT)
    await client.send({"type": "subscribe", "channel": "private-b", "grant": one.grant("7", "private-b")})
    await client.recv("subscribed", "private-b")
    await client.send({"type": "subscribe", "channel": "private-a"})
    assert (await client.recv("error", "private-a"))["code"] == "forbidden"


async def test_a_users_subscriptions_end_on_every_server_and_nobody_elses(world: World) -> None:
    grant = world.grant("7", "private-*")
    mine = [await world.listener(server, "private-a", grant=grant) for server in (world.a, world.b)]
    other = await world.listener(world.b, "private-a", grant=world.grant("8", "private-*"))
    await world.say("unsubscribe", "private-a", user="7")
    for client in mine:
        ended = await client.recv("unsubscribed", "private-a", PROMPT)
        assert ended["code"] == "revoked"
    await world.say("publish", "private-a", "secret")
    await other.recv("message", "private-a")
    for client in mine:
        await client.send({"type": "subscribe", "channel": "private-b"})
        await client.recv("subscribed", "private-b")
        assert client.messages("private-a") == []


async def test_a_channel_that_was_ended_needs_a_grant_made_afterwards(one: World) -> None:
    old = one.grant("7", "private-*")
    client = await one.listener(None, "private-a", grant=old)
    await one.say("unsubscribe", "private-a", user="7")
    await client.recv("unsubscribed", "private-a", PROMPT)
    await client.send({"type": "subscribe", "channel": "private-a"})
    assert (await client.recv("error", "private-a"))["code"] == "forbidden"
    await client.send({"type": "subscribe", "channel": "private-a", "grant": one.grant("7", "private-*")})
    await client.recv("subscribed", "private-a")
    again, _ = await one.client(grant=old, channels={"private-a": None, "private-b": None})
    assert (await again.recv("error", "private-a"))["code"] == "forbidden"
    await again.recv("subscribed", "private-b")


@pytest.mark.parametrize("who", ["user", "connection"])
async def test_a_channel_ended_while_offline_stays_ended_over_every_resume(one: World, who: str) -> None:
    client, hello = await one.client(grant=one.grant("7", "private-*"))
    await client.close()
    await one.say("unsubscribe", "private-a", **{who: "7" if who == "user" else hello["connection"]})
    for _ in range(3):
        client, again = await one.client(resume=hello["resume"], channels={"private-a": None, "private-b": None})
        assert again["connection"] == hello["connection"]
        assert (await client.recv("error", "private-a"))["code"] == "forbidden"
        await client.recv("subscribed", "private-b")
        await client.close()
        if who == "user":
            hello = again


async def test_a_channel_for_all_ends_too_and_can_be_asked_for_again(one: World) -> None:
    client, hello = await one.client(channels={"room": None})
    await client.recv("subscribed", "room")
    await one.say("unsubscribe", "room", connection=hello["connection"])
    await client.recv("unsubscribed", "room", PROMPT)
    await client.send({"type": "subscribe", "channel": "room"})
    await client.recv("subscribed", "room")


# From the command line, and from a request.


async def test_the_command_line_ends_connections_and_subscriptions(world: World) -> None:
    def run(*arguments: str) -> None:
        environ = {"PUBSUB_URL": world.options["url"], "PUBSUB_PREFIX": world.options["prefix"]}
        command = [sys.executable, "-c", "from pubsub_mw.cli import main; main()", *arguments]
        subprocess.run(command, env={**_environ(), **environ}, check=True, timeout=15)

    grant = world.grant("7", "private-*")
    one = await world.listener(world.a, "private-a", grant=grant)
    two, hello = await world.client(world.b, grant=grant, channels={"private-b": None})
    await two.recv("subscribed", "private-b")
    await asyncio.to_thread(run, "unsubscribe", "private-a", "--user", "7")
    await one.recv("unsubscribed", "private-a", PROMPT)
    await asyncio.to_thread(run, "unsubscribe", "private-b", "--connection", hello["connection"])
    await two.recv("unsubscribed", "private-b", PROMPT)
    await asyncio.to_thread(run, "disconnect", "--connection", hello["connection"])
    assert (await two.closed(PROMPT))[0] == DISCONNECTED
    await asyncio.to_thread(run, "disconnect", "--user", "7")
    assert (await one.closed(PROMPT))[0] == DISCONNECTED


@pytest.mark.parametrize("arguments", [["disconnect"], ["disconnect", "--user", "7", "--connection", "c"]])
def test_the_command_line_wants_one_of_user_and_connection(arguments: list[str], redis_server: RedisServer) -> None:
    command = [sys.executable, "-c", "from pubsub_mw.cli import main; main()", *arguments, "--url", redis_server.url]
    done = subprocess.run(command, env=_environ(), capture_output=True, text=True, timeout=15, check=False)
    assert done.returncode == 2
    assert "give either --user or --connection" in done.stderr


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PUBSUB_")}


async def test_a_view_ends_the_connection_that_its_request_came_through(one: World) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["pubsub.publisher"].disconnect(connection=environ["pubsub.connection"].id)
        start_response("204 No Content", [])
        return []

    server = await one.servers.start(lambda: with_realtime(app, **one.options))
    client, _ = await one.client(server)
    await client.send({"type": "request", "id": "1", "method": "POST", "path": "/logout"})
    assert (await client.closed(PROMPT + 1000 * MS))[0] == DISCONNECTED


# Races and missed news.


async def test_a_revocation_that_races_a_connect_is_never_missed(world: World) -> None:
    for number in range(25):
        user = f"racer-{number}"
        grant = world.grant(user)
        clients = [await world._open(server.ws_url) for server in (world.a, world.b)]
        revoking = asyncio.create_task(world.say("disconnect", user=user))
        for client in clients:
            await client.send({"type": "connect", "grant": grant})
        for client in clients:
            assert (await client.closed(PROMPT))[0] == DISCONNECTED
        await revoking


class SlowLookUp(AsyncMemoryBroker):
    """A broker whose answer to a look-up is long on its way."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(memory_broker(settings))
        self.has_read = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
        answer = await super().revoked(identities)
        self.has_read.set()
        await self.may_answer.wait()
        return answer


async def test_what_is_ended_while_its_look_up_is_under_way_ends(prefix: str) -> None:
    settings = Settings.build("memory://", environ={}, prefix=prefix)
    broker = SlowLookUp(settings)
    hub = Hub(broker, settings)
    shared = Shared(settings, hub, broker, AsyncPublisher(**settings.overrides()), SECRET)
    publisher = Publisher("memory://", prefix=prefix, secret=SECRET)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(hub.run()), tasks.create_task(shared.control.run())]
        await eventually_async(lambda: hub.is_up)
        connection = Connection(shared, Handshake(headers=(), scheme="http", address=""))
        frame = json.dumps({"type": "connect", "grant": publisher.grant("7")})
        connecting = tasks.create_task(connection.receive(frame))
        await broker.has_read.wait()
        publisher.disconnect(user="7")
        await eventually_async(lambda: connection.send_queue.closed is not None)
        broker.may_answer.set()
        await connecting
        assert connection.send_queue.closed is not None
        assert connection.send_queue.closed[0] == DISCONNECTED
        assert connection.id is None
        connection.close()
        for task in running:
            task.cancel()


async def test_who_comes_while_others_are_looked_up_is_looked_up_with_all_the_rest(prefix: str) -> None:
    settings = Settings.build("memory://", environ={}, prefix=prefix)
    asked: list[int] = []

    class Counting(SlowLookUp):
        async def revoked(self, identities: Sequence[str]) -> list[dict[str, float]]:
            asked.append(len(identities))
            return await super().revoked(identities)

    broker = Counting(settings)
    hub = Hub(broker, settings)
    shared = Shared(settings, hub, broker, AsyncPublisher(**settings.overrides()), SECRET)
    publisher = Publisher("memory://", prefix=prefix, secret=SECRET)
    late = publisher.grant("7")
    publisher.disconnect(user="7")
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(hub.run())
        await eventually_async(lambda: hub.is_up)
        connections = [Connection(shared, Handshake(headers=(), scheme="http", address="")) for _ in range(100)]
        for index, connection in enumerate(connections):
            grant = publisher.grant("8") if index else late
            tasks.create_task(connection.receive(json.dumps({"type": "connect", "grant": grant})))
        await broker.has_read.wait()
        gone = tasks.create_task(shared.control.look_up(connections[1]))
        await asyncio.sleep(0)
        gone.cancel()
        broker.may_answer.set()
        await eventually_async(lambda: sum(connection.id is not None for connection in connections) == 99)
        assert connections[0].send_queue.closed is not None
        assert connections[0].send_queue.closed[0] == DISCONNECTED
        assert len(asked) <= 2
        for connection in connections:
            connection.close()
        running.cancel()


@pytest.fixture
async def behind_proxy(
    redis_server: RedisServer, prefix: str, raw_client: Open, tcp_proxy: Callable[[int], TcpProxy]
) -> AsyncIterator[tuple[World, TcpProxy]]:
    """A server with a bendable way to Redis; the application's own way is straight."""
    world = World(redis_server.url, prefix, raw_client)
    proxy = tcp_proxy(redis_server.port)
    quick = {"probe_interval": 0.1, "probe_timeout": 0.5, "broker_timeout": 1.0}
    async with world.servers:
        world.a = await world.serve(url=f"redis://{proxy.address}/0", **quick)
        yield world, proxy
    world.publisher.close()


async def test_what_was_ended_while_the_link_to_redis_was_broken_ends_when_it_is_back(
    behind_proxy: tuple[World, TcpProxy],
) -> None:
    world, proxy = behind_proxy
    client, _ = await world.client(grant=world.grant())
    other = await world.listener(None, "private-a", grant=world.grant("8", "private-*"))
    proxy.refuse()
    proxy.reset()
    await world.say("disconnect", user="7")
    await world.say("unsubscribe", "private-a", user="8")
    proxy.accept()
    assert (await client.closed())[0] == DISCONNECTED
    await other.recv("unsubscribed", "private-a")


async def test_what_was_ended_and_is_no_longer_in_the_control_channels_history_ends_all_the_same(
    behind_proxy: tuple[World, TcpProxy], redis_server: RedisServer
) -> None:
    world, proxy = behind_proxy
    client, _ = await world.client(grant=world.grant())
    stays, _ = await world.client(grant=world.grant("8"))
    proxy.refuse()
    proxy.reset()
    await world.say("disconnect", user="7")
    await world.say("disconnect", user="9")
    redis_server.cli("DEL", f"{world.options['prefix']}:{{#control}}:h")
    proxy.accept()
    assert (await client.closed())[0] == DISCONNECTED
    await stays.send({"type": "subscribe", "channel": "room"})
    await stays.recv("subscribed", "room")


async def test_a_server_that_started_without_redis_hears_the_application_when_redis_is_there(
    behind_proxy: tuple[World, TcpProxy],
) -> None:
    world, proxy = behind_proxy
    proxy.refuse()
    proxy.reset()
    quick = {"probe_interval": 0.1, "probe_timeout": 0.5, "broker_timeout": 0.5}
    late = await world.serve(url=f"redis://{proxy.address}/0", **quick)
    began = time.monotonic()
    await eventually_async(lambda: time.monotonic() > began + 1)
    proxy.accept()

    async def connected() -> RawClient | None:
        client = await world._open(late.ws_url)
        await client.send({"type": "connect", "grant": grant})
        await eventually_async(lambda: client.code is not None or client.received)
        return client if client.received and client.received[0]["type"] == "connected" else None

    grant = world.grant()
    client = await eventually_async(connected)
    assert client is not None
    await world.say("disconnect", user="7")
    assert (await client.closed(PROMPT))[0] == DISCONNECTED


# One connection, one place.


async def test_a_connection_resumed_on_another_server_closes_the_older_one(world: World) -> None:
    older, hello = await world.client(world.a)
    newer, again = await world.client(world.b, resume=hello["resume"])
    assert again["connection"] == hello["connection"]
    assert (await older.closed(PROMPT))[0] == REPLACED
    newest, _ = await world.client(world.a, resume=again["resume"])
    assert (await newer.closed(PROMPT))[0] == REPLACED
    await world.say("publish", f"#connection-{hello['connection']}", "for you")
    await newest.recv("message")
    assert newest.code is None


async def test_a_connection_resumed_on_the_same_server_closes_the_older_one(one: World) -> None:
    older, hello = await one.client()
    newer, _ = await one.client(resume=hello["resume"])
    assert (await older.closed(PROMPT))[0] == REPLACED
    await one.say("publish", f"#connection-{hello['connection']}", "for you")
    await newer.recv("message")


async def test_of_connections_resumed_everywhere_at_once_exactly_one_stays(world: World) -> None:
    first, hello = await world.client(world.a)
    for _ in range(5):
        clients = [await world._open(server.ws_url) for server in (world.a, world.b) * 3]
        for client in clients:
            await client.send({"type": "connect", "resume": hello["resume"]})
        await eventually_async(lambda clients=clients: sum(c.code == REPLACED for c in clients) == len(clients) - 1)  # type: ignore[misc]
        (stays,) = [client for client in clients if client.code is None]
        # Whatever was on its way has arrived when something that was said later has.
        await stays.send({"type": "subscribe", "channel": "room"})
        await stays.recv("subscribed", "room")
        await world.say("publish", f"#connection-{hello['connection']}", "still here?")
        await stays.recv("message")
        assert stays.code is None
    assert first.code == REPLACED


# Grants and resume tokens.


def unsigned(claims: dict[str, Any]) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims)}."


def altered(token: str) -> str:
    header, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["sub"] = "root"
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{header}.{body}.{signature}"


def bad_grants() -> dict[str, str]:
    claims = {"sub": "7", "exp": time.time() + 600, "channels": ["*"]}
    public = rsa.generate_private_key(65537, 2048)
    pem = public.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    good = jwt.encode(claims, SECRET, algorithm="HS256")
    return {
        "alg none": unsigned(claims),
        "alg none with a signature": unsigned(claims) + good.split(".")[2],
        "another secret": jwt.encode(claims, "another secret of 32 bytes or more", algorithm="HS256"),
        "another algorithm of the family": jwt.encode(claims, SECRET * 2, algorithm="HS512"),
        "a key pair nobody knows": jwt.encode(claims, public, algorithm="RS256"),
        "altered": altered(good),
        "cut": good[:-1],
        "no exp": jwt.encode({"sub": "7", "channels": ["*"]}, SECRET, algorithm="HS256"),
        "not a token": "let me in",
        "empty": "",
        "a public key": pem.decode(),
    }


@pytest.mark.parametrize("kind", list(bad_grants()))
async def test_a_grant_that_is_not_ours_closes_the_connection(one: World, kind: str) -> None:
    grant = bad_grants()[kind]
    assert await one.refused(grant=grant) == GRANT_INVALID
    client, _ = await one.client(grant=one.grant())
    await client.send({"type": "grant", "grant": grant})
    assert (await client.recv("error"))["code"] == "grant_invalid"


async def test_a_resume_token_is_no_grant_and_a_grant_no_resume_token(one: World) -> None:
    grant = one.grant("7", "private-*")
    client, hello = await one.client(grant=grant)
    await client.close()
    assert await one.refused(grant=hello["resume"]) == GRANT_INVALID
    for token in (grant, altered(hello["resume"]), unsigned({"cid": hello["connection"], "exp": 9e9, "iat": 0}), "x"):
        _, other = await one.client(resume=token)
        assert other["connection"] != hello["connection"]
        assert other["user"] is None


async def test_somebody_elses_resume_token_does_not_restore_the_id_nor_what_was_sent_to_it(one: World) -> None:
    client, mine = await one.client(grant=one.grant("7"))
    await client.close()
    own = f"#connection-{mine['connection']}"
    position = str(await asyncio.to_thread(one.publisher.publish, own, "before"))
    await one.say("publish", own, "for 7 alone")
    thief, other = await one.client(grant=one.grant("8"), resume=mine["resume"], channels={own: position})
    assert other["connection"] != mine["connection"]
    assert other["user"] == "8"
    assert (await thief.recv("error", own))["code"] == "bad_channel"
    assert thief.messages(own) == []


async def test_an_expired_grant_in_a_resume_token_is_refused_and_a_fresh_one_resumes(one: World) -> None:
    client, hello = await one.client(grant=one.grant("7", expires=0.3))
    await client.close()

    async def is_expired() -> bool:
        return time.time() > expired_at

    expired_at = time.time() + 0.3
    await eventually_async(is_expired)
    assert await one.refused(resume=hello["resume"]) == GRANT_EXPIRED
    _, again = await one.client(resume=hello["resume"], grant=one.grant("7"))
    assert again["connection"] == hello["connection"]


async def test_an_expiry_is_announced_and_a_fresh_grant_goes_on(one: World) -> None:
    server = await one.serve(grant_grace=60)
    client = await one.listener(server, "private-a", grant=one.grant("7", "private-a", expires=0.5))
    assert (await client.recv("error"))["code"] == "grant_expired"
    await client.send({"type": "subscribe", "channel": "private-b"})
    assert (await client.recv("error", "private-b"))["code"] == "forbidden"
    await client.send({"type": "grant", "grant": one.grant("7", "private-*")})
    await client.send({"type": "subscribe", "channel": "private-b"})
    await client.recv("subscribed", "private-b")
    await one.say("publish", "private-a", 1)
    await client.recv("message", "private-a")


async def test_an_expired_grant_ends_the_connection_after_its_grace(one: World) -> None:
    server = await one.serve(grant_grace=0.3)
    client, _ = await one.client(server, grant=one.grant("7", expires=0.3))
    await client.recv("error")
    assert (await client.closed(PROMPT))[0] == GRANT_EXPIRED


async def test_a_grant_refreshed_before_its_expiry_is_never_announced(one: World) -> None:
    server = await one.serve(grant_grace=0)
    client, _ = await one.client(server, grant=one.grant("7", expires=0.5))
    old_expires = time.time() + 0.5
    await client.send({"type": "grant", "grant": one.grant("7")})
    await eventually_async(lambda: time.time() > old_expires + 0.3)
    await client.send({"type": "subscribe", "channel": "room"})
    await client.recv("subscribed", "room")
    assert not [frame for frame in client.received if frame["type"] == "error"]


async def test_a_fresh_grant_that_allows_less_ends_what_it_does_not_allow(one: World) -> None:
    client, _ = await one.client(
        grant=one.grant("7", "private-*"), channels={"private-a": None, "private-b": None, "room": None}
    )
    for channel in ("private-a", "private-b", "room"):
        await client.recv("subscribed", channel)
    await client.send({"type": "grant", "grant": one.grant("7", "private-a")})
    assert (await client.recv("unsubscribed", "private-b"))["code"] == "forbidden"
    for channel in ("private-a", "private-b", "room"):
        await one.say("publish", channel, 1)
    for channel in ("private-a", "room"):
        await client.recv("message", channel)
    assert client.messages("private-b") == []


async def test_a_fresh_grant_of_somebody_else_is_refused(one: World) -> None:
    client, _ = await one.client(grant=one.grant("7"))
    await client.send({"type": "grant", "grant": one.grant("8", "private-*")})
    assert (await client.recv("error"))["code"] == "grant_invalid"
    await client.send({"type": "subscribe", "channel": "private-a"})
    assert (await client.recv("error", "private-a"))["code"] == "forbidden"


# Guessing.


async def test_a_guessed_name_is_answered_alike_whether_there_is_such_a_channel_or_not(one: World) -> None:
    await one.say("publish", "private-there", "secret")
    listener = await one.listener(None, "private-there", grant=one.grant("8", "private-there"))
    client, _ = await one.client(grant=one.grant("7", "private-mine"))
    answers = []
    for name in ("private-there", "private-not-there", "presence-there", f"private-{secrets.token_hex(8)}"):
        await client.send({"type": "subscribe", "channel": name})
        answer = await client.recv("error", name)
        answers.append({key: value for key, value in answer.items() if key != "channel"})
        await client.send({"type": "unsubscribe", "channel": name})
        assert (await client.recv("error", name))["code"] == "not_subscribed"
    assert answers == [answers[0]] * 4
    assert answers[0]["code"] == "forbidden"
    assert listener.code is None


async def test_own_channels_of_others_and_the_servers_channels_cannot_be_asked_for(one: World) -> None:
    _, other = await one.client(grant=one.grant("8"))
    client, hello = await one.client(grant=one.grant("7", "*"))
    own = f"#connection-{other['connection']}"
    names = [own, "#user-8", "#user-7", "#connection-none", "#control", "#lifecycle", "#server-x", "#"]
    for name in names:
        await client.send({"type": "subscribe", "channel": name})
        assert (await client.recv("error", name))["code"] == "bad_channel"
        await client.send({"type": "publish", "id": "1", "channel": name, "data": 1})
        assert (await client.recv("error", name))["code"] == "bad_channel"
    await client.close()
    again, _ = await one.client(resume=hello["resume"], channels=dict.fromkeys(names))
    for name in names:
        if name != "#user-7":
            assert (await again.recv("error", name))["code"] == "bad_channel"


async def test_the_log_never_shows_a_grant_or_a_token(one: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        grant = one.grant("7")
        client, hello = await one.client(grant=grant)
        await client.close()
        await one.refused(grant=grant[:-2])
        await one.client(resume=altered(hello["resume"]))
        await one.say("disconnect", user="7")
        await one.refused(resume=hello["resume"])
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("pubsub_mw"))
    for token in (grant, hello["resume"]):
        assert token.split(".")[2][:20] not in ours
        assert token.split(".")[1][:40] not in ours
