"""Send the browser's client, made small: without comments and spaces, line by line as it was, and compressed.

In:     the text of an ES module that is formatted as ours is; requests for it
Out:    the same program; compressed by gzip for whom accepts that
Owns:   what a browser may keep of it: an entity tag for each form
Never:  parses JavaScript: it knows how our one file is formatted, and the client's own tests run on what it makes;
        touches what is in quotes; compresses anything for each request
"""

import gzip
import hashlib
import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["Static", "slim"]

_COMMENTS = re.compile(r"^ */\*\*.*?\*/\n|^ *//[^\n]*\n|/\*\*[^\n]*?\*/ ?| // [^\n]*$", re.MULTILINE | re.DOTALL)
_SPACES = re.compile(
    r"""("(?:\\.|[^"\\])*"|`[^`]*`)|^ +|^\n|(?<=[,;:?&|=<>*(){}]) +| +(?=[:?&|=<>*(){}!])""", re.MULTILINE
)


def slim(text: str) -> str:
    """Return the module without what only its readers need. Its regular expressions hold no blanks."""
    return _SPACES.sub(lambda found: found[1] or "", _COMMENTS.sub("", text))


_HEADERS = {"cache-control": "no-cache", "access-control-allow-origin": "*", "x-content-type-options": "nosniff"}


class Static:
    """One file of the package, as an ASGI endpoint; public, so any page may load it."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self._media_type = media_type
        forms = (content, gzip.compress(content, 9, mtime=0))
        self._forms = [(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"') for body in forms]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Request(scope).headers
        is_compressed = _accepts_gzip(",".join(asked.getlist("accept-encoding")))
        body, etag = self._forms[is_compressed]
        headers = {"etag": etag, "vary": "accept-encoding", **_HEADERS}
        known = {tag.strip().removeprefix("W/") for tag in ",".join(asked.getlist("if-none-match")).split(",")}
        coding = {"content-encoding": "gzip"} if is_compressed else {}
        response = Response(body, media_type=self._media_type, headers=headers | coding)
        if known & {etag, "*"}:
            response = Response(status_code=304, headers=headers)
        await response(scope, receive, send)


def _accepts_gzip(header: str) -> bool:
    """Read `Accept-Encoding`. Source: RFC 9110 12.5.3."""
    refused = dict(re.findall(r"([^\s,;]+)\s*(;\s*q=0(?:\.0*)?\s*(?=,|$))?", header.lower()))
    return not refused.get("gzip", refused.get("*", "it is not named"))
