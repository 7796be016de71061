"""Be one client, whichever transport it uses: frame in, effect, frame out.

In:     the text of each frame the client sent, one after another
Out:    frames into its send queue; subscriptions into the hub; publications to the broker
Owns:   who the client is (id, grant), its subscriptions, and its next deadline on the wheel
Never:  knows a socket; raises for what a client did: that becomes an `error` frame, or a close code

States: new -> connected -> closed. A command before `connect` is refused; `connect` twice is refused.

There may be 100,000 of them in a process, nearly all idle: what is seldom needed is made when it is.
"""

import asyncio
import dataclasses
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any

import orjson

from pubsub_mw import protocol
from pubsub_mw.errors import (
    BrokerUnavailable,
    ChannelError,
    CloseCode,
    ErrorCode,
    FrameError,
    GrantError,
)
from pubsub_mw.grants import Resume, sign_resume, verify_resume
from pubsub_mw.model import (
    CONNECTION_PREFIX,
    FROM_HANDSHAKE,
    USER_PREFIX,
    Channel,
    ConnectionId,
    Grant,
    Handshake,
    Position,
    channel_of_connection,
    channel_of_user,
    check_subscribable,
    compile_patterns,
    is_presence,
    is_protected,
)
from pubsub_mw.realtime.requests import Requests
from pubsub_mw.realtime.send_queue import SendQueue
from pubsub_mw.realtime.shared import EXPIRED, FORBIDDEN, Shared
from pubsub_mw.realtime.subscription import Subscription

__all__ = ["Connection", "Recall"]

log = logging.getLogger("pubsub_mw")

_NONE: Mapping[Any, Any] = MappingProxyType({})

Recall = Callable[[str], str | None]
"""Tells the position, as text, at which a channel was left, or None."""

_SILENT = "the broker does not answer; come back in a moment"


@dataclasses.dataclass(frozen=True, slots=True)
class _Own:
    """Where a connection takes up its own two channels: a position from the client, from its token, or neither."""

    position: Position | None
    is_announced: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Allowed:
    """By what a connection listens to a channel: a grant, or else the application or `public`; and since when."""

    is_by_grant: bool
    at: float


