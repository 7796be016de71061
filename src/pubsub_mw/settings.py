"""Hold every knob: its unit, its default, its bounds.

In:     keyword arguments, else `PUBSUB_*` of the environment, else the default
Out:    one immutable `Settings`, checked as a whole
Owns:   the names; a setting `x` is the argument `x` and the variable `PUBSUB_X`
Never:  lets a wrong value wait until traffic arrives; logs `secret` or the password in `url`

In the environment lists are space-separated. All quantities of time are seconds.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pubsub_mw.errors import SettingsError

__all__ = ["Settings"]


def _number(default: float, minimum: float, maximum: float) -> Any:
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting. Build it with `Settings.build`, which also reads the environment.

    Attributes:
        url: the broker: `memory://`, `redis://`, `rediss://`, `unix://`, or
            `redis+sentinel://host:26379,host:26379/master`
        secret: signs grants and resume tokens (any text; 32 bytes or more); None = made once and
            kept in the broker, with a warning
        grant_public_key: PEM text of an RSA, EC or Ed25519 key that verifies grants instead of
            `secret`; None = `secret` does
        prefix: of every Redis key
        origins: who may open a connection from a browser, as `scheme://host[:port]`; `*` = anybody;
            empty = the host that the request was sent to
        requests: patterns of paths that clients may request over their connection, such as `/rooms/*`;
            `serve` and `with_realtime`, which expose the app anyway, take `/*`
        request_headers: names that clients may send with a request besides the usual ones
        in_flight: requests of one connection that run at once
        request_backlog: further requests of a connection that wait for that; beyond it they are refused
            as `busy`
        request_timeout: from when a request is stored until its answer begins, the wait for those of its connection
            before it included; then it is answered 504
        request_grace: beyond that, after which the realtime server itself answers 504, for want of a worker
        queue_size: requests of all connections that may wait for a worker; beyond it they are refused as
            `busy`
        lease: after which a request is taken from a worker that gives no sign of life
        max_deliveries: of one request to workers; after that it is answered 500 and set aside
        authorize: a path of the app, such as `/pubsub/authorize`, that decides on subscriptions which no
            grant allows; it is asked with `?channel=...`; 2xx allows; "" = nobody decides
        lifecycle: a path of the app, such as `/pubsub/lifecycle`, that is told by POST of connections that
            begin and end; "" = none
        lifecycle_grace: after which a connection that broke is reported as ended, if it was not resumed
        presence_ttl: after which a server that gives no sign of life is taken for dead, and what it held is
            reported gone
        presence_grace: after which a user whose last connection to a presence channel broke is reported gone, if
            none was resumed
        presence_size: users on a presence channel; beyond it a subscription is refused as `busy`
        max_info_bytes: of the JSON that presence shows beside a user; a subscription with more is refused as
            `too_large`
        public: patterns of unprefixed channels that all may listen to
        history_size: publications kept per channel
        history_ttl: how long they are kept after the channel's last publication
        private_history_size: as `history_size`, for `#connection-` channels
        position_ttl: how long a channel's position outlives its last publication; a client that
            comes back later than this is told that it missed something even if it did not
        publish_timeout: after which a publisher raises instead of waiting for the broker
        idempotency_ttl: how long an idempotency key is remembered
        max_frame_bytes: of what a client may send in one frame
        max_publication_bytes: of what the application may publish, as JSON
        send_queue_bytes: live frames that may wait for one connection; beyond it the connection is
            closed with SLOW, resumably. Recovery waits for the client and never closes it
        recovery_page_bytes: of history read at once for a client that catches up
        recovery_buffer: live publications of a channel remembered while its history is read; beyond
            it the history is read once more
        fan_out_slice: deliveries made before the other connections of the process get their turn; 16 KiB count as
            one more
        fan_out_bytes: of publications that wait for the fan-out of their channel's last ones; beyond it Redis
            keeps what is new until they are out
        max_channels: per connection
        max_connections_per_address: per server process; 0 = off
        max_send_bytes: of one POST to `send`
        max_send_frames: in one POST to `send`
        max_resume_channels_bytes: of the channels and positions, as JSON, that `connect` by `send` puts into
            the resume token, which travels in a header
        ticket_ttl: for which a ticket can be shown instead of a resume token
        max_publish_bytes: of one POST to `publish`
        max_publish_items: publications in one POST to `publish`
        max_poll_wait: for which a poll may ask to be kept when there is nothing to tell
        max_poll_bytes: of frames in the answer to one poll, after at least one; the rest is for the next
        channel_linger: for which a channel is followed after its last listener left: polls leave after each answer
        connect_timeout: for the first frame, `connect`, or the body of a POST, to come
        ping_interval: between the server's pings
        ping_timeout: for anything to come from the client after a ping, else NO_PONG
        grant_grace: between the announcement that a grant expired and the close
        resume_ttl: how long a resume token restores its connection id
        revocation_ttl: how long `disconnect` and `unsubscribe` bar grants made before; a grant that is good for
            longer can be used again after that
        drain: over which a stopping server spreads the closing of its connections
        broker_timeout: for the broker to answer the realtime server
        probe_interval: between the publications by which a realtime server proves to itself that
            Redis delivers; and between questions to the sentinels who is the master
        probe_timeout: without one coming back, after which the link is given up and made anew
        check_interval: between comparisons of each channel's position with the broker's
        resync_batch: channels whose history is read in one round trip
        resync_concurrency: such round trips under way at once
    """

    url: str = "memory://"
    secret: str | None = None
    grant_public_key: str | None = None
    prefix: str = "pubsub"
    origins: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    request_headers: tuple[str, ...] = ()
    in_flight: int = _number(1, 1, 1_000)
    request_backlog: int = _number(64, 0, 100_000)
    request_timeout: float = _number(30.0, 0.01, 86_400)
    request_grace: float = _number(1.0, 0.0, 3_600)
    queue_size: int = _number(10_000, 1, 10_000_000)
    lease: float = _number(10.0, 0.05, 86_400)
    max_deliveries: int = _number(5, 1, 1_000)
    presence_ttl: float = _number(15.0, 0.1, 86_400)
    presence_grace: float = _number(3.0, 0.0, 3_600)
    presence_size: int = _number(1_000, 1, 100_000)
    max_info_bytes: int = _number(1_024, 4, 1 << 20)
    authorize: str = ""
    lifecycle: str = ""
    lifecycle_grace: float = _number(3.0, 0.0, 3_600)
    public: tuple[str, ...] = ("*",)
    history_size: int = _number(100, 1, 1_000_000)
    history_ttl: float = _number(300.0, 0.001, 31_536_000)
    private_history_size: int = _number(1_000, 1, 1_000_000)
    position_ttl: float = _number(86_400.0, 0.001, 31_536_000)
    publish_timeout: float = _number(2.0, 0.001, 3_600)
    idempotency_ttl: float = _number(300.0, 0.001, 31_536_000)
    max_frame_bytes: int = _number(65_536, 256, 1 << 30)
    max_publication_bytes: int = _number(1 << 20, 64, 1 << 29)
    send_queue_bytes: int = _number(1 << 20, 1_024, 1 << 34)
    recovery_page_bytes: int = _number(1 << 18, 1_024, 1 << 30)
    recovery_buffer: int = _number(4_096, 1, 1_000_000)
    fan_out_slice: int = _number(1_000, 1, 1_000_000)
    fan_out_bytes: int = _number(4 << 20, 1_024, 1 << 34)
    max_channels: int = _number(128, 1, 100_000)
    max_connections_per_address: int = _number(0, 0, 1_000_000)
    max_send_bytes: int = _number(65_536, 256, 1 << 30)
    max_send_frames: int = _number(32, 1, 10_000)
    max_resume_channels_bytes: int = _number(4_096, 2, 1 << 20)
    max_publish_bytes: int = _number(4 << 20, 256, 1 << 30)
    max_publish_items: int = _number(1_000, 1, 1_000_000)
    max_poll_wait: float = _number(50.0, 0.0, 3_600)
    max_poll_bytes: int = _number(1 << 18, 1, 1 << 30)
    channel_linger: float = _number(5.0, 0.0, 3_600)
    ticket_ttl: float = _number(30.0, 1, 3_600)
    connect_timeout: float = _number(10.0, 0.001, 3_600)
    ping_interval: float = _number(25.0, 0.01, 86_400)
    ping_timeout: float = _number(8.0, 0.01, 86_400)
    grant_grace: float = _number(10.0, 0.0, 3_600)
    resume_ttl: float = _number(604_800.0, 1, 31_536_000)
    revocation_ttl: float = _number(2_678_400.0, 1, 31_536_000)
    drain: float = _number(25.0, 0.0, 86_400)
    broker_timeout: float = _number(5.0, 0.01, 3_600)
    probe_interval: float = _number(1.0, 0.01, 3_600)
    probe_timeout: float = _number(3.0, 0.01, 3_600)
    check_interval: float = _number(25.0, 0.01, 86_400)
    resync_batch: int = _number(64, 1, 10_000)
    resync_concurrency: int = _number(4, 1, 1_000)

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            if knob.metadata:
                _check_number(knob, getattr(self, knob.name))
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", self.prefix):
            raise SettingsError(f"prefix {self.prefix!r} must be 1 to 64 of A-Z a-z 0-9 _ . : -")
        if self.secret is not None and not self.secret:
            raise SettingsError("secret is empty; leave it out to have one made, or set a long random text")
        if self.secret is not None and "-----BEGIN" in self.secret:
            raise SettingsError(
                "secret is a key in PEM; a public key goes into grant_public_key, a secret is random text"
            )
        if self.position_ttl < self.history_ttl:
            raise SettingsError("position_ttl must be at least history_ttl, or kept history could not be recovered")
        for name in ("authorize", "lifecycle"):
            path = getattr(self, name)
            if path and not path.startswith("/"):
                raise SettingsError(f"{name} {path!r} must be a path that begins with /")
        for pattern in self.requests:
            if not pattern.startswith(("/", "*")):
                raise SettingsError(f"requests {pattern!r} matches no path; a pattern of paths begins with / or *")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#]+", origin):
                raise SettingsError(f"origin {origin!r} must be scheme://host or scheme://host:port, or *")

    @classmethod
    def build(cls, url: str | None = None, *, environ: Mapping[str, str] | None = None, **overrides: Any) -> "Settings":
        """Build settings from arguments; what is not given comes from `environ` (default: `os.environ`).

        Raises:
            SettingsError: a name is unknown, or a value is of the wrong type or out of its bounds.
        """
        if url is not None:
            overrides["url"] = url
        variables = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        known = {knob.name: knob for knob in dataclasses.fields(cls)}
        for name in overrides:
            if name not in known:
                raise SettingsError(f"there is no setting {name!r}; there are: {', '.join(sorted(known))}")
        for name, knob in known.items():
            text = variables.get("PUBSUB_" + name.upper())
            if name in overrides:
                values[name] = _convert(knob, overrides[name], name)
            elif text or (text is not None and knob.type == tuple[str, ...]):
                # An empty list says something (PUBSUB_PUBLIC= : no channel is public); any other empty value does not.
                values[name] = _convert(knob, text, "PUBSUB_" + name.upper())
        return cls(**values)

    @property
    def claim_ttl(self) -> float:
        """How long a request and that it was answered are known: longer than until a 504 for want of a worker."""
        return self.idempotency_ttl + self.request_timeout + self.request_grace

    def overrides(self) -> dict[str, Any]:
        """Return every setting as an argument, to build the same settings elsewhere."""
        return {knob.name: getattr(self, knob.name) for knob in dataclasses.fields(self)}

    @property
    def safe_url(self) -> str:
        """`url` without its password, for logs and error texts; also where the url is malformed."""
        hidden = re.sub(r"(://[^:/?#@]*:).*@", r"\1***@", self.url, flags=re.DOTALL)
        return re.sub(r"([?&][^=&#]*password=)[^&#]*", r"\1***", hidden)


def _convert(knob: "dataclasses.Field[Any]", value: object, name: str) -> object:
    if knob.type == tuple[str, ...]:
        if isinstance(value, str):
            return tuple(value.split())
        if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise SettingsError(f"{name} must be a list of texts, or one text with spaces between them")
    if knob.type in (int, float):
        if isinstance(value, str):
            try:
                return knob.type(value.replace("_", ""))
            except ValueError:
                raise SettingsError(f"{name}={value!r} is not a number") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SettingsError(f"{name} must be a number, not {type(value).__name__}")
        if knob.type is int and isinstance(value, float) and not value.is_integer():
            raise SettingsError(f"{name}={value!r} must be a whole number")
        try:
            return knob.type(value)
        except OverflowError:
            raise SettingsError(f"{name} is too large a number") from None
    if value is None and knob.default is None:
        return None
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be a text, not {type(value).__name__}")
    return value


def _check_number(knob: "dataclasses.Field[Any]", value: float) -> None:
    low, high = knob.metadata["minimum"], knob.metadata["maximum"]
    if not low <= value <= high:
        raise SettingsError(f"{knob.name}={value} is out of bounds; it may be {low:g} to {high:g}")
