"""Of what a client puts into a frame, only what it may choose reaches the application."""

import sys
from typing import Any
from wsgiref.validate import validator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_mw.errors import FrameError
from pubsub_mw.model import ConnectionId, Handshake, Request
from pubsub_mw.protocol import RequestFrame
from pubsub_mw.realtime.request_check import RequestCheck
from pubsub_mw.settings import Settings
from pubsub_mw.worker.environ import build_environ, build_scope
from tests.worker.requests import request

HANDSHAKE = Handshake(
    headers=(
        ("host", "site.example:8443"),
        ("user-agent", "Browser/1.0"),
        ("accept-encoding", "gzip, br"),
        ("accept-language", "fi"),
        ("origin", "https://site.example:8443"),
        ("cookie", "session=abc"),
        ("cookie", "csrftoken=def"),
        ("upgrade", "websocket"),
        ("connection", "Upgrade"),
        ("sec-websocket-key", "c2VjcmV0"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-protocol", "chat"),
        ("authorization", "Basic handshake"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-host", "proxy.example"),
        ("x_forwarded_for", "203.0.113.10"),
    ),
    scheme="https",
    address="192.0.2.1",
)

FROM_HANDSHAKE = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/",
    "QUERY_STRING": "",
    "SERVER_NAME": "site.example",
    "SERVER_PORT": "8443",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": "192.0.2.1",
    "CONTENT_LENGTH": "0",
    "HTTP_HOST": "site.example:8443",
    "HTTP_USER_AGENT": "Browser/1.0",
    "HTTP_ACCEPT_LANGUAGE": "fi",
    "HTTP_ORIGIN": "https://site.example:8443",
    "HTTP_REFERER": "https://site.example:8443/",
    "HTTP_COOKIE": "session=abc; csrftoken=def",
    "HTTP_X_FORWARDED_FOR": "192.0.2.1",
    "HTTP_X_FORWARDED_HOST": "site.example:8443",
    "HTTP_X_FORWARDED_PROTO": "https",
    "wsgi.url_scheme": "https",
}
"""All texts of the environ of `GET /` on `HANDSHAKE`."""


def check(**frame: Any) -> Request:
    """Take a request through the realtime server's check, as all do on their way here."""
    fields: dict[str, Any] = {"id": "1", "method": "GET", "path": "/", "headers": {}, "body": b""}
    checker = RequestCheck(Settings.build(environ={}, requests="/*"))
    return checker.check(RequestFrame(**(fields | frame)), ConnectionId("c1"), "7", HANDSHAKE)


def texts(environ: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if isinstance(value, str)}


# What a client may choose, and where it goes.
TAKEN = {
    "Accept": "HTTP_ACCEPT",
    "accept-language": "HTTP_ACCEPT_LANGUAGE",
    "Content-Type": "CONTENT_TYPE",
    "CONTENT-LANGUAGE": "HTTP_CONTENT_LANGUAGE",
    "Idempotency-Key": "HTTP_IDEMPOTENCY_KEY",
    "If-Match": "HTTP_IF_MATCH",
    "If-None-Match": "HTTP_IF_NONE_MATCH",
    "X-CSRFToken": "HTTP_X_CSRFTOKEN",
    "X-CSRF-Token": "HTTP_X_CSRF_TOKEN",
    "X-Requested-With": "HTTP_X_REQUESTED_WITH",
    "X-Request-ID": "HTTP_X_REQUEST_ID",
    "HX-Request": "HTTP_HX_REQUEST",
}

# What it sends in vain.
DROPPED = [
    "Host",
    "Cookie",
    "Origin",
    "Referer",
    "User-Agent",
    "Authorization",
    "Content-Length",
    "Transfer-Encoding",
    "Connection",
    "Keep-Alive",
    "Upgrade",
    "TE",
    "Trailer",
    "Via",
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Prefix",
    "X-Forwarded-Port",
    "X-Real-IP",
    "X-HTTP-Method-Override",
    "Proxy",
    "Proxy-Authorization",
    "Sec-WebSocket-Protocol",
    "Sec-Fetch-Site",
    "Remote-User",
    "Script-Name",
    "Path-Info",
    "X-Admin",
    "wsgi.input",
    "pubsub.connection",
    "x_forwarded_for",
    "X-Forwarded_For",
    "X_CSRFToken",
    "REMOTE_USER",
    "SCRIPT_NAME",
    "HTTP_HOST",
    "CONTENT_TYPE",
]

# What the whole request is refused for: no browser sends it.
REFUSED = {
    "X-CSRFToken\r\nX-Admin": "1",
    "Accept:": "1",
    "Accept ": "1",
    " Accept": "1",
    "": "1",
    "Äccept": "1",
    "Accept\x00": "1",
}

BAD_VALUES = ["a\r\nX-Admin: 1", "a\nb", "a\rb", "a\x00b", "\x7f", "\x1b[2J", "smart “quotes”", "\ud800"]


def test_the_environ_is_exactly_what_the_handshake_and_the_frame_say() -> None:
    assert texts(build_environ(check(), 1)) == FROM_HANDSHAKE


@pytest.mark.parametrize("name", TAKEN)
def test_a_header_of_the_list_reaches_the_environ_under_its_name(name: str) -> None:
    environ = texts(build_environ(check(headers={name: "  of the client\t"}), 1))
    assert environ == FROM_HANDSHAKE | {TAKEN[name]: "of the client"}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("letters", [str, str.upper])
def test_any_other_header_changes_nothing(name: str, letters: Any) -> None:
    assert texts(build_environ(check(headers={letters(name): "203.0.113.66"}), 1)) == FROM_HANDSHAKE


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_none_refuses_the_request(name: str) -> None:
    with pytest.raises(FrameError, match="header name"):
        check(headers={name: REFUSED[name]})


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_value_that_is_not_a_line_of_latin_1_refuses_the_request(value: str) -> None:
    with pytest.raises(FrameError, match="header accept"):
        check(headers={"accept": value})


def test_a_client_that_sends_all_of_them_at_once_changes_nothing_but_what_the_list_allows() -> None:
    environ = texts(build_environ(check(headers=dict.fromkeys([*TAKEN, *DROPPED], "1")), 1))
    assert environ == FROM_HANDSHAKE | dict.fromkeys(TAKEN.values(), "1")


def test_a_header_that_comes_twice_in_different_letters_refuses_the_request() -> None:
    with pytest.raises(FrameError, match="comes twice"):
        check(headers={"Accept": "text/html", "accept": "application/json"})


def test_a_header_that_the_application_asks_for_is_let_through_and_one_that_only_a_proxy_may_set_is_not() -> None:
    settings = Settings.build(environ={}, requests="/*", request_headers="X-Tenant X-Forwarded-For Cookie X_Tenant")
    frame = RequestFrame(
        id="1", method="GET", path="/", headers={"X-Tenant": "a", "X-Forwarded-For": "b", "Cookie": "c"}, body=b""
    )
    environ = build_environ(RequestCheck(settings).check(frame, ConnectionId("c1"), None, HANDSHAKE), 1)
    assert texts(environ) == FROM_HANDSHAKE | {"HTTP_X_TENANT": "a"}


NAMES = st.one_of(
    st.sampled_from([*TAKEN, *DROPPED, *REFUSED]),
    st.text(st.sampled_from("aA-_:. \r\n\x00éhost"), max_size=12),
    st.text(max_size=20),
)
VALUES = st.one_of(st.sampled_from(BAD_VALUES), st.text(st.sampled_from("ab \r\n\t\x00\x7fé"), max_size=8), st.text())


@given(headers=st.dictionaries(NAMES, VALUES, max_size=4))
def test_no_headers_whatever_reach_the_environ_but_those_of_the_list_and_none_holds_a_control_character(
    headers: dict[str, str],
) -> None:
    try:
        environ = texts(build_environ(check(headers=headers), 1))
    except FrameError:
        return
    changed = {name for name, value in environ.items() if FROM_HANDSHAKE.get(name) != value}
    assert changed <= {"HTTP_" + name.upper().replace("-", "_") for name in _allowed()} | {"CONTENT_TYPE"}
    assert not FROM_HANDSHAKE.keys() - environ.keys()
    for name, value in environ.items():
        assert not any((ord(letter) < 32 and letter != "\t") or ord(letter) == 127 for letter in name + value)
        value.encode("latin-1")


def _allowed() -> list[str]:
    from pubsub_mw.realtime.request_check import _HEADERS

    return sorted(_HEADERS)


@given(path=st.text(), query=st.text())
def test_a_path_and_query_whatever_reach_only_their_own_keys(path: str, query: str) -> None:
    try:
        environ = texts(build_environ(check(path=f"/{path}?{query}"), 1))
    except FrameError:
        return
    assert {name for name, value in environ.items() if FROM_HANDSHAKE.get(name) != value} <= {
        "PATH_INFO",
        "QUERY_STRING",
    }
    segments = environ["PATH_INFO"].split("/")
    assert segments[0] == ""
    assert not {".", ".."} & set(segments)
    assert "" not in segments[1:-1]


# What the values are.


def test_method_path_query_and_body_are_those_of_the_frame() -> None:
    environ = build_environ(check(method="post", path="/a/%C3%A4?x=1&y=%20", body=b"\x00body"), 1)
    assert environ["REQUEST_METHOD"] == "POST"
    assert environ["PATH_INFO"].encode("latin-1").decode() == "/a/ä"
    assert environ["QUERY_STRING"] == "x=1&y=%20"
    assert environ["CONTENT_LENGTH"] == "5"
    assert environ["wsgi.input"].read() == b"\x00body"


@pytest.mark.parametrize(
    ("host", "name", "port"),
    [
        ("site.example", "site.example", "80"),
        ("site.example:8000", "site.example", "8000"),
        ("[::1]", "[::1]", "80"),
        ("[::1]:8000", "[::1]", "8000"),
        (None, "localhost", "80"),
    ],
)
def test_server_name_and_port_are_those_of_the_host(host: str | None, name: str, port: str) -> None:
    headers = () if host is None else (("host", host),)
    environ = build_environ(request(handshake=Handshake(headers=headers, scheme="http", address="")), 1)
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (name, port)


@pytest.mark.parametrize(
    ("headers", "referer"),
    [
        ((("origin", "https://a.example"),), "https://a.example/"),  # browsers open a WebSocket without one
        ((("origin", "https://a.example"), ("referer", "https://a.example/page")), "https://a.example/page"),
        ((("origin", "null"),), None),
        ((), None),
    ],
)
def test_where_a_handshake_has_no_referer_its_origin_is_one(
    headers: tuple[tuple[str, str], ...], referer: str | None
) -> None:
    handshake = Handshake(headers=headers, scheme="https", address="")
    assert build_environ(request(handshake=handshake), 1).get("HTTP_REFERER") == referer


def test_a_view_learns_which_connection_asks_and_how_often_it_was_run() -> None:
    connection = build_environ(request(), 2)["pubsub.connection"]
    assert (connection.id, connection.user, connection.transport) == ("c1", "7", "websocket")
    assert (connection.message_id, connection.delivery_count) == ("1", 2)


def test_nobody_is_a_remote_user() -> None:
    assert "REMOTE_USER" not in build_environ(request(), 1)


@pytest.mark.parametrize("made", [check(method="POST", path="/a?b=c", body=b"x"), request(), check(method="HEAD")])
def test_the_environ_is_one_by_pep_3333(made: Request) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        environ["wsgi.input"].read(1)
        start_response("204 No Content", [])
        return []

    started: list[str] = []

    def start_response(status: str, _headers: Any, _exc_info: Any = None) -> Any:
        started.append(status)
        return sys.stdout.write

    response = validator(app)(build_environ(made, 1), start_response)
    assert list(response) == []
    response.close()  # type: ignore[attr-defined]
    assert started == ["204 No Content"]


def test_the_scope_says_the_same_as_the_environ() -> None:
    scope = build_scope(
        check(
            method="POST", path="/a/%C3%A4%20b?x=%20", headers={"Accept": "*/*", "Host": "evil.example"}, body=b"abc"
        ),
        2,
        {"pool": "of the lifespan"},
    )
    assert (scope["type"], scope["method"], scope["scheme"]) == ("http", "POST", "https")
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a/ä b", b"/a/%C3%A4%20b", b"x=%20")
    assert (scope["server"], scope["client"], scope["root_path"]) == (("site.example", 8443), ("192.0.2.1", 0), "")
    assert scope["pubsub.connection"].delivery_count == 2
    assert scope["state"] == {"pool": "of the lifespan"}
    assert dict(scope["headers"]) == {
        b"accept": b"*/*",
        b"accept-language": b"fi",
        b"content-length": b"3",
        b"cookie": b"session=abc; csrftoken=def",
        b"host": b"site.example:8443",
        b"origin": b"https://site.example:8443",
        b"referer": b"https://site.example:8443/",
        b"user-agent": b"Browser/1.0",
        b"x-forwarded-for": b"192.0.2.1",
        b"x-forwarded-host": b"site.example:8443",
        b"x-forwarded-proto": b"https",
    }
    assert len(scope["headers"]) == len(dict(scope["headers"]))
