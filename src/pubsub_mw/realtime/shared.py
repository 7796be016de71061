"""Hold what all connections of a process have in common.

In:     settings, and what `app` has opened: hub, broker, publisher, secret
Out:    the parts that connections and HTTP routes use, each made once; what a grant allows; publications of clients
Owns:   nothing that changes, but the counts of connections
Never:  knows a connection
"""

import asyncio
import logging
import time
from collections import Counter

from pubsub_mw import protocol
from pubsub_mw.broker.interface import AsyncBroker
from pubsub_mw.errors import (
    ChannelError,
    CloseCode,
    ErrorCode,
    FrameError,
    GrantError,
    PublicationTooLarge,
    PublishError,
)
from pubsub_mw.grants import GrantVerifier
from pubsub_mw.model import Channel, Grant, check_subscribable, compile_patterns, is_protected
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.authorize import Authorizer
from pubsub_mw.realtime.control import Control
from pubsub_mw.realtime.hub import Hub
from pubsub_mw.realtime.lifecycle import Lifecycle
from pubsub_mw.realtime.presence import Presence
from pubsub_mw.realtime.requests import RequestGate
from pubsub_mw.realtime.socket import Sockets
from pubsub_mw.realtime.wheel import Wheel
from pubsub_mw.settings import Settings

__all__ = ["EXPIRED", "FORBIDDEN", "Shared"]

log = logging.getLogger("pubsub_mw")

FORBIDDEN = "no grant of yours allows it"
EXPIRED = "your grant, which allows it, expired; send a fresh one and ask again"


class Shared:
    """What all connections of a process have in common."""

    def __init__(
        self, settings: Settings, hub: Hub, broker: AsyncBroker, publisher: AsyncPublisher, secret: str
    ) -> None:
        self.settings = settings
        self.broker = broker
        self.hub = hub
        self.publisher = publisher
        self.secret = secret
        self.loop = asyncio.get_running_loop()
        self.verifier = GrantVerifier(secret, settings.grant_public_key)
        self.is_public = compile_patterns(settings.public)
        self.gate = RequestGate(settings, broker, publisher, secret)
        self.on_reply = self.gate.on_reply  # one object for all
        self.control = Control(broker, hub, settings, secret)
        self.authorizer = Authorizer(broker, hub, settings, secret)
        self.lifecycle = Lifecycle(broker, settings, secret)
        self.presence = Presence(broker, hub, settings)
        self.wheel = Wheel()
        self.sockets = Sockets(settings, self.wheel)
        # Counted for `metrics`, which reads it. By transport: who is here, and who came; by close code: who went,
        # None = the client went by itself, or its network.
        self.present: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.closed: Counter[CloseCode | None] = Counter()

    def allows(self, grant: Grant | None, channel: Channel) -> bool:
        """Whether `channel` may be listened to by everybody, or by `grant`."""
        if not is_protected(channel) and self.is_public(channel):
            return True
        return grant is not None and grant.expires_at > time.time() and compile_patterns(grant.channels)(channel)

    def verify(self, token: str) -> Grant:
        """Return what a grant allows that came in a frame.

        Raises:
            FrameError: it is not good.
        """
        try:
            return self.verifier.verify(token, now=time.time())
        except GrantError as error:
            raise FrameError(error.code, str(error)) from error

    async def publish(self, grant: Grant | None, command: protocol.Publish) -> None:
        """Publish what a client sent straight to a channel.

        Raises:
            FrameError: `grant` does not allow it, it is wrong, or the broker does not answer.
        """

        def refused(code: ErrorCode, message: str) -> FrameError:
            return FrameError(code, message, id=command.id, channel=command.channel[:200])

        try:
            channel = check_subscribable(command.channel)
        except ChannelError as error:
            raise refused(ErrorCode.BAD_CHANNEL, str(error)) from error
        if grant is None or not compile_patterns(grant.publish)(channel):
            raise refused(ErrorCode.FORBIDDEN, FORBIDDEN)
        if grant.expires_at <= time.time():
            raise refused(ErrorCode.GRANT_EXPIRED, EXPIRED)
        try:
            await self.publisher.publish(channel, command.data, event=command.event)
        except PublicationTooLarge as error:
            raise refused(ErrorCode.TOO_LARGE, str(error)) from error
        except ValueError as error:
            raise refused(ErrorCode.BAD_FRAME, str(error)) from error
        except PublishError as error:
            log.warning("a client's publication was not stored: %s", error)
            raise refused(ErrorCode.UNAVAILABLE, "it may not have been stored; try again in a few seconds") from error
