"""A Flask app with a login of its own, which decides who may listen and notes who comes and goes.

Reports are appended to the Redis list `WHO_REPORTS`, where the test reads them.
"""

import os

import redis
from flask import Flask, request, session
from flask.typing import ResponseReturnValue

from pubsub_mw import PubSub

__all__ = ["app"]

app = Flask(__name__)
app.secret_key = "the app's own key"
app.wsgi_app = PubSub(app.wsgi_app)  # type: ignore[method-assign]


@app.get("/")
def index() -> str:
    return "ready"


@app.post("/login/<user>")
def login(user: str) -> ResponseReturnValue:
    session["user"] = user
    return "", 204


@app.post("/logout")
def logout() -> ResponseReturnValue:
    """End the visitor's session and every connection of theirs."""
    request.environ["pubsub.publisher"].disconnect(user=session.pop("user"))
    return "", 204


@app.post("/rooms/<room>/leave/<user>")
def leave(room: str, user: str) -> ResponseReturnValue:
    request.environ["pubsub.publisher"].unsubscribe(f"private-{room}", user=user)
    return "", 204


@app.post("/grant/<user>")
def grant(user: str) -> str:
    return str(request.environ["pubsub.publisher"].grant(user, channels=["private-*"]))


@app.get("/pubsub/authorize")
def authorize() -> ResponseReturnValue:
    if request.environ["pubsub.connection"] is None or "user" not in session:
        return "", 403
    return {"user": session["user"]}


@app.post("/pubsub/lifecycle")
def lifecycle() -> ResponseReturnValue:
    if request.environ["pubsub.connection"] is None:
        return "", 403
    with redis.Redis.from_url(os.environ["PUBSUB_URL"]) as connection:
        connection.rpush(os.environ["WHO_REPORTS"], request.get_data())
    return "", 204
