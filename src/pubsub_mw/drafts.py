"""Turn what the application publishes into drafts for the broker.

In:     a channel and any data that JSON can say
Out:    drafts: checked, encoded once, within their bounds
Owns:   what may be published, and how Python's values look in JSON
Never:  touches a web framework; sends anything
"""

import dataclasses
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from datetime import time as clock_time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import orjson

from pubsub_mw.errors import PublicationTooLarge
from pubsub_mw.model import CONNECTION_PREFIX, Channel, Draft, check_channel
from pubsub_mw.protocol import message_head
from pubsub_mw.settings import Settings

__all__ = ["EVENT_PATTERN", "build_answer_draft", "build_draft", "build_drafts", "encode_data"]

_TAG_BYTES = 6
_MAX_KEY_LENGTH = 200
_MAX_EVENT_LENGTH = 200
EVENT_PATTERN = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
"""Of the name of an event: no control character and no end of a line. For Python, and for JSON Schema, where some
validators know no lone surrogates."""
_EVENT = re.compile(EVENT_PATTERN)


def build_drafts(settings: Settings, items: Iterable[tuple[str, object] | Mapping[str, Any]]) -> list[Draft]:
    """Check and encode `many`'s items.

    Raises:
        ValueError, TypeError: an item is wrong; a note to it says which.
    """
    drafts = []
    for index, item in enumerate(items):
        try:
            if isinstance(item, Mapping):
                unknown = item.keys() - {"channel", "data", "event", "exclude", "idempotency_key", "history"}
                if unknown or "channel" not in item or "data" not in item:
                    raise TypeError("an item must have channel and data, and may have publish's other arguments")
                drafts.append(build_draft(settings, **item))
            elif isinstance(item, (tuple, list)) and len(item) == 2:
                drafts.append(build_draft(settings, *item))
            else:
                raise TypeError("an item must be (channel, data) or a mapping of publish's arguments")
        except (ValueError, TypeError) as error:
            error.add_note(f"in item {index} of those to be published together")
            raise
    return drafts


def build_draft(
    settings: Settings,
    channel: str,
    data: object,
    *,
    event: str = "message",
    exclude: str | None = None,
    idempotency_key: str | None = None,
    history: bool | int | None = None,
) -> Draft:
    """Check and encode one publication; see `Publisher.publish`."""
    name = check_channel(channel)
    is_event = isinstance(event, str) and len(event) <= _MAX_EVENT_LENGTH and _EVENT.fullmatch(event)
    if not is_event or not _is_utf8(event):
        wrong = "a control character, the end of a line (U+2028, U+2029) or a lone surrogate"
        raise ValueError(f"event {event!r:.80} must be 1 to {_MAX_EVENT_LENGTH} characters, none {wrong}")
    if exclude is not None:
        if not isinstance(exclude, str):
            raise TypeError(f"exclude={exclude!r:.80} must be the id of a connection, which is a text")
        check_channel(f"{CONNECTION_PREFIX}{exclude}")
    if idempotency_key is not None and not (
        isinstance(idempotency_key, str) and 0 < len(idempotency_key) <= _MAX_KEY_LENGTH and _is_utf8(idempotency_key)
    ):
        raise ValueError(f"idempotency_key must be a text of 1 to {_MAX_KEY_LENGTH} characters, none a lone surrogate")
    encoded = encode_data(data)
    if len(encoded) > settings.max_publication_bytes:
        raise PublicationTooLarge(len(encoded), settings.max_publication_bytes)
    default_size = settings.private_history_size if name.startswith(CONNECTION_PREFIX) else settings.history_size
    size, is_kept = _history(history, default_size)
    return Draft(
        channel=name,
        tag=secrets.token_urlsafe(_TAG_BYTES),
        head=message_head(name, event, encoded),
        exclude=exclude or "",
        idempotency_key=idempotency_key or "",
        history_size=size,
        is_kept=is_kept,
        has_own_history=history is not None and history is not True,
    )


def build_answer_draft(settings: Settings, channel: Channel, head: bytes, key: str, reply: str, part: int = 0) -> Draft:
    """Return a part of the answer to a request, for the channel that it goes to.

    Args:
        channel: from `Request.reply_to`
        head: the frame up to its position
        key: idempotency key; published twice it shows once
        reply, part: as in `Draft`
    """
    return Draft(
        channel=channel,
        tag=secrets.token_urlsafe(_TAG_BYTES),
        head=head,
        exclude="",
        idempotency_key=key,
        history_size=settings.private_history_size,
        is_kept=True,
        reply=reply,
        part=part,
    )


def _history(history: bool | int | None, default_size: int) -> tuple[int, bool]:
    if history is None or history is True:
        return default_size, True
    if history is False or history == 0:
        return default_size, False
    if not isinstance(history, int) or not 0 < history <= 1_000_000:
        raise ValueError(f"history={history!r} must be None, False or a number of publications up to 1,000,000")
    return history, True


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_data(data: object) -> bytes:
    """Encode `data` as JSON.

    Raises:
        TypeError: it holds something JSON cannot say.
        ValueError: it holds itself, or NaN beside numbers over 64 bits.
    """
    try:
        return orjson.dumps(data, _encode_other, orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError as error:
        try:
            # What orjson leaves out and JSON has: integers over 64 bits, lone surrogates.
            return json.dumps(data, default=_encode_other, allow_nan=False, separators=(",", ":")).encode()
        except RecursionError:
            raise ValueError("data is nested too deeply, or holds itself") from None
        except (TypeError, ValueError) as other:
            raise type(other)(f"data cannot be published: {other}") from error


def _encode_other(value: object) -> object:
    """Say in JSON what a web application has at hand and orjson does not know."""
    if isinstance(value, (Decimal, PurePath)) or _is_lazy_text(value):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (date, clock_time)):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {knob.name: getattr(value, knob.name) for knob in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is not JSON; give a dict, list or text")


def _is_lazy_text(value: object) -> bool:
    # Whoever has such a value has imported its framework; nobody else should have to.
    functional = sys.modules.get("django.utils.functional")
    return functional is not None and isinstance(value, functional.Promise)
