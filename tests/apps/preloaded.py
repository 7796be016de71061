"""Publish while being imported, as an application may, and then from each request of each forked worker."""

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pubsub_mw import PubSub

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def _app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    position = environ["pubsub.publish"]("preloaded", os.getpid())
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"pid": os.getpid(), "offset": position.offset}).encode()]


app = PubSub(_app)
app.publisher.publish("preloaded", "before the fork")
