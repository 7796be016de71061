"""The Python client over each transport, and from one to the next: complete, in order, as the same connection."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import pubsub_mw.client.ladder
from pubsub_mw.client import Connection, connect
from pubsub_mw.errors import ConnectFailed, ConnectionClosed, RequestFailed, SubscriptionRefused
from tests.client.test_requests import Site
from tests.client_world import Endpoint
from tests.tools.clock import MS, eventually_async
from tests.tools.http_proxy import HttpProxy

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(40)]

TRANSPORTS = ("websocket", "sse", "longpoll")


@pytest.fixture
async def site(prefix: str) -> AsyncIterator[Site]:
    async with Site(prefix, ping_interval=0.2, history_size=10_000) as site:
        yield site
        site.allow(100)


@pytest.fixture
async def proxy(site: Site) -> AsyncIterator[HttpProxy]:
    async with HttpProxy(site.port).run() as proxy:
        yield proxy


@pytest.fixture(params=TRANSPORTS)
async def connection(proxy: HttpProxy, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    """A connection by one transport, through the proxy."""
    url = f"http://127.0.0.1:{proxy.port}/realtime"
    async with connect(url, transports=(request.param,), max_frame_bytes=1_000_000) as connection:
        yield connection


async def uses(connection: Connection, transport: str) -> None:
    def is_so() -> bool:
        assert (connection.state, connection.transport) == ("connected", transport)
        return True

    await eventually_async(is_so, 15_000 * MS)


async def test_publications_requests_and_channels_go_over_each(site: Site, connection: Connection) -> None:
    got: list[Any] = []
    first = await connection.subscribe("a", lambda message: got.append(message.data))
    position = str(await site.publisher.position("b"))
    await site.publisher.publish("b", "before")
    others = await asyncio.gather(*(connection.subscribe(f"c{number}") for number in range(5)))
    second = await connection.subscribe("b", position=position)
    await site.publisher.many([("a", number) for number in range(100)])
    assert (await anext(second)).data == "before"
    await eventually_async(lambda: got == list(range(100)))
    assert (await (await connection.fetch("/echo", json=[1])).json())["body"] == list(b"[1]")
    await others[0].unsubscribe()
    await first.unsubscribe()
    await site.publisher.publish("a", "nobody hears it")
    await site.publisher.publish("b", "after")
    assert (await anext(second)).data == "after"
    assert got == list(range(100))


async def test_nothing_is_lost_over_a_cut_and_a_restart(site: Site, proxy: HttpProxy, connection: Connection) -> None:
    before = connection.id
    got: list[Any] = []
    await connection.subscribe("a", lambda message: got.append(message.data))
    await site.publisher.publish("a", 1)
    await eventually_async(lambda: got == [1])
    proxy.cut()
    await site.publisher.publish("a", 2)
    await eventually_async(lambda: got == [1, 2])
    await site.stop()
    await site.publisher.publish("a", 3)
    await site.start()
    await eventually_async(lambda: got == [1, 2, 3], 10_000 * MS)
    await eventually_async(lambda: connection.id == before)


async def test_a_stream_of_the_app_goes_on_in_the_middle(site: Site, proxy: HttpProxy, connection: Connection) -> None:
    site.allow(2)
    parts = aiter(await connection.fetch("/stream/4"))
    assert [await anext(parts), await anext(parts)] == [b"0,", b"1,"]
    proxy.cut()
    site.allow(2)
    assert [part async for part in parts] == [b"2,", b"3,"]
    assert site.runs == ["stream"]


async def test_refusals_come_over_each(site: Site, proxy: HttpProxy, connection: Connection) -> None:
    with pytest.raises(SubscriptionRefused):
        await connection.subscribe("private-1")
    with pytest.raises(SubscriptionRefused) as refused:
        await connection.subscribe("#user-7")
    assert refused.value.code == "bad_channel"
    with pytest.raises(RequestFailed, match=r"too_large|connection_lost"):
        await connection.fetch("/echo", body="x" * 70_000)
    await uses(connection, connection.transport)
    assert (await connection.fetch("/echo")).ok
    with pytest.raises(ConnectionClosed) as caught:
        async with connect(
            f"http://127.0.0.1:{proxy.port}/realtime", grant="no grant", transports=(connection.transport,)
        ):
            pass
    assert caught.value.code == 3500
    assert site.runs == [""]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_channel_that_was_full_is_not_asked_for_again(prefix: str, transport: str) -> None:
    async with Endpoint("memory://", prefix=prefix, secret="s" * 32, presence_size=1, presence_grace=0.3) as endpoint:
        ann, bob = [await endpoint.grant(user=user, channels=["*"]) for user in ("ann", "bob")]
        async with connect(endpoint.url, grant=bob, transports=[transport]) as connection:
            heard = await connection.subscribe("b")
            async with connect(endpoint.url, grant=ann) as other:
                await other.subscribe("presence-a")
                with pytest.raises(SubscriptionRefused) as refused:
                    await connection.subscribe("presence-a")
                assert refused.value.code == "busy"
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                await endpoint.publisher.publish("b", "polls go on")
                await anext(heard)
                users = [member["user"] for member in await endpoint.publisher.presence("presence-a")]
                assert users in (["ann"], [])
            assert users == []


async def test_a_client_finds_the_way_that_delivers_and_loses_nothing_on_the_way_back(
    site: Site, proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_mw.client.ladder, "_CLIMB_PATIENCE", 1.0)
    got: list[Any] = []
    proxy.refuse("websocket")
    proxy.held = {"sse"}
    async with connect(f"http://127.0.0.1:{proxy.port}/realtime", open_timeout=3_000 * MS) as connection:
        before = connection.id
        await uses(connection, "longpoll")
        await connection.subscribe("a", lambda message: got.append(message.data))
        for step, (transport, refused) in enumerate([("sse", ["websocket", "longpoll"]), ("websocket", [])]):
            await site.publisher.many([("a", [step, number]) for number in range(500)])
            proxy.held = set()
            proxy.refuse(*refused)
            await uses(connection, transport)
        await site.publisher.publish("a", "last")
        await eventually_async(lambda: got[-1:] == ["last"])
        assert connection.id == before
    assert got == [[step, number] for step in range(2) for number in range(500)] + ["last"]


async def test_a_way_that_is_not_allowed_is_not_taken(site: Site, proxy: HttpProxy) -> None:
    proxy.refuse("websocket")
    with pytest.raises(ConnectFailed):
        async with connect(f"http://127.0.0.1:{proxy.port}/realtime", transports=["websocket"], open_timeout=0.5):
            pass
    assert set(proxy.seen) == {"websocket"}
    with pytest.raises(ValueError, match="longpoll"):
        connect(site.url, transports=["carrier pigeon"])


async def head_of_request(reader: asyncio.StreamReader) -> bytes:
    """Everything up to the empty line; nothing where the client's time ran out before it had asked."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b'{"frames": [{}]}', b""], ids=repr)
async def test_a_network_that_answers_by_itself_is_no_server(body: bytes) -> None:
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await head_of_request(reader) and body:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(serve_one, "127.0.0.1", 0) as portal:
        port = portal.sockets[0].getsockname()[1]
        with pytest.raises(ConnectFailed):
            async with connect(f"http://127.0.0.1:{port}/realtime", transports=["longpoll"], open_timeout=0.5):
                pass


async def test_a_url_that_is_too_long_for_a_proxy_is_told(caplog: pytest.LogCaptureFixture) -> None:
    connected = {"type": "connected", "connection": "c1", "resume": "x", "user": None, "ping": 25.0}
    greeting = json.dumps({"frames": [connected]}).encode()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of_request(reader)
        if head.startswith(b"POST"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(greeting), greeting))
        elif head:
            writer.write(b"HTTP/1.1 414 URI Too Long\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve_one, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        async with connect(f"http://127.0.0.1:{port}/realtime", transports=["longpoll"]):
            await eventually_async(lambda: "poll: the server answered 414" in caplog.text)
