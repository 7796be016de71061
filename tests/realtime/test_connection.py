"""One client without a socket: every command, every refusal, who it is and what it may."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import jwt
import pytest

from pubsub_mw.broker.engines import open_async_broker
from pubsub_mw.errors import CloseCode
from pubsub_mw.grants import sign_grant
from pubsub_mw.model import Handshake
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.connection import Connection
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.settings import Settings
from tests.realtime.conftest import delay_look_ups
from tests.tools.clock import MS, eventually_async

pytestmark = pytest.mark.anyio

SECRET = "a secret of thirty-two bytes or more"
Frame = dict[str, Any]


class Server:
    """What the connections of one process share, over a memory broker. Two of the same prefix are two processes."""

    def __init__(self, prefix: str, **overrides: Any) -> None:
        defaults = {"url": "memory://", "prefix": prefix, "secret": SECRET}
        self.settings = Settings.build(environ={}, **{**defaults, **overrides})
        broker = open_async_broker(self.settings)
        self.hub = Hub(broker, self.settings)
        self.publisher = AsyncPublisher(**self.settings.overrides())
        self.shared = Shared(self.settings, self.hub, broker, self.publisher, SECRET)
        self.task = asyncio.create_task(self.hub.run())
        self.clients: list[Client] = []

    def client(self) -> "Client":
        self.clients.append(Client(self))
        return self.clients[-1]

    async def connected(self, **fields: Any) -> "Client":
        client = self.client()
        await client.connect(**fields)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.connection.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Client:
    """The other side of a connection, where the socket would be."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.connection = Connection(server.shared, Handshake(headers=(), scheme="http", address=""))
        self.received: list[Frame] = []
        self.unread: list[Frame] = []

    @property
    def closed(self) -> tuple[CloseCode, str] | None:
        return self.connection.send_queue.closed

    @property
    def has_ended(self) -> bool:
        return self.closed is not None

    @property
    def id(self) -> str:
        assert self.connection.id is not None
        return self.connection.id

    async def send(self, frame: Frame | str) -> None:
        await self.connection.receive(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def connect(self, **fields: Any) -> Frame:
        await self.send({"type": "connect", **fields})
        return await self.recv("connected")

    async def subscribe(self, channel: str, **fields: Any) -> Frame:
        await self.send({"type": "subscribe", "channel": channel, **fields})
        return await self.recv()

    async def recv(self, kind: str | None = None) -> Frame:
        """The next frame, which must be of this kind; pings are left out."""
        await eventually_async(self.take, 5_000 * MS, f"no {kind or 'frame'}")
        frame = self.unread.pop(0)
        assert kind in (None, frame["type"]), frame
        return frame

    def take(self) -> int:
        """Take what waits; how many frames are unread."""
        frames = [json.loads(frame) for frame in self.connection.send_queue.take_nowait()]
        self.received += frames
        self.unread += [frame for frame in frames if frame["type"] != "ping"]
        return len(self.unread)

    async def refused(self, frame: Frame | str) -> str:
        """Send what is wrong, and return the code of the error; the connection goes on."""
        await self.send(frame)
        error = await self.recv("error")
        assert error["message"]
        assert self.closed is None
        return str(error["code"])


@pytest.fixture
async def serve(prefix: str) -> AsyncIterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**overrides: Any) -> Server:
        servers.append(Server(prefix, **overrides))
        return servers[-1]

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def server(serve: Callable[..., Server]) -> Server:
    return serve()


def grant(user: str | None = None, expires: float = 60, secret: str = SECRET, **patterns: Any) -> str:
    return sign_grant(secret, now=time.time(), expires=expires, user=user, **patterns)


# Connect.


async def test_a_client_is_told_who_it_is(server: Server) -> None:
    frame = await server.client().connect()
    assert frame["user"] is None
    assert frame["ping"] == server.settings.ping_interval
    assert len(frame["connection"]) >= 22
    assert frame["resume"].count(".") == 2


async def test_two_clients_have_two_ids(server: Server) -> None:
    assert (await server.connected()).id != (await server.connected()).id


