"""Publish, from anywhere.

In:     a channel and any data that JSON can say
Out:    a position, when the broker has it; an exception otherwise
Owns:   the two publishers; grants are made here too, because whoever publishes says who may listen
Never:  touches a web framework; keeps state of a request

`Publisher` is thread-safe and fork-safe: make one per process, or one for many that are forked later. `AsyncPublisher`
is the same for code on an event loop; it may be used from several loops, one after another or at once.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from pubsub_mw.broker.engines import current_stand_in, load_engine, open_async_broker, open_broker
from pubsub_mw.broker.interface import AsyncBroker, Broker
from pubsub_mw.broker.memory import AsyncMemoryBroker
from pubsub_mw.broker.presence import PresenceCall
from pubsub_mw.drafts import build_answer_draft, build_draft, build_drafts, encode_data
from pubsub_mw.errors import BrokerUnavailable, ChannelError, PublishError
from pubsub_mw.grants import sign_grant
from pubsub_mw.model import CONTROL_CHANNEL, Channel, Draft, Position, check_channel, check_subscribable, is_presence
from pubsub_mw.protocol import head_of
from pubsub_mw.settings import Settings

__all__ = ["AsyncPublisher", "Publisher", "warn_of_secret"]

log = logging.getLogger("pubsub_mw")

_MAX_EXPIRES = 100 * 366 * 86_400


class Publisher:
    """Publish from synchronous code: a view, Celery, cron, a shell.

    Args:
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        self.settings = Settings.build(url, **settings)
        self._engine = open_broker(self.settings)
        self._secret = self.settings.secret

    @property
    def _broker(self) -> Broker:
        return current_stand_in() or self._engine

    def publish(
        self,
        channel: str,
        data: object,
        *,
        event: str = "message",
        exclude: str | None = None,
        idempotency_key: str | None = None,
        history: bool | int | None = None,
    ) -> Position:
        """Publish `data` to `channel` and return its position; `str()` of that is its text on the wire.

        Args:
            channel: 1 to 200 of `A-Za-z0-9_.,:;=@/-`, or `#connection-<id>`, `#user-<id>`
            data: what JSON can say, also datetime, date, time, UUID (as texts), Decimal (text),
                timedelta (seconds), dataclasses, enums, sets, paths and lazy translation texts
            event: what kind of publication it is; 1 to 200 characters, no control characters
            exclude: a connection id that shall not get it
            idempotency_key: publishing again with it within `idempotency_ttl` returns the first
                position and delivers nothing
            history: None = keep `history_size` publications; a number = keep that many; False = do
                not keep this one, so who is away misses it (and is told that something was missed)

        Raises:
            ValueError, TypeError: an argument is wrong; nothing was sent.
            PublishError: the broker did not confirm it within `publish_timeout`.
        """
        draft = build_draft(
            self.settings,
            channel,
            data,
            event=event,
            exclude=exclude,
            idempotency_key=idempotency_key,
            history=history,
        )
        return self.publish_drafts([draft])[0]

    def many(self, items: Iterable[tuple[str, object] | Mapping[str, Any]]) -> list[Position]:
        """Publish several in one round trip, in order.

        Args:
            items: each `(channel, data)` or a mapping of `publish`'s arguments

        Raises:
            ValueError, TypeError: an item is wrong; none was sent.
            PublishError: the broker did not confirm all of them.
        """
        return self.publish_drafts(build_drafts(self.settings, items))

    def publish_drafts(self, drafts: Sequence[Draft]) -> list[Position]:
        """Publish what `build_draft` made. Usually not what you want: use `publish` or `many`."""
        if not drafts:
            return []
        try:
            return self._broker.publish(drafts)
        except BrokerUnavailable as error:
            raise _publish_error(drafts, error) from error

    def position(self, channel: str) -> Position:
        """Return the channel's newest position: render it into a page, subscribe from it, and nothing is missed.

        Take it before you read the state that the page shows.

        Raises:
            ChannelError: not a channel name.
            BrokerUnavailable: no answer within `publish_timeout`.
        """
        return self._broker.position(check_channel(channel))

    def grant(
        self,
        user: str | None = None,
        channels: Iterable[str] = (),
        publish: Iterable[str] = (),
        info: object = None,
        expires: float = 3600,
    ) -> str:
        """Return a signed grant for a client to show.

        Args:
            user: who it is; its characters are those of channel names
            channels: patterns of channels it may listen to; `*` stands for any text
            publish: patterns of channels it may publish to
            info: any JSON; presence shows it beside the user
            expires: seconds until it is no longer good

        Raises:
            ValueError, TypeError: an argument is wrong.
            BrokerUnavailable: no `secret` is set and the one in the broker could not be read.
        """
        claims = _grant_claims(user, channels, publish, info, expires)
        if self._secret is None:
            self._secret = self._broker.secret()
            warn_of_secret(self.settings)
        return sign_grant(self._secret, now=time.time(), **claims)

    def presence(self, channel: str) -> list[dict[str, Any]]:
        """Return who is on a presence channel: for each user, once, `user` (text) and `info` (any JSON).

        Raises:
            ChannelError: not the name of a presence channel.
            BrokerUnavailable: no answer within `publish_timeout`.
        """
        return _members(self._broker.presence(_check_presence(channel)))

    def disconnect(self, *, user: str | None = None, connection: str | None = None) -> None:
        """End every live connection of a user, or one connection, and bar the grants and resume tokens made until now.

        Live ones end within 2 s, with close code DISCONNECTED; a grant made from now on is good.

        Raises:
            TypeError: not exactly one of `user` and `connection` is given.
            PublishError: the broker did not confirm it.
        """
        self._revoke("*", user, connection)

    def unsubscribe(self, channel: str, *, user: str | None = None, connection: str | None = None) -> None:
        """End a user's, or one connection's, subscriptions to `channel`, and bar the grants made until now from it.

        A channel that all may listen to can be subscribed to again.

        Raises:
            ChannelError: not a channel name.
            TypeError: not exactly one of `user` and `connection` is given.
            PublishError: the broker did not confirm it.
        """
        self._revoke(check_subscribable(channel), user, connection)

    def _revoke(self, subject: str, user: str | None, connection: str | None) -> None:
        revocation = _revocation(self.settings, subject, user, connection)
        try:
            self._broker.revoke(*revocation)
        except BrokerUnavailable as error:
            raise _publish_error(revocation[-1:], error) from error

    def close(self) -> None:
        """Give idle connections back; the publisher stays usable."""
        self._broker.close()


