"""See what a test's request published, and send a request as a connection would; no broker needed.

In:     a test that makes requests, through the wrapped WSGI app, or by Django's own test client, which passes by that
Out:    the publications, in order; answers as a client would get them
Owns:   an engine that records, in the place of the broker, while `capture` is open
Never:  delivers anything; is more lenient than a server (names, sizes, headers and data are checked as ever)

    from pubsub_mw.testing import capture

    def test_say(client):
        with capture() as published:
            client.post("/rooms/42/messages", json={"text": "hi"})
        assert published[0].channel == "room:42"
        assert published[0].data == {"text": "hi"}

    def test_say_over_the_connection():
        connection = TestConnection(app, cookies={"session": "..."}, user="7")
        assert connection.fetch("/rooms/42/messages", json={"text": "hi"}).status == 201
"""

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pubsub_mw.broker.engines import stand_in
from pubsub_mw.broker.memory import MemoryBroker
from pubsub_mw.drafts import encode_data
from pubsub_mw.middleware import RequestPublisher
from pubsub_mw.model import ConnectionId, Draft, Handshake, Position, RequestConnection
from pubsub_mw.protocol import RequestFrame, message_tail
from pubsub_mw.publisher import Publisher
from pubsub_mw.realtime.request_check import RequestCheck
from pubsub_mw.settings import Settings
from pubsub_mw.worker.answers import Answer
from pubsub_mw.worker.environ import build_environ
from pubsub_mw.worker.wsgi import run_wsgi

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["Answered", "Published", "TestConnection", "WithPubSub", "capture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One publication that would have gone out.

    Attributes:
        channel: its name
        data: as a client would get it, after encoding
        event: what kind it is
        exclude: the connection id that would not get it, or None
        idempotency_key: as given, or None
        position: what the publisher was told
    """

    channel: str
    data: Any
    event: str
    exclude: str | None
    idempotency_key: str | None
    position: Position


@contextlib.contextmanager
def capture() -> Iterator[list[Published]]:
    """Record instead of publishing, in the whole process, for every publisher that exists or is made.

    Idempotency keys hold: the same key twice on a channel is recorded once. Do not nest it.
    """
    recorder = _Recorder(Settings())
    with stand_in(recorder):
        yield recorder.published


class _Recorder(MemoryBroker):
    """A memory broker that nobody listens to, and that remembers everything."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.expect_endpoint()
        self.published: list[Published] = []

    def publish(self, drafts: Sequence[Draft]) -> list[Position]:
        positions = super().publish(drafts)
        for draft, position in zip(drafts, positions, strict=True):
            if position.tag == draft.tag:  # else its idempotency key was known
                frame = json.loads(draft.head + message_tail)
                self.published.append(
                    Published(
                        channel=frame["channel"],
                        data=frame["data"],
                        event=frame["event"],
                        exclude=draft.exclude or None,
                        idempotency_key=draft.idempotency_key or None,
                        position=position,
                    )
                )
        return positions


class WithPubSub:
    """Give Django's own test client what `PubSub` gives a view: it calls views without the WSGI application.

    class Client(WithPubSub, django.test.Client):
        pass

    class MessagesTest(TestCase):
        client_class = Client
    """

    def request(self, **request: Any) -> Any:
        """Make a request with the keys of `PubSub` in its environ; those that are given stay."""
        publisher = Publisher()
        publish = RequestPublisher(publisher, None)
        keys = {"pubsub.publish": publish, "pubsub.publisher": publisher, "pubsub.connection": None}
        response = super().request(**{**keys, **request})  # type: ignore[misc]
        publish.note_status(response.status_code)
        publish.finish()
        return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer to a request, as the client would get it.

    Attributes:
        status: such as 200
        headers: those that a client gets, lower-case names
        chunks: one for each `response_chunk`, or the only one
        problem: None, or why a stream broke off
    """

    status: int
    headers: dict[str, str]
    chunks: tuple[bytes, ...]
    problem: str | None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class TestConnection:
    """A client's connection, for requests to `app` in a test. The app runs in the calling thread.

    Args:
        app: the WSGI app
        user: who the connection's grant says it is
        cookies: sent with the handshake
        headers: more of the handshake, such as `origin`; None leaves out one that is there by itself
        scheme: `http` or `https`
        settings: any field of `Settings`; every path may be requested unless `requests` says otherwise
    """

    __test__ = False

    def __init__(
        self,
        app: "WSGIApplication",
        *,
        user: str | None = None,
        cookies: Mapping[str, str] | None = None,
        headers: Mapping[str, str | None] | None = None,
        scheme: str = "http",
        **settings: Any,
    ) -> None:
        values: dict[str, str | None] = {"host": "localhost", "origin": f"{scheme}://localhost"}
        values |= {name.lower(): value for name, value in (headers or {}).items()}
        if cookies:
            values["cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        self.id = ConnectionId(secrets.token_urlsafe(16))
        self._app = app
        self._user = user
        kept = tuple((name, value) for name, value in values.items() if value is not None)
        self._handshake = Handshake(headers=kept, scheme=scheme, address="127.0.0.1")
        self._settings = Settings.build(**{"requests": "/*", **settings})
        self._check = RequestCheck(self._settings)
        self._count = 0

    def as_seen(self, message_id: str, *, delivery_count: int = 1) -> RequestConnection:
        """Return `environ["pubsub.connection"]` of one request, for a test that makes its requests by other means."""
        return RequestConnection(
            id=self.id,
            user=self._user,
            transport="websocket",
            message_id=message_id,
            delivery_count=delivery_count,
        )

    def fetch(
        self,
        path: str,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | str = b"",
        json: object = None,
        delivery_count: int = 1,
    ) -> Answered:
        """Send a request and return its answer.

        Args:
            path: with its query string
            method: default GET, or POST where there is a body
            headers: as a client may choose them
            body: bytes, or a text
            json: instead of `body`
            delivery_count: 2 = as if a worker had died while it ran this before

        Raises:
            FrameError: a server would refuse it.
        """
        self._count += 1
        chosen = dict(headers or {})
        if json is not None:
            body = encode_data(json)
            chosen.setdefault("content-type", "application/json")
        content = body.encode() if isinstance(body, str) else body
        frame = RequestFrame(
            id=str(self._count),
            method=method or ("POST" if content else "GET"),
            path=path,
            headers=chosen,
            body=content,
        )
        sink = _Collector()
        request = self._check.check(frame, self.id, self._user, self._handshake)
        run_wsgi(self._app, build_environ(request, delivery_count), sink)
        return sink.answered(Answer(request, self._settings))


class _Collector:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self._status = 500
        self._headers: list[tuple[str, str]] = []
        self._chunks: list[bytes] = []
        self._problem: str | None = None

    def whole(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.head(status, headers)
        self._chunks.append(body)

    def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._status, self._headers = status, headers

    def chunk(self, body: bytes) -> None:
        self._chunks.append(body)

    def end(self, problem: str | None) -> None:
        self._problem = problem

    @property
    def is_wanted(self) -> bool:
        return True

    def answered(self, answer: Answer) -> Answered:
        answer.head(self._status, self._headers)
        return Answered(status=answer.status, headers=answer.headers, chunks=tuple(self._chunks), problem=self._problem)
