"""Answer requests in the ways that tests need. Each run of a view leaves a line in the file `RUNS`."""

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Flask, Response, make_response, request

from pubsub_mw import PubSub

app = Flask(__name__)
app.wsgi_app = PubSub(app.wsgi_app)  # type: ignore[method-assign]

_RUNS = os.environ.get("RUNS", os.devnull)
_GATE = Path(os.environ.get("GATE", os.devnull))


def _note(event: str) -> None:
    """Write one line, whole, whichever process does."""
    connection = request.environ["pubsub.connection"]
    line = {"event": event, "id": connection.message_id, "connection": connection.id, "pid": os.getpid()}
    line |= {"delivery_count": connection.delivery_count, "at": time.time()}
    descriptor = os.open(_RUNS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


def _wait_for(count: int) -> None:
    """Wait until the file `GATE` holds so many bytes."""
    while not (_GATE.exists() and _GATE.stat().st_size >= count):
        time.sleep(0.005)


@app.route("/echo", methods=["GET", "POST", "PUT", "DELETE"])
def echo() -> dict[str, Any]:
    _note("run")
    return {
        "method": request.method,
        "query": request.query_string.decode(),
        "headers": dict(request.headers),
        "cookies": request.cookies,
        "body": base64.b64encode(request.get_data()).decode(),
        "address": request.remote_addr,
        "scheme": request.scheme,
        "user": request.environ["pubsub.connection"].user,
    }


@app.route("/run")
def run() -> str:
    _note("run")
    return str(request.environ["pubsub.connection"].delivery_count)


@app.route("/gate")
def gate() -> str:
    _note("run")
    _wait_for(1)
    return str(request.environ["pubsub.connection"].delivery_count)


@app.route("/die")
def die() -> str:
    """Take the worker's process along when run for the first time."""
    _note("run")
    if request.environ["pubsub.connection"].delivery_count == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return str(request.environ["pubsub.connection"].delivery_count)


@app.route("/cookie")
def cookie() -> Response:
    response = make_response("set")
    response.set_cookie("canary", "of-the-view")
    response.headers["X-Secret"] = "secret-of-the-view"
    return response


@app.route("/large/<int:size>")
def large(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


@app.route("/stream/<int:count>")
def stream(count: int) -> Response:
    """Say each number when the gate is so far open."""
    _note("run")

    def numbers() -> Iterator[str]:
        for number in range(count):
            _wait_for(number)
            yield f"{number},"

    response = Response(numbers(), mimetype="text/plain")
    environ = request.environ

    def note_close() -> None:
        with app.request_context(environ):
            _note("closed")

    response.call_on_close(note_close)
    return response
