"""Make out of a client's request what the application would see of the same request over HTTP.

In:     a request from the queue
Out:    a WSGI environ, or an ASGI scope
Owns:   where each value comes from: method, path, query, body and a few headers from the client; cookies, host,
        origin, scheme and address from the handshake of its connection
Never:  lets a header that the client chose pass for one that a proxy or the handshake set

Source: PEP 3333, "environ Variables"; ASGI spec, "HTTP connection scope". Names with an underscore never get here
(`realtime.request_check` refuses them), so `x_forwarded_for` cannot pass for `x-forwarded-for` (CVE-2026-3902).
"""

import functools
import sys
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pubsub_mw.model import FROM_HANDSHAKE, Request, RequestConnection

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["build_environ", "build_scope"]


def build_environ(request: Request, delivery_count: int) -> "WSGIEnvironment":
    """Return a fresh environ; `wsgi.input` is at its start."""
    headers = _headers(request)
    host, port = _server(headers["host"], request.handshake.scheme)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": request.path.encode().decode("latin-1"),
        "QUERY_STRING": request.query,
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": request.handshake.address,
        "CONTENT_LENGTH": str(len(request.body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.handshake.scheme,
        "wsgi.input": BytesIO(request.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "pubsub.connection": _connection(request, delivery_count),
    }
    for name, value in headers.items():
        environ[_key(name)] = value
    return environ


def build_scope(request: Request, delivery_count: int, state: dict[str, Any]) -> dict[str, Any]:
    """Return a fresh `http` scope; `state` as the app's lifespan left it."""
    headers = _headers(request)
    server = _server(headers["host"], request.handshake.scheme)
    headers["content-length"] = str(len(request.body))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.handshake.scheme,
        "path": request.path,
        "raw_path": quote(request.path).encode(),
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        "client": (request.handshake.address, 0) if request.handshake.address else None,
        "server": server,
        "state": state.copy(),
        "pubsub.connection": _connection(request, delivery_count),
    }


@functools.lru_cache(256)  # there are no more names than the lists of what a client and a handshake may say
def _key(name: str) -> str:
    return "CONTENT_TYPE" if name == "content-type" else "HTTP_" + name.upper().replace("-", "_")


def _headers(request: Request) -> dict[str, str]:
    """Return the headers, lower-case names; `host` is among them."""
    handshake = request.handshake
    headers: dict[str, str] = {}
    cookies: list[str] = []
    for name, value in handshake.headers:
        if name == "cookie":
            cookies.append(value)
        elif name in FROM_HANDSHAKE:
            headers.setdefault(name, value)
    host = headers.get("host") or "localhost"
    headers.update(request.headers)  # such as accept-language; a client may choose none of the following
    headers["host"] = host
    if "origin" in headers and headers["origin"] != "null":
        # A browser opens a WebSocket without a Referer. This is the one that it sends under `strict-origin`, and what
        # protection against CSRF that asks for one compares.
        headers.setdefault("referer", headers["origin"] + "/")
    if cookies:
        headers["cookie"] = "; ".join(cookies)  # RFC 9113 8.2.3
    # As the realtime server established them behind its trusted proxies, for an app that is configured to read these.
    headers["x-forwarded-proto"] = handshake.scheme
    headers["x-forwarded-host"] = host
    if handshake.address:
        headers["x-forwarded-for"] = handshake.address
    return headers


def _server(host: str, scheme: str) -> tuple[str, int]:
    name, separator, port = host.rpartition(":")
    if separator and port.isdigit() and not name.endswith(":"):
        return name, int(port)
    return host, 443 if scheme == "https" else 80


def _connection(request: Request, delivery_count: int) -> RequestConnection:
    return RequestConnection(
        id=request.connection,
        user=request.user,
        transport=request.transport,
        message_id=request.id,
        delivery_count=delivery_count,
    )
