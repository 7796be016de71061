"""docs/deploy/nginx.conf in front of a whole deployment."""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import pytest
from playwright.async_api import Page
from websockets.exceptions import InvalidStatus

from pubsub_mw.client import connect
from tests.deploy.conftest import VISITOR, Connect, Deployment
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame
from tests.tools.raw_stream import RawStream
from tests.tools.servers import Served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


async def test_plain_http_is_sent_to_https(deployment: Deployment) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(deployment.nginx.plain_url + "/seen?a=b")

    assert answer.status_code == 308
    assert answer.headers["Location"] == f"https://127.0.0.1:{deployment.nginx.plain_port}/seen?a=b"


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_the_app_sees_the_visitor_alike_over_http_and_over_a_connection(
    deployment: Deployment, version: str
) -> None:
    async with deployment.client(http2=version == "HTTP/2", http1=version != "HTTP/2") as http:
        answer = await http.post("/seen", headers={"Origin": deployment.nginx.url, "Cookie": "taste=good"})
        assert answer.http_version == version
        over_http = answer.json()
    client = await deployment.connect(Cookie="taste=good")
    await client.hello()
    await client.send({"type": "request", "id": "1", "method": "POST", "path": "/seen"})
    over_connection = json.loads((await client.recv("response"))["body"])

    assert over_http == over_connection
    assert over_connection == {
        "address": VISITOR,
        "scheme": "https",
        "host": deployment.host,
        "origin": deployment.nginx.url,
        "forwarded": [VISITOR],
        "cookies": {"taste": "good"},
    }


async def test_a_page_of_another_origin_is_refused(deployment: Deployment, raw_client: Connect) -> None:
    for origin in ("https://elsewhere.example", "https://127.0.0.1", "null"):
        with pytest.raises(InvalidStatus) as refused:
            await raw_client(deployment.socket_url, origin=origin, ssl=deployment.nginx.trust)
        assert refused.value.response.status_code == 403


async def test_metrics_are_not_for_visitors(deployment: Deployment) -> None:
    async with deployment.client() as client:
        for path in ("metrics", "metrics?a=b", "%6detrics", "./metrics", "/metrics"):
            answer = await client.get(httpx.URL(f"{deployment.nginx.url}/realtime/{path}"))
            assert (answer.status_code, "pubsub_" in answer.text) == (404, False), path
        assert (await client.get("/realtime/health")).status_code == 200
    async with httpx.AsyncClient(trust_env=False) as monitoring:
        for server in deployment.servers:
            assert "pubsub_connections" in (await monitoring.get(f"{server.url}/realtime/metrics")).text


async def test_the_browsers_client_comes_compressed(deployment: Deployment) -> None:
    async with deployment.client(http2=True) as client:
        answer = await client.get("/realtime/client.js", headers={"Accept-Encoding": "gzip, br"})
    assert (answer.status_code, answer.headers["content-encoding"]) == (200, "gzip")
    assert int(answer.headers["content-length"]) < 6_000
    assert "export function connect" in answer.text


async def test_a_reload_of_nginx_keeps_connections_and_takes_new_ones(deployment: Deployment, prefix: str) -> None:
    client = await deployment.connect()
    await client.hello(channels={prefix: None})
    await client.recv("subscribed")

    deployment.nginx.reload()
    later = await deployment.connect()
    await later.hello(channels={prefix: None})
    await later.recv("subscribed")
    await deployment.publish(prefix, "after the reload")

    for each in (client, later):
        assert (await each.recv("message"))["data"] == "after the reload"


async def test_a_server_that_stops_hands_its_clients_to_the_other_one(deployment: Deployment, prefix: str) -> None:
    """nginx offers whoever comes back first to the server that stops, which refuses, and then to the next."""
    client = await deployment.connect()
    hello = await client.hello(channels={prefix: None})
    at = (await client.recv("subscribed"))["position"]
    stopping = await _server_of_the_only_connection(deployment)

    await asyncio.to_thread(stopping.stop)
    assert (await client.closed())[0] == 3001
    await deployment.publish(prefix, "meanwhile")
    for _ in range(4):  # round robin would have offered two of these to the server that is gone
        back = await deployment.connect()
        await back.hello(resume=hello["resume"], channels={prefix: at})
        assert (await back.recv("message"))["data"] == "meanwhile"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_curl_hears_each_publication_at_once_though_nginx_buffers(
    deployment: Deployment, prefix: str, version: str
) -> None:
    """The responses of the app are buffered, by default; a stream asks nginx not to."""
    url = f"{deployment.nginx.url}/realtime/events?channel={prefix}"
    command = ["curl", "-N", "-s", version, "--cacert", str(deployment.nginx.certificate), url]
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert curl.stdout is not None
    try:
        async with asyncio.timeout(10_000 * MS):
            await curl.stdout.readuntil(b"\n\n")  # the padding: it listens
            for text in ("a", "<b>bold</b>", "c"):
                position = await deployment.publish(prefix, text)
                told = (await curl.stdout.readuntil(b"data: " + text.encode())).decode()
                rest = (await curl.stdout.readuntil(b"\n\n")).decode()
                assert f"id: {position}" in told + rest
    finally:
        curl.kill()
        await curl.wait()


