"""What the tests of a Django site and of a Flask app with Flask-WTF see of their own views, and of CSRF protection."""

from typing import Any

import django.test
import pytest
from flask import Flask
from flask_wtf import CSRFProtect
from flask_wtf.csrf import generate_csrf

from pubsub_mw import PubSub
from pubsub_mw.testing import TestConnection, WithPubSub, capture
from tests.apps.django_site import application


class Client(WithPubSub, django.test.Client):  # type: ignore[misc]
    """As the documentation has it."""


@pytest.fixture
def client() -> Client:
    return Client(headers={"host": "site.example"})


# Django's own test client.


def test_a_django_view_is_seen_publishing_by_djangos_test_client(client: Client) -> None:
    with capture() as published:
        answer = client.post("/say", {"text": "hi"})
    assert answer.status_code == 201
    assert [(item.channel, item.data, item.exclude) for item in published] == [("room", "hi", None)]


@pytest.mark.parametrize(("status", "seen"), [(200, [200]), (302, [302]), (404, [404]), (500, [])])
def test_on_success_is_seen_by_djangos_test_client_if_the_response_is_one(
    client: Client, status: int, seen: list[int]
) -> None:
    with capture() as published:
        assert client.get(f"/later/{status}").status_code == status
    assert [item.data for item in published] == seen


def test_on_success_is_not_seen_by_djangos_test_client_if_the_view_raises(client: Client) -> None:
    with capture() as published:
        with pytest.raises(RuntimeError, match="a fault of the application"):
            client.get("/fail")
        client.raise_request_exception = False
        assert client.get("/fail").status_code == 500
    assert published == []


def test_each_test_client_can_be_given_more_for_its_requests(client: Client) -> None:
    connection = TestConnection(application)
    with capture() as published:
        client.post("/say", {"text": "hi"}, **{"pubsub.connection": connection.as_seen("1")})
    assert published[0].exclude == connection.id


# CSRF protection, over a connection. Each line is one thing that a handshake or a client does otherwise.

HANDSHAKE = {"host": "site.example", "origin": "https://site.example"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}

TABLE: list[tuple[str, int, dict[str, Any]]] = [
    ("cookie, token, origin, scheme and host", 201, {}),
    ("the cookie alone", 403, {"token": None}),
    ("the token alone", 403, {"cookies": {}}),
    ("a token of another cookie", 403, {"token": "x" * 32}),
    ("no origin over https", 403, {"origin": None}),
    ("a foreign origin", 403, {"origin": "https://evil.example"}),
    ("the scheme lost", 403, {"scheme": "http"}),
    ("the host lost", 400, {"host": None}),
]


def say(app: Any, token: str | None, cookies: dict[str, str], **changed: Any) -> Any:
    scheme = changed.pop("scheme", "https")
    connection = TestConnection(app, cookies=cookies, headers={**HANDSHAKE, **changed}, scheme=scheme)
    headers = FORM if token is None else {**FORM, "X-CSRFToken": token}
    with capture() as published:
        answer = connection.fetch("/say", headers=headers, body="text=hi")
    assert len(published) == (answer.status == 201)
    return answer


@pytest.mark.parametrize(("status", "changed"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_django_decides_over_a_connection_as_it_does_over_http(
    client: Client, status: int, changed: dict[str, Any]
) -> None:
    token = client.get("/token", secure=True).text
    cookies = {name: morsel.value for name, morsel in client.cookies.items()}
    answer = say(application, **{"token": token, "cookies": cookies, **changed})
    assert answer.status == status
    if status == 201:
        assert answer.json() == {"user": "ada"}  # the session is the visitor's


@pytest.mark.parametrize(
    ("status", "changed"),
    [
        (201, {}),
        (400, {"token": None}),
        (400, {"cookies": {}}),
        (400, {"token": "x" * 32}),
        (400, {"origin": None}),
        (400, {"origin": "https://evil.example"}),
    ],
)
def test_flask_wtf_decides_over_a_connection_as_it_does_over_http(status: int, changed: dict[str, Any]) -> None:
    app = Flask(__name__)
    app.secret_key = "of the tests"
    CSRFProtect(app)
    app.get("/token")(generate_csrf)
    app.post("/say")(lambda: ({"user": "ada"}, 201, publish()))

    def publish() -> dict[str, str]:
        from flask import request

        request.environ["pubsub.publish"]("room", "hi")
        return {}

    app.wsgi_app = PubSub(app.wsgi_app)  # type: ignore[method-assign]
    visitor = app.test_client()
    token = visitor.get("/token", base_url="https://site.example").text
    cookie = visitor.get_cookie("session", domain="site.example")
    assert cookie is not None
    answer = say(app, **{"token": token, "cookies": {"session": cookie.value}, **changed})
    assert answer.status == status
