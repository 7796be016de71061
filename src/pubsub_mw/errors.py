"""Name everything that can go wrong, and say who may try again.

In:     nothing; this is the first file to read
Out:    exceptions for Python callers; close codes and error codes for clients
Owns:   the one table of codes. `CloseCode` ends a connection, `ErrorCode` refuses one command
Never:  lets a number and its retry policy disagree: the range *is* the policy (`may_reconnect`)

Close codes, by range (the ranges are those of centrifuge, so that its readers are at home):

    1000-2999   the WebSocket protocol's own (RFC 6455 7.4); a client reconnects
    3000-3499   ours; a client reconnects and resumes
    3500-3999   ours; a client does not reconnect: the same attempt would fail the same way
    4000-4499   free for applications; a client reconnects
    4500-4999   free for applications; a client does not reconnect
"""

from enum import IntEnum, StrEnum

__all__ = [
    "AppNotFound",
    "BrokerUnavailable",
    "ChannelError",
    "CloseCode",
    "ConnectFailed",
    "ConnectionClosed",
    "ErrorCode",
    "FrameError",
    "GrantError",
    "GrantExpired",
    "PubSubError",
    "PublicationTooLarge",
    "PublishError",
    "RequestFailed",
    "RequestTimeout",
    "SettingsError",
    "SubscriptionRefused",
    "may_reconnect",
]


class CloseCode(IntEnum):
    """Why the server ended a connection. Sent in `disconnect` and as the WebSocket close code."""

    MESSAGE_TOO_BIG = 1009  # RFC 6455: a frame over `max_frame_bytes`
    SHUTDOWN = 3001  # the server drains; another one, or the next one, takes over
    SLOW = 3002  # the client reads slower than `send_queue_bytes` allows
    NO_PONG = 3003  # nothing came from the client within `ping_interval` + `ping_timeout`
    CONNECT_TIMEOUT = 3004  # no `connect` frame within `connect_timeout`
    BROKER_UNAVAILABLE = 3005  # the broker could not be asked while connecting
    SERVER_ERROR = 3006  # a fault of ours; it is in the server's log
    GRANT_INVALID = 3500  # the grant's signature, shape or algorithm is wrong
    GRANT_EXPIRED = 3501  # the grant is past its `exp`; come back with a fresh one
    REPLACED = 3502  # the same connection id was resumed on another socket of this server process
    DISCONNECTED = 3503  # the application ended it


class ErrorCode(StrEnum):
    """Why one command was refused. Sent in `error`; everything else on the connection goes on."""

    BAD_FRAME = "bad_frame"  # not one JSON object, or a field is missing or of the wrong type
    UNKNOWN_TYPE = "unknown_type"  # `type` names no command
    CONNECT_FIRST = "connect_first"  # a command came before `connect`
    ALREADY_CONNECTED = "already_connected"  # `connect` came twice
    BAD_CHANNEL = "bad_channel"  # not a channel name, or a reserved one
    BAD_POSITION = "bad_position"  # not a position that a server made
    ALREADY_SUBSCRIBED = "already_subscribed"  # the connection listens to this channel
    NOT_SUBSCRIBED = "not_subscribed"  # the connection does not listen to this channel
    TOO_MANY_CHANNELS = "too_many_channels"  # over `max_channels`
    FORBIDDEN = "forbidden"  # no grant allows it; said alike for what is absent and what is denied
    GRANT_INVALID = "grant_invalid"  # the grant's signature, shape or algorithm is wrong
    GRANT_EXPIRED = "grant_expired"  # the grant is past its `exp`; send a fresh one in `grant`
    UNAVAILABLE = "unavailable"  # the broker did not answer; try again
    UNSUPPORTED = "unsupported"  # this server does not do that
    BUSY = "busy"  # the request queue, this connection's backlog, or a presence channel is full; try again later
    CANCELLED = "cancelled"  # the request was cancelled before it was begun
    REVOKED = "revoked"  # in `unsubscribed`: the application ended the subscription
    EXPIRED = "expired"  # the request was answered, and the answer is no longer kept
    TOO_LARGE = "too_large"  # over a limit of bytes


