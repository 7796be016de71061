"""The master fails over while publications flow: what is lost with it is told, and nothing else is lost or doubled."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from pubsub_mw import AsyncPublisher
from tests.journeys.fleet import Listener, Publishing, closing, listeners, run
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.redis_sentinel import RedisGroup
from tests.tools.servers import Processes, Served

CHANNELS = ("room:1", "room:2", "room:3")
CLIENTS = 6
FAILED_OVER_WITHIN = 10_000 * MS
BACK_WITHIN = 5_000 * MS
"""After the promotion: the sentinels tell it, the link is found dead or they are asked again, and it is made anew."""


class Stage:
    """Two realtime servers on a Redis that fails over, and how to play on them."""

    def __init__(self, group: RedisGroup, processes: Processes, prefix: str) -> None:
        self.group = group
        self.prefix = prefix
        env = {
            "PUBSUB_URL": group.url,
            "PUBSUB_PREFIX": prefix,
            "PUBSUB_SECRET": "a secret of thirty-two bytes or more",
            "PUBSUB_HISTORY_SIZE": "100000",
        }
        path = "/realtime/health"
        self.servers: list[Served] = [
            processes.pubsub_mw("realtime", env=env, ready_path=path, wait=False) for _ in range(2)
        ]
        for server in self.servers:
            server.wait_until_ready()

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[tuple[Publishing, list[Listener]]]:
        """Publish to clients on both servers. At the end all have all, or were told."""
        urls = [f"{server.ws_url}/realtime/" for server in self.servers]
        publisher = AsyncPublisher(self.group.url, prefix=self.prefix, history_size=100_000, publish_timeout=1_000 * MS)
        async with (
            closing(publisher),
            listeners(CLIENTS, urls, *CHANNELS) as fleet,
            Publishing(publisher, CHANNELS) as publishing,
        ):
            await publishing.more()
            yield publishing, fleet
            publishing.start()
            await publishing.more(20, BACK_WITHIN)
            await publishing.stop()
            await publishing.reaches(fleet, BACK_WITHIN)
            publishing.check(fleet)
            assert publishing.longest_seconds < 2_000 * MS


@pytest.fixture
def stage(processes: Processes, prefix: str) -> Iterator[Stage]:
    with RedisGroup() as group:
        yield Stage(group, processes, prefix)


def test_a_master_that_is_killed_is_followed_by_its_replica(stage: Stage) -> None:
    async def main() -> None:
        group = stage.group
        async with stage.playing() as (publishing, fleet):
            new = group.other
            await asyncio.to_thread(group.master.kill)
            await eventually_async(lambda: publishing.failed_count > 0)
            await asyncio.to_thread(group.wait_for, new, FAILED_OVER_WITHIN)
            await publishing.more(20, BACK_WITHIN)
            (old,) = (server for server in group.servers if server is not new)
            await asyncio.to_thread(old.start)  # comes back as a master, with nothing, until the sentinels tell it
            await asyncio.to_thread(group.wait_for_replica)
        assert not [reason for client in fleet for reason in client.told if reason == "epoch"]

    run(main)


def test_what_was_lost_with_the_master_is_told_to_everybody_who_had_it(stage: Stage) -> None:
    """The replica was behind: it was cut off before, and knows less than clients do."""

    async def main() -> None:
        group = stage.group
        async with stage.playing() as (publishing, fleet):
            new = group.other
            await publishing.stop()
            await publishing.reaches(fleet)
            await asyncio.to_thread(group.wait_for_replica)
            await asyncio.to_thread(new.cli, "REPLICAOF", "127.0.0.1", free_port())
            publishing.start()
            await publishing.more(60)
            await publishing.stop()
            await publishing.reaches(fleet)
            away = fleet[::2]
            for client in away:
                await client.stop()
            await asyncio.to_thread(group.master.kill)
            await asyncio.to_thread(group.wait_for, new, FAILED_OVER_WITHIN)
            here = [client for client in fleet if client not in away]
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in here), BACK_WITHIN)
            publishing.start()
            await publishing.more(90, BACK_WITHIN)  # past the offsets that were lost
            for client in away:
                client.start()
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in away), BACK_WITHIN)
        assert {reason for client in here for reason in client.told} <= {"ahead", "forked", "unrecovered"}
        assert {reason for client in away for reason in client.told} <= {"ahead", "forked", "unrecovered"}

    run(main)


def test_a_master_that_is_relieved_goes_on_with_nobody(stage: Stage) -> None:
    """`SENTINEL FAILOVER`: the old one stays a master for a while. With `min-replicas-to-write` it takes nothing then,
    so that nobody has to be told of a loss. (Of what it took just before, and did not pass on, they would be.)"""

    async def main() -> None:
        group = stage.group
        for server in group.servers:
            server.cli("CONFIG", "SET", "min-replicas-to-write", 1)
        async with stage.playing() as (publishing, fleet):
            old, new = group.master, group.other
            await publishing.stop()
            await asyncio.to_thread(group.wait_for_replica)
            await asyncio.to_thread(group.failover)
            await eventually_async(lambda: old.cli("ROLE")[2] == [], FAILED_OVER_WITHIN)
            publishing.start()
            await asyncio.to_thread(group.wait_for, new, FAILED_OVER_WITHIN)
            await asyncio.to_thread(group.wait_for_replica)  # until then there is none to write to
            await publishing.more(20, BACK_WITHIN)
        assert not [client.told for client in fleet if client.told]
        assert publishing.failed_count

    run(main)


def test_a_master_that_is_relieved_and_takes_writes_yet_is_left_within_a_second(stage: Stage) -> None:
    async def main() -> None:
        group = stage.group
        async with stage.playing() as (publishing, fleet):
            old, new = group.master, group.other
            await publishing.stop()
            await publishing.reaches(fleet)
            await asyncio.to_thread(group.wait_for_replica)
            await asyncio.to_thread(group.failover)
            await asyncio.to_thread(group.wait_for, new, FAILED_OVER_WITHIN)
            names = [f"{stage.prefix}:{{{channel}}}:p" for channel in CHANNELS]
            await eventually_async(lambda: new.cli("PUBSUB", "NUMSUB", *names)[1::2] == [2, 2, 2], 2_500 * MS)
            assert old.cli("PUBSUB", "NUMSUB", *names)[1::2] == [0, 0, 0]
            assert old.cli("ROLE")[0] == "master"
        assert not [client.told for client in fleet if client.told]

    run(main)