async def test_channels_of_connect_are_subscribed_or_refused_one_by_one(server: Server) -> None:
    position = await server.publisher.publish("news", 1)
    await server.publisher.publish("news", 2)
    client = await server.connected(channels={"news": str(position), "bad name": None, "room": None, "private-x": None})
    answers = {(frame := await client.recv())["channel"]: frame for _ in range(5)}
    assert answers["bad name"]["code"] == "bad_channel"
    assert answers["private-x"]["code"] == "forbidden"
    assert answers["room"]["recovered"] is None
    news = [frame for frame in client.received if frame.get("channel") == "news"]
    assert [frame["type"] for frame in news] == ["subscribed", "message"]
    assert news[0]["recovered"] is True
    assert news[0]["position"] == str(position)
    assert news[1]["data"] == 2


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "subscribe", "channel": "a"},
        {"type": "unsubscribe", "channel": "a"},
        {"type": "publish", "channel": "a", "data": 1},
        {"type": "grant", "grant": "x"},
        {"type": "pong"},
    ],
    ids=lambda frame: str(frame["type"]),
)
async def test_nothing_is_done_before_connect(server: Server, frame: Frame) -> None:
    client = server.client()
    assert await client.refused(frame) == "connect_first"
    await client.connect()
    assert server.hub.channel_count == 1  # its own


async def test_connect_works_once(server: Server) -> None:
    client = await server.connected()
    before = client.id
    assert await client.refused({"type": "connect"}) == "already_connected"
    assert client.id == before


async def test_who_does_not_connect_is_closed(serve: Callable[..., Server]) -> None:
    client = serve(connect_timeout=50 * MS).client()
    assert await client.refused("{}") == "bad_frame"
    await eventually_async(lambda: client.closed)
    assert client.closed is not None
    assert client.closed[0] is CloseCode.CONNECT_TIMEOUT


# Frames that are wrong.


DEEP = "[" * 20_000 + "]" * 20_000
BAD_FRAMES = [
    pytest.param("", "bad_frame", id="empty"),
    pytest.param("nonsense", "bad_frame", id="not JSON"),
    pytest.param('{"type":"pong"', "bad_frame", id="cut off"),
    pytest.param('{"type":"pong"}{"type":"pong"}', "bad_frame", id="two objects"),
    pytest.param("[]", "bad_frame", id="a list"),
    pytest.param("null", "bad_frame", id="null"),
    pytest.param('"pong"', "bad_frame", id="a text"),
    pytest.param("1", "bad_frame", id="a number"),
    pytest.param("{}", "bad_frame", id="no type"),
    pytest.param('{"type":1}', "bad_frame", id="type is a number"),
    pytest.param('{"type":null}', "bad_frame", id="type is null"),
    pytest.param('{"type":["pong"]}', "bad_frame", id="type is a list"),
    pytest.param('{"type":"nonsense"}', "unknown_type", id="unknown type"),
    pytest.param('{"type":"request","id":"1","method":"GET","path":"/"}', "forbidden", id="a path that is not allowed"),
    pytest.param('{"type":"%s"}' % ("x" * 10_000), "unknown_type", id="a long type"),
    pytest.param('{"type":"publish","channel":"c","data":NaN}', "bad_frame", id="NaN"),
    pytest.param('{"type":"publish","channel":"c","data":Infinity}', "bad_frame", id="Infinity"),
    pytest.param('{"type":"publish","channel":"c","data":"\\ud800"}', "bad_frame", id="half a surrogate pair"),
    pytest.param('{"type":"publish","channel":"c","data":' + DEEP + "}", "bad_frame", id="deep lists"),
    pytest.param('{"a":' * 20_000 + "1" + "}" * 20_000, "bad_frame", id="deep objects"),
    pytest.param('{"type":"subscribe"}', "bad_frame", id="subscribe without channel"),
    pytest.param('{"type":"subscribe","channel":null}', "bad_frame", id="channel is null"),
    pytest.param('{"type":"subscribe","channel":7}', "bad_frame", id="channel is a number"),
    pytest.param('{"type":"subscribe","channel":["c"]}', "bad_frame", id="channel is a list"),
    pytest.param('{"type":"subscribe","channel":"c","position":7}', "bad_frame", id="position is a number"),
    pytest.param('{"type":"subscribe","channel":"c","position":"x"}', "bad_position", id="position is none"),
    pytest.param('{"type":"subscribe","channel":"c","position":"e.1"}', "bad_position", id="position without tag"),
    pytest.param('{"type":"subscribe","channel":"c","position":"e.-1.t"}', "bad_position", id="negative offset"),
    pytest.param('{"type":"subscribe","channel":"c","position":"e.01.t"}', "bad_position", id="offset with a zero"),
    pytest.param(
        '{"type":"subscribe","channel":"c","position":"e.99999999999999999999.t"}', "bad_position", id="huge offset"
    ),
    pytest.param('{"type":"subscribe","channel":"c","position":".0.0"}', "bad_position", id="no epoch"),
    pytest.param('{"type":"subscribe","channel":"c","position":""}', "bad_position", id="empty position"),
    pytest.param('{"type":"subscribe","channel":"c","grant":7}', "bad_frame", id="grant is a number"),
    pytest.param('{"type":"subscribe","channel":"c","grant":"x"}', "grant_invalid", id="grant is none"),
    pytest.param('{"type":"unsubscribe"}', "bad_frame", id="unsubscribe without channel"),
    pytest.param('{"type":"unsubscribe","channel":"c"}', "not_subscribed", id="unsubscribe before subscribe"),
    pytest.param('{"type":"unsubscribe","channel":"%s"}' % ("x" * 10_000), "not_subscribed", id="a long channel"),
    pytest.param('{"type":"grant"}', "bad_frame", id="no grant"),
    pytest.param('{"type":"grant","grant":"a.b.c"}', "grant_invalid", id="a grant of nonsense"),
    pytest.param('{"type":"publish","channel":"c"}', "bad_frame", id="publish without data"),
    pytest.param('{"type":"publish","data":1}', "bad_frame", id="publish without channel"),
    pytest.param('{"type":"publish","channel":"c","data":1,"event":7}', "bad_frame", id="event is a number"),
    pytest.param('{"type":"publish","channel":"c","data":1}', "forbidden", id="publish without grant"),
    pytest.param('{"type":"publish","channel":"#user-7","data":1}', "bad_channel", id="publish to a reserved one"),
    pytest.param('{"type":"subscribe","channel":"presence-x"}', "forbidden", id="presence"),
]


