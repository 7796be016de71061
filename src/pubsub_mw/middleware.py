"""DOOR 1: put a publisher into a WSGI app's environ, and leave everything else alone.

In:     a request's environ and start_response
Out:    the app's own response, byte for byte; before it, the publications that waited for its success
Owns:   `environ["pubsub.publish"]`, `["pubsub.publisher"]`, `["pubsub.connection"]`
Never:  copies or wraps a response that it need not; lets a broker's fault turn a good response into an error

Source: PEP 3333, "Specification Details". Environ keys carry a dot, as it asks of servers and middleware.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pubsub_mw.drafts import build_draft
from pubsub_mw.errors import PublishError
from pubsub_mw.model import Draft, Position
from pubsub_mw.publisher import Publisher

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["PubSub", "RequestPublisher"]

log = logging.getLogger("pubsub_mw")

OnPublishError = Callable[[PublishError, list[Draft]], None]


class PubSub:
    """Wrap a WSGI app, so that its views find `environ["pubsub.publish"]`.

    Args:
        app: the WSGI app; stays what it was
        url: the broker; None = `PUBSUB_URL`, else `memory://`
        on_publish_error: called with the `PublishError` and the publications of an `on_success` that
            could not be published; the response has gone out by then, so this is the place to store
            or report them. An exception in it is logged
        settings: any field of `Settings`

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(
        self,
        app: "WSGIApplication",
        url: str | None = None,
        *,
        on_publish_error: OnPublishError | None = None,
        **settings: Any,
    ) -> None:
        self.app = app
        self.publisher = Publisher(url, **settings)
        self._on_publish_error = on_publish_error

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        publish = RequestPublisher(self.publisher, self._on_publish_error)
        environ["pubsub.publish"] = publish
        environ["pubsub.publisher"] = self.publisher
        environ.setdefault("pubsub.connection", None)

        def note_status(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            write = start_response(status, headers, exc_info) if exc_info else start_response(status, headers)
            publish.note_status(int(status[:3]))
            return write

        response = self.app(environ, note_status)
        if publish.has_status:
            publish.finish()
            return response
        # The app has not called start_response yet: it may, up to its first chunk (PEP 3333).
        return _LateStart(response, publish)


class RequestPublisher:
    """`environ["pubsub.publish"]` of one request: call it to publish now."""

    __slots__ = ("_is_finished", "_on_error", "_publisher", "_status", "_waiting")

    def __init__(self, publisher: Publisher, on_error: OnPublishError | None) -> None:
        self._publisher = publisher
        self._on_error = on_error
        self._waiting: list[Draft] = []
        self._status: int | None = None
        self._is_finished = False

    def __call__(
        self,
        channel: str,
        data: object,
        *,
        event: str = "message",
        exclude: str | None = None,
        idempotency_key: str | None = None,
        history: bool | int | None = None,
    ) -> Position:
        """Publish now; see `Publisher.publish`."""
        return self._publisher.publish(
            channel, data, event=event, exclude=exclude, idempotency_key=idempotency_key, history=history
        )

    def many(self, items: Iterable[tuple[str, object] | Mapping[str, Any]]) -> list[Position]:
        """Publish several now, in one round trip; see `Publisher.many`."""
        return self._publisher.many(items)

    def on_success(
        self,
        channel: str,
        data: object,
        *,
        event: str = "message",
        exclude: str | None = None,
        idempotency_key: str | None = None,
        history: bool | int | None = None,
    ) -> None:
        """Publish once the app has returned a response below 500; forget it if the app raises or answers 5xx.

        `data` is encoded now, so what changes later does not show. All that a request leaves here goes
        out in one round trip, before the response. If the broker fails then, the response goes out all
        the same; the failure is logged and given to `on_publish_error`. Called while a response is
        already streaming, it publishes at once.

        Raises:
            ValueError, TypeError: an argument is wrong.
        """
        self._waiting.append(
            build_draft(
                self._publisher.settings,
                channel,
                data,
                event=event,
                exclude=exclude,
                idempotency_key=idempotency_key,
                history=history,
            )
        )
        if self._is_finished:
            self.finish()

    @property
    def has_status(self) -> bool:
        """Whether the app has called start_response."""
        return self._status is not None

    def note_status(self, status: int) -> None:
        """Take the status that the app gave; the last one counts."""
        self._status = status

    def forget(self) -> None:
        """Drop what waits: the app raised."""
        self._waiting.clear()

    def finish(self) -> None:
        """Publish what waits if the status is below 500, else forget it. Never raises."""
        self._is_finished = True
        drafts, self._waiting = self._waiting, []
        if not drafts or self._status is None or self._status >= 500:
            return
        try:
            self._publisher.publish_drafts(drafts)
        except PublishError as error:
            log.error("on_success: %s", error)
            if self._on_error is not None:
                try:
                    self._on_error(error, drafts)
                except Exception:
                    log.exception("on_publish_error raised")


class _LateStart:
    """The response of an app that calls start_response only when its first chunk is asked for."""

    def __init__(self, response: Iterable[bytes], publish: RequestPublisher) -> None:
        self._response = response
        self._chunks: Iterator[bytes] | None = None
        self._publish = publish
        self._is_open = True

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._chunks is None:
                self._chunks = iter(self._response)
            chunk = next(self._chunks)
        except StopIteration:
            self._settle()
            raise
        except BaseException:
            self._publish.forget()
            raise
        self._settle()
        return chunk

    def _settle(self) -> None:
        if self._is_open and self._publish.has_status:
            self._is_open = False
            self._publish.finish()

    def close(self) -> None:
        close = getattr(self._response, "close", None)
        if close is not None:
            close()
