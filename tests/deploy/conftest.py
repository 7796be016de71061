"""Put an app, two realtime servers and a worker behind nginx, as docs/deploy.md does."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pubsub_mw import Publisher
from tests.tools.nginx import Nginx
from tests.tools.ports import free_port
from tests.tools.raw_client import RawClient
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served

SECRET = "a secret of thirty-two bytes or more"
VISITOR = "127.0.0.2"  # nginx itself comes from 127.0.0.1

Connect = Callable[..., Awaitable[RawClient]]


@dataclass(slots=True, kw_only=True)
class Deployment:
    nginx: Nginx
    servers: list[Served]
    publisher: Publisher
    processes: Processes
    env: dict[str, str]
    _connect: Connect

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.nginx.port}"

    @property
    def socket_url(self) -> str:
        return f"wss://{self.host}/realtime/"

    def client(self, **options: Any) -> httpx.AsyncClient:
        """A visitor of another address than nginx's own, which says that it has yet another one."""
        transport = httpx.AsyncHTTPTransport(verify=self.nginx.trust, local_address=VISITOR, **options)
        headers = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "http", "X-Real-IP": "6.6.6.6"}
        return httpx.AsyncClient(base_url=self.nginx.url, transport=transport, headers=headers)

    async def connect(self, **headers: str) -> RawClient:
        return await self._connect(
            self.socket_url,
            origin=self.nginx.url,
            headers={"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "http", **headers},
            ssl=self.nginx.trust,
            local_address=VISITOR,
        )

    async def publish(self, channel: str, data: object, **options: Any) -> str:
        return str(await asyncio.to_thread(partial(self.publisher.publish, channel, data, **options)))

    def start_server(self, port: int) -> Served:
        return self.processes.uvicorn(env=self.env, port=port)


@pytest.fixture
def settings() -> dict[str, str]:
    """Settings beyond what a deployment needs; a test may parametrize them."""
    return {}


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def deployment(
    settings: dict[str, str],
    processes: Processes,
    redis_url: str,
    prefix: str,
    tmp_path: Path,
    raw_client: Connect,
) -> Deployment:
    env = {
        "PUBSUB_URL": redis_url,
        "PUBSUB_PREFIX": prefix,
        "PUBSUB_SECRET": SECRET,
        "PUBSUB_REQUESTS": "/seen",
        "PUBSUB_DRAIN": "1",
        **settings,
    }
    app = processes.gunicorn("tests.apps.behind:app", env=env, wait=False)
    servers = [processes.uvicorn(env=env, port=free_port(), wait=False) for _ in range(2)]
    for served in (app, *servers):
        served.wait_until_ready()
    processes.pubsub_mw("worker", "tests.apps.behind:app", env=env)
    return Deployment(
        nginx=Nginx(processes, tmp_path, app.port, [server.port for server in servers]),
        servers=servers,
        publisher=Publisher(redis_url, prefix=prefix, secret=SECRET, history_size=100_000),
        processes=processes,
        env=env,
        _connect=raw_client,
    )