@pytest.mark.parametrize(("frame", "code"), BAD_FRAMES)
async def test_a_wrong_frame_is_answered_by_a_code_and_harms_nobody(server: Server, frame: str, code: str) -> None:
    client, other = await server.connected(), await server.connected()
    await other.subscribe("room")
    assert await client.refused(frame) == code
    assert len(json.dumps(client.received[-1])) < 1_000
    assert (await client.subscribe("room"))["type"] == "subscribed"
    await server.publisher.publish("room", "still here")
    assert (await client.recv("message"))["data"] == "still here"
    assert (await other.recv("message"))["data"] == "still here"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a*",
        "a?",
        "[a]",
        "{a}",
        "}",
        "a\x00",
        "a\r\n",
        "a\n",
        "ä",
        "#",
        "#x",
        "#connection-x",
        "#user-7",
        "a" * 201,
    ],
    ids=lambda name: repr(name)[:20],
)
async def test_a_name_that_is_none_is_refused(server: Server, name: str) -> None:
    client = await server.connected()
    assert await client.refused({"type": "subscribe", "channel": name}) == "bad_channel"
    assert server.hub.channel_count == 1


@pytest.mark.parametrize("name", ["a", "room:42", "A-Z_0.9,:;=@/-", "a" * 200, "privat", "pre-sence"])
async def test_every_allowed_name_can_be_listened_to(server: Server, name: str) -> None:
    client = await server.connected()
    assert (await client.subscribe(name))["type"] == "subscribed"
    await server.publisher.publish(name, 1)
    assert (await client.recv("message"))["channel"] == name


async def test_an_error_carries_the_id_and_channel_of_what_it_refuses(server: Server) -> None:
    client = await server.connected()
    await client.send({"type": "publish", "id": "17", "channel": "room", "data": 1})
    error = await client.recv("error")
    assert (error["id"], error["channel"]) == ("17", "room")


async def test_unknown_fields_are_ignored(server: Server) -> None:
    client = server.client()
    await client.send({"type": "connect", "newer": {"than": "us"}})
    await client.recv("connected")
    assert (await client.subscribe("room", newer=1))["type"] == "subscribed"


# Subscribe.


async def test_a_channel_is_subscribed_once(server: Server) -> None:
    client = await server.connected()
    await client.subscribe("room")
    assert await client.refused({"type": "subscribe", "channel": "room"}) == "already_subscribed"
    await server.publisher.publish("room", 1)
    await client.recv("message")
    await server.publisher.publish("room", 2)
    assert (await client.recv("message"))["data"] == 2


async def test_after_unsubscribe_nothing_comes_and_subscribing_again_works(server: Server) -> None:
    client = await server.connected()
    await client.subscribe("room")
    await client.send({"type": "unsubscribe", "channel": "room"})
    assert await client.recv() == {"type": "unsubscribed", "channel": "room", "code": "client", "reason": "as asked"}
    await server.publisher.publish("room", "missed")
    assert (await client.subscribe("room"))["recovered"] is None
    await server.publisher.publish("room", "heard")
    assert (await client.recv("message"))["data"] == "heard"


