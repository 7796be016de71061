"""Chat rooms, live: a Flask app that stays stateless and synchronous.

Two lines are the realtime part, the wrap and the call of `publish`. The page asks for one thing more, the position
that it goes on from: read before the messages are, so that none can fall between the page and its subscription.
"""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from uuid import uuid4

from flask import Flask, abort, redirect, render_template, request, url_for
from werkzeug.routing import BaseConverter

from pubsub_mw import PubSub

app = Flask(__name__)
app.wsgi_app = PubSub(app.wsgi_app)
app.config["REALTIME_URL"] = os.environ.get("REALTIME_URL", "/realtime")
app.config["CHAT_DB"] = os.environ.get("CHAT_DB", os.path.join(app.instance_path, "chat.sqlite3"))


class RoomConverter(BaseConverter):
    regex = "[a-z0-9][a-z0-9-]{0,39}"  # part of a channel's name too, so no more than a channel allows


app.url_map.converters["room"] = RoomConverter


@contextmanager
def database() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(app.config["CHAT_DB"])) as db, db:  # commits at the end, or rolls back, and closes
        db.row_factory = sqlite3.Row
        yield db


os.makedirs(os.path.dirname(os.path.abspath(app.config["CHAT_DB"])), exist_ok=True)
with database() as db:
    db.execute("""CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, room TEXT, name TEXT, text TEXT,
        sent TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ')), key TEXT, UNIQUE (room, key))""")


@app.get("/")
def index():
    room = re.sub("[^a-z0-9]+", "-", request.args.get("room", "").lower()).strip("-")[:40]
    return redirect(url_for("show_room", room=room or "lobby"))


@app.get("/rooms/<room:room>")
def show_room(room):
    position = request.environ["pubsub.publisher"].position(f"room:{room}")
    with database() as db:
        recent = db.execute("SELECT room FROM messages GROUP BY room ORDER BY max(id) DESC LIMIT 6")
        rooms = {"lobby": 1, room: 1} | {row["room"]: 1 for row in recent}
    return render_template("room.html", room=room, rooms=rooms, position=position, messages=messages(room), key=uuid4())


@app.get("/rooms/<room:room>/messages")
def messages(room):
    with database() as db:
        rows = db.execute("SELECT id, name, text, sent FROM messages WHERE room = ? ORDER BY id DESC LIMIT 50", [room])
        return [dict(row) for row in rows][::-1]


@app.post("/rooms/<room:room>/messages")
def say(room):
    name, text, key = (request.form.get(field, "").strip() for field in ("name", "text", "key"))
    if not (0 < len(name) <= 40 and 0 < len(text) <= 2000 and 0 < len(key) <= 40):
        abort(400)
    with database() as db:  # committed before it is published: whoever is told of a message can read it
        insert = "INSERT INTO messages (room, name, text, key) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        db.execute(insert, [room, name, text, key])
        row = db.execute("SELECT id, name, text, sent FROM messages WHERE room = ? AND key = ?", [room, key]).fetchone()
    publish = request.environ["pubsub.publish"]
    publish(f"room:{room}", dict(row), idempotency_key=key)  # sent twice by an unlucky browser, shown once
    wants_json = request.accept_mimetypes.best == "application/json"
    return (dict(row), 201) if wants_json else redirect(url_for("show_room", room=room), 303)
