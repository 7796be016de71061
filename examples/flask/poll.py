"""A poll with htmx: the view publishes a piece of rendered HTML, and every open page puts it in place.

There is no script of ours on the page, and none of pubsub-mw's: htmx listens to server-sent events.
"""

from flask import Blueprint, abort, redirect, render_template, request, url_for

from live import position_of
from rooms import database

poll = Blueprint("poll", __name__)
CHANNEL = "poll:cup"

with database() as db:
    db.execute("CREATE TABLE IF NOT EXISTS poll (answer TEXT PRIMARY KEY, votes INTEGER DEFAULT 0)")
    db.execute("INSERT OR IGNORE INTO poll (answer) VALUES ('tea'), ('coffee'), ('cocoa'), ('water')")


def render_bars(db):
    answers = db.execute("SELECT answer, votes FROM poll ORDER BY rowid").fetchall()
    return render_template("bars.html", answers=answers, most=max(1, *(answer["votes"] for answer in answers)))


@poll.get("/poll")
def show():
    position = position_of(CHANNEL)
    with database() as db:
        return render_template("poll.html", channel=CHANNEL, position=position, bars=render_bars(db))


@poll.get("/poll/bars")
def bars():
    with database() as db:
        return render_bars(db)


@poll.post("/poll")
def vote():
    with database() as db:
        if not db.execute("UPDATE poll SET votes = votes + 1 WHERE answer = ?", [request.form.get("answer")]).rowcount:
            abort(400)
        # While this transaction holds the lock, so that the pieces are published in the order of the votes.
        request.environ["pubsub.publish"](CHANNEL, render_bars(db))
    return ("", 204) if "HX-Request" in request.headers else redirect(url_for("poll.show"), 303)