async def test_what_was_missed_follows_subscribed(server: Server) -> None:
    first = await server.publisher.publish("room", 1)
    for data in (2, 3):
        await server.publisher.publish("room", data)
    client = await server.connected()
    frame = await client.subscribe("room", position=str(first))
    assert (frame["recovered"], frame["position"]) == (True, str(first))
    assert [(await client.recv("message"))["data"] for _ in range(2)] == [2, 3]


async def test_a_position_of_another_life_of_the_channel_is_told(server: Server) -> None:
    position = await server.publisher.publish("room", 1)
    client = await server.connected()
    frame = await client.subscribe("room", position="other.1.tag")
    assert (frame["recovered"], frame["position"]) == (False, str(position))


async def test_the_bound_of_channels_counts_those_that_are_open(serve: Callable[..., Server]) -> None:
    client = await serve(max_channels=2).connected()
    for name in ("a", "b"):
        await client.subscribe(name)
    assert await client.refused({"type": "subscribe", "channel": "c"}) == "too_many_channels"
    await client.send({"type": "unsubscribe", "channel": "a"})
    await client.recv("unsubscribed")
    assert (await client.subscribe("c"))["type"] == "subscribed"


async def test_a_client_that_leaves_leaves_nothing_behind(server: Server) -> None:
    client = await server.connected(grant=grant("7"))
    await client.subscribe("room")
    assert (server.hub.channel_count, server.hub.connection_count) == (3, 1)
    client.connection.close()
    client.connection.close()
    assert (server.hub.channel_count, server.hub.connection_count) == (0, 0)


@pytest.mark.parametrize("user", [None, "7"])
async def test_who_must_go_before_the_broker_follows_its_channels_leaves_nothing_waiting(
    server: Server, user: str | None
) -> None:
    server.task.cancel()  # now nothing is followed, and nothing refused
    await asyncio.gather(server.task, return_exceptions=True)
    client = server.client()
    grant = {} if user is None else {"grant": await server.publisher.grant(user=user)}
    connecting = asyncio.create_task(client.send({"type": "connect", **grant}))
    await eventually_async(lambda: server.hub.channel_count == (1 if user is None else 2))
    assert not connecting.done()
    client.connection.send_queue.close(CloseCode.DISCONNECTED, "the application ended this connection")
    client.connection.close()
    async with asyncio.timeout(5_000 * MS):
        await connecting
    assert client.take() == 0
    assert client.connection.id is None
    assert server.hub.channel_count == 0


# Permission.


async def test_public_patterns_say_what_all_may_hear(serve: Callable[..., Server]) -> None:
    client = await serve(public="news open-*").connected()
    assert (await client.subscribe("news"))["type"] == "subscribed"
    assert (await client.subscribe("open-a"))["type"] == "subscribed"
    assert await client.refused({"type": "subscribe", "channel": "newsroom"}) == "forbidden"


async def test_private_channels_need_a_grant_that_names_them(server: Server) -> None:
    nobody = await server.connected()
    assert await nobody.refused({"type": "subscribe", "channel": "private-a"}) == "forbidden"
    client = await server.connected(grant=grant("7", channels=("private-a", "private-b-*")))
    assert (await client.subscribe("private-a"))["type"] == "subscribed"
    assert (await client.subscribe("private-b-1"))["type"] == "subscribed"
    assert await client.refused({"type": "subscribe", "channel": "private-c"}) == "forbidden"
    assert await client.refused({"type": "subscribe", "channel": "private-aa"}) == "forbidden"


async def test_a_denied_channel_is_refused_alike_whether_it_exists_or_not(server: Server) -> None:
    await server.publisher.publish("private-real", 1)
    client = await server.connected()
    answers = []
    for name in ("private-real", "private-none"):
        error = await client.subscribe(name)
        answers.append({**error, "channel": ""})
    assert answers[0] == answers[1]


async def test_a_grant_may_come_with_the_subscription(server: Server) -> None:
    client = await server.connected()
    token = grant(channels=("private-a",))
    assert (await client.subscribe("private-a", grant=token))["type"] == "subscribed"


async def test_the_same_grant_over_and_over_grows_nothing(server: Server) -> None:
    client = await server.connected(grant=grant("7", channels=("private-a",)))
    token = grant("7", channels=("private-b",))
    for _ in range(20):
        await client.send({"type": "subscribe", "channel": "private-b", "grant": token})
    held = client.connection._grant
    assert held is not None
    assert held.channels == ("private-a", "private-b")


