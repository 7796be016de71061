"""Make the browser's client small to send: without comments and spaces, line by line as it was.

In:     the text of an ES module that is formatted as ours is
Out:    the same program
Owns:   nothing
Never:  parses JavaScript: it knows how our one file is formatted, and the client's own tests run on what it makes;
        touches what is in quotes
"""

import re

__all__ = ["slim"]

_COMMENTS = re.compile(r"^ */\*\*.*?\*/\n|^ *//[^\n]*\n|/\*\*[^\n]*?\*/ ?| // [^\n]*$", re.MULTILINE | re.DOTALL)
_SPACES = re.compile(
    r"""("(?:\\.|[^"\\])*"|`[^`]*`)|^ +|^\n|(?<=[,;:?&|=<>*(){}]) +| +(?=[:?&|=<>*(){}!])""", re.MULTILINE
)


def slim(text: str) -> str:
    """Return the module without what only its readers need. Its regular expressions hold no blanks."""
    return _SPACES.sub(lambda found: found[1] or "", _COMMENTS.sub("", text))
