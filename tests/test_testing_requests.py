"""Requests over a connection in a plain test of an application, with no server and no broker."""

import json
from typing import Any

import pytest
from flask import Flask, Response, abort, jsonify, request, session

from pubsub_mw import PubSub
from pubsub_mw.errors import FrameError
from pubsub_mw.testing import TestConnection, capture


def application() -> Any:
    app = Flask(__name__)
    app.secret_key = "secret"
    app.wsgi_app = PubSub(app.wsgi_app)  # type: ignore[method-assign]

    @app.route("/echo", methods=["GET", "POST", "PUT"])
    def echo() -> Response:
        connection = request.environ["pubsub.connection"]
        return jsonify(
            method=request.method,
            args=request.args,
            json=request.get_json(silent=True),
            text=request.get_data(as_text=True),
            cookies=request.cookies,
            origin=request.headers.get("Origin"),
            token=request.headers.get("X-CSRFToken"),
            secure=request.is_secure,
            user=connection.user,
            connection=connection.id,
            delivery_count=connection.delivery_count,
        )

    @app.post("/say")
    def say() -> tuple[str, int]:
        request.environ["pubsub.publish"]("room", request.json, exclude=request.environ["pubsub.connection"].id)
        return "", 201

    @app.get("/login")
    def login() -> str:
        session["user"] = "7"
        return "in"

    @app.get("/stream")
    def stream() -> Response:
        return Response(f"{number}," for number in range(3))

    @app.get("/breaks")
    def breaks() -> Response:
        def numbers() -> Any:
            yield "0,"
            raise ValueError

        return Response(numbers())

    @app.get("/missing")
    def missing() -> str:
        abort(404)

    return app


@pytest.fixture
def connection() -> TestConnection:
    return TestConnection(application(), user="7", cookies={"session": "abc", "b": "c"}, scheme="https")


def test_a_view_sees_the_connection_and_the_request(connection: TestConnection) -> None:
    answered = connection.fetch("/echo?a=1", headers={"X-CSRFToken": "t"}, json={"text": "ä"}, delivery_count=2)
    assert answered.status == 200
    assert answered.headers["content-type"] == "application/json"
    seen = answered.json()
    assert seen["connection"] == connection.id
    del seen["connection"]
    assert json.loads(seen.pop("text")) == {"text": "ä"}
    assert seen == {
        "method": "POST",
        "args": {"a": "1"},
        "json": {"text": "ä"},
        "cookies": {"session": "abc", "b": "c"},
        "origin": "https://localhost",
        "token": "t",
        "secure": True,
        "user": "7",
        "delivery_count": 2,
    }


def test_a_body_alone_makes_a_post_and_nothing_makes_a_get(connection: TestConnection) -> None:
    assert connection.fetch("/echo", body="x").json()["method"] == "POST"
    assert connection.fetch("/echo").json()["method"] == "GET"
    assert connection.fetch("/echo", method="put", body=b"x").json()["method"] == "PUT"


def test_what_a_view_publishes_is_captured(connection: TestConnection) -> None:
    with capture() as published:
        assert connection.fetch("/say", json={"text": "hi"}).status == 201
    assert [(item.channel, item.data, item.exclude) for item in published] == [("room", {"text": "hi"}, connection.id)]


def test_a_client_gets_no_cookie_and_no_header_that_is_not_on_the_list(connection: TestConnection) -> None:
    answered = connection.fetch("/login")
    assert answered.text == "in"
    assert set(answered.headers) <= {"content-type", "vary"}


def test_a_stream_keeps_its_chunks_and_says_where_it_broke(connection: TestConnection) -> None:
    assert connection.fetch("/stream").chunks == (b"0,", b"1,", b"2,")
    broken = connection.fetch("/breaks")
    assert (broken.body, broken.problem) == (b"0,", "the application failed")


def test_an_error_of_the_application_is_an_answer(connection: TestConnection) -> None:
    assert connection.fetch("/missing").status == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "/a/../echo"},
        {"path": "/echo", "headers": {"X User": "1"}},
        {"path": "/echo", "headers": {"Accept": "a\r\nb"}},
        {"path": "/echo", "method": "TRACE"},
    ],
)
def test_it_is_as_strict_as_a_server(connection: TestConnection, wrong: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        connection.fetch(**wrong)


def test_only_what_the_settings_allow_may_be_requested() -> None:
    connection = TestConnection(application(), requests="/rooms/*")
    with pytest.raises(FrameError, match="may not be requested"):
        connection.fetch("/echo")