async def test_somebody_elses_grant_is_refused(server: Server) -> None:
    client = await server.connected(grant=grant("7"))
    assert await client.refused({"type": "grant", "grant": grant("8")}) == "grant_invalid"
    assert await client.refused({"type": "grant", "grant": grant("7", expires=-1)}) == "grant_expired"
    assert await client.refused({"type": "grant", "grant": grant("7", secret=SECRET * 2)}) == "grant_invalid"
    assert client.connection.user == "7"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: grant("7", expires=-1), "grant_expired"),
        (lambda: grant("7", secret=SECRET * 2), "grant_invalid"),
        (lambda: grant("8"), "grant_invalid"),
    ],
    ids=["expired", "forged", "somebody else's"],
)
async def test_a_subscription_refused_for_its_grant_names_the_channel(
    server: Server, make: Callable[[], str], code: str
) -> None:
    client = await server.connected(grant=grant("7"))
    await client.send({"type": "subscribe", "channel": "private-a", "grant": make()})
    error = await client.recv("error")
    assert (error["code"], error.get("channel")) == (code, "private-a")


async def test_a_connection_whose_user_becomes_known_hears_the_users_channel(server: Server) -> None:
    client = await server.connected()
    await client.send({"type": "grant", "grant": grant("7")})
    assert (await client.recv("subscribed"))["channel"] == "#user-7"
    await server.publisher.publish("#user-7", "for you")
    assert (await client.recv("message"))["data"] == "for you"


BAD_GRANTS = [
    pytest.param("nonsense", CloseCode.GRANT_INVALID, id="nonsense"),
    pytest.param(grant("7", secret="another secret of thirty-two bytes"), CloseCode.GRANT_INVALID, id="another key"),
    pytest.param(grant("7", expires=-1), CloseCode.GRANT_EXPIRED, id="expired"),
    pytest.param(jwt.encode({"sub": "7", "exp": 9e9}, "", algorithm="none"), CloseCode.GRANT_INVALID, id="unsigned"),
    pytest.param(jwt.encode({"sub": "7"}, SECRET, algorithm="HS256"), CloseCode.GRANT_INVALID, id="without end"),
    pytest.param(
        jwt.encode({"sub": "a b", "exp": 9e9}, SECRET, algorithm="HS256"), CloseCode.GRANT_INVALID, id="bad user"
    ),
    pytest.param(
        jwt.encode({"exp": 9e9, "channels": "*"}, SECRET, algorithm="HS256"), CloseCode.GRANT_INVALID, id="bad patterns"
    ),
]


@pytest.mark.parametrize(("token", "code"), BAD_GRANTS)
async def test_a_bad_grant_in_connect_ends_the_connection(server: Server, token: str, code: CloseCode) -> None:
    client = server.client()
    await client.send({"type": "connect", "grant": token})
    assert client.closed is not None
    assert client.closed[0] is code
    assert server.hub.connection_count == 0


async def test_an_expired_grant_is_announced_and_then_ends_the_connection(serve: Callable[..., Server]) -> None:
    client = await serve(grant_grace=400 * MS).connected(grant=grant("7", expires=300 * MS))
    error = await client.recv("error")
    assert error["code"] == "grant_expired"
    assert not client.has_ended
    await eventually_async(lambda: client.closed)
    assert client.closed is not None
    assert client.closed[0] is CloseCode.GRANT_EXPIRED


async def test_a_fresh_grant_in_time_keeps_the_connection(serve: Callable[..., Server]) -> None:
    server = serve(grant_grace=500 * MS)
    client = await server.connected(grant=grant("7", expires=300 * MS))
    await client.recv("error")
    began = time.monotonic()
    await client.send({"type": "grant", "grant": grant("7", channels=("private-a",))})
    assert (await client.subscribe("private-a"))["type"] == "subscribed"
    await eventually_async(lambda: time.monotonic() - began > 600 * MS)
    assert client.closed is None