class AsyncPublisher:
    """Publish from code on an event loop. See `Publisher` for arguments and errors."""

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        self.settings = Settings.build(url, **settings)
        self._secret = self.settings.secret
        load_engine(self.settings)
        self._brokers: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncBroker] = WeakKeyDictionary()

    def _broker(self) -> AsyncBroker:
        substitute = current_stand_in()
        if substitute is not None:
            return AsyncMemoryBroker(substitute)
        # Connections belong to the loop they were made on: `asyncio.run` twice in one process is two loops.
        loop = asyncio.get_running_loop()
        if loop not in self._brokers:
            self._brokers[loop] = open_async_broker(self.settings)
        return self._brokers[loop]

    async def publish(
        self,
        channel: str,
        data: object,
        *,
        event: str = "message",
        exclude: str | None = None,
        idempotency_key: str | None = None,
        history: bool | int | None = None,
    ) -> Position:
        """As `Publisher.publish`."""
        draft = build_draft(
            self.settings,
            channel,
            data,
            event=event,
            exclude=exclude,
            idempotency_key=idempotency_key,
            history=history,
        )
        return (await self.publish_drafts([draft]))[0]

    async def many(self, items: Iterable[tuple[str, object] | Mapping[str, Any]]) -> list[Position]:
        """As `Publisher.many`."""
        return await self.publish_drafts(build_drafts(self.settings, items))

    async def publish_drafts(self, drafts: Sequence[Draft]) -> list[Position]:
        """As `Publisher.publish_drafts`."""
        if not drafts:
            return []
        try:
            return await self._broker().publish(drafts)
        except BrokerUnavailable as error:
            raise _publish_error(drafts, error) from error

    async def position(self, channel: str) -> Position:
        """As `Publisher.position`, but within `broker_timeout`."""
        (page,) = await self._broker().read([(check_channel(channel), None)], page_bytes=1)
        if isinstance(page, Exception):
            raise page
        return page.top

    async def grant(
        self,
        user: str | None = None,
        channels: Iterable[str] = (),
        publish: Iterable[str] = (),
        info: object = None,
        expires: float = 3600,
    ) -> str:
        """As `Publisher.grant`."""
        claims = _grant_claims(user, channels, publish, info, expires)
        if self._secret is None:
            self._secret = await self._broker().secret()
            warn_of_secret(self.settings)
        return sign_grant(self._secret, now=time.time(), **claims)

    async def presence(self, channel: str) -> list[dict[str, Any]]:
        """As `Publisher.presence`."""
        (present,) = await self._broker().presence([PresenceCall(channel=_check_presence(channel))])
        if isinstance(present, Exception):
            raise present
        return _members(present.users or {})

    async def disconnect(self, *, user: str | None = None, connection: str | None = None) -> None:
        """As `Publisher.disconnect`."""
        await self._revoke("*", user, connection)

    async def unsubscribe(self, channel: str, *, user: str | None = None, connection: str | None = None) -> None:
        """As `Publisher.unsubscribe`."""
        await self._revoke(check_subscribable(channel), user, connection)

    async def _revoke(self, subject: str, user: str | None, connection: str | None) -> None:
        revocation = _revocation(self.settings, subject, user, connection)
        try:
            await self._broker().revoke(*revocation)
        except BrokerUnavailable as error:
            raise _publish_error(revocation[-1:], error) from error

    async def close(self) -> None:
        """Give the running loop's connections back."""
        broker = self._brokers.pop(asyncio.get_running_loop(), None)
        if broker is not None:
            await broker.close()


