"""The same channels, positions and credentials by WebSocket, by server-sent events and by polls, on two servers."""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Page
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import InvalidStatus

from pubsub_mw import AsyncPublisher, Publisher
from tests.journeys.fleet import TRANSPORTS, Publishing, closing, listeners, run
from tests.tools.browser import PageErrors
from tests.tools.clock import MS, eventually, eventually_async
from tests.tools.raw_stream import RawStream
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served

SECRET = "a secret of thirty-two bytes or more"
CHANNELS = ("room:1", "room:2")
PUBLICATIONS = 5_000


class Deployment:
    """Two realtime servers on one Redis; nothing makes a client come back to the one it was at."""

    def __init__(self, processes: Processes, redis_server: RedisServer, prefix: str) -> None:
        self._processes = processes
        self.options: dict[str, Any] = {"url": redis_server.url, "prefix": prefix, "secret": SECRET}
        self.env = {"PUBSUB_URL": redis_server.url, "PUBSUB_PREFIX": prefix, "PUBSUB_SECRET": SECRET}

    def server(self, **settings: str) -> Served:
        return self._processes.uvicorn(env=self.env | settings)

    def servers(self, **settings: str) -> tuple[Served, Served]:
        """Two of them, which start at the same time."""
        one, other = (self._processes.uvicorn(env=self.env | settings, wait=False) for _ in range(2))
        return one.wait_until_ready(), other.wait_until_ready()

    def worker(self, app: str, *options: str, **settings: str) -> Served:
        return self._processes.pubsub_mw("worker", app, *options, env=self.env | settings)

    def publisher(self, **settings: Any) -> AsyncPublisher:
        return AsyncPublisher(**self.options, **settings)


@pytest.fixture
def deployment(processes: Processes, redis_server: RedisServer, prefix: str) -> Deployment:
    return Deployment(processes, redis_server, prefix)


def urls_of(*servers: Served) -> list[str]:
    return [f"{server.ws_url}/realtime/" for server in servers]


@pytest.mark.timeout(90_000 * MS)
def test_one_client_moves_from_transport_to_transport_and_gets_each_of_5000_once_and_in_order(
    deployment: Deployment,
) -> None:
    servers = deployment.servers(PUBSUB_HISTORY_SIZE=str(PUBLICATIONS))

    async def main() -> None:
        publisher = deployment.publisher(history_size=PUBLICATIONS)
        publishing = Publishing(publisher, CHANNELS)
        async with closing(publisher), listeners(1, urls_of(*servers), *CHANNELS) as (client,):
            moves = 0
            for number in range(0, PUBLICATIONS, 50):
                items = [(CHANNELS[n % 2], n) for n in range(number, number + 50)]
                for (channel, n), position in zip(items, await publisher.many(items), strict=True):
                    publishing.accepted[channel][str(position)] = n
                if number % 400 == 0:
                    # Websocket, poll, stream, websocket, ...: each at the other server, some in the middle of a frame.
                    client.transport = TRANSPORTS[-moves % 3]
                    if moves % 2:
                        client.drop()
                    moves += 1
                await asyncio.sleep(
                    25 * MS
                )  # so that a move can come to stand before the next one, on a quick machine too
            await publishing.reaches([client], 20_000 * MS)
            publishing.check([client])
            assert client.told == []
            assert sum(len(heard.got) for heard in client.heard.values()) == PUBLICATIONS
            assert client.connection_count >= 9

    run(main)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.timeout(60_000 * MS)
def test_who_comes_back_to_another_server_each_time_loses_and_doubles_nothing(
    deployment: Deployment, transport: str
) -> None:
    servers = deployment.servers(PUBSUB_HISTORY_SIZE="10000")

    async def main() -> None:
        publisher = deployment.publisher(history_size=10_000)
        async with (
            closing(publisher),
            listeners(3, urls_of(*servers), *CHANNELS, transports=[transport]) as clients,
            Publishing(publisher, CHANNELS) as publishing,
        ):
            for _ in range(20):
                await publishing.more(10)
                await eventually_async(lambda: all(client.is_listening for client in clients))
                for client in clients:
                    client.drop()
            await publishing.more(10)
            await publishing.stop()
            await publishing.reaches(clients)
            publishing.check(clients)
            assert not [client.told for client in clients if client.told]
            assert all(client.connection_count >= 15 for client in clients)

    run(main)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_is_asked_to_stop_ends_what_stands_and_exits(deployment: Deployment, transport: str) -> None:
    going, staying = deployment.servers(PUBSUB_DRAIN="0.5")

    async def main() -> None:
        publisher = deployment.publisher()
        async with (
            closing(publisher),
            listeners(4, urls_of(going, staying), *CHANNELS, transports=[transport]) as clients,
            Publishing(publisher, CHANNELS) as publishing,
        ):
            await publishing.more()
            going.send_signal(signal.SIGTERM)
            await eventually_async(lambda: going.exit_code is not None, 10_000 * MS, "the server does not stop")
            await publishing.more()
            await publishing.stop()
            await publishing.reaches(clients)
            publishing.check(clients)
            assert not [client.told for client in clients if client.told]

    run(main)
    assert going.exit_code in (0, -signal.SIGTERM)
    assert "Traceback" not in going.log
    assert "ASGI callable returned without" not in going.log


