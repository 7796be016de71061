"""The user that docs/deploy.md gives to Redis, for everything that a deployment does."""

import asyncio
import re
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from tests.deploy.conftest import Deployment
from tests.tools.clock import eventually_async
from tests.tools.redis_server import RedisServer
from tests.tools.servers import PROJECT

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def redis_url(redis_server: RedisServer, prefix: str) -> Iterator[str]:
    """Of that user, whose keys begin with the prefix of this test."""
    shown = re.search(r"(?m)^ACL SETUSER pubsub (.*)$", (PROJECT / "docs" / "deploy.md").read_text())
    assert shown
    rules = shown[1].replace("pubsub:", f"{prefix}:").split()
    redis_server.cli("ACL", "SETUSER", prefix, "reset", *rules)
    yield f"redis://{prefix}:password@127.0.0.1:{redis_server.port}/0"
    redis_server.cli("ACL", "DELUSER", prefix)


@pytest.mark.parametrize(
    "settings", [{"PUBSUB_LIFECYCLE": "/heard", "PUBSUB_AUTHORIZE": "/page"}], ids=["with all that there is"]
)
async def test_what_the_documentation_lets_a_redis_user_do_is_enough(
    deployment: Deployment,
) -> None:
    grant = await asyncio.to_thread(
        partial(deployment.publisher.grant, user="7", channels=["presence-*"], publish=["room"])
    )
    client = await deployment.connect()
    await client.hello(grant=grant, channels={"room": None, "presence-room": None, "private-asked": None})
    for _ in range(3):
        await client.recv("subscribed")

    await deployment.publish("room", "kept once", idempotency_key="k")
    await client.send({"type": "publish", "channel": "room", "data": "by the client"})
    await client.send({"type": "request", "id": "1", "method": "GET", "path": "/seen"})
    await eventually_async(lambda: client.messages("room") == ["kept once", "by the client"])
    assert (await client.recv("response"))["status"] == 200
    async with httpx.AsyncClient(trust_env=False) as monitoring:
        told = await monitoring.get(f"{deployment.servers[0].url}/realtime/metrics")
        assert 'pubsub_queue_requests{state="running"}' in told.text, "who may not count them tells nothing of them"
    present = await asyncio.to_thread(deployment.publisher.presence, "presence-room")
    assert [member["user"] for member in present] == ["7"]
    await asyncio.to_thread(partial(deployment.publisher.disconnect, user="7"))
    assert (await client.closed())[0] == 3503
    for served in deployment.processes.started:
        assert "NOPERM" not in served.log
        assert "permission" not in served.log
