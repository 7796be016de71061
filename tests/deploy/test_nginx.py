"""docs/deploy/nginx.conf in front of a whole deployment."""

import asyncio
import json
import signal

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.deploy.conftest import VISITOR, Connect, Deployment
from tests.tools.clock import eventually_async
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
        assert (await client.get("/realtime/metrics")).status_code == 404
        assert (await client.get("/realtime/health")).status_code == 200


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
