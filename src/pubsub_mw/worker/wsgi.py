"""Run a WSGI app on one request.

In:     an environ
Out:    the head, the chunks and the end of its answer, to a sink
Owns:   the server's side of PEP 3333: start_response, write, and close() on the iterable, whatever happens
Never:  holds back a chunk of a view that streams; goes on with a view whose answer nobody wants
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

__all__ = ["Sink", "run_wsgi"]

log = logging.getLogger("pubsub_mw")


class Sink(Protocol):
    """Where an answer goes. Every method may be called from any thread."""

    def whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None: ...

    def head(self, status: int, headers: list[tuple[str, str]]) -> None: ...

    def chunk(self, body: bytes) -> None: ...

    def end(self, problem: str | None) -> None: ...

    @property
    def is_wanted(self) -> bool:
        """Whether the client still waits."""


def run_wsgi(
    app: "WSGIApplication", environ: "WSGIEnvironment", sink: Sink, pace: Callable[[], None] = lambda: None
) -> None:
    """Run `app` and tell `sink` its answer; what the app raises is logged and ends the answer.

    Args:
        app: the application
        environ: of this request
        sink: where its answer goes
        pace: called after each chunk; returns when there is room for another
    """
    start: list[Any] = []
    written: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if start and exc_info is None:
            raise AssertionError("start_response was called a second time without exc_info")
        start[:] = [int(status[:3]), list(headers)]
        return written.append

    response = None
    try:
        response = app(environ, start_response)
        if start and _is_whole(start[1], response):
            sink.whole(start[0], start[1], b"".join([*written, *response]))
            return
        is_told = False
        for chunk in response:
            if not start:
                raise AssertionError("a chunk came before start_response was called")
            if not is_told:
                is_told = True
                sink.head(start[0], start[1])
                for early in written:
                    sink.chunk(early)
            if not sink.is_wanted:
                sink.end("cancelled")
                return
            if chunk:
                sink.chunk(b"".join([chunk]))  # as it is, or a TypeError here: text cannot be sent
                pace()
        if not start:
            raise AssertionError("the app returned without calling start_response")
        if is_told:
            sink.end(None)
        else:
            sink.whole(start[0], start[1], b"".join(written))
    except BaseException:  # sys.exit() too: it is the view that ends, not the worker's thread
        log.exception("%s %s raised", environ["REQUEST_METHOD"], environ["PATH_INFO"])
        sink.end("the application failed")
    finally:
        close = getattr(response, "close", None)
        if close is not None:
            try:
                close()
            except Exception:
                log.exception("close() raised after %s %s", environ["REQUEST_METHOD"], environ["PATH_INFO"])


def _is_whole(headers: list[tuple[str, str]], response: object) -> bool:
    """Whether the answer is complete as it stands: it has a length, or it is a list of chunks already."""
    return isinstance(response, (list, tuple)) or any(name.lower() == "content-length" for name, _ in headers)
