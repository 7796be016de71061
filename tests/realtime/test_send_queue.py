"""The frames that wait for one client: order, bounds, and the end."""

import asyncio
from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from pubsub_mw.errors import CloseCode
from pubsub_mw.realtime.send_queue import Batch, SendQueue
from tests.tools.clock import MS

T = TypeVar("T")

pytestmark = pytest.mark.anyio


async def test_frames_come_out_in_the_order_they_were_put_live_or_recovered() -> None:
    queue = SendQueue(1_000, 100)
    queue.put_nowait(b"1")
    queue.put_recovered_nowait(b"2")
    queue.put_nowait(b"3")
    assert [await queue.take() for _ in range(3)] == [b"1", b"2", b"3"]


async def test_who_waits_for_a_frame_gets_it_when_it_is_put() -> None:
    queue = SendQueue(1_000, 100)
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not reader.done()
    queue.put_nowait(b"frame")
    assert await reader == b"frame"


async def test_at_the_bound_the_queue_takes_a_frame_and_over_it_closes() -> None:
    queue = SendQueue(10, 5)
    queue.put_nowait(b"x" * 5)
    queue.put_nowait(b"x" * 5)
    assert [await queue.take(), await queue.take()] == [b"x" * 5, b"x" * 5]
    for _ in range(3):
        queue.put_nowait(b"x" * 5)
    assert queue.closed is not None
    assert queue.closed[0] is CloseCode.SLOW
    queue.put_nowait(b"never")
    queue.put_recovered_nowait(b"never")
    assert queue.take_nowait() == [b"x" * 5, b"x" * 5]


async def test_a_frame_larger_than_the_bound_goes_out_if_nothing_waits() -> None:
    queue = SendQueue(10, 5)
    queue.put_nowait(b"x" * 100)
    assert queue.closed is None
    queue.put_nowait(b"x")
    assert queue.closed is not None


async def test_what_was_taken_counts_no_more() -> None:
    queue = SendQueue(10, 5)
    for _ in range(20):
        queue.put_nowait(b"x" * 10)
        await queue.take()
    assert queue.closed is None
    assert queue.waiting_bytes == 0


async def test_recovered_frames_do_not_close_the_queue_and_leave_room_for_live_ones() -> None:
    queue = SendQueue(10, 5)
    for _ in range(100):
        queue.put_recovered_nowait(b"x" * 100)
    queue.put_nowait(b"x" * 10)
    assert queue.closed is None
    assert not queue.is_low
    assert queue.waiting_bytes == 10_010


async def test_a_callback_comes_once_when_enough_was_read() -> None:
    queue, called = SendQueue(100, 5), 0

    def count() -> None:
        nonlocal called
        called += 1

    for _ in range(4):
        queue.put_recovered_nowait(b"xxx")
    queue.when_low(count)
    await queue.take()
    await queue.take()
    assert called == 0
    await queue.take()
    assert called == 1
    await queue.take()
    assert called == 1


async def test_a_callback_comes_when_the_queue_closes_or_is_emptied() -> None:
    for end in ("close", "empty"):
        queue, called = SendQueue(100, 5), asyncio.Event()
        queue.put_recovered_nowait(b"x" * 50)
        queue.when_low(called.set)
        if end == "close":
            queue.close(CloseCode.SHUTDOWN, "")
        else:
            queue.take_nowait()
        assert called.is_set()


async def test_the_first_close_counts_and_is_told_once() -> None:
    queue, told = SendQueue(100, 5), []
    queue.when_closed(lambda: told.append(queue.closed))
    queue.close(CloseCode.SHUTDOWN, "first")
    queue.close(CloseCode.SLOW, "second")
    assert told == [(CloseCode.SHUTDOWN, "first")]


async def test_after_the_close_what_waits_can_still_be_taken_and_then_the_end() -> None:
    queue = SendQueue(100, 5)
    queue.put_nowait(b"last")
    queue.close(CloseCode.SHUTDOWN, "")
    assert await queue.take() == b"last"
    assert await queue.take() == b""


