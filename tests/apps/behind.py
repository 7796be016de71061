"""Say what an app behind nginx sees of its visitor, over HTTP and over a connection."""

from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix

from pubsub_mw import PubSub

app = Flask(__name__)
app.wsgi_app = PubSub(ProxyFix(app.wsgi_app, x_for=1, x_proto=1))  # type: ignore[method-assign]


@app.route("/seen", methods=["GET", "POST"])
def seen() -> dict[str, object]:
    return {
        "address": request.remote_addr,
        "scheme": request.scheme,
        "host": request.host,
        "origin": request.headers.get("Origin"),
        "forwarded": request.headers.getlist("X-Forwarded-For"),
        "cookies": request.cookies,
    }


@app.get("/page")
def page() -> str:
    return "<!doctype html><title>behind nginx</title><link rel=icon href='data:,'>"


@app.post("/heard")
def heard() -> tuple[str, int]:
    return "", 204