@pytest.mark.anyio
@pytest.mark.parametrize("transport", ["sse", "longpoll"])
async def test_a_request_is_answered_once_though_its_worker_dies(
    deployment: Deployment, raw_stream: Callable[..., Awaitable[RawStream]], transport: str, tmp_path: Path
) -> None:
    """It is sent to one server; its answer is heard at the other, or at each in turn."""
    runs = tmp_path / "runs"
    settings = {"PUBSUB_REQUESTS": "/*", "PUBSUB_LEASE": str(1_000 * MS), "RUNS": str(runs)}
    deployment.worker("tests.apps.answering:app", "--processes", "2", **settings)
    here, there = deployment.servers(**settings)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:

        async def send(*frames: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
            url = f"{here.url}/realtime/send"
            response = await http.post(url, json={"frames": frames, "transport": transport, **body})
            answers: list[dict[str, Any]] = response.raise_for_status().json()["frames"]
            return answers

        (connected,) = await send({"type": "connect"})
        resume, headers = connected["resume"], {"Authorization": f"Bearer {connected['resume']}"}
        heard: list[dict[str, Any]] = []
        stream = None
        if transport == "sse":
            stream = await raw_stream(f"{there.url}/realtime/events?frames=1", headers=headers)
        requests = [
            {"type": "request", "id": "1", "method": "GET", "path": "/die"},
            {"type": "request", "id": "2", "method": "GET", "path": "/run"},
        ]
        expected = [{"type": "accepted", "id": "1"}, {"type": "accepted", "id": "2"}]
        assert await send(*requests, resume=resume) == expected
        assert await send(requests[0], resume=resume) == expected[:1]  # sent again: it is known
        cursor, servers = "", [here, there]
        while len(heard) < 2:
            if stream is not None:
                heard.append(await stream.frame("response", timeout=10_000 * MS))
                continue
            servers.reverse()
            query = {"cursor": cursor, "wait": "10"}
            answer = (await http.get(f"{servers[0].url}/realtime/poll", params=query, headers=headers)).json()
            cursor = answer["cursor"]
            heard += [frame for frame in answer["frames"] if frame["type"] == "response"]
        assert [(frame["id"], frame["body"]) for frame in heard] == [("1", "2"), ("2", "1")]
    ran = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [(run["id"], run["delivery_count"]) for run in ran] == [("1", 1), ("1", 2), ("2", 1)]


OURS = "https://app.example"
ORIGINS = [
    (OURS, True),
    ("https://APP.example", True),
    ("https://app.example:443", True),
    ("http://app.example", False),
    ("https://app.example:8443", False),
    ("https://evil.example", False),
    ("https://app.example.evil.example", False),
    ("https://sub.app.example", False),
    ("https://app.example.", False),
    ("https://\u0430pp.example", False),
    ("null", False),
    (f"{OURS}, https://evil.example", False),
]


async def websocket_status(server: Served, origin: str) -> int:
    try:
        # As bytes of latin-1: a library that speaks for a page would not send some of them.
        headers = {"Origin": origin.encode().decode("latin-1")}
        async with connect_websocket(f"{server.ws_url}/realtime/", additional_headers=headers, proxy=None):
            return 200
    except InvalidStatus as error:
        return error.response.status_code


async def http_status(server: Served, origin: str, path: str) -> int:
    headers = [(b"Origin", origin.encode())]
    async with (
        httpx.AsyncClient(trust_env=False) as http,
        http.stream("GET", f"{server.url}/realtime/{path}?channel=a&wait=0", headers=headers) as response,
    ):
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == (origin if response.status_code == 200 else None)
        return response.status_code


def test_twelve_origins_get_the_same_answer_by_each_of_the_three_transports(deployment: Deployment) -> None:
    server = deployment.server(PUBSUB_ORIGINS=OURS)

    async def main() -> None:
        for origin, is_allowed in ORIGINS:
            statuses = [
                await websocket_status(server, origin),
                await http_status(server, origin, "events"),
                await http_status(server, origin, "poll"),
            ]
            assert statuses == [200 if is_allowed else 403] * 3, origin

    run(main)


def test_a_server_that_is_killed_is_outlived_by_what_the_app_is_told_of_its_pollers(deployment: Deployment) -> None:
    settings = {"PUBSUB_PRESENCE_TTL": "1", "PUBSUB_PRESENCE_GRACE": "0.2"}
    going, staying = deployment.servers(**settings)
    publisher = Publisher(**deployment.options)
    grant = publisher.grant(user="7", channels=["presence-*"])

    def poll(server: Served, resume: str, wait: str) -> httpx.Response:
        query = {"channel": "presence-a", "wait": wait}
        headers = {"Authorization": f"Bearer {resume}"}
        return httpx.get(f"{server.url}/realtime/poll", params=query, headers=headers, timeout=30)

    hello = {"frames": [{"type": "connect", "grant": grant}]}
    (connected,) = httpx.post(f"{staying.url}/realtime/send", json=hello).json()["frames"]
    assert poll(going, connected["resume"], "0").status_code == 200

    async def hang() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            headers = {"Authorization": f"Bearer {connected['resume']}"}
            query = {"channel": "presence-a", "wait": "30", "cursor": "e.1.t"}
            waiting = asyncio.create_task(http.get(f"{going.url}/realtime/poll", params=query, headers=headers))
            await eventually_async(lambda: going.log.count("/realtime/poll") >= 1)
            await asyncio.sleep(100 * MS)
            going.send_signal(signal.SIGKILL)
            await asyncio.gather(waiting, return_exceptions=True)

    run(hang)
    eventually(lambda: publisher.presence("presence-a") == [], 10_000 * MS)
    publisher.close()


@pytest.mark.anyio
async def test_a_browser_hears_what_was_sent_and_nothing_else(deployment: Deployment, browser_page: Page) -> None:
    server = deployment.server()
    await browser_page.goto(f"{server.url}/realtime/health")
    await browser_page.evaluate(
        """async () => {
            window.heard = [];
            window.source = new EventSource("/realtime/events?channel=room:1");
            for (const name of ["message", "said", "gap"]) {
                source.addEventListener(name, (event) => heard.push([event.type, event.data, event.lastEventId]));
            }
            await new Promise((resolve) => source.addEventListener("open", resolve));
        }"""
    )
    publisher = deployment.publisher()
    sent: list[tuple[str, Any]] = [
        ("message", "a\nb"),
        ("message", "\n\nid: forged\nevent: gap\ndata: forged\n\n"),
        ("said", "\0\u2028\u2029 \U0001f600 \ufeff"),
        ("message", ""),
        ("said", " leading and trailing "),
        ("message", "x" * 1_000_000),
        ("message", {"text": "a\r\nb", "n": [1, None]}),
    ]
    positions = [str(await publisher.publish("room:1", data, event=event)) for event, data in sent]
    count: Callable[[], Any] = lambda: browser_page.evaluate("heard.length")  # noqa: E731
    await eventually_async(lambda: browser_page.evaluate(f"heard.length >= {len(sent)}"), message="events")
    heard = await browser_page.evaluate("heard")
    assert [(event, json.loads(data) if data.startswith("{") else data) for event, data, _ in heard] == sent
    assert [last_id for _, _, last_id in heard] == positions
    assert await count() == len(sent)
    await publisher.close()


@pytest.mark.anyio
async def test_an_event_source_comes_back_by_itself_with_what_it_missed(
    deployment: Deployment, browser_page: Page, page_errors: PageErrors, tcp_proxy: Callable[[int], Any]
) -> None:
    server = deployment.server()
    proxy = tcp_proxy(server.port)
    await browser_page.goto(f"http://{proxy.address}/realtime/health")
    await browser_page.evaluate(
        """() => {
            window.heard = [];
            window.source = new EventSource("/realtime/events?channel=room:1&channel=room:2");
            source.onmessage = (event) => heard.push(event.data);
        }"""
    )
    publisher = deployment.publisher()

    async def publish_until(text: str) -> None:
        await publisher.publish("room:1", text)

    await browser_page.wait_for_function("source.readyState === 1")
    for number in range(2):
        await publish_until(f"{number} before")
        await eventually_async(lambda number=number: browser_page.evaluate(f"heard.includes('{number} before')"))  # type: ignore[misc]
        proxy.reset()
        await publish_until(f"{number} meanwhile")
        await publisher.publish("room:2", f"{number} there")
        await eventually_async(
            lambda number=number: browser_page.evaluate(  # type: ignore[misc]
                f"heard.includes('{number} meanwhile') && heard.includes('{number} there')"
            ),
            10_000 * MS,
        )
    heard = await browser_page.evaluate("heard")
    assert len(heard) == len(set(heard)) == 6
    page_errors.console.clear()
    await publisher.close()
