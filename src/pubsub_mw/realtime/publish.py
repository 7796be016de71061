"""Publish by HTTP, for programs in other languages.

In:     one publication or a list of them, by POST, with a grant
Out:    their positions; drafts to the broker; and the description of all that (OpenAPI)
Owns:   what such a program may publish where: the `publish` patterns of its grant
Never:  looks at cookies; publishes a part of a list of which another part is wrong

A channel that begins with `#` is somebody's own. A pattern allows those only if it begins with `#` itself, so that
`*` in the grant of a page is not the key to everybody's.
"""

import time
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.types import Receive

from pubsub_mw.drafts import EVENT_PATTERN, build_drafts
from pubsub_mw.errors import (
    BrokerUnavailable,
    ChannelError,
    ErrorCode,
    GrantError,
    PublicationTooLarge,
    PublishError,
)
from pubsub_mw.model import Draft, Grant, Handshake, compile_patterns
from pubsub_mw.realtime.http import Refusal, bearer, read_json
from pubsub_mw.realtime.shared import Shared

__all__ = ["DESCRIPTION", "answer_publish"]


async def answer_publish(receive: Receive, shared: Shared, handshake: Handshake) -> bytes:
    """Publish what a POST says, and return the answer's body.

    Raises:
        Refusal: nothing was published; or, with 503, something may have been.
    """
    settings = shared.settings
    grant = await _read_grant(shared, bearer(handshake))
    body = await read_json(receive, handshake, settings.max_publish_bytes, settings.connect_timeout)
    items = body if isinstance(body, list) else [body]
    if len(items) > settings.max_publish_items:
        raise Refusal(413, ErrorCode.TOO_LARGE, f"{settings.max_publish_items} publications may be sent at once")
    drafts = _read_drafts(shared, items)
    _check_allowed(grant, drafts)
    try:
        positions = await shared.publisher.publish_drafts(drafts)
    except PublishError as error:
        message = f"{error}; publish again with the same idempotency_key"
        raise Refusal(503, ErrorCode.UNAVAILABLE, message) from error
    if isinstance(body, list):
        return orjson.dumps({"positions": [str(position) for position in positions]})
    return orjson.dumps({"position": str(positions[0])})


async def _read_grant(shared: Shared, token: str | None) -> Grant:
    if token is None:
        raise Refusal(401, ErrorCode.GRANT_INVALID, "send Authorization: Bearer and a grant with publish patterns")
    try:
        grant = shared.verifier.verify(token, now=time.time())
    except GrantError as error:
        raise Refusal(401, error.code, str(error)) from error
    if grant.user is not None:
        try:
            (revoked,) = await shared.broker.revoked([f"user:{grant.user}"])
        except BrokerUnavailable as error:
            message = "the broker does not answer; nothing was published"
            raise Refusal(503, ErrorCode.UNAVAILABLE, message) from error
        if grant.issued_at <= revoked.get("*", float("-inf")):
            raise Refusal(401, ErrorCode.REVOKED, "the application ended what was granted until then")
    return grant


def _read_drafts(shared: Shared, items: Sequence[object]) -> list[Draft]:
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise Refusal(422, ErrorCode.BAD_FRAME, f"item {index} must be an object with channel and data")
        history = item.get("history")
        # JSON has one kind of number: 100.0 is an integer to a schema, and what some languages write for 100.
        if isinstance(history, float) and history.is_integer():
            item["history"] = int(history)
    try:
        return build_drafts(shared.settings, items)  # type: ignore[arg-type]
    except PublicationTooLarge as error:
        raise Refusal(413, ErrorCode.TOO_LARGE, _sentence(error)) from error
    except ChannelError as error:
        raise Refusal(422, ErrorCode.BAD_CHANNEL, _sentence(error)) from error
    except (ValueError, TypeError) as error:
        raise Refusal(422, ErrorCode.BAD_FRAME, _sentence(error)) from error


def _sentence(error: Exception) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def _check_allowed(grant: Grant, drafts: Sequence[Draft]) -> None:
    is_allowed = compile_patterns([pattern for pattern in grant.publish if not pattern.startswith("#")])
    is_own_allowed = compile_patterns([pattern for pattern in grant.publish if pattern.startswith("#")])
    for draft in drafts:
        if not (is_own_allowed if draft.channel.startswith("#") else is_allowed)(draft.channel):
            raise Refusal(403, ErrorCode.FORBIDDEN, f"{draft.channel}: the grant does not allow to publish there")


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return {"description": description, "content": _json(schema)}


def _error(description: str) -> dict[str, Any]:
    code, message = {"type": "string", "enum": [*ErrorCode]}, {"type": "string"}
    error = {"type": "object", "required": ["code", "message"], "properties": {"code": code, "message": message}}
    return _answer(description, error=error)


_NAME = "[A-Za-z0-9_.,:;=@/-]"
_POSITION = {"type": "string", "pattern": r"^[A-Za-z0-9_-]+\.[0-9]+\.[A-Za-z0-9_-]+$"}
_PUBLICATION: dict[str, Any] = {
    "type": "object",
    "required": ["channel", "data"],
    "additionalProperties": False,
    "properties": {
        "channel": {
            "type": "string",
            "maxLength": 200,
            "pattern": f"^({_NAME}+|#(connection|user)-{_NAME}+)$",
            "examples": ["room:42"],
        },
        "data": {"description": "Any JSON.", "examples": [{"text": "hi"}]},
        "event": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": EVENT_PATTERN, "default": "message"},
        "idempotency_key": {
            "type": ["string", "null"],
            "minLength": 1,
            "maxLength": 200,
            "description": "Publishing again with it returns the first position and delivers nothing.",
        },
        "exclude": {
            "type": ["string", "null"],
            "pattern": f"^{_NAME}{{1,188}}$",
            "description": "The id of a connection that shall not get it.",
        },
        "history": {
            "anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 1_000_000}, {"type": "null"}],
            "description": "How many publications the channel keeps; false = this one is not kept.",
        },
    },
}
_PUBLICATIONS = {"anyOf": [_PUBLICATION, {"type": "array", "items": _PUBLICATION}]}
_POSITIONS = {"position": _POSITION, "positions": {"type": "array", "items": _POSITION}}
DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Publish to browsers", "version": "1"},
    "components": {"securitySchemes": {"grant": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}},
    "security": [{"grant": []}],
    "paths": {
        "/publish": {
            "post": {
                "summary": "Publish one publication, or several in one round trip and in order.",
                "requestBody": {"required": True, "content": _json(_PUBLICATIONS)},
                "responses": {
                    "200": {
                        "description": "The broker has it: `position` of one, `positions` of a list.",
                        "content": _json({"type": "object", "properties": _POSITIONS}),
                    },
                    "400": _error("Not JSON."),
                    "401": _error("No grant, or one that is not good."),
                    "403": _error("The grant does not allow that channel."),
                    "408": _error("The body did not come in time."),
                    "413": _error("Too many, or too large."),
                    "415": _error("Not application/json."),
                    "422": _error("A publication is wrong."),
                    "503": _error("The broker did not confirm it. It may have been stored."),
                },
            }
        }
    },
}
"""Served at `{mount}/openapi.json`, with the mount as its server."""