async def test_what_is_sent_by_post_is_answered_on_the_stream(
    deployment: Deployment, raw_stream: Callable[..., Awaitable[RawStream]]
) -> None:
    """No request of these needs the server that the one before had; nginx deals them out in turn."""
    async with deployment.client(http2=True) as http:
        origin = {"Origin": deployment.nginx.url}

        async def send(frame: Frame, **fields: str) -> Frame:
            answer = await http.post("/realtime/send", json={**fields, "frames": [frame]}, headers=origin)
            assert answer.status_code == 200, answer.text
            reply: Frame = answer.json()["frames"][0]
            return reply

        connected = await send({"type": "connect"})
        resume = connected["resume"]
        stream = await raw_stream(
            f"{deployment.nginx.url}/realtime/events?frames=1",
            headers={"Authorization": f"Bearer {resume}"},
            ssl=deployment.nginx.trust,
        )
        assert (await stream.frame("connected"))["connection"] == connected["connection"]
        for number in ("1", "2", "3"):
            request = {"type": "request", "id": number, "method": "POST", "path": "/seen"}
            assert (await send(request, resume=resume))["type"] == "accepted"
            seen = json.loads((await stream.frame("response"))["body"])
            assert (seen["address"], seen["scheme"], seen["origin"]) == (VISITOR, "https", deployment.nginx.url)

        foreign = await http.post(
            "/realtime/send", json={"frames": [{"type": "connect"}]}, headers={"Origin": "https://elsewhere.example"}
        )
        assert foreign.status_code == 403


async def test_what_another_language_publishes_is_polled_from_any_server(deployment: Deployment, prefix: str) -> None:
    """nginx deals requests out in turn: each poll is answered by the server that the one before did not have."""
    grant = await asyncio.to_thread(partial(deployment.publisher.grant, publish=[prefix]))
    async with deployment.client(http2=True) as http:

        async def poll(cursor: str, wait: int) -> tuple[list[Frame], str]:
            query = {"channel": prefix, "cursor": cursor, "wait": str(wait)}
            answer = await http.get("/realtime/poll", params=query, timeout=20_000 * MS)
            assert answer.status_code == 200, answer.text
            return answer.json()["frames"], answer.json()["cursor"]

        _, cursor = await poll("", 0)
        for number in range(4):
            polling = asyncio.create_task(poll(cursor, 10))
            publication = {"channel": prefix, "data": number}
            answer = await http.post(
                "/realtime/publish", json=publication, headers={"Authorization": f"Bearer {grant}"}
            )
            assert answer.status_code == 200, answer.text
            frames, cursor = await polling
            assert [frame["data"] for frame in frames if frame["type"] == "message"] == [number]


async def test_a_page_gets_every_message_while_each_server_is_replaced(
    deployment: Deployment, prefix: str, browser_page: Page
) -> None:
    """By an EventSource, over HTTP/2, behind nginx that buffers by default."""
    await browser_page.goto(f"{deployment.nginx.url}/page")
    protocol = await browser_page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol")
    assert protocol == "h2"
    await browser_page.evaluate(
        """(url) => new Promise((open) => {
            window.heard = [];
            window.source = new EventSource(url);
            source.onopen = open;
            source.onmessage = (event) => heard.push(Number(event.data));
            source.addEventListener("gap", () => heard.push("gap"));
        })""",
        f"/realtime/events?channel={prefix}",
    )
    published, is_over = 0, False

    async def keep_publishing() -> None:
        nonlocal published
        while not is_over:  # not cancelled: what is on its way then is published all the same
            await deployment.publish(prefix, published)
            published += 1
            await asyncio.sleep(5 * MS)

    publishing = asyncio.create_task(keep_publishing())
    for server in deployment.servers:
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(deployment.start_server, server.port)
    for server in deployment.processes.started[-2:]:
        await asyncio.to_thread(server.stop)  # both are gone for a moment
    for server in deployment.servers:
        await asyncio.to_thread(deployment.start_server, server.port)
    is_over = True
    await publishing

    # Asked seldom: a page that is asked all the time has no time to hear.
    await browser_page.wait_for_function(
        "(last) => heard.at(-1) === last", arg=published - 1, polling=100, timeout=30_000
    )
    assert await browser_page.evaluate("heard") == list(range(published))
    assert await browser_page.evaluate("source.readyState") == 1


@pytest.mark.parametrize("transport", ["sse", "longpoll"])
async def test_as_many_channels_as_a_connection_may_have_are_named_in_a_url(
    deployment: Deployment, prefix: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(deployment.nginx.certificate))
    names = [f"{prefix}:{number:03}".ljust(40, "x") for number in range(128)]
    async with connect(deployment.socket_url, transports=[transport]) as connection:
        subscriptions = await asyncio.gather(*(connection.subscribe(name) for name in names[1:]))
        subscriptions.append(await connection.subscribe(names[0]))  # opens it anew, from the positions of all others
        for subscription in subscriptions:
            await deployment.publish(subscription.channel, subscription.channel)
            assert (await anext(subscription)).data == subscription.channel


@pytest.mark.parametrize("settings", [{"PUBSUB_DRAIN": "4"}], ids=["slowly"])
async def test_while_a_server_drains_nobody_is_turned_away(deployment: Deployment) -> None:
    clients = [await deployment.connect() for _ in range(20)]
    for client in clients:
        await client.hello()
    stopping = deployment.servers[0]

    stopping.send_signal(signal.SIGTERM)
    async with httpx.AsyncClient(base_url=stopping.url) as direct:

        async def is_draining() -> bool:
            return bool((await direct.get("/realtime/health")).json()["status"] == "draining")

        await eventually_async(is_draining)
        for _ in range(4):
            await (await deployment.connect()).hello()
        assert await is_draining(), "it was too quick to be seen"


async def _server_of_the_only_connection(deployment: Deployment) -> Served:
    async with httpx.AsyncClient() as direct:
        for server in deployment.servers:
            if (await direct.get(f"{server.url}/realtime/health")).json()["connections"]:
                return server
    raise AssertionError("nobody is connected")
