"""A plain WSGI application, made to publish by one line."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pubsub_mw import PubSub

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def publish_all(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    """Publish the items of the body, each `[channel, data]`, and answer with their positions."""
    items = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    positions = environ["pubsub.publish"].many([(channel, data) for channel, data in items])
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([str(position) for position in positions]).encode()]


app = PubSub(publish_all)
