"""Rooms, and what was said in them: one SQLite file. Nothing in here knows of realtime."""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from werkzeug.routing import BaseConverter

FILE = Path(os.environ.get("CHAT_DB", Path(__file__).with_name("instance") / "chat.sqlite3"))


class RoomConverter(BaseConverter):
    regex = "[a-z0-9][a-z0-9-]{0,39}"  # part of a channel's name too, so no more than a channel allows


def room_named(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "lobby"


@contextmanager
def database() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(FILE)) as db, db:  # commits at the end, or rolls back, and closes
        db.row_factory = sqlite3.Row
        yield db


FILE.parent.mkdir(parents=True, exist_ok=True)
with database() as db:
    db.execute("""CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, room TEXT, name TEXT, text TEXT,
        sent TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ')), key TEXT, UNIQUE (room, key))""")


def recent_messages(room: str) -> list[dict[str, str | int]]:
    with database() as db:
        rows = db.execute("SELECT id, name, text, sent FROM messages WHERE room = ? ORDER BY id DESC LIMIT 50", [room])
        return [dict(row) for row in rows][::-1]


def recent_rooms() -> list[str]:
    with database() as db:
        return [row[0] for row in db.execute("SELECT room FROM messages GROUP BY room ORDER BY max(id) DESC LIMIT 6")]


def add_message(room: str, name: str, text: str, key: str) -> dict[str, str | int]:
    """Return what was added under `key`, now or before."""
    with database() as db:
        insert = "INSERT INTO messages (room, name, text, key) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        db.execute(insert, [room, name, text, key])
        found = db.execute("SELECT id, name, text, sent FROM messages WHERE room = ? AND key = ?", [room, key])
        return dict(found.fetchone())
