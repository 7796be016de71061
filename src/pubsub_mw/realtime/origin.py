"""Decide which page may open a connection.

In:     a handshake and the `origins` setting
Out:    None, or the sentence with which it is refused
Owns:   the comparison; `null` and look-alikes never pass
Never:  matches by suffix, prefix or pattern

A browser names the page in `Origin` on every WebSocket and every POST, and no page can forge it; without this check
any page could open a connection with the visitor's cookies. Source: RFC 6455 10.2, RFC 6454.
"""

import functools
from urllib.parse import urlsplit

from pubsub_mw.model import Handshake

__all__ = ["names_origin", "refuse_origin"]

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def refuse_origin(handshake: Handshake, origins: tuple[str, ...], *, may_lack_origin: bool = False) -> str | None:
    """Return why the handshake is refused, or None if it may go on.

    Args:
        origins: who may; empty = the host that the request was sent to; `*` = anybody
        may_lack_origin: for a same-origin GET, where a browser sends none
    """
    found = handshake.all("origin")
    if len(found) > 1:
        return "more than one Origin header"
    if not found:
        if not may_lack_origin and handshake.all("cookie"):
            return "cookies came without an Origin header; a browser always sends one here"
        # A page of another origin can have its images and scripts ask with cookies and without Origin. It could not
        # read the answer, but the visitor would seem to be here.
        site = handshake.first("sec-fetch-site")
        return None if site in (None, "same-origin", "none") else f"a {site:.20} page may not connect without an Origin"
    if "*" in origins:
        return None
    origin = _parse(found[0])
    if origin is None:
        return f"origin {found[0]!r:.100} may not connect"
    if origins:
        allowed = names_origin(origins, found[0])
        cure = "allow it by PUBSUB_ORIGINS"
    else:
        hosts = handshake.all("host")
        allowed = len(hosts) == 1 and _parse(f"{origin[0]}://{hosts[0]}") == origin
        cure = (
            f"the request came with Host {', '.join(hosts)!r:.100}. A proxy that changes Host must pass it on as it"
            " came (nginx: proxy_set_header Host $http_host;); another origin is allowed by PUBSUB_ORIGINS"
        )
    return None if allowed else f"origin {found[0]!r:.100} may not connect; {cure}"


def names_origin(origins: tuple[str, ...], origin: str) -> bool:
    """Whether `origin` is among `origins` by its own name, not by `*`."""
    wanted = _parse(origin)
    return wanted is not None and any(_parse(candidate) == wanted for candidate in origins)


@functools.lru_cache(1_024)
def _parse(origin: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port, or None if `origin` is not exactly scheme://host[:port]."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    host = parts.hostname
    if not host or f"{parts.scheme}://{parts.netloc}".lower() != origin.lower() or "@" in parts.netloc:
        return None
    if port is None:
        port = _DEFAULT_PORTS.get(parts.scheme, 0)
    return parts.scheme, host, port
