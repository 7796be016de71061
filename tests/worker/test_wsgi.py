"""The server's side of PEP 3333."""

import logging
import sys
from collections.abc import Iterator
from typing import Any
from wsgiref.validate import validator

import pytest

from pubsub_mw.worker.environ import build_environ
from pubsub_mw.worker.wsgi import run_wsgi
from tests.worker.requests import Collector, request

PLAIN = [("Content-Type", "text/plain")]


class Body:
    """An iterable that knows whether it was closed, and how far it was asked."""

    def __init__(self, *chunks: bytes, raises: type[BaseException] | None = None) -> None:
        self._chunks = chunks
        self._raises = raises
        self.closed = 0
        self.asked = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.asked += 1
            yield chunk
        if self._raises is not None:
            raise self._raises("in the middle")

    def close(self) -> None:
        self.closed += 1


def run(app: Any, sink: Collector | None = None) -> list[tuple[Any, ...]]:
    sink = sink or Collector()
    run_wsgi(app, build_environ(request(), 1), sink)
    return sink.told


def app_of(response: Any, headers: list[tuple[str, str]] = PLAIN) -> Any:
    def app(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", headers)
        return response

    return app


@pytest.mark.parametrize("chunks", [[], [b"a"], [b"a", b"b"], (b"ab",)])
def test_a_list_is_the_whole_answer(chunks: Any) -> None:
    assert run(app_of(chunks)) == [("whole", 200, PLAIN, b"".join(chunks))]


def test_an_answer_with_a_length_is_whole_however_it_is_made() -> None:
    headers = [("content-LENGTH", "2")]
    body = Body(b"a", b"b")
    assert run(app_of(body, headers)) == [("whole", 200, headers, b"ab")]
    assert body.closed == 1


def test_an_iterator_streams_chunk_by_chunk_and_is_closed() -> None:
    body = Body(b"a", b"", b"b")
    assert run(app_of(body)) == [("head", 200, PLAIN), ("chunk", b"a"), ("chunk", b"b"), ("end", None)]
    assert body.closed == 1


def test_an_iterator_without_a_chunk_is_an_empty_answer() -> None:
    body = Body()
    assert run(app_of(body)) == [("whole", 200, PLAIN, b"")]
    assert body.closed == 1


def test_start_response_may_be_called_as_late_as_the_first_chunk() -> None:
    def app(_environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("201 Created", PLAIN)
        yield b"a"

    assert run(app) == [("head", 201, PLAIN), ("chunk", b"a"), ("end", None)]


def test_what_is_written_comes_first() -> None:
    def app(_environ: Any, start_response: Any) -> Body:
        write = start_response("200 OK", PLAIN)
        write(b"a")
        write(b"b")
        return Body(b"c")

    told = run(app)
    assert [part[1] for part in told if part[0] == "chunk"] == [b"a", b"b", b"c"]


def test_exc_info_replaces_the_head_as_long_as_nothing_was_sent() -> None:
    def app(_environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", PLAIN)
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())
        return [b"sorry"]

    assert run(app) == [("whole", 500, [], b"sorry")]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, GeneratorExit])
def test_an_app_that_raises_is_logged_and_its_answer_ends(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def app(_environ: Any, _start_response: Any) -> list[bytes]:
        raise kind("at once")

    assert run(app) == [("end", "the application failed")]
    assert "at once" in caplog.text


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_an_iterator_that_raises_is_closed_and_its_answer_ends(kind: type[BaseException]) -> None:
    body = Body(b"a", raises=kind)
    assert run(app_of(body))[-1] == ("end", "the application failed")
    assert body.closed == 1


@pytest.mark.parametrize(
    "app",
    [
        lambda _environ, _start_response: [b"no head"],
        lambda _environ, _start_response: iter([b"no head"]),
        lambda _environ, _start_response: iter([]),
        lambda _environ, start_response: (start_response("200 OK", []), start_response("200 OK", [])),
        lambda _environ, start_response: start_response("OK", []),
    ],
)
def test_an_app_against_pep_3333_is_answered_as_one_that_failed(app: Any) -> None:
    assert run(app) == [("end", "the application failed")]


@pytest.mark.parametrize("text", ["text", 7])
def test_what_is_no_bytes_among_the_chunks_ends_the_answer(text: Any) -> None:
    assert run(app_of(iter([text])))[-1] == ("end", "the application failed")
    told = run(app_of(iter([b"a", text, b"b"])))
    assert told[1:] == [("chunk", b"a"), ("end", "the application failed")]


def test_an_error_in_close_spoils_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Body):
        def close(self) -> None:
            raise ValueError("while closing")

    assert run(app_of(Bad(b"a")))[-1] == ("end", None)
    assert "while closing" in caplog.text


def test_a_stream_that_nobody_wants_is_closed_at_its_next_chunk() -> None:
    sink = Collector()

    class Unwanted(Body):
        def __iter__(self) -> Iterator[bytes]:
            for number, chunk in enumerate(super().__iter__()):
                sink.is_wanted = number < 1
                yield chunk

    body = Unwanted(b"a", b"b", b"c")
    assert run(app_of(body), sink) == [("head", 200, PLAIN), ("chunk", b"a"), ("end", "cancelled")]
    assert (body.closed, body.asked) == (1, 2)


def test_an_application_waits_after_each_chunk_until_there_is_room() -> None:
    sink, paced = Collector(), []
    run_wsgi(app_of(Body(b"a", b"b")), build_environ(request(), 1), sink, lambda: paced.append(len(sink.told)))
    assert paced == [2, 3]


@pytest.mark.parametrize("response", [[b"a"], Body(b"a", b"b"), Body()])
def test_a_validator_between_worker_and_app_finds_nothing(response: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = run(validator(app_of(response)))
    assert told[-1] in [("end", None), ("whole", 200, PLAIN, b"")]
    assert not caplog.records
