"""Who is there and what they may do, through gunicorn, two realtime servers and a worker, each a process."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pubsub_mw.publisher import Publisher
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60_000 * MS)]

PROMPT = 2000 * MS
PRESENCE_TTL = 3.0
REPLACED, DISCONNECTED = 3502, 3503
APP = "tests.apps.who:app"
Open = Callable[..., Awaitable[RawClient]]


class Deployment:
    """The processes of a site, and its visitors."""

    def __init__(self, processes: Processes, redis_server: RedisServer, prefix: str, open_client: Open) -> None:
        self._processes = processes
        self._redis = redis_server
        self._open = open_client
        self._reports = f"{prefix}:reports of the test"
        self.env = {
            "PUBSUB_URL": redis_server.url,
            "PUBSUB_PREFIX": prefix,
            "PUBSUB_SECRET": "a secret of the tests, 32 bytes or more",
            "PUBSUB_AUTHORIZE": "/pubsub/authorize",
            "PUBSUB_LIFECYCLE": "/pubsub/lifecycle",
            "PUBSUB_REQUESTS": "/*",
            "PUBSUB_PRESENCE_TTL": str(PRESENCE_TTL),
            "PUBSUB_LIFECYCLE_GRACE": "0.5",
            "PUBSUB_DRAIN": "0",
            "WHO_REPORTS": self._reports,
        }
        self.publisher = Publisher(redis_server.url, prefix=prefix, secret=self.env["PUBSUB_SECRET"])
        processes.pubsub_mw("worker", APP, env=self.env, wait=False)
        with ThreadPoolExecutor() as pool:
            web = pool.submit(processes.gunicorn, APP, workers=1, env=self.env)
            servers = [pool.submit(self.serve) for _ in range(2)]
        self.web = web.result()
        self.a, self.b = (server.result() for server in servers)

    def serve(self, port: int | None = None) -> Served:
        return self._processes.pubsub_mw("realtime", env=self.env, port=port, ready_path="/realtime/health")

    async def post(self, path: str, cookie: str = "") -> httpx.Response:
        async with httpx.AsyncClient() as http:
            return await http.post(self.web.url + path, headers={"cookie": cookie} if cookie else {})

    async def login(self, user: str) -> str:
        """Log in over HTTP; the cookie."""
        response = await self.post(f"/login/{user}")
        return response.headers["set-cookie"].partition(";")[0]

    async def open(self, server: Served, cookie: str = "") -> RawClient:
        headers = {"Cookie": cookie} if cookie else {}
        return await self._open(f"{server.ws_url}/realtime/", origin=server.url, headers=headers)

    async def client(self, server: Served, cookie: str = "", **hello: Any) -> tuple[RawClient, Frame]:
        client = await self.open(server, cookie)
        return client, await client.hello(**hello)

    def events(self, hello: Frame) -> list[str]:
        reports = [json.loads(report) for report in self._redis.cli("LRANGE", self._reports, 0, -1)]
        return [report["event"] for report in reports if report["connection"] == hello["connection"]]

    async def events_become(self, hello: Frame, *events: str, timeout: float = 10_000 * MS) -> None:
        await eventually_async(lambda: self.events(hello) == list(events), timeout, f"{self.events(hello)}")


@pytest.fixture
def site(
    anyio_backend: object,  # noqa: ARG001 - it makes the fixture part of an async test
    processes: Processes,
    redis_server: RedisServer,
    prefix: str,
    raw_client: Open,
) -> Deployment:
    return Deployment(processes, redis_server, prefix, raw_client)


async def test_a_visitor_logs_in_listens_on_two_servers_and_logs_out_of_both(site: Deployment) -> None:
    cookie = await site.login("7")
    clients = [(await site.client(server, cookie, channels={"private-a": None}))[0] for server in (site.a, site.b)]
    stranger, _ = await site.client(site.a, channels={"private-a": None})
    for client in clients:
        await client.recv("subscribed", "private-a")
    assert (await stranger.recv("error", "private-a"))["code"] == "forbidden"

    async def arrives() -> bool:
        await asyncio.to_thread(site.publisher.publish, "#user-7", "hello")
        return all(client.messages("#user-7") for client in clients)

    await eventually_async(arrives)
    assert stranger.messages("#user-7") == []
    began = time.monotonic()
    response = await site.post("/logout", cookie)
    assert response.status_code == 204
    for client in clients:
        assert (await client.closed(PROMPT))[0] == DISCONNECTED
    assert time.monotonic() - began < PROMPT
    logged_out = response.headers["set-cookie"].partition(";")[0]
    again, _ = await site.client(site.b, logged_out, channels={"private-a": None})
    assert (await again.recv("error", "private-a"))["code"] == "forbidden"


async def test_grants_tokens_and_subscriptions_end_everywhere_from_requests_publisher_and_command_line(
    site: Deployment,
) -> None:
    def run(*arguments: str) -> None:
        command = str(Path(sys.executable).with_name("pubsub-mw"))
        subprocess.run([command, *arguments], env={**os.environ, **site.env}, check=True, timeout=20)

    grant = (await site.post("/grant/7")).text
    channels = {"private-a": None, "private-b": None, "private-c": None}
    both = [await site.client(server, grant=grant, channels=channels) for server in (site.a, site.b)]
    for client, _ in both:
        for channel in channels:
            await client.recv("subscribed", channel)
    await site.post("/rooms/a/leave/7")
    await asyncio.to_thread(site.publisher.unsubscribe, "private-b", user="7")
    for client, _ in both:
        for channel in ("private-a", "private-b"):
            assert (await client.recv("unsubscribed", channel, PROMPT))["code"] == "revoked"
    await asyncio.to_thread(run, "unsubscribe", "private-c", "--user", "7")
    for client, _ in both:
        await client.recv("unsubscribed", "private-c", PROMPT)
    await asyncio.to_thread(run, "disconnect", "--user", "7")
    for client, _ in both:
        assert (await client.closed(PROMPT))[0] == DISCONNECTED
    for server, (_, hello) in zip((site.b, site.a), both, strict=True):
        barred = await site.open(server)
        await barred.send({"type": "connect", "resume": hello["resume"], "grant": grant})
        assert (await barred.closed())[0] == DISCONNECTED
    fresh = (await site.post("/grant/7")).text
    client, hello = await site.client(site.a, grant=fresh, channels={"private-a": None})
    assert hello["user"] == "7"
    await client.recv("subscribed", "private-a")


async def test_a_connection_opened_again_on_another_server_is_closed_on_the_first(site: Deployment) -> None:
    older, hello = await site.client(site.a)
    newer, again = await site.client(site.b, resume=hello["resume"])
    assert again["connection"] == hello["connection"]
    assert (await older.closed(PROMPT))[0] == REPLACED
    await asyncio.to_thread(site.publisher.publish, f"#connection-{hello['connection']}", "for you")
    await newer.recv("message")
    await site.events_become(hello, "connect")
    await newer.close()
    await site.events_become(hello, "connect", "disconnect")


async def test_a_killed_servers_connections_are_reported_by_another_one_and_resumed_ones_are_not(
    site: Deployment,
) -> None:
    stays, stays_hello = await site.client(site.a)
    gone, gone_hello = await site.client(site.a)
    for hello in (stays_hello, gone_hello):
        await site.events_become(hello, "connect")
    began = time.monotonic()
    site.a.kill()
    await asyncio.gather(stays.closed(), gone.closed())
    moved, again = await site.client(site.b, resume=stays_hello["resume"])
    assert again["connection"] == stays_hello["connection"]
    await site.events_become(gone_hello, "connect", "disconnect", timeout=PRESENCE_TTL + 8_000 * MS)
    assert time.monotonic() - began > PRESENCE_TTL / 2
    assert site.events(stays_hello) == ["connect"]
    await moved.close()
    await site.events_become(stays_hello, "connect", "disconnect")


async def test_a_server_that_is_restarted_keeps_who_comes_back_and_reports_who_does_not(site: Deployment) -> None:
    site.b.stop()  # so that nobody but the next one can hand in the reports
    stays, stays_hello = await site.client(site.a)
    _, gone_hello = await site.client(site.a)
    for hello in (stays_hello, gone_hello):
        await site.events_become(hello, "connect")
    port = site.a.port
    assert await asyncio.to_thread(site.a.stop) in (0, -15)
    assert (await stays.closed())[0] == 3001
    restarted = await asyncio.to_thread(site.serve, port)
    _, again = await site.client(restarted, resume=stays_hello["resume"])
    assert again["connection"] == stays_hello["connection"]
    await site.events_become(gone_hello, "connect", "disconnect", timeout=2 * PRESENCE_TTL + 8_000 * MS)
    assert site.events(stays_hello) == ["connect"]


async def test_the_paths_for_the_server_alone_are_closed_to_visitors(site: Deployment) -> None:
    client, hello = await site.client(site.a, await site.login("7"))
    await site.events_become(hello, "connect")
    for number, path in enumerate(("/pubsub/lifecycle", "/pubsub/authorize?channel=private-a", "/pubsub/%6cifecycle")):
        frame = {"type": "request", "id": str(number), "method": "POST", "path": path, "body": "{}"}
        await client.send(frame)
        assert (await client.recv("error"))["code"] == "forbidden"
    assert (await site.post("/pubsub/lifecycle")).status_code == 403
    assert site.events(hello) == ["connect"]
