"""Make the browser's client small to send: without comments and indentation.

In:     the text of an ES module that is formatted as ours is
Out:    the same program
Owns:   nothing
Never:  parses JavaScript: it knows how our one file is formatted, and the client's own tests run on what it makes
"""

import re

__all__ = ["slim"]

_COMMENTS = re.compile(r"^ */\*\*.*?\*/\n|^ *//[^\n]*\n| // [^\n]*$", re.MULTILINE | re.DOTALL)
_SPACE = re.compile(r"^ +|^\n", re.MULTILINE)


def slim(text: str) -> str:
    """Return the module without what only its readers need."""
    return "// pubsub-mw: the file with its comments is in the package, pubsub_mw/static/client.js\n" + _SPACE.sub(
        "", _COMMENTS.sub("", text)
    )
