"""Make requests as they come off the queue, and collect answers to them."""

from typing import Any

from pubsub_mw.broker.codec import encode_request
from pubsub_mw.broker.interface import Offer
from pubsub_mw.model import Channel, ConnectionId, Handshake, Request

__all__ = ["Collector", "offer", "request"]

CONNECTION = ConnectionId("c1")


def request(**fields: Any) -> Request:
    """A GET of `/` on a connection from `http://site.example`, but for `fields`."""
    defaults: dict[str, Any] = {
        "connection": CONNECTION,
        "user": "7",
        "transport": "websocket",
        "id": "1",
        "method": "GET",
        "path": "/",
        "query": "",
        "headers": (),
        "body": b"",
        "handshake": Handshake(headers=(("host", "site.example"),), scheme="http", address="192.0.2.1"),
        "reply_to": Channel("#connection-c1"),
    }
    return Request(**{**defaults, **fields})


def offer(item: Request, key: bytes, *, is_ordered: bool = True) -> Offer:
    """What stores `item`."""
    return Offer(
        connection=item.connection,
        request_id=item.id,
        payload=encode_request(item, key),
        reply_to=item.reply_to,
        is_ordered=is_ordered,
    )


class Collector:
    """A sink that writes down what it is told.

    Attributes:
        told: name and arguments of each call, in order
        is_wanted: as the application sees it; a test may change it
    """

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.is_wanted = True

    def whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.told.append(("whole", status, headers, body))

    def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.told.append(("head", status, headers))

    def chunk(self, body: bytes) -> None:
        self.told.append(("chunk", body))

    def end(self, problem: str | None) -> None:
        self.told.append(("end", problem))