async def test_who_waits_for_a_frame_is_woken_by_the_close() -> None:
    queue = SendQueue(100, 5)
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.close(CloseCode.SHUTDOWN, "")
    async with asyncio.timeout(1_000 * MS):
        assert await reader == b""


async def test_a_reader_that_was_cancelled_leaves_the_frame_to_the_next() -> None:
    queue = SendQueue(100, 5)
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.put_nowait(b"frame")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await queue.take() == b"frame"


async def test_what_is_held_waits_for_the_first_frame() -> None:
    queue = SendQueue(100, 5)
    queue.hold()
    queue.put_nowait(b"2")
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.put_nowait(b"3")
    await asyncio.sleep(0)
    assert not reader.done()
    queue.put_first(b"1")
    queue.release()
    assert [await reader, await queue.take(), await queue.take()] == [b"1", b"2", b"3"]
    assert queue.waiting_bytes == 0


async def test_a_close_lets_out_what_is_held() -> None:
    queue = SendQueue(100, 5)
    queue.hold()
    queue.put_nowait(b"held")
    reader = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.close(CloseCode.BROKER_UNAVAILABLE, "")
    assert await reader == b"held"


async def test_a_batch_is_put_as_its_frames_are_and_recovered_ones_are_not_bounded() -> None:
    queue = SendQueue(100, 5)
    queue.put_recovered_batch(Batch((b"r" * 90, b"r" * 90)))
    queue.put_batch(Batch((b"a" * 60, b"b" * 30)))
    queue.put_batch(Batch((b"c" * 10, b"d")))
    assert queue.closed is not None
    assert queue.closed[0] is CloseCode.SLOW
    assert queue.take_nowait() == [b"r" * 90, b"r" * 90, b"a" * 60, b"b" * 30, b"c" * 10]


@pytest.mark.parametrize("sizes", [[1], [125], [126], [65_535], [65_536], [0, 1, 126, 70_000, 125]])
async def test_a_batch_reads_as_websocket_text_frames_to_a_client(sizes: list[int]) -> None:
    batch = Batch(tuple(bytes([ord("a") + index]) * size for index, size in enumerate(sizes)))
    assert batch.cost == 1 + len(batch.websocket) // 16_384
    reader = StreamReader()
    reader.feed_data(batch.websocket)
    reader.feed_eof()
    for expected in batch.frames:
        frame = finish(Frame.parse(reader.read_exact, mask=False))
        assert (frame.opcode, frame.fin, frame.data) == (Opcode.TEXT, True, expected)
    assert finish(reader.at_eof())


def finish(reading: Generator[None, None, T]) -> T:
    """Run one of the parser's generators, for which everything is there already."""
    try:
        next(reading)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a frame is not whole")


@given(st.lists(st.tuples(st.sampled_from(["live", "recovered", "take", "take all"]), st.integers(1, 40))))
def test_bytes_are_counted_as_they_come_and_go(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        queue, waiting = SendQueue(100, 20), list[bytes]()
        for step, size in steps:
            if step == "take" and waiting:
                assert await queue.take() == waiting.pop(0)
            elif step == "take all":
                assert queue.take_nowait() == waiting
                waiting = []
            elif step == "recovered" and queue.closed is None:
                queue.put_recovered_nowait(b"r" * size)
                waiting.append(b"r" * size)
            elif step == "live" and queue.closed is None:
                live = sum(len(frame) for frame in waiting if frame.startswith(b"l"))
                queue.put_nowait(b"l" * size)
                if live and live + size > 100:
                    assert queue.closed is not None
                else:
                    waiting.append(b"l" * size)
            assert queue.waiting_bytes == sum(map(len, waiting))
            assert queue.is_low == (queue.waiting_bytes <= 20)

    asyncio.run(main())
