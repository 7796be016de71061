"""The server's side of ASGI."""

import asyncio
from typing import Any

import pytest

from pubsub_mw.worker.asgi import Lifespan, run_asgi
from pubsub_mw.worker.environ import build_scope
from tests.tools.clock import MS
from tests.worker.requests import Collector, request

pytestmark = pytest.mark.anyio

HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
PLAIN = [("content-type", "text/plain")]


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def run(app: Any, sink: Collector | None = None, content: bytes = b"") -> list[tuple[Any, ...]]:
    async def pace() -> None:
        pass

    sink = sink or Collector()
    async with asyncio.timeout(10_000 * MS):
        await run_asgi(app, build_scope(request(), 1, {}), content, sink, pace)
    return sink.told


def sends(*messages: dict[str, Any]) -> Any:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


async def test_an_answer_in_one_message_is_whole() -> None:
    assert await run(sends(HEAD, body(b"a"))) == [("whole", 200, PLAIN, b"a")]


async def test_an_answer_in_several_messages_streams() -> None:
    told = await run(sends(HEAD, body(b"a", more=True), body(b"", more=True), body(b"b", more=True), body(b"")))
    assert told == [("head", 200, PLAIN), ("chunk", b"a"), ("chunk", b"b"), ("end", None)]


async def test_the_app_gets_the_body_at_once_and_then_waits_for_the_end() -> None:
    got: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())
        await send(HEAD)
        await send(body(b"a"))
        got.append(await receive())

    await run(app, content=b"sent")
    assert got == [{"type": "http.request", "body": b"sent", "more_body": False}, {"type": "http.disconnect"}]


async def test_an_app_whose_client_cancels_is_told_so_in_receive_and_in_send() -> None:
    sink, told_by = Collector(), []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(HEAD)
        await send(body(b"a", more=True))
        sink.is_wanted = False
        told_by.append((await receive())["type"])
        try:
            await send(body(b"b", more=True))
        except OSError:
            told_by.append("send")
            raise

    told = await run(app, sink)
    assert told[-1] == ("end", "cancelled")
    assert told_by == ["http.disconnect", "send"]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
@pytest.mark.parametrize("before", [[], [HEAD], [HEAD, body(b"a", more=True)]])
async def test_an_app_that_raises_is_logged_and_its_answer_ends(
    kind: type[BaseException], before: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in before:
            await send(message)
        raise kind("at once")

    assert (await run(app))[-1] == ("end", "the application failed")
    assert "at once" in caplog.text


@pytest.mark.parametrize("messages", [[], [HEAD], [body(b"a")], [HEAD, body(b"a", more=True)]])
async def test_an_app_that_does_not_complete_its_answer_is_answered_as_one_that_failed(messages: list[Any]) -> None:
    assert (await run(sends(*messages)))[-1] == ("end", "the application failed")


async def test_what_an_app_does_after_its_answer_belongs_to_nobody() -> None:
    assert await run(sends(HEAD, body(b"a"), body(b"b"))) == [("whole", 200, PLAIN, b"a")]


async def test_a_lifespan_starts_the_app_shares_its_state_and_stops_it() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for event in ("startup", "shutdown"):
            seen.append((await receive())["type"])
            scope["state"]["pool"] = event
            await send({"type": f"lifespan.{event}.complete"})

    state: dict[str, Any] = {}
    lifespan = Lifespan(app, state)
    await lifespan.start()
    assert state == {"pool": "startup"}
    await lifespan.stop()
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


async def test_an_app_that_knows_no_lifespan_needs_none() -> None:
    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        assert scope["type"] == "http"

    lifespan = Lifespan(app, {})
    await lifespan.start()
    await lifespan.stop()


async def test_an_app_that_cannot_start_says_why() -> None:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(RuntimeError, match="no database"):
        await Lifespan(app, {}).start()
