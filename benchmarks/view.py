"""The views that both sides of `requests.py` serve: the smallest one there is, and one that takes and gives JSON."""

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

app = Flask(__name__)


@app.get("/hello")
def hello() -> str:
    return "hello"


@app.post("/rooms/<int:room>/messages")
def say(room: int) -> ResponseReturnValue:
    return jsonify(room=room, text=request.get_json()["text"]), 201
