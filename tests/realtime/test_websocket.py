"""The socket's two directions: what may come in, how it ends, and that one stuck client is nobody else's matter."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from pubsub_mw.errors import CloseCode
from pubsub_mw.publisher import AsyncPublisher
from tests.realtime.conftest import Site
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import RawClient

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]


async def connected(raw_client: Open, site: Site, *channels: str, **fields: Any) -> RawClient:
    client = await raw_client(site.ws_url + "/")
    await client.hello(channels=dict.fromkeys(channels), **fields)
    for channel in channels:
        await client.recv("subscribed", channel)
    return client


async def test_a_publication_reaches_who_listens(
    serve_realtime: Serve, raw_client: Open, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    client = await connected(raw_client, site, "room")
    position = await publisher.publish("room", {"text": "hë"}, event="said")
    assert await client.recv("message") == {
        "type": "message",
        "channel": "room",
        "event": "said",
        "data": {"text": "hë"},
        "position": str(position),
    }


@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_a_frame_may_be_as_large_as_the_bound_and_no_larger(
    serve_realtime: Serve, raw_client: Open, publisher: AsyncPublisher, over: int
) -> None:
    site = await serve_realtime(max_frame_bytes=1_000)
    client, other = await connected(raw_client, site), await connected(raw_client, site, "room")
    frame = json.dumps({"type": "subscribe", "channel": "room", "filler": ""})
    frame = frame[:-2] + "x" * (1_000 + over - len(frame)) + frame[-2:]
    assert len(frame) == 1_000 + over
    await client.send(frame)
    if over <= 0:
        await client.recv("subscribed", "room")
    else:
        disconnect = await client.recv("disconnect")
        assert (disconnect["code"], disconnect["retry"]) == (CloseCode.MESSAGE_TOO_BIG, 0)
        assert (await client.closed())[0] == CloseCode.MESSAGE_TOO_BIG
    await publisher.publish("room", 1)
    await other.recv("message")


async def test_bytes_count_and_not_characters(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime(max_frame_bytes=1_000)
    client = await connected(raw_client, site)
    await client.send('{"type":"pong","filler":"' + "ä" * 600 + '"}')
    assert (await client.closed())[0] == CloseCode.MESSAGE_TOO_BIG


async def test_a_frame_in_many_fragments_counts_as_one(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime(max_frame_bytes=1_000)
    client = await connected(raw_client, site)

    async def fragments() -> Any:
        for _ in range(10):
            yield "x" * 200

    await client.websocket.send(fragments())
    assert (await client.closed())[0] == CloseCode.MESSAGE_TOO_BIG


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(b"\x00\xff", "bad_frame", id="bytes"),
        pytest.param(b'{"type":"pong"}', "bad_frame", id="bytes that would be a frame"),
        pytest.param("{", "bad_frame", id="broken JSON"),
        pytest.param("[" * 60_000, "bad_frame", id="deep JSON"),
        pytest.param('{"type":"connect"}', "already_connected", id="connect again"),
        pytest.param('{"type":"subscribe","channel":"a b"}', "bad_channel", id="no channel"),
    ],
)
async def test_a_wrong_frame_is_answered_and_the_connection_goes_on(
    serve_realtime: Serve, raw_client: Open, publisher: AsyncPublisher, frame: str | bytes, code: str
) -> None:
    site = await serve_realtime()
    client, other = await connected(raw_client, site, "room"), await connected(raw_client, site, "room")
    await client.send(frame)
    assert (await client.recv("error"))["code"] == code
    await publisher.publish("room", 1)
    await client.recv("message")
    await other.recv("message")


async def test_a_frame_before_connect_is_refused_and_connect_still_works(
    serve_realtime: Serve, raw_client: Open
) -> None:
    site = await serve_realtime()
    client = await raw_client(site.ws_url)
    await client.send({"type": "subscribe", "channel": "room"})
    assert (await client.recv())["code"] == "connect_first"
    await client.hello()


async def test_who_sends_nothing_is_closed_in_time(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime(connect_timeout=100 * MS)
    client = await raw_client(site.ws_url)
    disconnect = await client.recv("disconnect")
    assert disconnect["code"] == CloseCode.CONNECT_TIMEOUT
    assert await client.closed() == (CloseCode.CONNECT_TIMEOUT, disconnect["reason"])


async def test_pings_come_and_who_does_not_answer_is_closed(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime(ping_interval=100 * MS, ping_timeout=600 * MS)
    alive = await connected(raw_client, site)
    dead = await raw_client(site.ws_url, answer_pings=False)
    assert (await dead.hello())["ping"] == 100 * MS
    assert (await dead.closed())[0] == CloseCode.NO_PONG
    await eventually_async(lambda: sum(frame["type"] == "ping" for frame in alive.received) >= 5)
    assert alive.code is None


@pytest.mark.parametrize(
    ("headers", "origin", "is_admitted"),
    [
        pytest.param({}, None, True, id="a program"),
        pytest.param({}, "http://127.0.0.1:{port}", True, id="a page of the same host"),
        pytest.param({"cookie": "s=1"}, "http://127.0.0.1:{port}", True, id="the same with cookies"),
        pytest.param({}, "https://evil.example", False, id="a foreign page"),
        pytest.param({}, "null", False, id="null"),
        pytest.param({"cookie": "s=1"}, None, False, id="cookies without origin"),
    ],
)
async def test_a_foreign_page_is_refused_before_accept(
    serve_realtime: Serve, raw_client: Open, headers: dict[str, str], origin: str | None, is_admitted: bool
) -> None:
    site = await serve_realtime()
    origin = origin and origin.format(port=site.port)
    if is_admitted:
        await (await raw_client(site.ws_url, origin=origin, headers=headers)).hello()
    else:
        with pytest.raises(InvalidStatus) as refusal:
            await raw_client(site.ws_url, origin=origin, headers=headers)
        assert refusal.value.response.status_code == 403
        assert b"s=1" not in (refusal.value.response.body or b"")


async def test_two_origins_are_refused(serve_realtime: Serve) -> None:
    site = await serve_realtime(origins="*")
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: https://a\r\nOrigin: https://b\r\n\r\n"
    )
    assert (await reader.readline())[9:12] in (b"400", b"403")  # uvicorn itself may refuse what comes twice
    writer.close()
    await writer.wait_closed()


async def test_a_slow_client_is_closed_and_others_still_receive(
    serve_realtime: Serve, raw_client: Open, publisher: AsyncPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("socket", "websocket"):
        monkeypatch.setattr(f"pubsub_mw.realtime.{module}.CLOSE_SECONDS", 500 * MS)
    site = await serve_realtime(send_queue_bytes=100_000)
    slow, quick = await connected(raw_client, site, "room"), await connected(raw_client, site, "room")
    slow.pause()
    hub = (await site.app.start()).hub
    queues, count = hub.send_queues(), 0
    while not any(queue.closed for queue in queues):
        # More than what the kernel buffers, one by one so that the quick one is never far behind.
        count += 1
        assert count < 1_000
        await publisher.publish("room", "x" * 50_000)
        await quick.recv("message")
    # Given up when its farewell could not be sent either.
    await eventually_async(lambda: hub.connection_count == 1)
    await publisher.publish("room", "after")
    assert (await quick.recv("message"))["data"] == "after"
    assert quick.code is None
    assert hub.channel_count == 2  # the room, and the quick one's own
    assert count > 5, "the bound counts what waits, not what the socket took"


async def test_a_slow_client_that_wakes_up_is_told_and_resumes_with_nothing_lost(
    serve_realtime: Serve, raw_client: Open, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime(send_queue_bytes=100_000, history_size=100_000)
    slow = await connected(raw_client, site, "room")
    slow.pause()
    queues = (await site.app.start()).hub.send_queues()
    count = 0
    while queues[0].closed is None:
        count += 1
        await publisher.publish("room", [count, "x" * 50_000])
        await asyncio.sleep(0)
    slow.resume()
    disconnect = await slow.recv("disconnect")
    assert (disconnect["code"], disconnect["retry"]) == (CloseCode.SLOW, 0)
    assert (await slow.closed())[0] == CloseCode.SLOW
    before = [data[0] for data in slow.messages("room")]
    last = [frame for frame in slow.received if frame["type"] == "message"][-1]
    back = await raw_client(site.ws_url)
    await back.hello(channels={"room": last["position"]})
    assert (await back.recv("subscribed"))["recovered"] is True
    await eventually_async(lambda: len(before) + len(back.messages("room")) >= count)
    assert before + [data[0] for data in back.messages("room")] == list(range(1, count + 1))
    assert back.code is None


async def test_a_client_that_is_gone_without_a_word_leaves_nothing_behind(
    serve_realtime: Serve, raw_client: Open
) -> None:
    site = await serve_realtime()
    clients = [await connected(raw_client, site, "room") for _ in range(5)]
    hub = (await site.app.start()).hub
    assert hub.connection_count == 5
    for client in clients:
        client.abort()
    await eventually_async(lambda: hub.connection_count == hub.channel_count == 0)


async def test_a_handshake_that_ends_at_any_byte_harms_nobody(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime()
    request = (
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x92"
    )
    for length in range(1, len(request) + 1, 7):
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(request[:length])
        await writer.drain()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
    await connected(raw_client, site, "room")
    hub = (await site.app.start()).hub
    await eventually_async(lambda: hub.connection_count == 1)


async def test_who_is_replaced_is_told_not_to_come_back(serve_realtime: Serve, raw_client: Open) -> None:
    site = await serve_realtime()
    first = await raw_client(site.ws_url)
    hello = await first.hello()
    second = await raw_client(site.ws_url)
    assert (await second.hello(resume=hello["resume"]))["connection"] == hello["connection"]
    assert (await first.recv("disconnect"))["retry"] is None
    assert (await first.closed())[0] == CloseCode.REPLACED


@pytest.mark.parametrize("grant", ["nonsense", ""])
async def test_a_bad_grant_is_told_not_to_come_back(serve_realtime: Serve, raw_client: Open, grant: str) -> None:
    site = await serve_realtime()
    client = await raw_client(site.ws_url)
    await client.send({"type": "connect", "grant": grant})
    assert (await client.recv("disconnect"))["retry"] is None
    assert (await client.closed())[0] == CloseCode.GRANT_INVALID
