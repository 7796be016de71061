"""Take the frames that a client without a WebSocket sends, and answer each at once.

In:     `{"resume"?, "frames": [...]}` by POST
Out:    `{"frames": [...]}`: for each `connected`, `accepted` or an `error`, then an `error` for each channel of
        `connect` that cannot be, and stored answers to requests that were sent again; requests into the queue,
        publications to the broker, a fresh grant to wherever the stream is
Owns:   nothing: who the client is comes from its token each time, so any server will do
Never:  says `accepted` before it is true; takes what a form or a page of another origin could send

What a frame brings about arrives by the stream or the poll.
"""

import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence

import orjson
from starlette.types import Receive

from pubsub_mw import protocol
from pubsub_mw.errors import BrokerUnavailable, ChannelError, ErrorCode, FrameError, GrantError
from pubsub_mw.grants import Resume, sign_resume
from pubsub_mw.model import (
    USER_PREFIX,
    Channel,
    ConnectionId,
    Grant,
    Handshake,
    HistoryPage,
    Position,
    channel_of_connection,
    channel_of_user,
    check_channel,
    check_subscribable,
)
from pubsub_mw.realtime.http import Refusal, bearer, read_json, read_resume
from pubsub_mw.realtime.shared import Shared

__all__ = ["answer_frames"]

log = logging.getLogger("pubsub_mw")

_TRANSPORTS = ("sse", "longpoll")
_SILENT = "the broker does not answer; send it again"


async def answer_frames(receive: Receive, shared: Shared, handshake: Handshake) -> bytes:
    """Carry out what a POST says, and return the answer's body.

    Raises:
        Refusal: nothing of it was carried out.
    """
    settings = shared.settings
    body = await read_json(receive, handshake, settings.max_send_bytes, settings.connect_timeout)
    frames = body.get("frames") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(frames, list) or not frames:
        raise Refusal(400, ErrorCode.BAD_FRAME, 'the body must be {"resume": ..., "frames": [...]}')
    if len(frames) > settings.max_send_frames:
        message = f"{settings.max_send_frames} frames may be sent at once"
        raise Refusal(413, ErrorCode.TOO_LARGE, message)
    token, transport = body.get("resume"), body.get("transport", _TRANSPORTS[0])
    if transport not in _TRANSPORTS or not isinstance(token, (str, type(None))):
        message = f"resume must be a text, and transport one of {', '.join(_TRANSPORTS)}"
        raise Refusal(400, ErrorCode.BAD_FRAME, message)
    resume = read_resume(shared, token if token is not None else bearer(handshake))
    sender = _Sender(shared, handshake, transport, resume)
    if resume is not None:
        await sender.look_up()
        if sender.is_revoked:
            raise Refusal(401, ErrorCode.REVOKED, "the application ended this connection; connect anew")
    answers = [await sender.answer(frame) for frame in frames]
    return b'{"frames":[%b]}' % b",".join(answers + sender.more)


