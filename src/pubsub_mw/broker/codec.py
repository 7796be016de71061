r"""Store a publication as bytes, and read it back.

In:     drafts and positions; bytes from history or pub/sub
Out:    bytes; `Publication` values
Owns:   the layout: `<position> <previous tag> <exclude>\n<frame>`
Never:  looks into the frame; lets bytes that are not ours through

The same bytes are the history entry and the pub/sub payload. `publish.lua` builds the same layout.
"""

from pubsub_mw.model import Draft, Position, Publication
from pubsub_mw.protocol import message_tail

__all__ = ["decode", "encode"]


def encode(draft: Draft, position: Position, previous_tag: str) -> bytes:
    """Return the payload of `draft` at `position`."""
    text = str(position).encode()
    return b"%b %b %b\n%b%b%b" % (text, previous_tag.encode(), draft.exclude.encode(), draft.head, text, message_tail)


def decode(payload: bytes) -> Publication:
    """Read a payload.

    Raises:
        ValueError: the bytes are not one.
    """
    header, separator, frame = payload.partition(b"\n")
    if not separator or len(header) > 512:
        raise ValueError("not a publication: no header")
    try:
        position, previous_tag, exclude = header.decode("ascii").split(" ")
    except ValueError as error:
        raise ValueError("not a publication: malformed header") from error
    return Publication(Position.parse(position), previous_tag, exclude, frame)
