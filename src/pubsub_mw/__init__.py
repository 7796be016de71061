"""Realtime for Python web applications that stay stateless and synchronous.

`PubSub` wraps a WSGI app; `Publisher` and `AsyncPublisher` publish outside a request. The realtime server is
`pubsub_mw.asgi:app`, or `pubsub_mw.realtime.Realtime` inside another ASGI app.
"""

from pubsub_mw.errors import (
    BrokerUnavailable,
    ChannelError,
    PublicationTooLarge,
    PublishError,
    PubSubError,
    SettingsError,
)
from pubsub_mw.middleware import PubSub
from pubsub_mw.model import Position
from pubsub_mw.publisher import AsyncPublisher, Publisher

__all__ = [
    "AsyncPublisher",
    "BrokerUnavailable",
    "ChannelError",
    "Position",
    "PubSub",
    "PubSubError",
    "PublicationTooLarge",
    "PublishError",
    "Publisher",
    "SettingsError",
]

__version__ = "0.1.0"
