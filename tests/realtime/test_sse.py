"""Server-sent events: what a stream says, what it never says, and how it ends."""

import asyncio
import gc
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import example, given
from hypothesis import strategies as st

from pubsub_mw.errors import CloseCode
from pubsub_mw.protocol import message_head, message_tail
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime import Realtime, sse
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.cursor import Cursor
from tests.realtime.conftest import SECRET, Site, delay_look_ups
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import RawClient
from tests.tools.raw_stream import Event, RawStream
from tests.tools.redis_server import RedisServer
from tests.tools.tcp_proxy import TcpProxy

Serve = Callable[..., Awaitable[Site]]
Open = Callable[..., Awaitable[RawClient]]
Stream = Callable[..., Awaitable[RawStream]]
FRAMES = ("frames", "1")


def channels(*names: str) -> list[tuple[str, str]]:
    return [("channel", name) for name in names]


async def listening(raw_stream: Stream, site: Site, *names: str, **options: Any) -> RawStream:
    """A plain stream that is known to have all of its channels."""
    stream = await raw_stream(site.url + "/events", params=channels(*names), **options)
    assert stream.status == 200, stream.body
    await eventually_async(
        lambda: stream.last_id.count(":") == (len(names) if len(names) > 1 else 0) and stream.last_id
    )
    return stream


# What is sent.


def parsed(text: str) -> list[Event]:
    """What a parser that is not ours makes of a stream, piece by piece."""
    lines, decoder, events = SSELineDecoder(), SSEDecoder(), []
    for start in range(0, len(text), 7):
        for line in lines.decode(text[start : start + 7]):
            has_data = bool(decoder._data)
            event = decoder.decode(line)
            if event is not None and has_data:
                events.append(Event(event.event, event.data, event.id))
    return events


def frame_of(data: object, event: str = "message") -> bytes:
    return message_head("room", event, json.dumps(data).encode()) + b"e.1.t" + message_tail


def one_line_end(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


hostile = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("\n\r\0\u2028\u2029\x85\x0b\x0c\x1c \ufeff:\U0001f600")),
    max_size=60,
).map(lambda text: text.replace("!", "\n\nid: forged\nevent: forged\ndata: forged\n\n"))


@given(
    data=hostile, event=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)
)
@example(data="a\r\nb\rc\nd", event="message")
@example(data="\n\nid: forged\n\ndata: forged\n\n", event="data")
@example(data="", event="message")
@example(data=" leading", event="id")
@example(data="\ufeff\0\u2028\u2029", event="e")
def test_text_arrives_as_it_was_sent_and_adds_no_event_and_no_id(data: str, event: str) -> None:
    text = sse._Plain(Cursor("room"), "#connection-1").render(frame_of(data, event)).decode()
    # What SSE cannot say is which kind of line end it was.
    assert parsed(text + sse._Plain(Cursor("room"), "").render(frame_of("next")).decode()) == [
        Event(event, one_line_end(data), "e.1.t"),
        Event("message", "next", "e.1.t"),
    ]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | hostile,
        lambda inner: st.lists(inner) | st.dictionaries(hostile, inner),
    )
)
def test_whatever_else_arrives_as_json(data: object) -> None:
    events = parsed(sse._Plain(Cursor("room"), "").render(frame_of(data)).decode())
    if isinstance(data, str):
        assert events == [Event("message", one_line_end(data), "e.1.t")]
    else:
        assert [json.loads(event.data) for event in events] == [data]


@given(hostile, hostile)
def test_frames_arrive_exactly(data: str, key: str) -> None:
    events = parsed(sse._Framed(Cursor("room"), "").render(frame_of({key: data})).decode())
    assert [event.frame["data"] for event in events] == [{key: data}]


@pytest.mark.parametrize("event", ["a\nid: forged", "a\r\rdata: forged\r\r", "\n\n"])
def test_an_event_that_another_program_wrote_cannot_add_a_line(event: str) -> None:
    frame = message_head("room", event, b'"x"') + b"e.1.t" + message_tail
    events = parsed(sse._Plain(Cursor("room"), "").render(frame).decode())
    assert [(found.data, found.id) for found in events] == [("x", "e.1.t")]


def test_half_of_a_surrogate_pair_arrives_as_a_replacement() -> None:
    (event,) = parsed(sse._Plain(Cursor("room"), "").render(frame_of("a\ud800b")).decode())
    assert event.data == "a\ufffdb"