async def test_what_an_expired_grant_allowed_is_refused_as_expired_until_a_fresh_one_came(server: Server) -> None:
    client = await server.connected(grant=grant("7", expires=300 * MS, channels=("private-a",), publish=("room",)))
    await client.recv("error")
    refused = await client.subscribe("private-a")
    assert (refused["type"], refused["code"], refused["channel"]) == ("error", "grant_expired", "private-a")
    await client.send({"type": "publish", "id": "p1", "channel": "room", "data": 1})
    refused = await client.recv("error")
    assert (refused["code"], refused["channel"], refused["id"]) == ("grant_expired", "room", "p1")
    assert await client.refused({"type": "subscribe", "channel": "private-b"}) == "forbidden"
    assert await client.refused({"type": "publish", "channel": "hall", "data": 1}) == "forbidden"
    assert (await client.subscribe("open"))["type"] == "subscribed"
    await client.send({"type": "grant", "grant": grant("7", channels=("private-a",))})
    assert (await client.subscribe("private-a"))["type"] == "subscribed"
    assert await client.refused({"type": "publish", "channel": "room", "data": 1}) == "forbidden"


async def test_what_was_revoked_of_an_expired_grant_is_forbidden(server: Server) -> None:
    client = await server.connected(grant=grant("7", expires=300 * MS, channels=("private-a",)))
    await client.recv("error")
    client.connection.revoke("user:7", "private-a", time.time())
    assert await client.refused({"type": "subscribe", "channel": "private-a"}) == "forbidden"


async def test_a_grant_beside_an_expired_one_neither_ends_what_there_is_nor_makes_it_last(
    serve: Callable[..., Server],
) -> None:
    server = serve(grant_grace=150 * MS)
    client = await server.connected(
        grant=grant("7", expires=300 * MS, channels=("private-a",)), channels={"private-a": None}
    )
    await client.recv("subscribed")
    await client.recv("error")
    token = grant("7", channels=("private-b",))
    while not client.has_ended:
        await client.send({"type": "subscribe", "channel": "private-b", "grant": token})
        await asyncio.sleep(20 * MS)
    client.take()
    assert {(frame["type"], frame["channel"], frame["code"]) for frame in client.unread} == {
        ("error", "private-b", "grant_expired")
    }
    assert client.closed is not None
    assert client.closed[0] is CloseCode.GRANT_EXPIRED


async def test_a_grant_that_expires_while_its_connection_begins_ends_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_look_ups(monkeypatch, server.shared.control, 100 * MS)
    client = server.client()
    token = grant("7", expires=50 * MS, channels=("private-a",))
    await client.send({"type": "connect", "grant": token, "channels": {"private-a": None}})
    assert client.closed is not None
    assert client.closed[0] is CloseCode.GRANT_EXPIRED
    assert not client.take()


# Publish.


async def test_a_client_publishes_where_its_grant_allows(server: Server) -> None:
    listener = await server.connected(channels={"room": None})
    await listener.recv("subscribed")
    client = await server.connected(grant=grant("7", publish=("room",)))
    await client.send({"type": "publish", "channel": "room", "event": "typing", "data": {"by": "7"}})
    message = await listener.recv("message")
    assert (message["event"], message["data"]) == ("typing", {"by": "7"})
    assert await client.refused({"type": "publish", "channel": "other", "data": 1}) == "forbidden"
    assert await client.refused({"type": "publish", "channel": "room", "data": 1, "event": ""}) == "bad_frame"


async def test_what_a_client_publishes_has_its_bound(serve: Callable[..., Server]) -> None:
    client = await serve(max_publication_bytes=100).connected(grant=grant(publish=("*",)))
    assert await client.refused({"type": "publish", "channel": "room", "data": "x" * 101}) == "too_large"


# Own channels, and coming back.


async def test_what_is_sent_to_a_connection_reaches_it_alone(server: Server) -> None:
    client, other = await server.connected(), await server.connected()
    await server.publisher.publish(f"#connection-{client.id}", "for you")
    assert (await client.recv("message"))["data"] == "for you"
    other.take()
    assert not other.unread


async def test_what_is_sent_to_a_user_reaches_all_connections_of_that_user(server: Server) -> None:
    first, second = await server.connected(grant=grant("7")), await server.connected(grant=grant("7"))
    other = await server.connected(grant=grant("77"))
    await server.publisher.publish("#user-7", "for you")
    assert (await first.recv("message"))["data"] == (await second.recv("message"))["data"] == "for you"
    other.take()
    assert not other.unread


async def test_connected_comes_before_anything_sent_to_the_user(server: Server) -> None:
    """The user's channel is busy, and is followed already for another connection."""
    await server.connected(grant=grant("7"))
    stop = asyncio.Event()

    async def publish() -> None:
        while not stop.is_set():
            await server.publisher.publish("#user-7", 1)
            await asyncio.sleep(0)

    busy = asyncio.create_task(publish())
    for _ in range(20):
        client = server.client()
        await client.send({"type": "connect", "grant": grant("7")})
        client.take()
        assert client.received[0]["type"] == "connected"
        client.connection.close()
    stop.set()
    await busy


