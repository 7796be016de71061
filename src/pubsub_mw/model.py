"""Define the values that travel between the rooms.

In:     nothing
Out:    immutable values; each says who makes it and who reads it
Owns:   what a channel name and a position look like
Never:  does I/O, reads a clock, or knows JSON
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NewType

from pubsub_mw.errors import ChannelError

__all__ = [
    "CONNECTION_PREFIX",
    "CONTROL_CHANNEL",
    "FROM_HANDSHAKE",
    "LIFECYCLE_CHANNEL",
    "START_EPOCH",
    "START_TAG",
    "USER_PREFIX",
    "Channel",
    "ConnectionId",
    "Draft",
    "Grant",
    "Handshake",
    "HistoryPage",
    "Position",
    "Publication",
    "Request",
    "RequestConnection",
    "channel_of_connection",
    "channel_of_user",
    "check_channel",
    "check_subscribable",
    "compile_patterns",
    "is_presence",
    "is_protected",
]

Channel = NewType("Channel", str)
ConnectionId = NewType("ConnectionId", str)

CONNECTION_PREFIX = "#connection-"
USER_PREFIX = "#user-"
CONTROL_CHANNEL = Channel("#control")
"""What the application tells all realtime servers; neither clients nor `publish` can name it."""
LIFECYCLE_CHANNEL = Channel("#lifecycle")
"""Where the application's answers to lifecycle reports go; nobody listens. Such a report is never too late."""

_NAME = re.compile(r"[A-Za-z0-9_.,:;=@/-]{1,200}\Z")
_POSITION = re.compile(r"([A-Za-z0-9_-]{1,32})\.(0|[1-9][0-9]{0,15})\.([A-Za-z0-9_-]{1,32})\Z")

START_TAG = "0"
"""The tag of offset 0: nothing has been published, so there is nothing that could differ."""

START_EPOCH = ""
"""The epoch of `Position.start()`: whichever the channel gets."""


def check_channel(name: str) -> Channel:
    """Return `name` if the application may publish to it.

    Raises:
        ChannelError: not 1 to 200 of `A-Za-z0-9_.,:;=@/-`, or a `#` name other than
            `#connection-<id>` and `#user-<id>`.
    """
    if not isinstance(name, str):
        raise ChannelError(name, "is not the name of a channel; a name is a string")
    if name.startswith("#"):
        kind, _, whose = name[1:].partition("-")
        if kind not in ("connection", "user"):
            raise ChannelError(name, "is reserved; of the # names only #connection-<id> and #user-<id> may be used")
        if len(name) > 200 or not _NAME.match(whose):
            raise ChannelError(name, f"names no {kind}: its id is 1 to {198 - len(kind)} of A-Z a-z 0-9 _.,:;=@/-")
    elif not _NAME.match(name):
        raise ChannelError(name, "is not the name of a channel; use 1 to 200 of A-Z a-z 0-9 _ . , : ; = @ / -")
    return Channel(name)


def check_subscribable(name: str) -> Channel:
    """Return `name` if a client may ask for it by name: any channel but the reserved `#` ones.

    Raises:
        ChannelError: see above.
    """
    channel = check_channel(name)
    if channel.startswith("#"):
        raise ChannelError(name, "is reserved; the server subscribes a connection to its own # channels by itself")
    return channel


def is_protected(channel: str) -> bool:
    """Whether listening to `channel` needs a grant that names it."""
    return channel.startswith(("private-", "presence-"))


def is_presence(channel: str) -> bool:
    """Whether `channel` shows who is there."""
    return channel.startswith("presence-")


def channel_of_connection(connection: ConnectionId) -> Channel:
    """Return the channel that only `connection` listens to."""
    return Channel(CONNECTION_PREFIX + connection)


def channel_of_user(user: str) -> Channel:
    """Return the channel that all connections of `user` listen to.

    Raises:
        ChannelError: `user` holds a character that a channel name cannot.
    """
    return check_channel(USER_PREFIX + user)


