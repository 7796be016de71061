"""Who may open a connection from a browser: exactly whom the table says, and no look-alike."""

import pytest

from pubsub_mw.model import Handshake
from pubsub_mw.realtime.origin import names_origin, refuse_origin


def handshake(*headers: tuple[str, str]) -> Handshake:
    return Handshake(headers=headers, scheme="https", address="192.0.2.1")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        pytest.param("https://good.example", "good.example", id="same host"),
        pytest.param("http://good.example", "good.example", id="a proxy took the TLS off"),
        pytest.param("https://GOOD.example", "good.EXAMPLE", id="case does not matter"),
        pytest.param("https://good.example:443", "good.example", id="default port spelled out by the page"),
        pytest.param("https://good.example", "good.example:443", id="default port spelled out by the host"),
        pytest.param("http://localhost:8000", "localhost:8000", id="another port, the same on both sides"),
        pytest.param("http://[::1]:8000", "[::1]:8000", id="IPv6"),
        pytest.param("https://xn--mnchen-3ya.example", "xn--mnchen-3ya.example", id="IDN as browsers send it"),
    ],
)
def test_a_page_of_the_same_host_may_connect(origin: str, host: str) -> None:
    assert refuse_origin(handshake(("host", host), ("origin", origin)), ()) is None


FOREIGN = [
    pytest.param("https://evil.example", id="another host"),
    pytest.param("null", id="null, as sandboxed frames and files send it"),
    pytest.param("https://good.example.evil.example", id="ours as its beginning"),
    pytest.param("https://evilgood.example", id="ours as its end"),
    pytest.param("https://sub.good.example", id="a subdomain"),
    pytest.param("https://good.example:8443", id="another port"),
    pytest.param("https://good.example.", id="a dot at the end"),
    pytest.param("https://good.example@evil.example", id="ours as a user name"),
    pytest.param("https://evil.example@good.example", id="with a user name"),
    pytest.param("https://good.example/", id="a slash at the end"),
    pytest.param("https://good.example/path", id="a path"),
    pytest.param("https://good.example?query", id="a query"),
    pytest.param("https://good.example#fragment", id="a fragment"),
    pytest.param("https://g\u043e\u043ed.example", id="Cyrillic letters"),
    pytest.param("https://good.example, https://evil.example", id="two in one header"),
    pytest.param("https://good.example:port", id="a port that is no number"),
    pytest.param("https://good.example:99999", id="a port that is none"),
    pytest.param("https://[good.example", id="a broken bracket"),
    pytest.param("good.example", id="no scheme"),
    pytest.param("//good.example", id="an empty scheme"),
    pytest.param("https://", id="no host"),
    pytest.param("", id="empty"),
    pytest.param(" https://good.example", id="a blank before"),
    pytest.param("https://good.exam\tple", id="a tab inside"),
    pytest.param("file://", id="a file"),
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_may_not_connect(origin: str) -> None:
    assert refuse_origin(handshake(("host", "good.example"), ("origin", origin)), ()) is not None


def test_a_refusal_names_the_host_that_came_and_what_a_proxy_needs() -> None:
    """nginx's own Host is the upstream's name."""
    refusal = refuse_origin(handshake(("host", "upstream"), ("origin", "https://good.example")), ())
    assert refusal is not None
    for part in ("'https://good.example'", "'upstream'", "proxy_set_header Host $http_host;", "PUBSUB_ORIGINS"):
        assert part in refusal


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_may_not_connect_where_origins_are_listed(origin: str) -> None:
    refusal = refuse_origin(
        handshake(("host", "evil.example"), ("origin", origin)), ("https://good.example", "https://other.example")
    )
    assert refusal is not None


def test_a_listed_origin_may_connect_whatever_the_host() -> None:
    listed = ("https://good.example", "http://localhost:3000")
    assert refuse_origin(handshake(("host", "api.example"), ("origin", "http://localhost:3000")), listed) is None
    assert refuse_origin(handshake(("host", "api.example"), ("origin", "https://good.example:443")), listed) is None


def test_a_list_counts_schemes_and_does_not_include_the_own_host() -> None:
    listed = ("https://good.example",)
    assert refuse_origin(handshake(("host", "good.example"), ("origin", "http://good.example")), listed) is not None
    assert refuse_origin(handshake(("host", "api.example"), ("origin", "https://api.example")), listed) is not None


def test_a_star_lets_everybody_in() -> None:
    assert (
        refuse_origin(handshake(("host", "a.example"), ("origin", "https://b.example"), ("cookie", "c=1")), ("*",))
        is None
    )


def test_two_origin_headers_are_refused_even_where_everybody_may_come() -> None:
    two = handshake(("host", "a.example"), ("origin", "https://a.example"), ("origin", "https://a.example"))
    assert refuse_origin(two, ("*",)) is not None
    assert refuse_origin(two, ()) is not None


def test_two_host_headers_match_nothing() -> None:
    two = handshake(("host", "a.example"), ("host", "b.example"), ("origin", "https://a.example"))
    assert refuse_origin(two, ()) is not None


def test_without_origin_a_program_may_connect_but_nobody_with_cookies() -> None:
    assert refuse_origin(handshake(("host", "a.example")), ()) is None
    assert refuse_origin(handshake(("host", "a.example"), ("cookie", "session=1")), ()) is not None
    assert refuse_origin(handshake(("host", "a.example"), ("cookie", "session=1")), ("*",)) is not None


def test_without_origin_cookies_are_no_matter_where_a_browser_sends_none() -> None:
    assert refuse_origin(handshake(("host", "a.example"), ("cookie", "session=1")), (), may_lack_origin=True) is None


def test_a_refusal_shows_no_cookie() -> None:
    refusal = refuse_origin(
        handshake(("host", "a.example"), ("origin", "https://b.example"), ("cookie", "session=CANARY")), ()
    )
    assert refusal is not None
    assert "CANARY" not in refusal


@pytest.mark.parametrize(
    ("site", "is_allowed"),
    [(None, True), ("same-origin", True), ("none", True), ("same-site", False), ("cross-site", False)],
)
def test_a_get_without_an_origin_is_not_to_come_from_another_site(site: str | None, is_allowed: bool) -> None:
    headers = [("host", "good.example"), ("cookie", "session=x")]
    if site is not None:
        headers.append(("sec-fetch-site", site))
    refusal = refuse_origin(handshake(*headers), (), may_lack_origin=True)
    assert (refusal is None) == is_allowed


def test_an_origin_is_named_exactly_or_not_at_all() -> None:
    named = ("https://good.example", "*")
    assert names_origin(named, "https://GOOD.example:443")
    assert not any(names_origin(named, origin) for origin in ("https://evil.example", "*", "null", ""))
