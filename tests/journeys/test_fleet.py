"""Two realtime servers, a gunicorn with two workers, Redis, fifty clients that come and go; nothing breaks but they."""

import asyncio
import random

import httpx
import pytest

from pubsub_mw import AsyncPublisher
from tests.journeys.fleet import Publishing, closing, listeners, run
from tests.tools.clock import MS, eventually_async
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes

PUBLICATIONS = 10_000
CHANNELS = 10


@pytest.mark.timeout(90_000 * MS)
def test_fifty_restless_clients_get_ten_thousand_publications_once_and_in_order(
    redis_server: RedisServer, processes: Processes, prefix: str
) -> None:
    env = {
        "PUBSUB_URL": redis_server.url,
        "PUBSUB_PREFIX": prefix,
        "PUBSUB_SECRET": "a secret of thirty-two bytes or more",
        "PUBSUB_HISTORY_SIZE": str(PUBLICATIONS),
    }
    servers = [processes.uvicorn(env=env, wait=False) for _ in range(2)]
    site = processes.gunicorn("tests.apps.publishing:app", env=env)
    for server in servers:
        server.wait_until_ready()
    channels = [f"room:{number}" for number in range(CHANNELS)]
    urls = [f"{server.ws_url}/realtime/" for server in servers]
    chance = random.Random(1)

    async def main() -> None:
        publisher = AsyncPublisher(redis_server.url, prefix=prefix, history_size=PUBLICATIONS)
        publishing = Publishing(publisher, channels)
        batches = [[[channels[n % CHANNELS], n] for n in range(m, m + 50)] for m in range(0, PUBLICATIONS, 50)]
        is_over = asyncio.Event()

        def accept(batch: list[list[object]], positions: list[str]) -> None:
            for (channel, number), position in zip(batch, positions, strict=True):
                publishing.accepted[str(channel)][position] = int(str(number))

        async def post(http: httpx.AsyncClient, batches: list[list[list[object]]]) -> None:
            for batch in batches:
                response = await http.post(site.url, json=batch)
                accept(batch, response.raise_for_status().json())
                await asyncio.sleep(10 * MS)

        async def publish(batches: list[list[list[object]]]) -> None:
            for batch in batches:
                positions = await publisher.many([(str(channel), data) for channel, data in batch])
                accept(batch, [str(position) for position in positions])
                await asyncio.sleep(20 * MS)

        async def disturb() -> None:
            while not is_over.is_set():
                chance.choice(clients).drop()
                await asyncio.sleep(chance.uniform(0, 40) * MS)

        groups = [channels[n : n + 2] for n in range(0, CHANNELS, 2)]
        async with (
            closing(publisher),
            listeners(10, urls, *groups[0]) as first,
            listeners(10, urls, *groups[1]) as second,
            listeners(10, urls, *groups[2]) as third,
            listeners(10, urls, *groups[3]) as fourth,
            listeners(10, urls, *groups[4]) as fifth,
        ):
            clients = [*first, *second, *third, *fourth, *fifth]
            disturbing = asyncio.create_task(disturb())
            async with httpx.AsyncClient() as http:
                await asyncio.gather(post(http, batches[:50]), post(http, batches[50:100]), publish(batches[100:]))
            is_over.set()
            await disturbing
            assert publishing.accepted_count == PUBLICATIONS
            await publishing.reaches(clients, 20_000 * MS)
            publishing.check(clients)
            assert not [client.told for client in clients if client.told]
            for client in clients:
                assert sum(len(heard.got) for heard in client.heard.values()) == PUBLICATIONS // 5
            assert sum(client.connection_count for client in clients) > 2 * len(clients)
            await eventually_async(lambda: all(client.is_listening for client in clients))

    run(main)