def compile_patterns(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a test for whether a text matches one of `patterns` as a whole; `*` stands for any text, `/` included."""
    if not patterns:
        return lambda _text: False
    expression = re.compile(f"(?:{'|'.join(map(_expression, patterns))})\\Z", re.DOTALL)
    return lambda text: expression.match(text) is not None


def _expression(pattern: str) -> str:
    first, *parts = map(re.escape, pattern.split("*"))
    if not parts:
        return first
    # Atomic groups: each part is taken where it first fits and never tried further on, which would find nothing more
    # and take time without bound. The last one has to end the text.
    return first + "".join(f"(?>.*?{part})" for part in parts[:-1]) + ".*" + parts[-1]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one channel's history. Its text, `<epoch>.<offset>.<tag>`, is opaque to clients.

    Attributes:
        epoch: names one unbroken history; changes when the broker lost it
        offset: counts the channel's publications from 1; 0 = before the first
        tag: random per publication, because after a failover the same epoch and offset
            can name another publication; `START_TAG` at offset 0
    """

    epoch: str
    offset: int
    tag: str

    def __str__(self) -> str:
        return f"{self.epoch}.{self.offset}.{self.tag}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Read a position from its text.

        Raises:
            ValueError: the text is no position.
        """
        match = _POSITION.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r:.80} is not a position; give back one that a server sent, unchanged")
        return cls(match[1], int(match[2]), match[3])

    @classmethod
    def start(cls) -> "Position":
        """Return the place before a channel's first publication, in whichever epoch it will have."""
        return _START

    @property
    def is_start(self) -> bool:
        return self.epoch == START_EPOCH


_START = Position(START_EPOCH, 0, START_TAG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A publication on its way to the broker, which gives it epoch and offset. Made by the publishers.

    Attributes:
        channel: where to
        tag: random; also how a retry finds out that the first try had arrived
        head: bytes of the finished `message` frame up to its position
        exclude: the connection that shall not get it, or ""
        idempotency_key: a publication with the same key within `idempotency_ttl` seconds, of a part of an answer
            within `claim_ttl`, is not published again; "" = none
        history_size: how many publications the channel keeps from now on (>= 1), and an eighth more at most
        is_kept: whether this one is among them; its offset is used up either way
    """

    channel: Channel
    tag: str
    head: bytes
    exclude: str
    idempotency_key: str
    history_size: int
    is_kept: bool
    reply: str = ""
    """`>` + a request's id where its answer begins, `-` where it goes on, `.` where it is complete; else ""."""
    part: int = 0
    """Counts those that share an idempotency key, from 1: one with this number or a higher one was published before, or
    it is published now. 0 = the key is of this one alone."""
    has_own_history: bool = False
    """Whether `history` was given with it, so that the channel may keep less than it did."""


@dataclass(frozen=True, slots=True)
class Publication:
    """One item published to a channel. Made by the broker, read by the realtime server.

    Attributes:
        position: its place
        previous: the place before it, which it follows
        exclude: the connection that shall not get it, or ""
        frame: the finished frame as UTF-8 JSON; b"" in history when it was not kept
        reply, has_own_history: as in `Draft`
    """

    position: Position
    previous: Position
    exclude: str
    frame: bytes
    reply: str = ""
    has_own_history: bool = False

    def follows(self, position: Position) -> bool:
        """Whether this is exactly the next publication after `position`."""
        return self.previous == position or (position.is_start and self.previous.offset == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPage:
    """What one atomic read of a channel's history found.

    Attributes:
        top: the channel's newest position
        publications: those kept after the offset that was asked for, in offset order
        is_complete: whether they reach up to `top`; if not, the page's bound in bytes was met first
    """

    top: Position
    publications: tuple[Publication, ...]
    is_complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a verified grant allows.

    Attributes:
        user: who it is, or None
        channels: patterns of channels that may be listened to
        publish: patterns of channels that may be published to
        info: JSON value that presence shows beside the user
        issued_at: seconds since 1970
        expires_at: seconds since 1970
    """

    user: str | None
    channels: tuple[str, ...]
    publish: tuple[str, ...]
    info: object
    issued_at: float
    expires_at: float


FROM_HANDSHAKE = frozenset({"accept-language", "cookie", "host", "origin", "referer", "user-agent"})
"""Headers of a handshake that the application sees with each request; no others are put into the queue."""
_FROM_HANDSHAKE = frozenset(name.encode() for name in FROM_HANDSHAKE)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Handshake:
    """The HTTP request that opened a connection. Holds cookies: never logged, never in an error text.

    Attributes:
        headers: lower-case names, in the order they came
        scheme: `http` or `https`
        address: the remote address as the server saw it, or ""
    """

    headers: tuple[tuple[str, str], ...]
    scheme: str
    address: str

    def all(self, name: str) -> list[str]:
        """Return every value of header `name` (lower case)."""
        return [value for key, value in self.headers if key == name]

    def first(self, name: str) -> str | None:
        """Return the first value of header `name` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)

    @classmethod
    def from_scope(cls, scope: Mapping[str, object], *, is_whole: bool = True) -> "Handshake":
        """Read it from an ASGI scope; with `FROM_HANDSHAKE` alone, unless it is to be whole.

        Source: ASGI spec, "HTTP & WebSocket ASGI Message Format".
        """
        headers = scope["headers"]
        client = scope.get("client")
        assert isinstance(headers, (list, tuple))
        return cls(
            headers=tuple(
                [
                    (name.decode("latin-1").lower(), value.decode("latin-1"))
                    for name, value in headers
                    if is_whole or name in _FROM_HANDSHAKE
                ]
            ),
            scheme="https" if scope.get("scheme") in ("https", "wss") else "http",
            address=str(client[0]) if isinstance(client, (list, tuple)) else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConnection:
    """`environ["pubsub.connection"]`: where a request came from when it came through a connection.

    Attributes:
        id: of the connection; give it to `exclude` to leave the sender out
        user: who the connection's grant says it is; over a WebSocket else the application's `authorize`; or None
        transport: `websocket`, `sse` or `longpoll`
        message_id: the id that the client gave the request; the same when it is sent again
        delivery_count: 1, or more when a worker died while it ran this request
    """

    id: ConnectionId
    user: str | None
    transport: str
    message_id: str
    delivery_count: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Request:
    """What a client asks the application, on its way through the queue. Holds cookies: never logged.

    Attributes:
        connection: who asks
        user: who the connection's grant says it is; over a WebSocket else the application's `authorize`; or None
        transport: `websocket`, `sse` or `longpoll`
        id: chosen by the client, unique on its connection
        method: in capitals
        path: decoded, without the query string
        query: as sent, without "?"
        headers: those that a client may choose, lower-case names
        body: bytes
        handshake: of the connection
        reply_to: the channel that the answer is published to
    """

    connection: ConnectionId
    user: str | None
    transport: str
    id: str
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    handshake: Handshake
    reply_to: Channel