def _revocation(
    settings: Settings, subject: str, user: str | None, connection: str | None
) -> tuple[str, str, float, Draft]:
    """Check whom the application means, and return what the broker's `revoke` takes."""
    if (user is None) == (connection is None):
        raise TypeError("give either user= or connection=")
    at = time.time()
    identity = f"user:{user}" if user is not None else f"connection:{connection}"
    check_channel("#" + identity.replace(":", "-", 1))
    news = head_of({"type": "control", "identity": identity, "subject": subject, "at": at})
    return identity, subject, at, build_answer_draft(settings, CONTROL_CHANNEL, news, "", "")


def _grant_claims(
    user: str | None, channels: Iterable[str], publish: Iterable[str], info: object, expires: float
) -> dict[str, Any]:
    """Check what a grant shall say, and return it as `sign_grant` takes it."""
    if not isinstance(expires, (int, float)) or not 0 < expires <= _MAX_EXPIRES:
        raise ValueError(f"expires={expires!r} must be a number of seconds, up to a hundred years")
    return {
        "expires": expires,
        "user": None if user is None else str(user),
        "channels": _patterns("channels", channels),
        "publish": _patterns("publish", publish),
        "info": None if info is None else json.loads(encode_data(info)),
    }


def _patterns(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{name} is a list of patterns, not one text; write [{patterns!r}]")
    checked = tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in checked):
        raise TypeError(f"{name} is a list of patterns, and each is a text")
    return checked


def _check_presence(name: str) -> Channel:
    channel = check_channel(name)
    if not is_presence(channel):
        raise ChannelError(name, "is not a presence channel; those begin with presence-")
    return channel


def _members(users: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [{"user": user, "info": json.loads(info)} for user, info in users.items()]


def warn_of_secret(settings: Settings) -> None:
    """Say that nobody chose the secret."""
    log.warning(
        "PUBSUB_SECRET is not set: grants are signed with a secret kept in the broker (%s), "
        "readable for all who may read there. Set it, the same for every process",
        settings.safe_url,
    )


def _publish_error(drafts: Sequence[Draft], error: BrokerUnavailable) -> PublishError:
    return PublishError(tuple(draft.channel for draft in drafts), str(error))
