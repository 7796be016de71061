"""What an application's own tests see of what it publishes."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from flask import Flask, request

from pubsub_mw import AsyncPublisher, Publisher, PubSub
from pubsub_mw.errors import ChannelError, PublicationTooLarge
from pubsub_mw.testing import Published, capture

NOBODY = "redis://127.0.0.1:1/0"  # no broker is needed, not even one that a setting names


@pytest.fixture
def flask_app() -> Flask:
    app = Flask(__name__)

    @app.post("/rooms/<room>/messages")
    def say(room: str) -> tuple[dict[str, Any], int]:
        message = {"text": request.form["text"]}
        request.environ["pubsub.publish"](f"room:{room}", message, exclude=request.form.get("connection"))
        return message, 201

    @app.post("/later/<int:status>")
    def later(status: int) -> tuple[str, int]:
        request.environ["pubsub.publish"].on_success("room:1", status, event="done", idempotency_key="once")
        return "", status

    @app.post("/fails")
    def fail() -> str:
        request.environ["pubsub.publish"].on_success("room:1", "never")
        raise RuntimeError("a fault of the application")

    app.wsgi_app = PubSub(app.wsgi_app, NOBODY)  # type: ignore[method-assign]
    return app


def test_a_flask_view_is_seen_publishing(flask_app: Flask) -> None:
    with capture() as published:
        assert flask_app.test_client().post("/rooms/42/messages", data={"text": "hi"}).status_code == 201

    (one,) = published
    assert one == Published(
        channel="room:42",
        data={"text": "hi"},
        event="message",
        exclude=None,
        idempotency_key=None,
        position=one.position,
    )
    assert one.position.offset == 1


def test_all_that_was_said_is_seen_in_order(flask_app: Flask) -> None:
    client = flask_app.test_client()
    with capture() as published:
        for number in range(3):
            client.post("/rooms/1/messages", data={"text": f"{number}", "connection": "c1"})
        assert [one.data["text"] for one in published] == ["0", "1", "2"]
        assert [one.position.offset for one in published] == [1, 2, 3]
        assert {one.exclude for one in published} == {"c1"}


@pytest.mark.parametrize(("status", "is_seen"), [(200, True), (404, True), (500, False)])
def test_on_success_is_seen_if_the_response_is_one(flask_app: Flask, status: int, *, is_seen: bool) -> None:
    with capture() as published:
        flask_app.test_client().post(f"/later/{status}")
    assert [(one.data, one.event, one.idempotency_key) for one in published] == [(status, "done", "once")] * is_seen


def test_on_success_is_not_seen_if_the_view_raises(flask_app: Flask) -> None:
    with capture() as published:
        assert flask_app.test_client().post("/fails").status_code == 500
    assert published == []


def test_the_same_key_is_seen_once_per_channel_and_capture(flask_app: Flask) -> None:
    client = flask_app.test_client()
    for _ in range(2):
        with capture() as published:
            client.post("/later/200")
            client.post("/later/201")
            assert len(published) == 1
            publisher = Publisher(NOBODY)
            known = publisher.publish("room:1", "again", idempotency_key="once")
            assert known == published[0].position
            assert publisher.publish("room:2", "elsewhere", idempotency_key="once") == published[1].position


def test_a_plain_wsgi_app_is_seen_publishing_also_while_it_streams() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"1"
        environ["pubsub.publish"]("room:1", {"in": "the middle"})
        yield b"2"
        environ["pubsub.publish"].many([("room:1", 2), {"channel": "room:2", "data": 3, "event": "moved"}])

    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    with capture() as published:
        assert b"".join(PubSub(app, NOBODY)(environ, lambda *_: print)) == b"12"

    assert [(one.channel, one.data, one.event) for one in published] == [
        ("room:1", {"in": "the middle"}, "message"),
        ("room:1", 2, "message"),
        ("room:2", 3, "moved"),
    ]


def test_publishers_made_before_during_and_in_threads_are_all_seen() -> None:
    before = Publisher(NOBODY)
    with capture() as published:
        before.publish("room:1", "before")
        Publisher().publish("room:1", "during")
        thread = threading.Thread(target=before.publish, args=("room:1", "in a thread"))
        thread.start()
        thread.join()
        assert before.position("room:1") == published[-1].position
    assert [one.data for one in published] == ["before", "during", "in a thread"]


@pytest.mark.anyio
async def test_an_async_publisher_is_seen() -> None:
    publisher = AsyncPublisher(NOBODY)
    with capture() as published:
        position = await publisher.publish("room:1", "async")
        await asyncio.gather(*(publisher.publish("room:2", number) for number in range(3)))
        assert await publisher.position("room:1") == position
    assert (published[0].data, published[0].position) == ("async", position)
    assert [one.data for one in published[1:]] == [0, 1, 2]
    await publisher.close()


def test_data_is_seen_as_a_client_would_get_it() -> None:
    with capture() as published:
        data = {"when": (2026, 1), 7: "seven"}
        Publisher().publish("room:1", data)
        data["when"] = (0, 0)
    assert published[0].data == {"when": [2026, 1], "7": "seven"}


def test_what_may_not_be_published_raises_as_ever() -> None:
    with capture() as published:
        with pytest.raises(ChannelError):
            Publisher().publish("no such name", 1)
        with pytest.raises(PublicationTooLarge):
            Publisher(max_publication_bytes=64).publish("room:1", "x" * 100)
        with pytest.raises(TypeError):
            Publisher().publish("room:1", object())
    assert published == []


def test_captures_are_not_nested_and_the_outer_one_goes_on() -> None:
    with capture() as published:
        with pytest.raises(RuntimeError, match="nested"), capture():
            pytest.fail("it opened")
        Publisher().publish("room:1", "still seen")
    assert len(published) == 1


def test_a_capture_ends_with_its_block_also_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), capture() as published:
        raise ZeroDivisionError
    with caplog.at_level(logging.WARNING, "pubsub_mw"):
        Publisher("memory://", prefix="test-after-capture").publish("room:1", 1)
    assert published == []
    assert "nothing in this process listens" in caplog.text, "it went to the memory broker again"


def test_a_capture_starts_empty_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pubsub_mw"), capture():
        Publisher().publish("room:1", 1)
    with capture() as published:
        assert published == []
        assert Publisher().publish("room:1", 1).offset == 1
    assert not caplog.records