async def test_what_came_while_away_is_there_on_another_server(serve: Callable[..., Server]) -> None:
    here, there = serve(), serve()
    client = here.client()
    hello = await client.connect(grant=grant("7"))
    await here.publisher.publish(f"#connection-{client.id}", 1)
    last = await client.recv("message")
    client.connection.close()
    await here.publisher.publish(f"#connection-{hello['connection']}", 2)
    await here.publisher.publish("#user-7", 3)
    back = there.client()
    again = await back.connect(resume=hello["resume"], channels={last["channel"]: last["position"]})
    assert (again["connection"], again["user"]) == (hello["connection"], "7")
    frames = [await back.recv() for _ in range(3)]
    assert {(f["type"], f["channel"], f.get("data")) for f in frames} == {
        ("subscribed", last["channel"], None),
        ("message", last["channel"], 2),
        ("message", "#user-7", 3),
    }


async def test_a_message_to_the_user_between_joining_and_connected_is_not_lost_with_the_connection(
    server: Server,
) -> None:
    """The token of a connection that died before it read anything must lead back to all it was sent."""
    client = server.client()
    connecting = asyncio.create_task(client.send({"type": "connect", "grant": grant("7")}))
    published = 0
    while not connecting.done():
        published += 1
        await server.publisher.publish("#user-7", published)
        await asyncio.sleep(0)
    client.take()
    hello, *unread = client.received
    received = [frame["data"] for frame in unread]
    client.connection.close()
    back = await server.connected(resume=hello["resume"])
    await eventually_async(lambda: back.take() >= len(received))
    assert [frame["data"] for frame in back.unread][-max(1, len(received)) :][: len(received)] == received


async def test_a_resumed_connection_is_told_when_what_came_meanwhile_is_gone(serve: Callable[..., Server]) -> None:
    server = serve(private_history_size=2)
    client = server.client()
    hello = await client.connect()
    client.connection.close()
    for number in range(5):
        await server.publisher.publish(f"#connection-{hello['connection']}", number)
    back = await server.connected(resume=hello["resume"])
    assert (await back.recv("subscribed"))["recovered"] is False


async def test_the_older_of_two_connections_with_one_id_is_replaced(serve: Callable[..., Server]) -> None:
    server = serve()
    client = server.client()
    hello = await client.connect()
    back = await server.connected(resume=hello["resume"])
    assert back.id == hello["connection"]
    assert client.closed is not None
    assert client.closed[0] is CloseCode.REPLACED
    client.connection.close()
    await server.publisher.publish(f"#connection-{back.id}", "for the newer")
    assert (await back.recv("message"))["data"] == "for the newer"


@pytest.mark.parametrize("forged", ["nonsense", "grant", "cut"])
async def test_a_forged_resume_token_restores_nothing(server: Server, forged: str) -> None:
    client = server.client()
    hello = await client.connect(grant=grant("7"))
    token = {"nonsense": "x.y.z", "grant": grant("7"), "cut": hello["resume"][:-2]}[forged]
    back = server.client()
    again = await back.connect(resume=token, channels={f"#connection-{client.id}": None})
    assert again["connection"] != hello["connection"]
    assert again["user"] is None
    assert (await back.recv("error"))["code"] == "bad_channel"
    assert client.closed is None


async def test_a_resume_token_that_is_too_old_restores_nothing(serve: Callable[..., Server]) -> None:
    server = serve(resume_ttl=1)
    client = server.client()
    hello = await client.connect()
    began = time.time()
    await eventually_async(lambda: time.time() - began > 1)
    assert (await server.client().connect(resume=hello["resume"]))["connection"] != hello["connection"]


async def test_another_user_does_not_get_the_id_that_was_somebodys(server: Server) -> None:
    client = server.client()
    hello = await client.connect(grant=grant("7"))
    again = await server.client().connect(resume=hello["resume"], grant=grant("8"))
    assert again["user"] == "8"
    assert again["connection"] != hello["connection"]
    assert client.closed is None


async def test_who_logs_in_keeps_the_connection(server: Server) -> None:
    client = server.client()
    hello = await client.connect()
    again = await server.client().connect(resume=hello["resume"], grant=grant("7"))
    assert (again["user"], again["connection"]) == ("7", hello["connection"])


