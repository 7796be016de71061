"""Many deadlines on one timer: told once, in time, and not after a change of mind."""

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.realtime.wheel import Wheel
from tests.realtime.virtual_loop import run_virtually

TICK = 1 / 64


class Sleeper:
    """Somebody with a deadline."""

    def __init__(self, wheel: Wheel, again_in: float | None = None) -> None:
        self.due = 0
        self.wheel = wheel
        self.again_in = again_in
        self.told: list[float] = []

    def on_due(self) -> None:
        now = asyncio.get_running_loop().time()
        self.told.append(now)
        if self.again_in is not None:
            self.wheel.set(self, now + self.again_in)


def test_each_is_told_once_and_never_early() -> None:
    async def main() -> None:
        wheel = Wheel()
        sleepers = {delay: Sleeper(wheel) for delay in (0.0, 0.001, 0.5, 0.501, 3.0, 3_600.0)}
        for delay, sleeper in sleepers.items():
            wheel.set(sleeper, delay)
        await asyncio.sleep(4_000)
        for delay, sleeper in sleepers.items():
            assert len(sleeper.told) == 1
            assert delay <= sleeper.told[0] <= delay + 2 * TICK
            assert sleeper.due == 0

    run_virtually(main)


def test_who_changes_the_time_or_goes_is_not_told_at_the_old_one() -> None:
    async def main() -> None:
        wheel = Wheel()
        later, sooner, gone = Sleeper(wheel), Sleeper(wheel), Sleeper(wheel)
        for sleeper in (later, sooner, gone):
            wheel.set(sleeper, 5)
        wheel.set(later, 10)
        wheel.set(sooner, 1)
        wheel.discard(gone)
        wheel.discard(gone)
        await asyncio.sleep(20)
        assert [round(sleeper.told[0]) for sleeper in (later, sooner)] == [10, 1]
        assert not gone.told

    run_virtually(main)


def test_one_who_sets_the_next_time_while_it_is_told_is_told_again() -> None:
    async def main() -> None:
        wheel = Wheel()
        sleeper = Sleeper(wheel, again_in=25)
        wheel.set(sleeper, 25)
        await asyncio.sleep(1_000)
        assert 39 <= len(sleeper.told) <= 40

    run_virtually(main)


def test_a_fault_of_one_keeps_nobody_else_from_being_told() -> None:
    class Faulty(Sleeper):
        def on_due(self) -> None:
            raise RuntimeError("on purpose")

    async def main() -> None:
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context["exception"]))
        wheel = Wheel()
        others = [Sleeper(wheel) for _ in range(20)]
        for sleeper in (*others, Faulty(wheel)):
            wheel.set(sleeper, 1)
        await asyncio.sleep(2)
        assert len(faults) == 1
        assert all(len(sleeper.told) == 1 for sleeper in others)

    run_virtually(main)


def test_thousands_at_once_leave_turns_to_others() -> None:
    async def main() -> None:
        wheel = Wheel()
        sleepers = [Sleeper(wheel) for _ in range(5_000)]
        for sleeper in sleepers:
            wheel.set(sleeper, 1)
        counts = []
        while not all(sleeper.told for sleeper in sleepers):
            counts.append(sum(len(sleeper.told) for sleeper in sleepers))
            await asyncio.sleep(0 if counts[-1] else 1)
        assert max(after - before for before, after in itertools.pairwise(counts)) <= 500

    run_virtually(main)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100) | st.none(), st.floats(0, 10)), max_size=40))
def test_whatever_is_set_moved_and_forgotten_the_last_word_counts(steps: list[tuple[int, float | None, float]]) -> None:
    async def main() -> None:
        wheel = Wheel()
        loop = asyncio.get_running_loop()
        sleepers = [Sleeper(wheel) for _ in range(6)]
        expected: dict[int, list[float]] = {index: [] for index in range(6)}
        waiting: dict[int, float] = {}

        def pass_time() -> None:
            for index in list(waiting):
                if not sleepers[index].due:
                    expected[index].append(waiting.pop(index))

        for index, delay, pause in steps:
            pass_time()
            waiting.pop(index, None)
            if delay is None:
                wheel.discard(sleepers[index])
            else:
                waiting[index] = loop.time() + delay
                wheel.set(sleepers[index], waiting[index])
            await asyncio.sleep(pause)
        await asyncio.sleep(200)
        pass_time()
        assert not waiting
        for index, sleeper in enumerate(sleepers):
            assert len(sleeper.told) == len(expected[index])
            for told, at in zip(sleeper.told, expected[index], strict=True):
                assert at - 1e-9 <= told <= at + 2 * TICK

    run_virtually(main)
