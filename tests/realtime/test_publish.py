"""Publishing by HTTP: what a program in another language needs to know, and that its description is true."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pubsub_mw.publisher import AsyncPublisher, Publisher
from tests.realtime.conftest import SECRET, Site
from tests.tools.clock import MS
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes

Serve = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]


class Program:
    """A program that has a grant."""

    def __init__(self, http: httpx.AsyncClient, site: Site, grant: str) -> None:
        self.http = http
        self.url = site.url + "/publish"
        self.headers = {"Authorization": f"Bearer {grant}"}

    async def post(self, body: Any, **headers: str) -> httpx.Response:
        return await self.http.post(self.url, json=body, headers={**self.headers, **headers})

    async def refused(self, body: Any, **headers: str) -> tuple[int, str]:
        response = await self.post(body, **headers)
        error = response.json()["error"]
        assert error["message"]
        return response.status_code, error["code"]


@pytest.mark.anyio
class TestPublishing:
    async def test_one_arrives_and_is_answered_with_its_position(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_client: Open, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        client = await raw_client(site.ws_url + "/")
        await client.hello(channels={"room": None})
        await client.recv("subscribed")
        program = Program(http, site, await publisher.grant(publish=["room"]))
        response = await program.post({"channel": "room", "data": {"text": "h\u00eb"}, "event": "said"})
        assert response.status_code == 200
        assert await client.recv("message") == {
            "type": "message",
            "channel": "room",
            "event": "said",
            "data": {"text": "h\u00eb"},
            **response.json(),
        }

    async def test_a_list_is_answered_in_order(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        program = Program(http, await serve_realtime(), await publisher.grant(publish=["*"]))
        answer = (await program.post([{"channel": "a", "data": 1}, {"channel": "b", "data": 2}])).json()
        tops = [str(await publisher.position(channel)) for channel in "ab"]
        assert answer == {"positions": tops}
        assert (await program.post([])).json() == {"positions": []}

    async def test_an_idempotency_key_shows_once_and_an_excluded_connection_hears_nothing(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_client: Open, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        client = await raw_client(site.ws_url + "/")
        connection = (await client.hello(channels={"room": None}))["connection"]
        await client.recv("subscribed")
        program = Program(http, site, await publisher.grant(publish=["*"]))
        once = {"channel": "room", "data": 1, "idempotency_key": "k", "history": 5.0}
        assert (await program.post(once)).json() == (await program.post(once)).json()
        await program.post({"channel": "room", "data": 2, "exclude": connection})
        await program.post({"channel": "room", "data": 3})
        assert [(await client.recv("message"))["data"] for _ in range(2)] == [1, 3]

    @pytest.mark.parametrize("way", ["publish", "send", "websocket"])
    async def test_an_integer_over_64_bits_keeps_all_its_digits(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_client: Open, publisher: AsyncPublisher, way: str
    ) -> None:
        site = await serve_realtime()
        client = await raw_client(site.ws_url + "/")
        grant = await publisher.grant(publish=["*"])
        await client.hello(channels={"room": None}, grant=grant)
        await client.recv("subscribed")
        publication = {"channel": "room", "data": [12345678901234567890123, -(2**70), 1.5]}
        if way == "publish":
            assert (await Program(http, site, grant).post(publication)).status_code == 200
        elif way == "send":
            frames = [{"type": "connect", "grant": grant}, {"type": "publish", **publication}]
            answer = await http.post(site.url + "/send", json={"frames": frames})
            assert answer.json()["frames"][1]["type"] == "accepted"
        else:
            await client.send({"type": "publish", **publication})
        assert (await client.recv("message"))["data"] == publication["data"]

    async def test_a_list_of_which_one_is_wrong_is_not_published(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        program = Program(http, await serve_realtime(), await publisher.grant(publish=["a"]))
        before = await publisher.position("a")
        good = {"channel": "a", "data": 1}
        assert await program.refused([good, {"channel": "b", "data": 1}]) == (403, "forbidden")
        assert await program.refused([good, {"channel": "a b", "data": 1}]) == (422, "bad_channel")
        assert await program.refused([good, {"channel": "a"}]) == (422, "bad_frame")
        assert await publisher.position("a") == before

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ("text", 422, "bad_frame"),
            ([[]], 422, "bad_frame"),
            ({"channel": "a", "data": 1, "more": 1}, 422, "bad_frame"),
            ({"channel": 7, "data": 1}, 422, "bad_channel"),
            ({"channel": "#control", "data": 1}, 422, "bad_channel"),
            ({"channel": "a", "data": 1, "event": "a\nb"}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "event": None}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "history": -1}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "history": 1.5}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "history": 1e300}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "exclude": "a b"}, 422, "bad_channel"),
            ({"channel": "a", "data": 1, "exclude": False}, 422, "bad_frame"),
            ({"channel": "a", "data": 1, "idempotency_key": ""}, 422, "bad_frame"),
            ({"channel": "a", "data": "x" * 1_000}, 413, "too_large"),
            ([{"channel": "a", "data": 1}] * 4, 413, "too_large"),
            ({"channel": "a", "data": "x" * 5_000}, 413, "too_large"),
        ],
    )
    async def test_what_is_wrong_is_refused_with_a_sentence(
        self,
        serve_realtime: Serve,
        http: httpx.AsyncClient,
        publisher: AsyncPublisher,
        body: Any,
        status: int,
        code: str,
    ) -> None:
        site = await serve_realtime(max_publication_bytes=500, max_publish_bytes=4_000, max_publish_items=3)
        program = Program(http, site, await publisher.grant(publish=["*"]))
        assert await program.refused(body) == (status, code)

    async def test_somebodys_own_channel_takes_a_pattern_that_says_so(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        body = {"channel": "#user-7", "data": 1}
        page, backend = [Program(http, site, await publisher.grant(publish=[pattern])) for pattern in ("*", "#user-*")]
        assert await page.refused(body) == (403, "forbidden")
        assert (await backend.post(body)).status_code == 200
        assert await backend.refused({"channel": "a", "data": 1}) == (403, "forbidden")

    async def test_only_a_good_grant_counts_and_no_cookie(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher, prefix: str
    ) -> None:
        site = await serve_realtime()
        body = {"channel": "a", "data": 1}
        grant = await publisher.grant(user="7", publish=["*"])
        program = Program(http, site, grant)
        assert (await program.post(body, Cookie="session=x")).status_code == 200
        assert await program.refused(body, Origin="https://evil.example") == (403, "forbidden")
        for shown in ("Bearer x.y.z", "Basic eA==", "Bearer"):
            assert (await program.refused(body, Authorization=shown))[0] == 401
        async with await RawClient.connect(site.ws_url + "/") as client:
            resume = (await client.hello(grant=grant))["resume"]
        assert await program.refused(body, Authorization=f"Bearer {resume}") == (401, "grant_invalid")
        program.headers = {}
        assert (await program.refused(body, Cookie="session=x"))[0] == 401
        end = Publisher("memory://", prefix=prefix, secret=SECRET)
        await asyncio.to_thread(end.disconnect, user="7")
        program.headers = {"Authorization": f"Bearer {grant}"}
        assert await program.refused(body) == (401, "revoked")

    async def test_a_draining_server_still_publishes(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        program = Program(http, site, await publisher.grant(publish=["*"]))
        await site.app.start()
        await site.app.drain(0)
        assert (await program.post({"channel": "a", "data": 1})).status_code == 200


def test_a_broker_that_is_away_is_said_to_be(processes: Processes) -> None:
    env = {"PUBSUB_URL": f"redis://127.0.0.1:{free_port()}", "PUBSUB_SECRET": SECRET, "PUBSUB_PUBLISH_TIMEOUT": "0.2"}
    server = processes.uvicorn(env=env, ready_path="/realtime/client.js")
    grant = Publisher("memory://", secret=SECRET).grant(publish=["*"])
    headers = {"Authorization": f"Bearer {grant}"}
    response = httpx.post(f"{server.url}/realtime/publish", json={"channel": "a", "data": 1}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert "idempotency_key" in response.json()["error"]["message"]


@pytest.mark.parametrize("seed", "123")
@pytest.mark.timeout(120_000 * MS)
def test_the_description_is_true_of_a_real_server(
    processes: Processes, redis_server: RedisServer, prefix: str, tmp_path: Path, seed: str
) -> None:
    env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}
    server = processes.uvicorn(env=env)
    grant = Publisher("memory://", secret=SECRET).grant(publish=["*", "#*"])
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/realtime/openapi.json"),
        *("--header", f"Authorization: Bearer {grant}"),
        *("--checks", "all", "--max-examples", "60", "--seed", seed, "--generation-database", "none"),
    ]
    # It keeps what it found in the directory that it runs in.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 / 1" in done.stdout or "Tested: 1" in done.stdout, done.stdout
