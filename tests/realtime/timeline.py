"""Keep the truth about channels, and judge what a client was given against it.

In:     every publication with the position it followed
Out:    verdicts: what lies between two positions, and whether being told of a loss was called for
Owns:   the chain of publications: each one knows the one before, so forks and lost epochs need no special case
Never:  asks the code under test
"""

from collections import defaultdict
from dataclasses import dataclass

from pubsub_mw.model import START_TAG, Position

__all__ = ["Entry", "Timeline"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One publication that was accepted."""

    position: Position
    previous: Position
    data: int
    is_kept: bool
    exclude: str


class Timeline:
    """All that was ever published to one channel, on whichever branch."""

    def __init__(self, history_size: int) -> None:
        self._history_size = history_size
        self._entries: dict[Position, Entry] = {}
        self._highest: dict[str, int] = defaultdict(int)
        self.was_rolled_back = False

    def add(self, entry: Entry) -> None:
        assert entry.position not in self._entries, "a position is given out once"
        self._entries[entry.position] = entry
        epoch = entry.position.epoch
        self._highest[epoch] = max(self._highest[epoch], entry.position.offset)

    def entry(self, position: Position) -> Entry:
        return self._entries[position]

    def between(self, older: Position, newer: Position) -> list[Entry] | None:
        """Return what was published after `older` up to `newer`, or None if the one does not lead to the other."""
        found: list[Entry] = []
        position = newer
        while position != older:
            if position not in self._entries:
                assert position.offset == 0, f"{position} is a position nobody gave out"
                assert position.tag == START_TAG
                return None
            found.append(self._entries[position])
            position = found[-1].previous
        return found[::-1]

    def has_branch(self, position: Position, excluded: str) -> bool:
        """Whether something that excludes `excluded` follows `position`: they may be further than they know."""
        return any(entry.previous == position and entry.exclude == excluded for entry in self._entries.values())

    def may_be_told(self, older: Position, newer: Position) -> bool:
        """Whether somebody at `older` may be told that continuity was lost, and to go on from `newer`."""
        missed = self.between(older, newer)
        if missed is None:
            # Another epoch or another branch; or an older state, which must be the broker's doing and not the hub's.
            return self.was_rolled_back or self.between(newer, older) is None
        oldest_kept = self._highest[newer.epoch] - self._history_size + 1
        return any(not entry.is_kept or entry.position.offset < oldest_kept for entry in missed)