def test_a_million_line_ends_cost_no_time() -> None:
    data = "\n" * 1_000_000
    frame = frame_of(data)

    async def rendered() -> tuple[float, bytes]:
        began = time.process_time()  # not what others on this machine take
        text = sse._Plain(Cursor("room"), "").render(frame)
        return time.process_time() - began, text

    seconds, text = asyncio.run(rendered())
    assert seconds < 1000 * MS
    assert text.count(b"data: ") == 1_000_001


@pytest.mark.anyio
class TestPlain:
    async def test_a_publication_arrives_with_its_event_and_position(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        stream = await listening(raw_stream, await serve_realtime(), "room")
        first = await publisher.publish("room", "<p>h\u00eb</p>\n<p>\U0001f600</p>", event="said")
        second = await publisher.publish("room", {"text": "a\nb"})
        assert await stream.recv() == Event("said", "<p>h\u00eb</p>\n<p>\U0001f600</p>", str(first))
        event = await stream.recv()
        assert (event.event, json.loads(event.data), event.id) == ("message", {"text": "a\nb"}, str(second))

    async def test_a_stream_that_is_over_is_gone(self, serve_realtime: Serve, raw_stream: Stream) -> None:
        """At once, without the garbage collector, which a server of many connections runs seldom."""
        site = await serve_realtime()
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                stream = await listening(raw_stream, site, "room")
                await stream.close()
            await eventually_async(lambda: not [item for item in gc.get_objects() if isinstance(item, Connection)])
        finally:
            gc.enable()

    @pytest.mark.parametrize("frames", ["", "1"])
    async def test_nothing_is_missed_from_its_answer_on(
        self,
        serve_app: Callable[..., Awaitable[Site]],
        raw_stream: Stream,
        redis_server: RedisServer,
        tcp_proxy: Callable[[int], TcpProxy],
        prefix: str,
        frames: str,
    ) -> None:
        """Between the broker, which is far away, and a client that takes "open" for "listening"."""
        proxy = tcp_proxy(redis_server.port)
        options = {"prefix": prefix, "secret": SECRET}
        app = await asyncio.to_thread(lambda: Realtime(f"redis://{proxy.address}", **options))
        site = await serve_app(app)
        await (await listening(raw_stream, site, "warm")).close()
        proxy.latency(100 * MS)
        stream = await raw_stream(site.url + "/events", params=[*channels("a", "b"), ("frames", frames)])
        publisher = AsyncPublisher(redis_server.url, **options)
        for name in ("a", "b"):
            await publisher.publish(name, f"{name}1")
        await publisher.close()
        await eventually_async(lambda: {"a1", "b1"} <= set(re.findall("[ab]1", "".join(e.data for e in stream.events))))
        proxy.latency(0)

    async def test_its_headers_get_it_through_proxies(self, serve_realtime: Serve, raw_stream: Stream) -> None:
        stream = await listening(raw_stream, await serve_realtime(), "room")
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["x-accel-buffering"] == "no"
        assert stream.headers["cache-control"] == "no-store, no-transform"
        assert stream.headers["x-content-type-options"] == "nosniff"
        assert stream.raw_bytes > 2_048
        assert stream.retry is not None
        assert 1 <= stream.retry <= 3

    async def test_a_megabyte_arrives_whole(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        stream = await listening(raw_stream, await serve_realtime(), "room")
        text = ("\0\u2028 \U0001f600\n" * 200_000)[:250_000]
        await publisher.publish("room", text)
        assert (await stream.recv()).data == text

    async def test_who_comes_back_with_the_last_id_gets_what_was_missed(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        stream = await listening(raw_stream, site, "a", "b")
        await publisher.publish("a", "a1")
        await publisher.publish("b", "b1")
        await stream.recv(lambda event: event.data == "b1")
        await eventually_async(lambda: {event.data for event in stream.events} == {"a1", "b1"})
        await stream.close()
        for number in (2, 3):
            await publisher.publish("a", f"a{number}")
            await publisher.publish("b", f"b{number}")
        url = site.url + "/events"
        again = await raw_stream(url, params=channels("b", "new", "a"), headers={"Last-Event-ID": stream.last_id})
        await eventually_async(lambda: len(again.events) == 4)
        assert sorted(event.data for event in again.events) == ["a2", "a3", "b2", "b3"]
        await publisher.publish("new", "n1")
        assert (await again.recv(lambda event: event.data == "n1")).event == "message"

    async def test_an_id_comes_before_the_first_event(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        stream = await listening(raw_stream, site, "room")
        await stream.close()
        assert not stream.events
        await publisher.publish("room", "missed")
        again = await raw_stream(site.url + "/events?channel=room", headers={"Last-Event-ID": stream.last_id})
        assert (await again.recv()).data == "missed"

    async def test_a_position_of_the_page_and_a_cursor_in_the_url_are_where_to_begin(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        position = await publisher.position("a")
        await publisher.publish("a", "a1")
        await publisher.publish("b", "b1")
        stream = await raw_stream(
            site.url + "/events", params=[*channels("b", "a"), ("position", ""), ("position", str(position))]
        )
        assert (await stream.recv()).data == "a1"
        by_cursor = await raw_stream(site.url + "/events", params=[*channels("a"), ("cursor", str(position))])
        assert (await by_cursor.recv()).data == "a1"
        # A page's EventSource comes back with the url that it began with; the header knows better.
        later = await raw_stream(
            site.url + "/events",
            params=[*channels("a"), ("position", str(position))],
            headers={"Last-Event-ID": by_cursor.last_id},
        )
        await publisher.publish("a", "a2")
        assert (await later.recv()).data == "a2"

    async def test_lost_continuity_is_an_event(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime(history_size=2)
        position = await publisher.position("room")
        for number in range(150):
            await publisher.publish("room", number, history=2)
        stream = await raw_stream(site.url + "/events", params=[*channels("room"), ("position", str(position))])
        event = await stream.recv()
        assert (event.event, event.frame["recovered"], event.frame["channel"]) == ("gap", False, "room")
        assert event.id == event.frame["position"]
        last = await publisher.publish("room", "live")
        assert await stream.recv() == Event("message", "live", str(last))

    async def test_heartbeats_are_comments(self, serve_realtime: Serve, raw_stream: Stream) -> None:
        site = await serve_realtime(ping_interval=50 * MS, ping_timeout=50 * MS)
        stream = await listening(raw_stream, site, "room")
        before = stream.raw_bytes
        await eventually_async(lambda: stream.raw_bytes >= before + 5 * len(":\n\n"))
        assert not stream.events

    @pytest.mark.parametrize(
        ("query", "status", "word"),
        [
            ("", 400, "channel"),
            ("channel=", 400, "channel"),
            ("channel=a%20b", 400, "channel"),
            ("channel=%23user-7", 400, "reserved"),
            ("channel=room&channel=private-room", 403, "private-room"),
            ("channel=a&position=x", 400, "position"),
            ("channel=a&position=&position=", 400, "position"),
            ("channel=a&cursor=!", 400, "cursor"),
            ("&".join(f"channel=c{number}" for number in range(9)), 400, "8 channels"),
            ("&".join(["channel=a"] * 100), 400, "query"),
        ],
    )
    async def test_what_cannot_be_is_said_by_the_status(
        self, serve_realtime: Serve, raw_stream: Stream, query: str, status: int, word: str
    ) -> None:
        site = await serve_realtime(max_channels=8)
        stream = await raw_stream(site.url + "/events?" + query)
        assert stream.status == status
        assert word in json.loads(stream.body)["error"]["message"]
        await eventually_async(lambda: site.app._running.hub.connection_count == 0)

    async def test_an_event_source_is_asked_to_come_back_later_in_its_own_words(
        self, serve_realtime: Serve, raw_stream: Stream
    ) -> None:
        site = await serve_realtime(max_connections_per_address=1)
        await listening(raw_stream, site, "room")
        url = site.url + "/events?channel=room"
        for accept, path in (("*/*", url), ("text/event-stream", url + "&frames=1")):
            refused = await raw_stream(path, headers={"Accept": accept})
            assert (refused.status, refused.headers["retry-after"]) == (429, "2")
        stream = await raw_stream(url, headers={"Accept": "text/event-stream"})
        await stream.ended()
        assert (stream.status, stream.events) == (200, [])

    async def test_another_method_is_refused(self, serve_realtime: Serve) -> None:
        site = await serve_realtime()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /events?channel=a HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        assert b" 405 " in await reader.readline()
        writer.close()


@pytest.mark.anyio
class TestFrames:
    async def test_a_stream_is_a_connection(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        stream = await raw_stream(site.url + "/events", params=[*channels("room"), FRAMES])
        connected = await stream.frame()
        assert connected["type"] == "connected"
        subscribed = await stream.frame("subscribed", "room")
        assert subscribed["recovered"] is None
        position = await publisher.publish("room", {"a": 1}, event="e")
        assert await stream.frame() == {
            "type": "message", "channel": "room", "event": "e", "data": {"a": 1}, "position": str(position),
        }  # fmt: skip
        await publisher.publish("room", "not for me", exclude=connected["connection"])
        await publisher.publish(f"#connection-{connected['connection']}", "for me")
        assert (await stream.frame("message"))["data"] == "for me"

    async def test_a_resumed_one_goes_on_with_its_own_channels(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        grant = await publisher.grant(user="7", channels=["private-*"])
        first = await raw_stream_of_websocket(site, grant)
        own = [f"#connection-{first['connection']}", "#user-7"]
        headers = {"Authorization": f"Bearer {first['resume']}"}
        stream = await raw_stream(site.url + "/events", params=[*channels("private-room"), FRAMES], headers=headers)
        connected = await stream.frame("connected")
        assert (connected["connection"], connected["user"]) == (first["connection"], "7")
        await stream.frame("subscribed", "private-room")
        for channel in (*own, "private-room"):
            await publisher.publish(channel, f"to {channel}")
        await eventually_async(lambda: len(stream.events) == 5)
        await stream.close()
        for channel in (*own, "private-room"):
            await publisher.publish(channel, f"more to {channel}")
        # By the id as an EventSource does it, and by positions as a library does it.
        by_id = await raw_stream(
            site.url + "/events",
            params=[*channels("private-room"), FRAMES],
            headers={**headers, "Last-Event-ID": stream.last_id},
        )
        expected = sorted(f"more to {channel}" for channel in (*own, "private-room"))
        await eventually_async(lambda: len(messages(by_id)) == 3)
        assert sorted(messages(by_id)) == expected
        positions = {
            event.frame["channel"]: event.frame["position"] for event in stream.events if "position" in event.frame
        }
        names = (*own, "private-room")
        by_position = await raw_stream(
            site.url + "/events",
            params=[*channels(*names), *(("position", positions[name]) for name in names), FRAMES],
            headers=headers,
        )
        await eventually_async(lambda: len(messages(by_position)) == 3)
        assert sorted(messages(by_position)) == expected
        disconnect = await by_id.frame("disconnect")
        assert (disconnect["code"], disconnect["retry"]) == (CloseCode.REPLACED, None)
        await by_id.ended()

    async def test_a_refused_channel_is_a_frame_and_the_others_go_on(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        stream = await raw_stream(site.url + "/events", params=[*channels("private-a", "b"), FRAMES])
        error = await stream.frame("error")
        assert (error["code"], error["channel"]) == ("forbidden", "private-a")
        await publisher.publish("b", 1)

    async def test_pings_are_frames_and_need_no_answer(self, serve_realtime: Serve, raw_stream: Stream) -> None:
        site = await serve_realtime(ping_interval=30 * MS, ping_timeout=30 * MS)
        stream = await raw_stream(site.url + "/events", params=[*channels("a"), FRAMES])
        for _ in range(5):
            await stream.frame("ping")

    @pytest.mark.parametrize("form", ["framed", "plain"])
    async def test_a_grant_that_expires_while_the_stream_begins_refuses_the_stream(
        self,
        serve_realtime: Serve,
        raw_stream: Stream,
        publisher: AsyncPublisher,
        monkeypatch: pytest.MonkeyPatch,
        form: str,
    ) -> None:
        site = await serve_realtime()
        first = await raw_stream_of_websocket(site, await publisher.grant(channels=["private-*"], expires=500 * MS))
        delay_look_ups(monkeypatch, site.app._running.shared.control, 500 * MS)
        params = [*channels("private-a"), *([FRAMES] if form == "framed" else [])]
        headers = {"Authorization": f"Bearer {first['resume']}"}
        stream = await raw_stream(site.url + "/events", params=params, headers=headers)
        assert stream.status == 401

    @pytest.mark.parametrize("shown", ["Bearer no.such.token", "Basic eA==", "Bearer"])
    async def test_a_token_that_is_not_ours_is_refused(
        self, serve_realtime: Serve, raw_stream: Stream, shown: str
    ) -> None:
        site = await serve_realtime()
        stream = await raw_stream(site.url + "/events?channel=a&frames=1", headers={"Authorization": shown})
        assert (stream.status, stream.headers["www-authenticate"]) == (401, "Bearer")

    async def test_a_user_who_was_disconnected_is_cut_and_not_let_in_again(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher, prefix: str
    ) -> None:
        site = await serve_realtime()
        first = await raw_stream_of_websocket(site, await publisher.grant(user="7"))
        headers = {"Authorization": f"Bearer {first['resume']}"}
        stream = await raw_stream(site.url + "/events?channel=a&frames=1", headers=headers)
        await stream.frame("subscribed")
        await asyncio.to_thread(disconnect_user, prefix)
        assert (await stream.frame("disconnect", timeout=2000 * MS))["code"] == CloseCode.DISCONNECTED
        await stream.ended()
        again = await raw_stream(site.url + "/events?channel=a&frames=1", headers=headers)
        assert again.status == 401

    async def test_a_subscription_that_was_ended_is_told(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher, prefix: str
    ) -> None:
        site = await serve_realtime()
        first = await raw_stream_of_websocket(site, await publisher.grant(user="7", channels=["private-*"]))
        headers = {"Authorization": f"Bearer {first['resume']}"}
        url = site.url + "/events?channel=private-a&channel=b"
        framed = await raw_stream(url + "&frames=1", headers=headers)
        await framed.frame("subscribed", "private-a")
        await asyncio.to_thread(unsubscribe_user, prefix, "private-a")
        assert (await framed.frame("unsubscribed", timeout=2000 * MS))["code"] == "revoked"
        plain = await raw_stream(url, headers=headers)
        assert plain.status == 403


@pytest.mark.anyio
class TestEnds:
    async def test_a_closed_tab_is_noticed(self, serve_realtime: Serve, raw_stream: Stream) -> None:
        site = await serve_realtime()
        stream = await listening(raw_stream, site, "room")
        hub = site.app._running.hub
        assert hub.connection_count == 1
        await stream.close()
        await eventually_async(lambda: hub.connection_count == hub.channel_count == 0)

    async def test_a_tab_that_is_closed_while_the_app_is_asked_is_noticed(
        self, serve_realtime: Serve, raw_stream: Stream
    ) -> None:
        site = await serve_realtime(authorize="/authorize")
        url = site.url + "/events?channel=private-room"
        opening = asyncio.ensure_future(raw_stream(url))
        await eventually_async(lambda: site.app._running and site.app._running.hub.connection_count == 1)
        opening.cancel()
        await eventually_async(lambda: site.app._running.hub.connection_count == 0)

    async def test_a_slow_reader_is_cut_and_others_still_receive(
        self, serve_realtime: Serve, raw_stream: Stream, publisher: AsyncPublisher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sse, "CLOSE_SECONDS", 100 * MS)
        site = await serve_realtime(send_queue_bytes=200_000)
        hub = (await site.app.start()).hub
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", site.port))
        slow.sendall(b"GET /events?channel=room HTTP/1.1\r\nhost: a\r\n\r\n")
        quick = await listening(raw_stream, site, "room")
        await eventually_async(lambda: hub.connection_count == 2)
        for number in range(150):
            await publisher.publish("room", str(number) + "x" * 50_000)
            assert (await quick.recv()).data.startswith(f"{number}x")
            if hub.connection_count == 1:
                break
        await eventually_async(lambda: hub.connection_count == 1)
        await publisher.publish("room", "still here")
        assert (await quick.recv()).data == "still here"
        slow.close()

    async def test_a_draining_server_says_goodbye_and_lets_nobody_in(
        self, serve_realtime: Serve, raw_stream: Stream
    ) -> None:
        site = await serve_realtime()
        plain = await listening(raw_stream, site, "room")
        framed = await raw_stream(site.url + "/events?channel=room&frames=1")
        await framed.frame("subscribed")
        await site.app.drain(0)
        disconnect = await framed.frame("disconnect")
        assert disconnect["code"] == CloseCode.SHUTDOWN
        assert 0 <= disconnect["retry"] <= 2
        await framed.ended()
        await plain.ended()
        assert plain.retry is not None
        assert plain.retry <= 2
        refused = await raw_stream(site.url + "/events?channel=room")
        assert refused.status == 503


def messages(stream: RawStream) -> list[Any]:
    return [event.frame["data"] for event in stream.events if event.frame["type"] == "message"]


async def raw_stream_of_websocket(site: Site, grant: str) -> dict[str, Any]:
    """The `connected` frame of a connection that began as a WebSocket and is gone."""
    async with await RawClient.connect(site.ws_url + "/") as client:
        return await client.hello(grant=grant)


def disconnect_user(prefix: str) -> None:
    from pubsub_mw.publisher import Publisher

    Publisher("memory://", prefix=prefix, secret=SECRET).disconnect(user="7")


def unsubscribe_user(prefix: str, channel: str) -> None:
    from pubsub_mw.publisher import Publisher

    Publisher("memory://", prefix=prefix, secret=SECRET).unsubscribe(channel, user="7")
