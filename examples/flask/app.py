"""Chat rooms, live: a Flask app that stays stateless and synchronous.

Two lines make it live, the wrap and the call of `publish`. A page also says from which position it goes on, read before
the messages, so that none falls between; and whoever logs out is disconnected.
"""

import os
from functools import partial
from uuid import uuid4

from flask import Flask, abort, redirect, render_template, request, session, url_for

from letter import letter
from live import position_of
from poll import poll
from pubsub_mw import PubSub
from rooms import RoomConverter, add_message, recent_messages, recent_rooms, room_named

app = Flask(__name__)
app.wsgi_app = PubSub(app.wsgi_app)
app.secret_key = os.environ.get("CHAT_SECRET", "for development only")  # signs the session
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # no other site can post as the visitor
app.url_map.converters["room"] = RoomConverter
app.register_blueprint(letter)
app.register_blueprint(poll)


@app.get("/")
def index():
    return redirect(url_for("show_room", room=room_named(request.args.get("room", ""))), 303)


@app.post("/session")
def log_in_or_out():  # whoever says a name has it: here goes a login of your own
    response = redirect(url_for("index", room=request.form.get("room")), 303)
    if session:  # the connections of the visitor's other windows end as well, as soon as this answer is sent
        response.call_on_close(partial(request.environ["pubsub.publisher"].disconnect, user=session["user"]))
    session.clear()
    if name := request.form.get("name", "").strip()[:40]:
        session.update(name=name, user=uuid4().hex)
    return response


@app.get("/grant")
def grant():
    if not session:
        abort(401)
    publisher, info = request.environ["pubsub.publisher"], {"name": session["name"]}
    return {"grant": publisher.grant(user=session["user"], channels=["presence-room:*"], info=info)}


@app.get("/rooms/<room:room>")
def show_room(room):
    position = position_of(f"room:{room}")
    rooms = dict.fromkeys(["lobby", room, *recent_rooms()])
    page = {"room": room, "rooms": rooms, "position": position, "messages": recent_messages(room), "key": uuid4()}
    return render_template("room.html", **page)


@app.get("/rooms/<room:room>/messages")
def messages(room):
    return recent_messages(room)


@app.post("/rooms/<room:room>/messages")
def say(room):
    if "name" not in session:
        abort(401)
    text, key = request.form.get("text", "").strip(), request.form.get("key", "").strip()
    if not (0 < len(text) <= 2000 and 0 < len(key) <= 40):
        abort(400)
    message = add_message(room, session["name"], text, key)
    publish = request.environ["pubsub.publish"]
    publish(f"room:{room}", message, idempotency_key=key)  # sent twice by an unlucky browser, shown once
    wants_json = request.accept_mimetypes.best == "application/json"
    return (message, 201) if wants_json else redirect(url_for("show_room", room=room), 303)