class _Sender:
    """Who sends, as its token says, or as its `connect` made it."""

    def __init__(self, shared: Shared, handshake: Handshake, transport: str, resume: Resume | None) -> None:
        self._shared = shared
        self._handshake = handshake
        self._transport = transport
        self._resume = resume
        self.more: list[bytes] = []  # what else is to be told, after the answers
        self.is_revoked = False
        self.is_void = False

    async def look_up(self) -> None:
        """Find out what was revoked.

        Raises:
            Refusal: that cannot be known now.
        """
        try:
            await self._shared.control.look_up(self)
        except BrokerUnavailable as error:
            raise Refusal(503, ErrorCode.UNAVAILABLE, _SILENT) from error

    @property
    def _grant(self) -> Grant | None:
        return self._resume.grant if self._resume is not None else None

    @property
    def identities(self) -> Sequence[str]:
        """By which the application can have ended it."""
        if self._resume is None:
            return []
        user = self._grant.user if self._grant is not None else None
        return [f"connection:{self._resume.connection}", *([] if user is None else [f"user:{user}"])]

    def revoke(self, identity: str, subject: str, at: float) -> None:
        """Note that `at` was not long enough ago. Single channels are looked up where they are listened to."""
        if subject == "*" and self._resume is not None:
            made_at = -math.inf  # of an id that was ended
            if identity.startswith("user:") and self._grant is not None:
                made_at = self._grant.issued_at
                # A token from before is not shown to be of whom the grant names now.
                self.is_void = self.is_void or self._resume.issued_at <= at
            self.is_revoked = self.is_revoked or made_at <= at

    async def take_grant(self, grant: Grant) -> None:
        """Nothing: it is gone before news could come."""

    async def answer(self, frame: object) -> bytes:
        """Carry out one frame."""
        try:
            command = protocol.read_command(frame)
            if isinstance(command, protocol.Connect):
                return await self._connect(command)
            if self._resume is None:
                raise FrameError(ErrorCode.CONNECT_FIRST, "send resume, or connect as the first frame")
            return await self._carry_out(self._resume, command)
        except FrameError as error:
            return protocol.error(error.code, str(error), id=error.id, channel=error.channel)
        except Refusal as refusal:
            return protocol.error(refusal.code, refusal.message)

    async def _carry_out(self, resume: Resume, command: protocol.Command) -> bytes:
        gate = self._shared.gate
        match command:
            case protocol.RequestFrame():
                user = resume.grant.user if resume.grant is not None else None
                self._check_fresh(resume)
                stored = await gate.accept(command, resume.connection, user, self._handshake, self._transport)
                self.more += [part.frame for part in stored]
                return protocol.accepted(id=command.id)
            case protocol.Cancel():
                if await gate.cancel(resume.connection, command.id):
                    raise FrameError(ErrorCode.CANCELLED, "cancelled before it was begun", id=command.id)
                return protocol.accepted(id=command.id)
            case protocol.Publish():
                await self._shared.publish(resume.grant, command)
                return protocol.accepted(id=command.id, channel=command.channel)
            case protocol.RefreshGrant():
                return protocol.accepted(resume=await self._refresh(resume, command.grant))
            case protocol.Subscribe() | protocol.Unsubscribe():
                message = "name the channels in the url of the stream or the poll"
                raise FrameError(ErrorCode.UNSUPPORTED, message, channel=command.channel[:200])
        return protocol.accepted()  # a pong: nobody waits for it

    def _check_fresh(self, resume: Resume) -> None:
        """Refuse to act for somebody whose grant is over, as a connection that is closed for it does."""
        if resume.grant is not None and resume.grant.expires_at + self._shared.settings.grant_grace <= time.time():
            raise FrameError(ErrorCode.GRANT_EXPIRED, "the grant expired; send a fresh one in grant")

    async def _connect(self, command: protocol.Connect) -> bytes:
        """Make a connection without a stream: its token, and a ticket for a stream that cannot show that."""
        if self._resume is not None:
            raise FrameError(ErrorCode.ALREADY_CONNECTED, "this connection is connected already")
        shared, now = self._shared, time.time()
        before = None
        if command.resume is not None:
            try:
                before = read_resume(shared, command.resume)
            except Refusal as refusal:
                log.info("not resumed: %s", refusal)
        try:
            grant, before = shared.verifier.admit(command.grant, before, now=now)
        except GrantError as error:
            raise FrameError(error.code, str(error)) from error
        new = Resume(connection=ConnectionId(secrets.token_urlsafe(16)), grant=grant, user_position=None, issued_at=now)
        self._resume = new if before is None else dataclasses.replace(before, grant=grant)
        await self.look_up()
        if self.is_revoked:
            self._resume, self.is_revoked = None, False
            raise FrameError(ErrorCode.REVOKED, "the application ended this connection; connect without resume")
        if self.is_void:
            self._resume, before = new, None
        resume = dataclasses.replace(self._resume, issued_at=now)
        channels = self._listenable(command.channels, resume if before is not None else None)
        self._resume = resume = await self._placed(resume, channels)
        ticket = secrets.token_urlsafe(16)
        kept = sign_resume(shared.secret, resume, expires=shared.settings.ticket_ttl, use="ticket")
        try:
            await shared.broker.put_ticket(ticket, kept, shared.settings.ticket_ttl)
        except BrokerUnavailable as error:
            raise FrameError(ErrorCode.UNAVAILABLE, _SILENT) from error
        user = grant.user if grant is not None else None
        token = self._signed(resume)
        return protocol.connected(resume.connection, token, user, shared.settings.ping_interval, ticket)

    def _listenable(self, channels: Mapping[str, str | None], resumed: Resume | None) -> dict[str, str | None]:
        """Return those of `channels` that can be, with their positions; of each other one tell after the answers.

        Args:
            resumed: whose token was shown; of its own channels it may say where it left them

        Raises:
            FrameError: it says that wrongly.
        """
        listenable: dict[str, str | None] = {}
        for name, position in channels.items():
            is_own = resumed is not None and _is_own(name, resumed)
            try:
                channel = check_channel(name) if is_own else check_subscribable(name)
                if position is not None:
                    Position.parse(position)
            except ValueError as error:
                code = ErrorCode.BAD_CHANNEL if isinstance(error, ChannelError) else ErrorCode.BAD_POSITION
                if is_own:
                    raise FrameError(code, str(error), channel=name[:200]) from error
                self.more.append(protocol.error(code, str(error), channel=name[:200]))
            else:
                listenable[channel] = position
        return listenable

    async def _placed(self, resume: Resume, channels: Mapping[str, str | None]) -> Resume:
        """Note where each channel stands that is to be listened to from now on, so that nothing is missed until then.

        Not of those that nobody has allowed yet: that they exist is no business of this client.
        """
        anew = [Channel(name) for name, position in channels.items() if position is None and not name.startswith("#")]
        wanted = [channel for channel in anew if self._shared.allows(resume.grant, channel)]
        user = resume.grant.user if resume.grant is not None else None
        if user is not None and resume.user_position is None:
            wanted.append(channel_of_user(user))
        tops = await self._tops(wanted)
        places = {name: str(tops[Channel(name)]) if name in tops else place for name, place in channels.items()}
        limit = self._shared.settings.max_resume_channels_bytes
        if len(places) > self._shared.settings.max_channels or len(orjson.dumps(places)) > limit:
            message = f"the names and positions of these channels are over {limit} bytes; name them in the url instead"
            raise FrameError(ErrorCode.TOO_MANY_CHANNELS, message)
        user_position = resume.user_position
        if user is not None:
            place = places.get(channel_of_user(user))
            user_position = Position.parse(place) if place else tops.get(channel_of_user(user), user_position)
        return dataclasses.replace(resume, channels=places, user_position=user_position)

    async def _tops(self, channels: Sequence[Channel]) -> dict[str, Position]:
        if not channels:
            return {}
        try:
            pages = await self._shared.broker.read([(channel, None) for channel in channels], page_bytes=1)
        except BrokerUnavailable as error:
            raise FrameError(ErrorCode.UNAVAILABLE, _SILENT) from error
        found: dict[str, Position] = {
            name: page.top for name, page in zip(channels, pages, strict=True) if isinstance(page, HistoryPage)
        }
        if len(found) < len(channels):
            raise FrameError(ErrorCode.UNAVAILABLE, _SILENT)
        return found

    async def _refresh(self, resume: Resume, token: str) -> str:
        """Take a fresh grant, tell the connection's stream, and return the token that holds it."""
        shared, now = self._shared, time.time()
        grant = shared.verify(token)
        if self._grant is not None and self._grant.user not in (None, grant.user):
            raise FrameError(ErrorCode.GRANT_INVALID, "the grant is somebody else's; open a new connection with it")
        fresh = dataclasses.replace(resume, grant=grant, issued_at=now)
        self._resume = fresh
        await self.look_up()
        if self.is_revoked:
            self._resume, self.is_revoked = resume, False
            raise FrameError(ErrorCode.GRANT_INVALID, "the application ended what was granted until then")
        if grant.user is not None and fresh.user_position is None:
            self._resume = fresh = await self._placed(fresh, fresh.channels)
        try:
            await shared.control.send_grant(fresh)
        except BrokerUnavailable as error:
            raise FrameError(ErrorCode.UNAVAILABLE, "the broker does not answer; send the grant again") from error
        return self._signed(fresh)

    def _signed(self, resume: Resume) -> str:
        return sign_resume(self._shared.secret, resume, expires=self._shared.settings.resume_ttl)


def _is_own(name: str, resumed: Resume) -> bool:
    """Whether `name` is the connection's own channel or its user's, who may be known to the application alone."""
    user = resumed.grant.user if resumed.grant is not None else None
    if name.startswith(USER_PREFIX):
        return user is None or name == channel_of_user(user)
    return name == channel_of_connection(resumed.connection)