def may_reconnect(code: int) -> bool:
    """Whether a client may reconnect after the connection ended with close code `code`."""
    return not (3500 <= code <= 3999 or 4500 <= code <= 4999)


class PubSubError(Exception):
    """The root of every exception that pubsub-mw raises on purpose."""


class SettingsError(PubSubError, ValueError):
    """A setting is unknown, of the wrong type or out of its bounds. Raised when settings are built."""


class ChannelError(PubSubError, ValueError):
    """A text is not the name of a channel, or names one that may not be used so.

    Attributes:
        channel: the text
    """

    def __init__(self, channel: object, reason: str) -> None:
        super().__init__(f"{channel!r:.220} {reason}")
        self.channel = channel


class PublicationTooLarge(PubSubError, ValueError):
    """The encoded publication is over `max_publication_bytes`.

    Attributes:
        size_bytes: of the encoded publication
        limit_bytes: the setting
    """

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the publication is {size_bytes} bytes of JSON, over the limit of {limit_bytes}; "
            "publish a reference to it instead, or raise max_publication_bytes"
        )
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class BrokerUnavailable(PubSubError):
    """The broker did not answer, or refused. Whether it did what was asked is not known."""


class PublishError(PubSubError):
    """The broker did not confirm a publication. It may have been stored all the same.

    Publishing again with the same `idempotency_key` is safe; without one it may show twice.

    Attributes:
        channels: the channels of what was to be published, in order
    """

    def __init__(self, channels: tuple[str, ...], reason: str) -> None:
        super().__init__(f"not published to {', '.join(channels)}: {reason}")
        self.channels = channels


class GrantError(PubSubError):
    """A grant or resume token is not valid: signature, algorithm or shape is wrong.

    Attributes:
        code: the `ErrorCode` to answer with
        close_code: the `CloseCode` of a connection that began with it
    """

    code = ErrorCode.GRANT_INVALID
    close_code = CloseCode.GRANT_INVALID


class GrantExpired(GrantError):
    """A grant or resume token was valid once and is past its `exp`."""

    code = ErrorCode.GRANT_EXPIRED
    close_code = CloseCode.GRANT_EXPIRED


class FrameError(PubSubError):
    """A frame from the other side breaks the protocol.

    Attributes:
        code: the `ErrorCode` to answer with
        id: the command's own id where it carried one
        channel: the channel that the command named, where it named one
    """

    def __init__(self, code: ErrorCode, message: str, *, id: str | None = None, channel: str | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.code = code
        self.id = id
        self.channel = channel


class SubscriptionRefused(PubSubError):
    """The server refused or ended a subscription of the Python client.

    Attributes:
        channel: the channel
        code: the `ErrorCode`, or whatever text a newer server sent
    """

    def __init__(self, channel: str, code: str, message: str) -> None:
        super().__init__(f"{channel}: {message} ({code})")
        self.channel = channel
        self.code = code


class RequestFailed(PubSubError):
    """A request of the Python client was refused, or its answer is lost.

    Attributes:
        code: the server's `ErrorCode` (`busy`, `forbidden`, `expired`, ...); or `not_connected`: it was not sent;
            `connection_lost`: it was sent, and may have run, but its answer is lost; `broken_off`: the app failed in
            the middle of its answer; `status`: the app answered 400 or more, of `Response.raise_for_status`; `timeout`
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


class RequestTimeout(RequestFailed, TimeoutError):
    """The answer to a request of the Python client did not begin in time. The request may have run."""

    def __init__(self, message: str) -> None:
        super().__init__("timeout", message)


class AppNotFound(PubSubError):
    """A name does not lead to a web application."""


class ConnectFailed(PubSubError):
    """No realtime server answered the Python client in time."""


class ConnectionClosed(PubSubError):
    """The Python client's connection ended for good: `code` says that reconnecting is no use.

    Attributes:
        code: the close code
        reason: what the server said
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"connection closed with {code}: {reason}")
        self.code = code
        self.reason = reason
