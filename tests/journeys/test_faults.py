"""One thing breaks while publications flow: nothing is lost or doubled within history, and what is lost is told.

The time limits are those of the documentation: a dead link is found within `probe_timeout` and one probe, and after a
restart of Redis everybody is told within five seconds. Where a fault lasts for a while, that while is slept.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve

from pubsub_mw import AsyncPublisher
from tests.journeys.fleet import Listener, Publishing, closing, listeners, run
from tests.tools.clock import MS, eventually_async
from tests.tools.ports import free_port
from tests.tools.raw_client import Frame
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes, Served
from tests.tools.tcp_proxy import TcpProxy

CHANNELS = ("room:1", "room:2", "room:3")
CLIENTS = 6
TOLD_WITHIN = 10_000 * MS

Proxy = Callable[[int], TcpProxy]


class Stage:
    """Two realtime servers on one Redis that the test may break, and how to play on them."""

    def __init__(self, redis: RedisServer, processes: Processes, prefix: str, proxy: TcpProxy | None = None) -> None:
        self.redis = redis
        self.prefix = prefix
        self.proxy = proxy
        env = {
            "PUBSUB_URL": redis.url if proxy is None else f"redis://{proxy.address}/0",
            "PUBSUB_PREFIX": prefix,
            "PUBSUB_SECRET": "a secret of thirty-two bytes or more",
            "PUBSUB_HISTORY_SIZE": "100000",
        }
        self.servers: list[Served] = [processes.uvicorn(env=env, wait=False) for _ in range(2)]
        for server in self.servers:
            server.wait_until_ready()

    @property
    def urls(self) -> list[str]:
        return [f"{server.ws_url}/realtime/" for server in self.servers]

    @asynccontextmanager
    async def playing(self, clients: int = CLIENTS) -> AsyncIterator[tuple[Publishing, list[Listener]]]:
        """Publish, past the proxy, to clients on both servers. At the end all have all, or were told."""
        publisher = AsyncPublisher(self.redis.url, prefix=self.prefix, history_size=100_000, publish_timeout=1_000 * MS)
        async with (
            closing(publisher),
            listeners(clients, self.urls, *CHANNELS) as fleet,
            Publishing(publisher, CHANNELS) as publishing,
        ):
            await publishing.more()
            yield publishing, fleet
            publishing.start()
            await publishing.more()
            await publishing.stop()
            await publishing.reaches(fleet)
            publishing.check(fleet)


@pytest.fixture
def stage(own_redis: RedisServer, processes: Processes, prefix: str) -> Stage:
    return Stage(own_redis, processes, prefix)


@pytest.fixture
def bent_stage(own_redis: RedisServer, processes: Processes, prefix: str, tcp_proxy: Proxy) -> Stage:
    return Stage(own_redis, processes, prefix, tcp_proxy(own_redis.port))


def assert_nobody_was_told(fleet: list[Listener]) -> None:
    assert not [client.told for client in fleet if client.told]


def assert_everybody_was_told_once_per_channel(fleet: list[Listener], *reasons: str) -> None:
    for client in fleet:
        for channel, heard in client.heard.items():
            assert len(heard.told) == 1, f"{channel}: {heard.told}"
            assert heard.told[0] in (*reasons, "unrecovered")


def test_redis_restarts_without_its_data_and_everybody_is_told_once(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(stage.redis.kill)
            await eventually_async(lambda: publishing.failed_count > 0)
            await asyncio.to_thread(stage.redis.start)
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in fleet), TOLD_WITHIN)
            await publishing.more()
        assert_everybody_was_told_once_per_channel(fleet, "epoch")
        assert publishing.longest_seconds < 4_000 * MS

    run(main)


def test_redis_restarts_without_its_data_and_idle_channels_are_told_too(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await publishing.stop()
            await publishing.reaches(fleet)
            await asyncio.to_thread(stage.redis.restart)
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in fleet), TOLD_WITHIN)
        assert_everybody_was_told_once_per_channel(fleet, "epoch")

    run(main)


def test_a_link_that_freezes_and_goes_on_loses_nothing(bent_stage: Stage) -> None:
    async def main() -> None:
        assert bent_stage.proxy is not None
        async with bent_stage.playing() as (publishing, fleet):
            bent_stage.proxy.freeze()
            await asyncio.sleep(5_000 * MS)
            bent_stage.proxy.pass_through()
        assert_nobody_was_told(fleet)
        assert not publishing.failed_count

    run(main)


def test_a_link_that_swallows_everything_is_found_out_and_nothing_is_lost(bent_stage: Stage) -> None:
    async def main() -> None:
        assert bent_stage.proxy is not None
        async with bent_stage.playing() as (_, fleet):
            bent_stage.proxy.blackhole()
            await asyncio.sleep(5_000 * MS)
            bent_stage.proxy.pass_through()
        assert_nobody_was_told(fleet)

    run(main)


def test_a_black_hole_for_the_present_connections_alone_is_found_out(bent_stage: Stage) -> None:
    """As when a NAT or a firewall forgets them; new ones work."""

    async def main() -> None:
        assert bent_stage.proxy is not None
        async with bent_stage.playing() as (publishing, fleet):
            bent_stage.proxy.blackhole()
            await publishing.more(20)
            bent_stage.proxy.pass_through()  # what was lost stays lost, and those connections stay dark
            behind = [dict(client.heard["room:1"].got) for client in fleet]
            await publishing.more(20)
            assert [dict(client.heard["room:1"].got) for client in fleet] == behind, "they are deaf"
            await publishing.stop()
            await publishing.reaches(fleet)
        assert_nobody_was_told(fleet)

    run(main)


def test_pubsub_connections_that_are_killed_over_and_over_lose_nothing(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            killed = 0
            while killed < 20:
                killed += int(await asyncio.to_thread(stage.redis.cli, "CLIENT", "KILL", "TYPE", "pubsub"))
                await publishing.more(10)
        assert_nobody_was_told(fleet)

    run(main)


def test_all_connections_that_are_killed_over_and_over_lose_nothing(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            for _ in range(20):
                await asyncio.to_thread(stage.redis.cli, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.to_thread(stage.redis.cli, "CLIENT", "KILL", "TYPE", "pubsub")
                await publishing.more(10)
        assert_nobody_was_told(fleet)

    run(main)


def test_a_flush_is_told_once_to_everybody(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(stage.redis.cli, "FLUSHALL")
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in fleet), TOLD_WITHIN)
            await publishing.more(100)
            assert not publishing.failed_count
        assert_everybody_was_told_once_per_channel(fleet, "epoch")

    run(main)


@pytest.mark.parametrize("lost", ["history", "position"])
def test_a_single_key_that_is_evicted_is_told_or_does_no_harm(stage: Stage, lost: str) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            for client in fleet[::2]:
                await client.stop()
            await publishing.more(20)
            key = f"{stage.prefix}:{{room:1}}{':h' if lost == 'history' else ''}"
            assert await asyncio.to_thread(stage.redis.cli, "DEL", key) == 1
            await publishing.more(30)
            for client in fleet[::2]:
                client.start()
        for index, client in enumerate(fleet):
            was_away = index % 2 == 0
            assert client.heard["room:2"].told == client.heard["room:3"].told == []
            told = len(client.heard["room:1"].told)
            if lost == "position":
                assert told == 1
            else:
                # Who was away is told, unless a server still has all that it needs: what it read for others just now.
                assert told <= int(was_away)

    run(main)


@pytest.mark.timeout(40_000 * MS)
def test_a_redis_that_comes_back_older_than_it_was_tells_everybody(
    own_redis: RedisServer, processes: Processes, prefix: str
) -> None:
    """Its snapshot lacks what clients have: with fewer publications than they know they are ahead of it, with as many
    or more their history has forked."""
    stage = Stage(own_redis, processes, prefix)
    snapshot = own_redis.directory / "dump.rdb"

    async def fall_back() -> None:
        saved = snapshot.with_suffix(".saved")
        await asyncio.to_thread(shutil.copy, snapshot, saved)
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(shutil.copy, saved, snapshot)
        await asyncio.to_thread(own_redis.start)

    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(own_redis.cli, "SAVE")
            await publishing.more(30)
            await publishing.stop()
            await publishing.reaches(fleet)
            away = fleet[::2]
            for client in away:
                await client.stop()  # some learn of it live, some only when they come back
            await fall_back()
            here = [client for client in fleet if client not in away]
            await eventually_async(lambda: all(len(client.told) == len(CHANNELS) for client in here), TOLD_WITHIN)
            assert {reason for client in here for reason in client.told} <= {"ahead", "forked"}
            publishing.start()
            await publishing.more(100)  # past the offsets that were lost
            for client in away:
                client.start()
            await eventually_async(lambda: all(client.told for client in away), TOLD_WITHIN)
        assert_everybody_was_told_once_per_channel(fleet, "ahead", "forked")

    run(main)


def test_a_server_that_is_killed_leaves_its_clients_to_the_other(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(stage.servers[0].kill)
            await eventually_async(lambda: all(client.is_listening for client in fleet), 10_000 * MS)
            await publishing.more(50)
        assert_nobody_was_told(fleet)
        assert sum(client.connection_count for client in fleet) > len(fleet)

    run(main)


def test_a_server_that_is_asked_to_stop_hands_its_clients_over(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(stage.servers[0].send_signal, 15)
            await publishing.more(50)
        assert_nobody_was_told(fleet)

    run(main)


def test_a_server_that_stands_still_for_a_while_loses_nothing(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (_, fleet):
            stage.servers[0].pause()
            await asyncio.sleep(4_000 * MS)
            stage.servers[0].resume()
        assert_nobody_was_told(fleet)

    run(main)


def test_a_redis_that_stands_still_for_a_while_loses_nothing_it_accepted(stage: Stage) -> None:
    async def main() -> None:
        async with stage.playing() as (publishing, fleet):
            await asyncio.to_thread(stage.redis.pause)
            await eventually_async(lambda: publishing.failed_count > 2, 10_000 * MS)
            await asyncio.to_thread(stage.redis.resume)
            await publishing.more(50)
        assert_nobody_was_told(fleet)
        assert publishing.longest_seconds < 4_000 * MS

    run(main)


# The control: the same check, shown to find what it is there to find.


def test_a_client_that_gives_no_position_back_is_caught_by_the_check(stage: Stage) -> None:
    """It loses over every reconnect what plain pub/sub loses."""

    async def main() -> None:
        async with (
            listeners(CLIENTS, stage.urls, *CHANNELS, remembers=False, transports=["websocket"]) as forgetful,
            stage.playing() as (publishing, fleet),
        ):
            for _ in range(5):
                await publishing.more(10)
                for client in [*forgetful, *fleet]:
                    client.drop()
            await publishing.more(30)
        with pytest.raises(AssertionError, match="after"):
            publishing.check(forgetful)

    run(main)


def message(offset: int, tag: str = "", epoch: str = "e") -> Frame:
    position = f"{epoch}.{offset}.{tag or offset}"
    return {"type": "message", "channel": "room:1", "position": position, "data": offset}


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([message(1), message(3)], id="a hole"),
        pytest.param([message(1), message(1)], id="a double"),
        pytest.param([message(2), message(1)], id="a wrong order"),
        pytest.param([message(1), message(2), message(1)], id="a step back"),
        pytest.param([message(1), message(2, epoch="f")], id="another epoch"),
        pytest.param([message(1), message(2, tag="x")], id="another branch"),
        pytest.param([message(1), message(2), message(3), message(4), message(5)], id="something invented"),
        pytest.param([message(1)], id="a missing end"),
        pytest.param([{"type": "nonsense"}], id="an unknown frame"),
    ],
)
def test_a_server_that_lies_is_caught_by_the_check(frames: list[Frame]) -> None:
    async def lie(websocket: ServerConnection) -> None:
        subscribed = {"type": "subscribed", "channel": "room:1", "position": "e.0.0", "recovered": None}
        for frame in [{"type": "connected", "resume": ""}, subscribed, *frames]:
            await websocket.send(json.dumps(frame))
        await websocket.wait_closed()

    async def main() -> None:
        async with serve(lie, "127.0.0.1", port := free_port()):
            async with listeners(1, [f"ws://127.0.0.1:{port}"], "room:1") as (client,):
                await eventually_async(lambda: client.frame_count == len(frames) + 2)
            publishing = Publishing(AsyncPublisher("memory://"), ["room:1"])
            publishing.accepted["room:1"] = {f"e.{offset}.{offset}": offset for offset in (1, 2, 3)}
            with pytest.raises(AssertionError):
                publishing.check([client])

    run(main)
