"""The golden frames as a whole: nothing of the wire is missing from them, and a real server keeps to their shapes.

One by one they are held against the encoders in `test_protocol.py`, the codes in `test_errors.py`, the browser's client
in `static/client.test.mjs`.
"""

import dataclasses
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pubsub_mw import protocol
from pubsub_mw.broker.memory import memory_broker
from pubsub_mw.errors import ErrorCode
from pubsub_mw.protocol import decode_command
from pubsub_mw.realtime.subscription import GapReason
from tests.client_world import Endpoint
from tests.tools.clock import eventually_async
from tests.tools.raw_client import Frame, RawClient

GOLDEN = json.loads((Path(__file__).parent / "frames.json").read_text())
CLIENT: list[Frame] = GOLDEN["frames"]["client"]
SERVER: list[Frame] = GOLDEN["frames"]["server"]

NAMED_ALIKE = {"ping": "PING", "message": "message_head"} | {
    kind: f"{kind}_head" for kind in ("response", "response_start", "response_chunk", "response_end")
}
NOT_OF_A_FRAME = {
    "decode_body",
    "decode_command",
    "encode_body",
    "head_of",
    "message_tail",
    "position_of",
    "read_command",
    "read_json",
    "split_message",
}
READ_TOGETHER = {"encoding": "body"}
"""Fields that are read into one value."""


def specified(part: str) -> set[str]:
    """The frame types of one table of the specification."""
    table = (protocol.__doc__ or "").split(part)[1].split("\n\n")[1]
    rows = re.findall(r"^(`\w+`(?:, `\w+`)*)(?= )", table, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"\w+", row)}


def test_every_frame_of_the_specification_is_shown() -> None:
    assert {frame["type"] for frame in CLIENT} == specified("A client sends:")
    assert {frame["type"] for frame in SERVER} == specified("The server sends:")


def test_every_function_that_makes_a_frame_is_shown() -> None:
    made = {name for name in protocol.__all__ if name[0].islower()} - NOT_OF_A_FRAME | {"PING"}
    assert {NAMED_ALIKE.get(frame["type"], frame["type"]) for frame in SERVER} == made


def test_every_field_of_every_command_is_shown() -> None:
    shown: dict[type, set[str]] = {}
    for frame in CLIENT:
        shown.setdefault(type(decode_command(json.dumps(frame))), set()).update(
            READ_TOGETHER.get(name, name) for name in frame.keys() - {"type"}
        )
    for command, fields in shown.items():
        assert fields == {field.name for field in dataclasses.fields(command)}, command


def test_every_reason_of_a_gap_and_every_outcome_of_recovery_is_shown() -> None:
    assert {frame["reason"] for frame in SERVER if frame["type"] == "gap"} == set(GapReason)
    assert {frame["recovered"] for frame in SERVER if frame["type"] == "subscribed"} == {True, False, None}


def test_codes_in_frames_are_in_the_tables() -> None:
    for frame in SERVER:
        if frame["type"] == "error":
            assert frame["code"] in GOLDEN["error_codes"]
        elif frame["type"] == "unsubscribed":
            assert frame["code"] in ("client", *ErrorCode)
        elif frame["type"] == "disconnect":
            may_reconnect = dict(GOLDEN["close_codes"].values())[frame["code"]]
            assert may_reconnect == (frame["retry"] is not None)


def shape(frame: Frame) -> tuple[Any, ...]:
    """The type, the fields, and what kind each value is; `data` may be anything."""
    return tuple(
        sorted(
            (name, value if name == "type" else "any" if name == "data" else kind(value))
            for name, value in frame.items()
        )
    )


def kind(value: object) -> str:
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.anyio
async def test_a_real_server_says_nothing_of_another_shape(
    prefix: str, raw_client: Callable[..., Awaitable[RawClient]]
) -> None:
    async with Endpoint("memory://", prefix=prefix, secret="s" * 32, ping_interval=0.05) as endpoint:
        url = endpoint.url.replace("http", "ws") + "/"
        grant = await endpoint.grant(user="7", channels=["private-*"])
        client = await raw_client(url)
        token = (await client.hello(grant=grant, channels={"room:1": None, "room:2": "0ld.1.x"}))["resume"]
        await client.send("no frame")
        await client.send({"type": "subscribe", "channel": "presence-1"})
        await client.send({"type": "unsubscribe", "channel": "room:2"})
        await client.send({"type": "publish", "id": "p1", "channel": "room:1", "data": None})
        await endpoint.publisher.publish("room:1", {"text": "hi"})
        await client.recv("message")
        position = str(await endpoint.publisher.publish("room:1", 1))
        await client.send({"type": "unsubscribe", "channel": "room:1"})
        await client.send({"type": "subscribe", "channel": "room:1", "position": position})
        await eventually_async(lambda: {True, False, None} <= {f.get("recovered", 0) for f in client.received})
        memory_broker(endpoint.publisher.settings).lose()
        await client.recv("gap")
        await eventually_async(lambda: any(frame["type"] == "ping" for frame in client.received))
        async with await RawClient.connect(url) as nobody:
            await nobody.hello(resume=token)
            await client.recv("disconnect")
        anonymous = await raw_client(url)
        await anonymous.hello()
        await endpoint.stop()

        received = [*client.received, *nobody.received, *anonymous.received]
        golden = {shape(frame) for frame in SERVER}
        assert [frame for frame in received if shape(frame) not in golden] == []
        elsewhere = {"accepted", "join", "leave", "response", "response_start", "response_chunk", "response_end"}
        assert {frame["type"] for frame in received} == {frame["type"] for frame in SERVER} - elsewhere
