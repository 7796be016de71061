"""What a client without a WebSocket sends: one answer for each frame, from any server, and nothing from a form."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import flask
import httpx
import jwt
import pytest
from starlette.routing import Mount, Router

from pubsub_mw import protocol
from pubsub_mw.asgi import with_realtime
from pubsub_mw.broker.engines import open_broker
from pubsub_mw.broker.interface import answer_key
from pubsub_mw.drafts import build_answer_draft
from pubsub_mw.errors import CloseCode
from pubsub_mw.grants import sign_grant
from pubsub_mw.model import channel_of_connection
from pubsub_mw.publisher import AsyncPublisher, Publisher
from pubsub_mw.realtime import Realtime
from pubsub_mw.settings import Settings
from tests.realtime.conftest import SECRET, Site
from tests.realtime.serving import Servers
from tests.tools.clock import MS, eventually_async
from tests.tools.raw_client import Frame, RawClient
from tests.tools.raw_stream import RawStream
from tests.tools.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]
Stream = Callable[..., Awaitable[RawStream]]


class Sender:
    """Posts frames as a client does; `hello` and `grant` keep what is to be shown next."""

    def __init__(self, http: httpx.AsyncClient, site: Site) -> None:
        self.http = http
        self.url = site.url + "/send"
        self.resume: str | None = None

    async def post(self, *frames: object, **options: Any) -> httpx.Response:
        body: dict[str, Any] = {"frames": list(frames)}
        if self.resume is not None:
            body["resume"] = self.resume
        return await self.http.post(self.url, json=body, **options)

    async def send(self, *frames: object) -> list[Frame]:
        response = await self.post(*frames)
        assert response.status_code == 200, response.text
        answers: list[Frame] = response.json()["frames"]
        return answers

    async def hello(self, **fields: Any) -> Frame:
        (connected,) = await self.send({"type": "connect", **fields})
        assert connected["type"] == "connected", connected
        self.resume = connected["resume"]
        return connected


def events(site: Site, *channels: str, **query: str) -> str:
    parts = [f"channel={channel}" for channel in channels] + [f"{name}={value}" for name, value in query.items()]
    return f"{site.url}/events?{'&'.join(parts)}"


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_a_connection_begins_without_a_stream_and_goes_on_with_one_elsewhere(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
) -> None:
    here, there = await serve_realtime(), await serve_realtime()
    sender = Sender(http, here)
    grant = await publisher.grant(user="7", channels=["private-*"])
    connected = await sender.hello(grant=grant, channels={"private-a": None, "b": None})
    assert (connected["user"], connected["ping"]) == ("7", 25.0)
    # Between the two requests: on the connection's own channel, its user's, and those that it will listen to.
    own = [f"#connection-{connected['connection']}", "#user-7"]
    for channel in (*own, "private-a", "b"):
        await publisher.publish(channel, f"to {channel}")
    stream = await raw_stream(events(there, frames="1"), headers=bearer(sender.resume))
    first = await stream.frame("connected")
    assert (first["connection"], first["user"]) == (connected["connection"], "7")
    heard = {(await stream.frame("message"))["data"] for _ in range(4)}
    assert heard == {f"to {channel}" for channel in (*own, "private-a", "b")}


async def test_positions_in_connect_are_where_the_stream_begins(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    position = await publisher.publish("a", 1)
    await publisher.publish("a", 2)
    sender = Sender(http, site)
    await sender.hello(channels={"a": str(position)})
    stream = await raw_stream(events(site, frames="1"), headers=bearer(sender.resume))
    assert (await stream.frame("message"))["data"] == 2
    # Named in the url, it is the url that counts.
    other = await raw_stream(events(site, "a", frames="1"), headers=bearer(sender.resume))
    assert (await other.frame("subscribed", "a"))["recovered"] is None


async def test_a_position_of_a_channel_that_nobody_allowed_is_not_told(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    await publisher.publish("private-a", 1)
    connected = await Sender(http, await serve_realtime()).hello(channels={"private-a": None, "b": None})
    claims = jwt.decode(connected["resume"], options={"verify_signature": False})
    assert claims["channels"]["private-a"] is None
    assert claims["channels"]["b"].endswith(".0.0")


@pytest.mark.parametrize("opens", ["the token", "the ticket", "the token, naming another channel"])
async def test_positions_of_the_connections_own_channels_are_where_the_stream_goes_on(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher, opens: str
) -> None:
    site = await serve_realtime()
    sender = Sender(http, site)
    connected = await sender.hello(grant=await publisher.grant(user="7"))
    own = [f"#connection-{connected['connection']}", "#user-7"]
    positions = {channel: str(await publisher.publish(channel, "known")) for channel in own}
    for channel in own:
        await publisher.publish(channel, "missed")
    resume, sender.resume = sender.resume, None
    again = await sender.hello(resume=resume, channels={**positions, "a": None})
    assert again["connection"] == connected["connection"]
    if opens == "the ticket":
        stream = await raw_stream(events(site, frames="1", ticket=again["ticket"]))
    else:
        named = ["b"] if "naming" in opens else []
        stream = await raw_stream(events(site, *named, frames="1"), headers=bearer(sender.resume))
    assert (await stream.frame("connected"))["connection"] == connected["connection"]
    for channel in own:
        told = await stream.frame("subscribed", channel)
        assert (told["position"], told["recovered"]) == (positions[channel], True)
        message = await stream.frame("message")
        assert (message["channel"], message["data"]) == (channel, "missed")
    await stream.frame("subscribed", "b" if "naming" in opens else "a")
    # A WebSocket that shows the token and gives no positions goes on from there, too, on the user's channel.
    websocket = await RawClient.connect(site.ws_url + "/")
    await websocket.hello(resume=sender.resume)
    heard = [(await websocket.recv("message")) for _ in range(3)]
    assert [frame["data"] for frame in heard if frame["channel"] == "#user-7"] == ["missed"]
    await websocket.close()


async def test_own_channels_are_taken_from_nobody_who_cannot_show_that_they_are(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    sender = Sender(http, site)
    connected = await sender.hello(grant=await publisher.grant(user="7"))
    own = f"#connection-{connected['connection']}"
    position = str(await publisher.publish(own, 1))

    async def refused(**fields: Any) -> list[tuple[str, str]]:
        answers = await Sender(http, site).send({"type": "connect", **fields})
        assert answers[0]["type"] == "connected"
        return [(answer["code"], answer["channel"]) for answer in answers[1:]]

    assert await refused(channels={own: position}) == [("bad_channel", own)]
    assert await refused(resume="x.y.z", channels={own: position}) == [("bad_channel", own)]
    strangers = {"#connection-x": position, "#user-8": None, own: position}
    assert await refused(resume=sender.resume, channels=strangers) == [
        ("bad_channel", "#connection-x"),
        ("bad_channel", "#user-8"),
    ]
    # As on a WebSocket: who names its own wrongly would miss what was sent to it.
    (error,) = await Sender(http, site).send({"type": "connect", "resume": sender.resume, "channels": {own: "x"}})
    assert (error["code"], error["channel"]) == ("bad_position", own)


async def test_the_channel_of_a_user_whom_the_application_names_keeps_its_position(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    nobody = Sender(http, site)
    await nobody.hello()
    position = str(await publisher.publish("#user-7", "known"))
    await publisher.publish("#user-7", "missed")
    resume, nobody.resume = nobody.resume, None
    await nobody.hello(resume=resume, channels={"#user-7": position})
    stream = await raw_stream(events(site, frames="1"), headers=bearer(nobody.resume))
    await stream.frame("connected")
    await nobody.send({"type": "grant", "grant": await publisher.grant(user="7")})
    assert (await stream.frame("subscribed", "#user-7"))["position"] == position
    assert (await stream.frame("message"))["data"] == "missed"


@pytest.mark.parametrize("code", ["bad_channel", "bad_position"])
async def test_a_channel_that_cannot_be_is_told_and_the_others_are_listened_to(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher, code: str
) -> None:
    site = await serve_realtime()
    wrong = {"a b": None} if code == "bad_channel" else {"a": "x"}
    sender = Sender(http, site)
    connected, pong, error = await sender.send(
        {"type": "connect", "channels": {**wrong, "good": None}}, {"type": "pong"}
    )
    assert (connected["type"], pong["type"]) == ("connected", "accepted"), "in the order of the frames"
    assert (error["type"], error["code"], [error["channel"]]) == ("error", code, list(wrong))
    stream = await raw_stream(events(site, ticket=connected["ticket"]))  # a plain one, which ends if one is refused
    await publisher.publish("good", "hi")
    assert (await stream.recv()).data == "hi"


@pytest.mark.parametrize(
    "channels",
    [
        {f"{number:03}" + "x" * 190: None for number in range(30)},
        {str(number): None for number in range(129)},
    ],
    ids=["too long", "too many"],
)
async def test_channels_that_no_token_holds_are_refused(
    serve_realtime: Serve, http: httpx.AsyncClient, channels: dict[str, str | None]
) -> None:
    sender = Sender(http, await serve_realtime(max_resume_channels_bytes=5_000))
    (error,) = await sender.send({"type": "connect", "channels": channels})
    assert (error["type"], error["code"]) == ("error", "too_many_channels")


async def test_a_token_fits_into_the_header_that_carries_it(serve_realtime: Serve, http: httpx.AsyncClient) -> None:
    sender = Sender(http, await serve_realtime())
    connected = await sender.hello(channels={f"{number:03}" + "x" * 100: None for number in range(25)})
    assert len(connected["resume"]) < 8_000  # nginx: large_client_header_buffers 4 8k


class TestTickets:
    async def test_a_ticket_opens_one_stream(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        here, there = await serve_realtime(), await serve_realtime()
        grant = await publisher.grant(user="7", channels=["private-*"])
        connected = await Sender(http, here).hello(grant=grant, channels={"private-a": None})
        stream = await raw_stream(events(there, frames="1", ticket=connected["ticket"]))
        assert (await stream.frame("connected"))["connection"] == connected["connection"]
        assert (await stream.frame("subscribed"))["channel"] == "private-a"
        again = await raw_stream(events(here, frames="1", ticket=connected["ticket"]))
        assert again.status == 401
        assert "ticket" in json.loads(again.body)["error"]["message"]

    async def test_plain_event_sources_show_one_too(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        grant = await publisher.grant(user="7", channels=["private-*"])
        connected = await Sender(http, site).hello(grant=grant)
        stream = await raw_stream(events(site, "private-a", ticket=connected["ticket"]))
        await publisher.publish("private-a", "for whom it is")
        assert (await stream.recv()).data == "for whom it is"

    async def test_it_is_good_for_a_while_only(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream
    ) -> None:
        site = await serve_realtime(ticket_ttl=1)
        connected = await Sender(http, site).hello()
        await asyncio.sleep(1.1)
        assert (await raw_stream(events(site, "a", ticket=connected["ticket"]))).status == 401

    async def test_what_is_kept_for_it_is_no_token(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream
    ) -> None:
        site = await serve_realtime()
        connected = await Sender(http, site).hello()
        kept = await site.app._running.shared.broker.take_ticket(connected["ticket"])
        assert (await raw_stream(events(site, "a"), headers=bearer(kept))).status == 401


class TestGrants:
    async def test_a_fresh_one_reaches_the_stream_on_another_server(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        here, there = [await serve_realtime(grant_grace=100 * MS) for _ in range(2)]
        sender = Sender(http, here)
        began = time.time()
        await sender.hello(grant=await publisher.grant(user="7", channels=["private-a"], expires=2000 * MS))
        stream = await raw_stream(events(there, "private-a", frames="1"), headers=bearer(sender.resume))
        await stream.frame("subscribed")
        fresh = await publisher.grant(user="7", channels=["private-*"], expires=600)
        (accepted,) = await sender.send({"type": "grant", "grant": fresh})
        assert accepted["type"] == "accepted"
        while time.time() < began + 2300 * MS:
            await publisher.publish("private-a", "still")
            await stream.frame("message")
            await asyncio.sleep(100 * MS)
        assert not stream.has_ended
        # What is shown from now on is the fresh token, with what it allows.
        other = await raw_stream(events(there, "private-b", frames="1"), headers=bearer(accepted["resume"]))
        assert (await other.frame("subscribed"))["channel"] == "private-b"

    async def test_one_that_is_not_good_is_refused(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher, prefix: str
    ) -> None:
        sender = Sender(http, await serve_realtime())
        await sender.hello(grant=await publisher.grant(user="7"))
        expired = sign_grant(SECRET, now=time.time() - 100, expires=10, user="7")
        revoked = await publisher.grant(user="7")
        answers = await sender.send(
            {"type": "grant", "grant": "x.y.z"},
            {"type": "grant", "grant": expired},
            {"type": "grant", "grant": await publisher.grant(user="8")},
            {"type": "grant"},
        )
        assert [answer["code"] for answer in answers] == [
            "grant_invalid", "grant_expired", "grant_invalid", "bad_frame",
        ]  # fmt: skip
        await asyncio.to_thread(Publisher("memory://", prefix=prefix, secret=SECRET).disconnect, user="7")
        assert (await sender.post({"type": "grant", "grant": revoked})).status_code == 401

    async def test_whoever_was_nobody_becomes_its_user(
        self, serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
    ) -> None:
        site = await serve_realtime()
        sender = Sender(http, site)
        await sender.hello()
        stream = await raw_stream(events(site, "a", frames="1"), headers=bearer(sender.resume))
        await stream.frame("subscribed", "a")
        await sender.send({"type": "grant", "grant": await publisher.grant(user="7")})
        await stream.frame("subscribed", "#user-7")
        await publisher.publish("#user-7", "hi")
        assert (await stream.frame("message"))["data"] == "hi"

    @pytest.mark.parametrize("made", ["forged", "expired"])
    async def test_connect_with_a_bad_one_is_an_error(
        self, serve_realtime: Serve, http: httpx.AsyncClient, made: str
    ) -> None:
        sender = Sender(http, await serve_realtime())
        forged = sign_grant("another secret, also of 32 bytes!", now=time.time(), expires=60)
        expired = sign_grant(SECRET, now=time.time() - 100, expires=10)
        answers = await sender.send(
            {"type": "connect", "grant": forged if made == "forged" else expired}, {"type": "pong"}
        )
        assert [answer["code"] for answer in answers] == [
            "grant_invalid" if made == "forged" else "grant_expired", "connect_first",
        ]  # fmt: skip


class TestRevocation:
    async def test_who_was_disconnected_sends_nothing_more_and_cannot_resume(
        self, serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher, prefix: str
    ) -> None:
        site = await serve_realtime()
        sender = Sender(http, site)
        connected = await sender.hello(grant=await publisher.grant(user="7", publish=["*"]))
        end = Publisher("memory://", prefix=prefix, secret=SECRET)
        await asyncio.to_thread(end.disconnect, user="7")
        response = await sender.post({"type": "publish", "channel": "a", "data": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "revoked")
        fresh = Sender(http, site)
        (error,) = await fresh.send({"type": "connect", "resume": sender.resume})
        assert error["code"] == "revoked"
        # A grant that was made since then is good; the id from before is not.
        again = await fresh.hello(resume=sender.resume, grant=await publisher.grant(user="7"))
        assert again["connection"] != connected["connection"]

    async def test_a_connection_can_be_ended_by_its_id(
        self, serve_realtime: Serve, http: httpx.AsyncClient, prefix: str
    ) -> None:
        sender = Sender(http, await serve_realtime())
        connected = await sender.hello()
        end = Publisher("memory://", prefix=prefix, secret=SECRET)
        await asyncio.to_thread(end.disconnect, connection=connected["connection"])
        assert (await sender.post({"type": "pong"})).status_code == 401


async def test_a_publication_goes_where_the_grant_allows(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, publisher: AsyncPublisher
) -> None:
    site = await serve_realtime()
    stream = await raw_stream(events(site, "chat:1", frames="1"))
    await stream.frame("subscribed")
    sender = Sender(http, site)
    await sender.hello(grant=await publisher.grant(user="7", publish=["chat:*"]))
    answers = await sender.send(
        {"type": "publish", "id": "p1", "channel": "chat:1", "data": [1], "event": "said"},
        {"type": "publish", "id": "p2", "channel": "other", "data": 1},
        {"type": "publish", "channel": "#user-7", "data": 1},
        {"type": "pong"},
        {"type": "subscribe", "channel": "a"},
        {"type": "unsubscribe", "channel": "a"},
        {"type": "connect"},
        {"type": "dance"},
        7,
    )
    assert answers[0] == {"type": "accepted", "id": "p1", "channel": "chat:1"}
    assert answers[3] == {"type": "accepted"}
    assert [(a["code"], a.get("id"), a.get("channel")) for a in answers if a["type"] == "error"] == [
        ("forbidden", "p2", "other"),
        ("bad_channel", None, "#user-7"),
        ("unsupported", None, "a"),
        ("unsupported", None, "a"),
        ("already_connected", None, None),
        ("unknown_type", None, None),
        ("bad_frame", None, None),
    ]
    message = await stream.frame("message")
    assert (message["data"], message["event"]) == ([1], "said")


async def test_a_publication_that_an_expired_grant_allowed_is_refused_as_expired(
    serve_realtime: Serve, http: httpx.AsyncClient, publisher: AsyncPublisher
) -> None:
    sender = Sender(http, await serve_realtime())
    expired_at = time.time() + 500 * MS
    await sender.hello(grant=await publisher.grant(user="7", publish=["chat:*"], expires=500 * MS))
    await eventually_async(lambda: time.time() > expired_at)
    say = {"type": "publish", "id": "p1", "channel": "chat:1", "data": 1}
    answers = await sender.send(say, {**say, "channel": "hall"})
    assert [(answer["code"], answer["id"], answer["channel"]) for answer in answers] == [
        ("grant_expired", "p1", "chat:1"),
        ("forbidden", "p1", "hall"),
    ]
    (accepted,) = await sender.send({"type": "grant", "grant": await publisher.grant(user="7", publish=["chat:*"])})
    sender.resume = accepted["resume"]
    assert (await sender.send(say))[0]["type"] == "accepted"


class TestWhatIsNotTaken:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
            ({"Content-Type": "text/plain; application/json"}, 415),
            ({}, 415),
            ({"Content-Type": "application/json; charset=utf-8"}, 200),
            ({"Content-Type": "Application/JSON"}, 200),
            ({"Content-Type": "application/json", "Cookie": "session=x"}, 403),
            ({"Content-Type": "application/json", "Cookie": "session=x", "Origin": "null"}, 403),
            ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ],
    )
    async def test_a_form_and_a_foreign_page_are_refused(
        self, serve_realtime: Serve, http: httpx.AsyncClient, headers: dict[str, str], status: int
    ) -> None:
        site = await serve_realtime()
        content = b'{"frames":[{"type":"connect"}]}'
        assert (await http.post(site.url + "/send", content=content, headers=headers)).status_code == status

    async def test_the_page_of_the_same_host_is_not(self, serve_realtime: Serve, http: httpx.AsyncClient) -> None:
        site = await serve_realtime()
        response = await http.post(
            site.url + "/send",
            json={"frames": [{"type": "connect"}]},
            headers={"Cookie": "session=x", "Origin": site.url},
        )
        assert response.status_code == 200

    @pytest.mark.parametrize(
        ("content", "status"),
        [
            (b"", 400),
            (b"[]", 400),
            (b"{}", 400),
            (b'{"frames":[]}', 400),
            (b'{"frames":{}}', 400),
            (b'{"frames":[{"type":"connect"}],"resume":7}', 400),
            (b'{"frames":[{"type":"connect"}],"transport":"pigeon"}', 400),
            (b'{"frames":[{"type":"connect"}],"resume":"x.y.z"}', 401),
            (b'{"frames":[' + b",".join([b"0"] * 32) + b"]}", 200),
            (b'{"frames":[' + b",".join([b"0"] * 33) + b"]}", 413),
            (b"[" * 60_000, 400),
            (b"\n" * 65_536, 400),
            (b"\n" * 65_537, 413),
            (b"\xff\xfe", 400),
        ],
    )
    async def test_a_body_that_is_none_is_refused(
        self, serve_realtime: Serve, http: httpx.AsyncClient, content: bytes, status: int
    ) -> None:
        site = await serve_realtime()
        response = await http.post(site.url + "/send", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text
        assert status == 200 or response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("path", "declared"), [("/send", "65537"), ("/send", "9" * 18), ("/publish", "4001"), ("/publish", "9" * 18)]
    )
    async def test_a_body_that_is_said_to_be_too_large_is_not_waited_for(
        self, serve_realtime: Serve, publisher: AsyncPublisher, path: str, declared: str
    ) -> None:
        site = await serve_realtime(max_publish_bytes=4_000)
        grant = await publisher.grant(publish=["*"])
        head = f"host: a\r\ncontent-type: application/json\r\nauthorization: Bearer {grant}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(f"POST {path} HTTP/1.1\r\n{head}content-length: {declared}\r\n\r\n".encode())
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 3000 * MS)
        writer.close()

    @pytest.mark.parametrize("declared", ["x", "-1", "1.5", "0x10", "", "1, 2", "\u00b2", "9" * 5_000])
    async def test_a_length_that_is_none_breaks_nothing(
        self, serve_realtime: Serve, http: httpx.AsyncClient, declared: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        site = await serve_realtime(connect_timeout=100 * MS)
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        head = f"POST /send HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {declared}\r\n\r\n"
        writer.write(head.encode("latin-1"))
        assert b" 4" in await asyncio.wait_for(reader.readline(), 3000 * MS)
        writer.close()
        assert (await http.get(site.url + "/client.js")).status_code == 200
        assert "Traceback" not in caplog.text

    async def test_a_body_that_does_not_come_is_not_waited_for(self, serve_realtime: Serve) -> None:
        site = await serve_realtime(connect_timeout=100 * MS)
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /send HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 3000 * MS)
        writer.close()


class TestPagesOfAnotherOrigin:
    PAGE = "https://app.example"

    @pytest.mark.parametrize("path", ["/send", "/events"])
    async def test_an_allowed_one_is_answered_with_its_name_and_may_use_cookies(
        self, serve_realtime: Serve, http: httpx.AsyncClient, path: str
    ) -> None:
        site = await serve_realtime(origins=[self.PAGE])
        asked = await http.options(
            site.url + path,
            headers={
                "Origin": self.PAGE,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == self.PAGE
        assert asked.headers["access-control-allow-credentials"] == "true"
        assert asked.headers["access-control-allow-methods"] == ("POST" if path == "/send" else "GET")
        assert {"authorization", "content-type", "last-event-id"} <= set(
            asked.headers["access-control-allow-headers"].split(", ")
        )
        assert asked.headers["vary"] == "origin"
        answered = await http.post(
            site.url + "/send",
            json={"frames": [{"type": "connect"}]},
            headers={"Origin": self.PAGE, "Cookie": "session=x"},
        )
        assert answered.headers["access-control-allow-origin"] == self.PAGE

    async def test_a_refusal_can_be_read_by_it_too(self, serve_realtime: Serve, http: httpx.AsyncClient) -> None:
        site = await serve_realtime(origins=[self.PAGE])
        refused = await http.get(site.url + "/events", headers={"Origin": self.PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, self.PAGE)

    async def test_a_foreign_one_is_told_nothing(self, serve_realtime: Serve, http: httpx.AsyncClient) -> None:
        site = await serve_realtime(origins=[self.PAGE])
        for method in ("OPTIONS", "POST"):
            answer = await http.request(method, site.url + "/send", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in answer.headers

    async def test_where_all_are_allowed_none_may_use_cookies(
        self, serve_realtime: Serve, http: httpx.AsyncClient
    ) -> None:
        site = await serve_realtime(origins=["*", self.PAGE])
        for page, allowed, credentials in (("https://x.example", "*", None), (self.PAGE, self.PAGE, "true")):
            answer = await http.options(site.url + "/send", headers={"Origin": page})
            assert answer.headers["access-control-allow-origin"] == allowed
            assert answer.headers.get("access-control-allow-credentials") == credentials


async def test_a_draining_server_still_takes_what_its_clients_send(
    serve_realtime: Serve, http: httpx.AsyncClient
) -> None:
    site = await serve_realtime()
    sender = Sender(http, site)
    await sender.hello()
    await site.app.drain(0)
    assert await sender.send({"type": "pong"}) == [{"type": "accepted"}]


async def test_a_websocket_goes_on_as_a_stream_that_sends(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream
) -> None:
    here, there = await serve_realtime(), await serve_realtime()
    websocket = await RawClient.connect(here.ws_url + "/")
    connected = await websocket.hello(channels={"a": None})
    stream = await raw_stream(events(there, "a", frames="1"), headers=bearer(connected["resume"]))
    assert (await websocket.closed())[0] == CloseCode.REPLACED
    sender = Sender(http, here)
    sender.resume = (await stream.frame("connected"))["resume"]
    assert await sender.send({"type": "pong"}) == [{"type": "accepted"}]


async def test_a_request_runs_the_view_and_is_answered_on_the_stream(
    http: httpx.AsyncClient, raw_stream: Stream, prefix: str
) -> None:
    app = flask.Flask("answering")

    @app.post("/echo")
    def echo() -> Any:
        connection = flask.request.environ["pubsub.connection"]
        return {
            "id": connection.id,
            "transport": connection.transport,
            "said": flask.request.get_json(),
            "cookie": flask.request.cookies.get("session"),
        }

    async with Servers() as servers:
        server = await servers.start(lambda: with_realtime(app, url="memory://", prefix=prefix, secret=SECRET))
        site = Site(None, server.port, None)  # type: ignore[arg-type]
        site.url += "/realtime"
        sender = Sender(http, site)
        connected = await sender.hello()
        stream = await raw_stream(events(site, "a", frames="1"), headers=bearer(sender.resume))
        for transport in ("sse", "longpoll"):
            request = {
                "type": "request", "id": transport, "method": "POST", "path": "/echo",
                "headers": {"content-type": "application/json"}, "body": '"hi"',
            }  # fmt: skip
            body = {
                "frames": [request, {**request, "id": "x", "path": "//"}],
                "resume": sender.resume,
                "transport": transport,
            }
            cookies = {"Cookie": "session=abc", "Origin": server.url}
            accepted, refused = (await http.post(sender.url, json=body, headers=cookies)).json()["frames"]
            assert accepted == {"type": "accepted", "id": transport}
            assert (refused["code"], refused["id"]) == ("bad_frame", "x")
            response = await stream.frame("response")
            assert (response["id"], response["status"]) == (transport, 200)
            assert json.loads(response["body"]) == {
                "id": connected["connection"], "transport": transport, "said": "hi", "cookie": "abc",
            }  # fmt: skip
        assert await sender.send({"type": "cancel", "id": "sse"}) == [{"type": "accepted", "id": "sse"}]


@pytest.mark.parametrize("engine", ["memory", "redis"])
async def test_a_request_sent_again_gets_the_stored_answer_after_what_is_said_of_each_frame(
    http: httpx.AsyncClient, request: pytest.FixtureRequest, prefix: str, engine: str
) -> None:
    url = "memory://" if engine == "memory" else request.getfixturevalue("redis_server").url
    app, runs = flask.Flask("answering"), list[str]()

    @app.get("/<name>")
    def answer(name: str) -> Any:
        runs.append(name)
        return f"of {name}" if name == "a" else iter(["of ", name])

    async with Servers() as servers:
        server = await servers.start(lambda: with_realtime(app, url=url, prefix=prefix, secret=SECRET))
        site = Site(None, server.port, None)  # type: ignore[arg-type]
        site.url += "/realtime"
        sender = Sender(http, site)
        await sender.hello()
        sent = [{"type": "request", "id": name, "method": "GET", "path": f"/{name}"} for name in "ab"]
        accepted = [{"type": "accepted", "id": name} for name in "ab"]
        assert await sender.send(*sent) == accepted

        async def both_answers() -> list[Frame]:
            said = await sender.send(*sent, {"type": "pong"})
            assert said[:3] == [*accepted, {"type": "accepted"}]
            return said[3:] if said[-1].get("id") == "b" else []

        parts = await eventually_async(both_answers)
        assert {part["id"]: "" for part in parts} == {"a": "", "b": ""}
        assert "".join(part.get("body", "") for part in parts) == "of aof b"
        assert parts[-1]["type"] in ("response", "response_end")
        assert runs == ["a", "b"]


@pytest.mark.parametrize("transport", ["sse", "longpoll", "websocket"])
async def test_a_server_that_sees_an_answer_pass_does_not_wait_for_it_any_more(
    serve_realtime: Serve, http: httpx.AsyncClient, raw_stream: Stream, prefix: str, transport: str
) -> None:
    site = await serve_realtime(requests="/*")
    sender = Sender(http, site)
    connected = await sender.hello()
    if transport == "sse":
        stream = await raw_stream(events(site, frames="1"), headers=bearer(sender.resume))
        await stream.frame("connected")
    elif transport == "websocket":
        client = await RawClient.connect(site.ws_url + "/")
        await client.hello(resume=sender.resume)
    await sender.send({"type": "request", "id": "1", "method": "GET", "path": "/"})
    expected = (await site.app.start()).shared.gate._timers
    assert len(expected) == 1
    settings = Settings.build("memory://", environ={}, prefix=prefix)
    channel = channel_of_connection(connected["connection"])
    head = protocol.response_head("1", 200, {}, b"")
    open_broker(settings).publish([build_answer_draft(settings, channel, head, answer_key("1"), ".1")])
    if transport == "longpoll":
        await http.get(site.url + "/poll?wait=1", headers=bearer(sender.resume))
    await eventually_async(lambda: not expected)
    if transport == "websocket":
        await client.close()


async def test_requests_sent_by_post_wait_in_the_connections_line_whichever_server_takes_them(
    http: httpx.AsyncClient, redis_server: RedisServer, prefix: str
) -> None:
    def build() -> Any:
        mounted = Realtime(redis_server.url, prefix=prefix, secret=SECRET, requests="/*", request_backlog=1)
        return Router(routes=[Mount("/realtime", mounted)], lifespan=mounted.router.lifespan_context)

    async with Servers() as servers:
        senders = []
        for server in (await servers.start(build), await servers.start(build)):
            site = Site(None, server.port, None)  # type: ignore[arg-type]
            site.url += "/realtime"
            senders.append(Sender(http, site))
        await senders[0].hello()
        senders[1].resume = senders[0].resume
        sent = [{"type": "request", "id": str(number), "method": "GET", "path": "/"} for number in range(3)]
        assert await senders[0].send(sent[0]) == [{"type": "accepted", "id": "0"}]
        assert await senders[1].send(sent[1]) == [{"type": "accepted", "id": "1"}]
        (busy,) = await senders[0].send(sent[2])
        assert (busy["code"], busy["id"]) == ("busy", "2")
        (cancelled,) = await senders[0].send({"type": "cancel", "id": "1"})
        assert (cancelled["code"], cancelled["id"]) == ("cancelled", "1")
        assert await senders[1].send(sent[2]) == [{"type": "accepted", "id": "2"}]