async def test_a_resume_token_outlives_its_grant_only_with_a_fresh_one(server: Server) -> None:
    client = server.client()
    hello = await client.connect(grant=grant("7", expires=300 * MS))
    await client.recv("error")
    back = server.client()
    await back.send({"type": "connect", "resume": hello["resume"]})
    assert back.closed is not None
    assert back.closed[0] is CloseCode.GRANT_EXPIRED
    again = await server.client().connect(resume=hello["resume"], grant=grant("7"))
    assert again["connection"] == hello["connection"]


async def test_a_resumed_connection_has_its_grant(server: Server) -> None:
    client = server.client()
    hello = await client.connect(grant=grant("7", channels=("private-a",)))
    back = await server.connected(resume=hello["resume"], channels={"private-a": None, "private-b": None})
    assert {(f["type"], f["channel"]) for f in [await back.recv(), await back.recv()]} == {
        ("subscribed", "private-a"),
        ("error", "private-b"),
    }


async def test_what_excludes_a_connection_excludes_it_after_it_came_back(server: Server) -> None:
    client = server.client()
    hello = await client.connect(channels={"room": None})
    position = (await client.recv("subscribed"))["position"]
    client.connection.close()
    await server.publisher.publish("room", "own", exclude=hello["connection"])
    await server.publisher.publish("room", "other")
    back = await server.connected(resume=hello["resume"], channels={"room": position})
    await back.recv("subscribed")
    assert (await back.recv("message"))["data"] == "other"


# When the broker does not answer: the hub of these servers is stopped, so nothing is confirmed and nothing read.


async def stop_answering(server: Server) -> None:
    server.task.cancel()
    await asyncio.gather(server.task, return_exceptions=True)
    server.task = asyncio.create_task(server.hub._refuse())  # type: ignore[arg-type]


async def test_a_new_connection_is_asked_to_come_back_when_the_broker_is_silent(serve: Callable[..., Server]) -> None:
    server = serve(broker_timeout=100 * MS)
    await stop_answering(server)
    client = server.client()
    await client.send({"type": "connect", "grant": grant("7")})
    assert client.closed is not None
    assert client.closed[0] is CloseCode.BROKER_UNAVAILABLE
    assert server.hub.connection_count == 0


async def test_a_resumed_connection_is_not_left_deaf_when_the_broker_is_silent(serve: Callable[..., Server]) -> None:
    here, there = serve(), serve(broker_timeout=100 * MS)
    hello = await here.client().connect()
    await stop_answering(there)
    client = await there.connected(resume=hello["resume"])
    await eventually_async(lambda: client.closed)
    assert client.closed is not None
    assert client.closed[0] is CloseCode.BROKER_UNAVAILABLE


async def test_a_subscription_is_refused_as_unavailable_when_the_broker_is_silent(serve: Callable[..., Server]) -> None:
    server = serve(broker_timeout=100 * MS)
    client = await server.connected()
    await stop_answering(server)
    error = await client.subscribe("room")
    assert (error["type"], error["code"], error["channel"]) == ("error", "unavailable", "room")
    await client.send({"type": "subscribe", "channel": "room"})
    assert (await client.recv("error"))["code"] == "unavailable"
    assert client.closed is None


# Deadlines.


async def test_who_answers_pings_stays_and_who_does_not_is_closed(serve: Callable[..., Server]) -> None:
    server = serve(ping_interval=100 * MS, ping_timeout=500 * MS)
    alive, dead = await server.connected(), await server.connected()

    async def answer() -> bool:
        for frame in alive.connection.send_queue.take_nowait():
            assert json.loads(frame) == {"type": "ping"}
            await alive.send({"type": "pong"})
        return dead.closed is not None

    await eventually_async(answer)
    assert dead.closed is not None
    assert dead.closed[0] is CloseCode.NO_PONG
    assert alive.closed is None


async def test_anything_that_comes_counts_as_an_answer(serve: Callable[..., Server]) -> None:
    client = await serve(ping_interval=100 * MS, ping_timeout=500 * MS).connected()
    began = time.monotonic()

    async def send_nonsense() -> bool:
        await client.send("nonsense")
        return time.monotonic() - began > 900 * MS

    await eventually_async(send_nonsense)
    assert client.closed is None


async def test_no_secret_of_a_client_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = await server.connected()
    for frame in (
        {"type": "grant", "grant": "CANARY"},
        {"type": "subscribe", "channel": "a", "grant": "CANARY.CANARY.CANARY"},
        {"type": "connect", "resume": "CANARY"},
    ):
        await client.send(frame)
    await server.client().send({"type": "connect", "resume": "CANARY", "grant": "CANARY"})
    assert "CANARY" not in caplog.text