class Connection:
    """One client.

    Args:
        shared: of this process
        handshake: the request that opened it
        transport: `websocket`, `sse` or `longpoll`. Only over the first does a client answer pings. Over the last a
            connection is one poll: it is told nothing of itself, and without a token it is nobody's, with no channels
            of its own
        send_queue: where its frames go, if the transport has one of its own
    """

    __slots__ = (
        "_allowed",
        "_app_info",
        "_app_user",
        "_app_user_at",
        "_asking",
        "_expiry_told_at",
        "_grant",
        "_handshake",
        "_is_present",
        "_next_ping_at",
        "_own",
        "_recall",
        "_requests",
        "_revoked",
        "_shared",
        "_subscriptions",
        "_token",
        "_unanswered_at",
        "_user_positions",
        "due",
        "id",
        "send_queue",
        "transport",
    )

    def __init__(
        self,
        shared: Shared,
        handshake: Handshake,
        transport: str = "websocket",
        send_queue: SendQueue | None = None,
    ) -> None:
        settings = shared.settings
        self._shared = shared
        self._handshake = _pack(handshake)
        self.transport = transport
        self.send_queue = send_queue or SendQueue(settings.send_queue_bytes, settings.send_queue_bytes // 4)
        self.id: ConnectionId | None = None
        self._grant: Grant | None = None
        self._subscriptions: dict[Channel, Subscription] = {}
        self._own: tuple[Subscription, ...] = ()
        self._requests: Requests | None = None
        self._asking: Mapping[Channel, asyncio.Task[FrameError | None]] = _NONE
        self._app_user: str | None = None
        self._app_info: object = None
        self._app_user_at = math.inf  # when the application was asked who it is
        self._user_positions: Mapping[str, Position] = _NONE  # for the channel of the user whom the app may name
        self._recall: Recall = _recall_nothing
        self._token: Resume | None = None  # until it has begun
        self._revoked: Mapping[str, float] = _NONE  # channel, or `*` -> grants made until then are void
        self._allowed: dict[Channel, _Allowed] = {}
        self._next_ping_at = math.inf
        self._unanswered_at: float | None = None  # when the first ping went out since anything came
        self._expiry_told_at: float | None = None
        self._is_present = True
        shared.present[transport] += 1
        shared.opened[transport] += 1
        self.due = 0
        shared.wheel.set(self, self._now() + settings.connect_timeout)

    @property
    def handshake(self) -> Handshake:
        """The request that opened it, with the headers that the application sees."""
        return _unpack(self._handshake)

    @property
    def user(self) -> str | None:
        """Who the grant says it is, else the application."""
        return self._grant.user if self._grant is not None and self._grant.user is not None else self._app_user

    @property
    def info(self) -> object:
        """What presence shows beside the user."""
        return self._grant.info if self._grant is not None and self._grant.user is not None else self._app_info

    @property
    def own_channels(self) -> list[Channel]:
        """Its own and, where the user is known, the user's; none for a poll of nobody."""
        return [subscription.channel for subscription in self._own]

    @property
    def _is_reported(self) -> bool:
        """Whether the application is told of it: not of a poll of nobody."""
        return bool(self._own) and self._own[0].channel.startswith(CONNECTION_PREFIX)

    async def receive(self, text: str | bytes) -> None:
        """Take one frame. Returns when its effect has been begun; answers come through `send_queue`."""
        rest = self.take(text)
        if rest is not None:
            await rest

    def take(self, text: str | bytes) -> Awaitable[None] | None:
        """Do the same at once where nothing is to be waited for; else return what to await."""
        self._unanswered_at = None
        try:
            command = protocol.decode_command(text)
            if isinstance(command, protocol.Connect):
                return self._connect(command)
            if self.id is None:
                raise FrameError(ErrorCode.CONNECT_FIRST, "the first frame must be connect")
            if isinstance(command, protocol.Subscribe):
                if command.grant is not None:
                    return self._answer(self._subscribe_with(command.grant, command), command.channel[:200])
                self._subscribe(command.channel, command.position)
            elif isinstance(command, protocol.Unsubscribe):
                self._unsubscribe(command.channel)
            elif isinstance(command, protocol.RefreshGrant):
                return self._answer(self.take_grant(self._shared.verify(command.grant)))
            elif isinstance(command, protocol.Publish):
                return self._answer(self._shared.publish(self._grant, command))
            elif isinstance(command, protocol.RequestFrame):
                self._open_requests().put(command, self.user)
            elif isinstance(command, protocol.Cancel):
                self._open_requests().cancel(command.id)
        except FrameError as error:
            self._refuse(error)
        return None

    async def _answer(self, rest: Coroutine[Any, Any, None], channel: str | None = None) -> None:
        try:
            await rest
        except FrameError as error:
            error.channel = error.channel or channel
            self._refuse(error)

    def _refuse(self, error: FrameError) -> None:
        self.send_queue.put_nowait(protocol.error(error.code, str(error), id=error.id, channel=error.channel))

    async def _subscribe_with(self, grant: str, command: protocol.Subscribe) -> None:
        await self.take_grant(self._shared.verify(grant), adds=True)
        self._subscribe(command.channel, command.position)

    def refuse(self, code: ErrorCode, message: str) -> None:
        """Answer a frame that could not even be taken as text."""
        self._unanswered_at = None
        self.send_queue.put_nowait(protocol.error(code, message))

    def close(self) -> None:
        """Leave the hub. Idempotent; the transport calls it when the client is gone."""
        self._shared.wheel.discard(self)
        if self._is_present:
            self._is_present = False
            self._shared.present[self.transport] -= 1
            self._shared.closed[self.send_queue.closed[0] if self.send_queue.closed is not None else None] += 1
        self.send_queue.close(CloseCode.SERVER_ERROR, "closed")
        for task in list(self._asking.values()):
            task.cancel()
        self._shared.control.leave(self)
        if self._requests is not None:
            self._requests.close()
        # Whom the application sent away is gone at once; others may come back.
        is_over = self.send_queue.closed is not None and self.send_queue.closed[0] is CloseCode.DISCONNECTED
        grace = 0.0 if is_over else self._shared.settings.presence_grace
        for subscription in [*self._subscriptions.values(), *self._own]:
            self._shared.presence.leave(subscription, after=grace)
            self._shared.hub.unsubscribe(subscription)
        self._subscriptions.clear()
        is_reported, self._own = self._is_reported, ()
        if self.id is not None and self._shared.hub.close(self.id, self.send_queue) and is_reported:
            self._shared.lifecycle.end(self.id)

    # Who it is.

    def _connect(self, command: protocol.Connect) -> Awaitable[None] | None:
        """Begin, without a coroutine for those who bring nothing that is to be looked up."""
        if command.grant is not None or command.resume is not None:
            return self._answer(self.connect(command, self._resumed(command.resume)))
        if self.id is not None:
            raise FrameError(ErrorCode.ALREADY_CONNECTED, "this connection is connected already")
        self._shared.control.enter(self)
        begun = self._begin(command)
        if begun is None:
            self._listen_as_asked(command)
        else:
            begun.add_done_callback(lambda _: self._listen_as_asked(command))
        return begun

    async def connect(
        self,
        command: protocol.Connect,
        resume: Resume | None,
        *,
        recall: Recall | None = None,
        needs_all: bool = False,
        takes_over: bool = True,
    ) -> None:
        """Begin. Where that fails, the send queue is closed with the reason.

        Args:
            command: its `resume` was read already
            resume: what it restores
            recall: tells where one of the connection's own channels was left, if `command` does not
            needs_all: every channel must be allowed; waits until that is known
            takes_over: another server may hold it, and is told to close it

        Raises:
            FrameError: it is connected already, or its own channels are named wrongly; or, if it needs all, a channel
                is refused.
        """
        if self.id is not None:
            raise FrameError(ErrorCode.ALREADY_CONNECTED, "this connection is connected already")
        self._recall = recall or self._recall
        try:
            grant, resume = self._shared.verifier.admit(command.grant, resume, now=time.time())
        except GrantError as error:
            self.send_queue.close(error.close_code, str(error))
            return
        self._grant, self._token = grant, resume
        if not await self._is_admitted():
            return
        begun = self._begin(command, takes_over=takes_over)
        if begun is not None:
            await begun
        self._listen_as_asked(command, needs_all=needs_all)
        if needs_all:
            for refused in await asyncio.gather(*self._asking.values(), return_exceptions=True):
                if refused is not None:
                    raise refused

    async def _is_admitted(self) -> bool:
        """Look up what was revoked; False if that ends the connection, or cannot be known, or took too long."""
        self._shared.control.enter(self)
        try:
            await self._shared.control.look_up(self)
        except BrokerUnavailable:
            self.send_queue.close(CloseCode.BROKER_UNAVAILABLE, "the broker does not answer; come back in a moment")
        if self._grant is not None and self._grant.expires_at <= time.time():
            self.send_queue.close(CloseCode.GRANT_EXPIRED, "the grant expired just now; show a new one in connect")
        return self.send_queue.closed is None

    @property
    def identities(self) -> list[str]:
        """By which the application can name this connection."""
        connection = self.id or (self._token.connection if self._token is not None else None)
        users = [] if self.user is None else [f"user:{self.user}"]
        return users if connection is None else [*users, f"connection:{connection}"]

    def revoke(self, identity: str, subject: str, at: float) -> ConnectionId | None:
        """Give up a channel, or `*`, everything, if what `identity` was given for it is no younger than `at`.

        Returns:
            The connection, if it ended as somebody's whom its resume tokens, made before the application said who it
            is, do not name: they must be barred by its id.
        """
        self._revoked = {**self._revoked, subject: max(at, self._revoked.get(subject, -math.inf))}
        if subject != "*":
            subscription = self._subscriptions.get(Channel(subject))
            allowed = self._allowed.get(Channel(subject))
            if subscription is not None and allowed is not None and allowed.at <= at:
                self._end_subscription(subscription, ErrorCode.REVOKED, "the application ended it")
            return None
        token = self._token if self.id is None else None
        unnamed = None
        if identity.startswith("user:"):
            by_grant = self._grant is not None and self._grant.user is not None
            made_at = self._grant.issued_at if self._grant is not None and by_grant else self._app_user_at
            if token is not None and token.issued_at <= at:
                self._token = None
            if not by_grant:
                unnamed = self.id
        else:
            made_at = -math.inf  # an id that was ended is never anybody's again, so no clock is asked
        if made_at > at:
            return None
        self.send_queue.close(CloseCode.DISCONNECTED, "the application ended this connection")
        return unnamed

    def _end_subscription(self, subscription: Subscription, code: ErrorCode, reason: str) -> None:
        del self._subscriptions[subscription.channel]
        self._shared.presence.leave(subscription)
        self._shared.hub.unsubscribe(subscription)
        self.send_queue.put_nowait(protocol.unsubscribed(subscription.channel, code, reason))

    def _resumed(self, token: str | None) -> Resume | None:
        """Return what a resume token restores; one that is too old or not ours restores nothing."""
        if token is None:
            return None
        try:
            return verify_resume(self._shared.secret, token, now=time.time())
        except GrantError as error:
            log.info("not resumed: %s", error)
            return None

    def _own_positions(
        self, command: protocol.Connect, connection: ConnectionId, resume: Resume | None
    ) -> dict[Channel, _Own]:
        is_poll = self.transport == "longpoll"  # which goes by the answers
        positions = {channel_of_connection(connection): _Own(Position.start(), is_poll)}
        if self.user is not None:
            known = resume.user_position if resume is not None else None
            positions[channel_of_user(self.user)] = _Own(known, is_poll)
        for channel in positions:
            text = command.channels.get(channel) if resume is not None else None
            text = text or self._recall(channel)
            if text is not None:
                positions[channel] = _Own(_position(channel, text), True)
        return positions

    def _begin(self, command: protocol.Connect, *, takes_over: bool = True) -> "asyncio.Future[Any] | None":
        """Take up the connection's own channels and put `connected`, now, or when what is returned is done.

        It goes out together with the first answers about the channels asked for. A new connection is told its id when
        the broker follows its channels, so that nothing sent to it can be missed. A resumed one is told at once: what
        it missed is read from history.
        """
        hub, resume = self._shared.hub, self._token  # None if it was made before its user was disconnected
        connection = resume.connection if resume is not None else ConnectionId(secrets.token_urlsafe(16))
        if resume is None and self.transport == "longpoll":
            self.id = connection
            hub.open(connection, self.send_queue)
            self._schedule()
            return None
        settled: list[asyncio.Future[bool]] = []
        for channel, own in self._own_positions(command, connection, resume).items():
            settled.append(self._shared.loop.create_future())
            subscription = Subscription(
                channel,
                connection,
                self.send_queue,
                own.position,
                is_announced=own.is_announced,
                is_fresh=resume is None and channel == channel_of_connection(connection),
                settled=settled[-1],
                on_reply=self._shared.on_reply,
            )
            self._own += (subscription,)
        # What comes meanwhile, as on the user's channel, goes out after `connected`.
        self.send_queue.hold()
        if resume is not None:
            self._welcome(connection, resume, takes_over=takes_over)
            for subscription, followed in zip(self._own, settled, strict=True):
                followed.add_done_callback(self._on_own_settled)
                hub.subscribe(subscription)
            return None
        for subscription in self._own:
            hub.subscribe(subscription)
        begun = settled[0] if len(settled) == 1 else asyncio.gather(*settled)

        def go_on(_: object) -> None:
            if not all(followed.result() for followed in settled):
                self.send_queue.close(CloseCode.BROKER_UNAVAILABLE, _SILENT)
            if self.send_queue.closed is None:
                self._welcome(connection, None, takes_over=False)

        begun.add_done_callback(go_on)
        return begun

    def _welcome(self, connection: ConnectionId, resume: Resume | None, *, takes_over: bool) -> None:
        settings = self._shared.settings
        self.id, self.send_queue.is_poll = connection, self.transport == "longpoll"
        self._shared.hub.open(connection, self.send_queue)
        if takes_over:
            self._shared.control.claim(connection, by_poll=self.send_queue.is_poll)
        if settings.lifecycle:
            self._shared.lifecycle.begin(connection, self.user, self.transport, self.handshake)
        if self.transport != "longpoll":
            token = self._sign(connection, resume.channels if resume is not None else {})
            self.send_queue.put_first(protocol.connected(connection, token, self.user, settings.ping_interval))
        self._schedule()

    def _listen_as_asked(self, command: protocol.Connect, *, needs_all: bool = False) -> None:
        if self.id is None or self.send_queue.closed is not None:
            return
        resume, self._token = self._token, None
        for channel, position in command.channels.items():
            if resume is not None and any(channel == own.channel for own in self._own):
                continue
            try:
                if channel.startswith(USER_PREFIX) and resume is not None and self.user is None:
                    # Whose it is the application says when it is asked again; until then it is nobody's.
                    self._keep_user_position(channel, position)
                else:
                    self._subscribe(channel, position)
            except FrameError as error:
                if needs_all:
                    raise
                self._refuse(error)
        self.send_queue.release()

    def _open_requests(self) -> Requests:
        if self._requests is None:
            assert self.id is not None
            self._requests = Requests(self._shared.gate, self.id, self.handshake, self.send_queue, self._own[0])
            self._own[0].on_reply = self._requests.on_reply
        return self._requests

    def _sign(self, connection: ConnectionId, channels: Mapping[str, str | None]) -> str:
        resume = Resume(
            connection=connection,
            grant=self._grant,
            user_position=self._own[-1].position if len(self._own) > 1 else None,
            issued_at=time.time(),
            channels=channels,
        )
        return sign_resume(self._shared.secret, resume, expires=self._shared.settings.resume_ttl)

    async def take_grant(self, grant: Grant, *, adds: bool = False) -> None:
        """Take a fresh grant instead of the present one, or, if it `adds`, beside it: what either allows is allowed,
        until the first of the two expires. Whoever was nobody becomes its user.

        A present one of which something was revoked meanwhile is not added to: it must not get that back.

        Raises:
            FrameError: it is somebody else's, or was revoked, or that cannot be known now.
        """
        present = self._grant
        if self.user is not None and grant.user != self.user:
            raise FrameError(ErrorCode.GRANT_INVALID, "the grant is somebody else's; open a new connection with it")
        if grant.issued_at <= self._revoked.get("*", -math.inf):
            raise FrameError(ErrorCode.GRANT_INVALID, "the application ended what was granted until then")
        was_nobody = self.user is None
        if was_nobody and grant.user is not None:
            # Entered under the user's name before that is looked up, as when a connection begins.
            self._grant = grant
            try:
                await self._shared.control.look_up(self)
            except BrokerUnavailable as error:
                self._grant = present
                raise FrameError(ErrorCode.UNAVAILABLE, "the broker does not answer; send the grant again") from error
            if self.send_queue.closed is not None:
                return
        if adds and present is not None and max(self._revoked.values(), default=-math.inf) < present.issued_at:
            grant = dataclasses.replace(
                grant,
                issued_at=min(present.issued_at, grant.issued_at),
                channels=tuple(dict.fromkeys(present.channels + grant.channels)),
                publish=tuple(dict.fromkeys(present.publish + grant.publish)),
                expires_at=min(present.expires_at, grant.expires_at),
            )
        self._grant = grant
        if was_nobody and grant.user is not None:
            self._listen_to_user(grant.user)
        if grant.expires_at > time.time():
            self._expiry_told_at = None
        for channel in [name for name, allowed in self._allowed.items() if allowed.is_by_grant]:
            subscription = self._subscriptions.get(channel)
            if self._may_listen(channel):
                self._allowed[channel] = _Allowed(True, grant.issued_at)
            elif subscription is not None and subscription.is_open and not self._is_granted(channel):
                self._end_subscription(subscription, ErrorCode.FORBIDDEN, "the fresh grant does not allow it")
        self._schedule()

    def _listen_to_user(self, user: str) -> None:
        """Follow the channel of a user who became known after `connected`.

        `subscribed` tells where it begins, because the resume token cannot know.
        """
        assert self.id is not None
        channel = channel_of_user(user)
        followed: asyncio.Future[bool] = self._shared.loop.create_future()
        followed.add_done_callback(self._on_own_settled)
        position = self._user_positions.get(channel)
        recalled = self._recall(channel)
        if position is None and recalled is not None:
            position = _position(channel, recalled)
        own = Subscription(channel, self.id, self.send_queue, position, settled=followed)
        self._own += (own,)
        self._shared.hub.subscribe(own)
        if self._is_reported:
            self._shared.lifecycle.begin(self.id, user, self.transport, self.handshake)

    # What it listens to.

    def _subscribe(self, name: str, position_text: str | None) -> None:
        try:
            channel = check_subscribable(name)
        except ChannelError as error:
            raise FrameError(ErrorCode.BAD_CHANNEL, str(error), channel=name[:200]) from error
        if channel in self._subscriptions and self._subscriptions[channel].is_open:
            raise FrameError(ErrorCode.ALREADY_SUBSCRIBED, "this connection listens to it already", channel=channel)
        position = _position(channel, position_text) if position_text is not None else None
        self._forget_refused()
        limit = self._shared.settings.max_channels
        if len(self._subscriptions) + len(self._asking) >= limit:
            raise FrameError(
                ErrorCode.TOO_MANY_CHANNELS, f"a connection may listen to {limit} channels", channel=channel
            )
        if channel in self._asking:
            raise FrameError(ErrorCode.ALREADY_SUBSCRIBED, "the application is asked about it already", channel=channel)
        if self._may_listen(channel):
            is_by_grant = is_protected(channel) or not self._shared.is_public(channel)
            issued_at = self._grant.issued_at if self._grant is not None else 0.0
            self._allowed[channel] = _Allowed(is_by_grant, issued_at if is_by_grant else time.time())
            self._listen(channel, position)
            return
        refusal = FrameError(ErrorCode.FORBIDDEN, FORBIDDEN, channel=channel)
        if self._is_granted(channel):
            refusal = FrameError(ErrorCode.GRANT_EXPIRED, EXPIRED, channel=channel)
        if not self._shared.settings.authorize:
            raise refusal
        task = asyncio.create_task(self._ask(channel, position, refusal))
        self._asking = {**self._asking, channel: task}
        task.add_done_callback(lambda _: self._forget_asking(channel, task))

    def _listen(self, channel: Channel, position: Position | None) -> None:
        """Subscribe to a channel that this connection may listen to."""
        assert self.id is not None
        subscription = Subscription(channel, self.id, self.send_queue, position)
        if not is_presence(channel):
            self._shared.hub.subscribe(subscription)
        elif self.user is not None:
            self._shared.presence.enter(subscription, self.user, self.info)
        else:
            raise FrameError(ErrorCode.FORBIDDEN, "a presence channel needs a user", channel=channel)
        self._subscriptions[channel] = subscription

    async def _ask(self, channel: Channel, position: Position | None, refusal: FrameError) -> FrameError | None:
        """Let the application decide, then subscribe, or refuse and return why: `refusal`, if it says no."""
        assert self.id is not None
        asked_at = time.time()
        try:
            decision = await self._shared.authorizer.ask(channel, self.id, self.user, self.transport, self.handshake)
            if not decision.is_allowed or (decision.user is not None and self.user not in (None, decision.user)):
                raise refusal
            if decision.user is not None and self._app_user is None:
                await self._take_app_user(decision.user, decision.info, asked_at)
            if asked_at <= self._revoked.get(channel, -math.inf):
                raise FrameError(ErrorCode.FORBIDDEN, FORBIDDEN, channel=channel)
            if self.send_queue.closed is None:
                self._allowed[channel] = _Allowed(False, asked_at)
                self._drop_asking(channel)  # before the answer, after which the client may ask anew at once
                self._listen(channel, position)
            return None
        except BrokerUnavailable as error:
            log.warning("%s: %s", channel, error)
            refused = FrameError(
                ErrorCode.UNAVAILABLE, "the application could not be asked; try again in a few seconds"
            )
        except FrameError as error:
            refused = error
        self._drop_asking(channel)
        self.send_queue.put_nowait(protocol.error(refused.code, str(refused), channel=channel))
        return refused

    def _forget_asking(self, channel: Channel, task: "asyncio.Task[FrameError | None]") -> None:
        if self._asking.get(channel) is task:
            self._drop_asking(channel)
        if not task.cancelled() and task.exception() is not None:
            log.error("asking about %s failed by a fault of the server", channel, exc_info=task.exception())

    def _drop_asking(self, channel: Channel) -> None:
        self._asking = {name: task for name, task in self._asking.items() if name != channel}

    async def _take_app_user(self, user: str, info: object, asked_at: float) -> None:
        """Be who the application says; from now on the user's own channel arrives too.

        Raises:
            BrokerUnavailable: it cannot be known now whether the application ended that meanwhile.
        """
        was_nobody = self.user is None
        self._app_user, self._app_info, self._app_user_at = user, info, asked_at
        try:
            await self._shared.control.look_up(self)
        except BrokerUnavailable:
            self._app_user, self._app_info = None, None
            raise
        if was_nobody and self.send_queue.closed is None:
            self._listen_to_user(user)

    def _keep_user_position(self, channel: Channel | str, position_text: str | None) -> None:
        self._user_positions = _NONE if position_text is None else {channel: _position(channel, position_text)}

    def _on_own_settled(self, followed: "asyncio.Future[bool]") -> None:
        """End a connection whose own channel the broker does not deliver: what is sent to it would be missed."""
        if not followed.cancelled() and not followed.result():
            self.send_queue.close(CloseCode.BROKER_UNAVAILABLE, _SILENT)

    def _may_listen(self, channel: Channel) -> bool:
        grant = self._grant
        if grant is not None and grant.issued_at <= self._revoked.get(channel, -math.inf):
            grant = None
        return self._shared.allows(grant, channel)

    def _is_granted(self, channel: Channel) -> bool:
        """Whether the grant allows a channel, or did until it expired."""
        grant = self._grant
        if grant is None or grant.issued_at <= self._revoked.get(channel, -math.inf):
            return False
        return compile_patterns(grant.channels)(channel)

    def _forget_refused(self) -> None:
        for channel in [name for name, subscription in self._subscriptions.items() if not subscription.is_open]:
            del self._subscriptions[channel]
        for channel in [name for name in self._allowed if name not in self._subscriptions]:
            del self._allowed[channel]

    def _unsubscribe(self, name: str) -> None:
        asking = self._asking.get(Channel(name))
        if asking is not None:
            self._drop_asking(Channel(name))
            asking.cancel()
            self.send_queue.put_nowait(protocol.unsubscribed(name, "client", "as asked"))
            return
        subscription = self._subscriptions.pop(Channel(name), None)
        if subscription is None or not subscription.is_open:
            raise FrameError(ErrorCode.NOT_SUBSCRIBED, "this connection does not listen to it", channel=name[:200])
        self._shared.presence.leave(subscription)
        self._shared.hub.unsubscribe(subscription)
        self.send_queue.put_nowait(protocol.unsubscribed(name, "client", "as asked"))

    # Deadlines. On the wheel is whichever comes next.

    def _now(self) -> float:
        return self._shared.loop.time()

    def _schedule(self) -> None:
        settings, now = self._shared.settings, self._now()
        if self._next_ping_at == math.inf:
            # Spread over the interval, so that connections made at once are not pinged at once.
            self._next_ping_at = now + random.uniform(0.5, 1.0) * settings.ping_interval
        next_at = min(self._next_ping_at, now + self._until_expiry())
        if self._unanswered_at is not None:
            next_at = min(next_at, self._unanswered_at + settings.ping_timeout)
        self._shared.wheel.set(self, next_at)

    def _until_expiry(self) -> float:
        if self._grant is None:
            return math.inf
        if self._expiry_told_at is not None:
            return self._expiry_told_at + self._shared.settings.grant_grace - self._now()
        return min(self._grant.expires_at - time.time(), 3_600.0)

    def on_due(self) -> None:
        settings, now = self._shared.settings, self._now()
        if self.send_queue.closed is not None:
            return
        if self.id is None:
            self.send_queue.close(CloseCode.CONNECT_TIMEOUT, "no connect frame came in time")
            return
        if self._until_expiry() <= 0:
            if self._expiry_told_at is not None:
                self.send_queue.close(CloseCode.GRANT_EXPIRED, "the grant expired and no fresh one came")
                return
            if self._grant is not None and self._grant.expires_at <= time.time():
                self._expiry_told_at = now
                message = f"the grant expired; send a fresh one within {settings.grant_grace:g} s"
                self.send_queue.put_nowait(protocol.error(ErrorCode.GRANT_EXPIRED, message))
        if self._unanswered_at is not None and now - self._unanswered_at >= settings.ping_timeout:
            silence = settings.ping_timeout
            self.send_queue.close(CloseCode.NO_PONG, f"nothing came for {silence:g} s after a ping")
            return
        if now >= self._next_ping_at:
            self._next_ping_at = now + settings.ping_interval
            if self.transport == "websocket":
                self._unanswered_at = self._unanswered_at or now
            self.send_queue.put_nowait(protocol.PING)
        self._schedule()


def _recall_nothing(_channel: str) -> None:
    return None


def _pack(handshake: Handshake) -> bytes:
    """Return what is needed of a handshake later, in one object."""
    headers = [item for item in handshake.headers if item[0] in FROM_HANDSHAKE]
    # Copied, because orjson leaves its answer in a buffer of 4 KB.
    return bytes(memoryview(orjson.dumps((headers, handshake.scheme, handshake.address))))


def _unpack(packed: bytes) -> Handshake:
    headers, scheme, address = orjson.loads(packed)
    return Handshake(headers=tuple((name, value) for name, value in headers), scheme=scheme, address=address)


def _position(channel: str, text: str) -> Position:
    try:
        position = Position.parse(text)
    except ValueError as error:
        raise FrameError(ErrorCode.BAD_POSITION, str(error), channel=channel) from error
    return position
