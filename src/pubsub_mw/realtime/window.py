"""Remember what was just read of a channel's history, while many come back to it.

In:     publications: from a page of history, then those that came live
Out:    what somebody at a position missed; the same runs for all who are there
Owns:   a stretch of one channel's history without a hole, in no more than so many bytes
Never:  answers for a position that it does not hold, or over a publication that is not kept: history must be asked

A stretch proves itself: each publication names the one before, tag and all. So whoever is somewhere in it, and gets
what follows up to its top, has missed nothing, whatever became of the broker since.
"""

from collections import deque
from collections.abc import Iterable
from itertools import islice

from pubsub_mw.model import Position, Publication
from pubsub_mw.realtime.subscription import Run, runs_of

__all__ = ["Window"]


class Window:
    """One stretch.

    Args:
        start: the position that the first of its publications follows
        limit_bytes: of frames; beyond it the oldest are forgotten

    Attributes:
        top: the position of the newest publication
        used_at: when it last answered, by the event loop's clock; its owner's to set
    """

    __slots__ = ("_answers", "_first", "_limit_bytes", "_places", "_publications", "_size", "top", "used_at")

    def __init__(self, start: Position, limit_bytes: int) -> None:
        self.top = start
        self.used_at = 0.0
        self._limit_bytes = limit_bytes
        self._size = 0
        self._publications: deque[Publication] = deque()
        self._first = 0  # the number of the oldest that is still there
        self._places = {start: 0}  # position -> the number of the publication that follows it
        self._answers: dict[Position, list[Run]] = {}

    def extend(self, publications: Iterable[Publication], *, are_live: bool = False) -> None:
        """Append those that follow its top, each one the one before; others are left out.

        Of one that came live and changes what the channel keeps it cannot be told what is kept now: history must be
        asked, and the window ends before it.
        """
        for publication in publications:
            if publication.previous != self.top or (are_live and publication.has_own_history):
                continue
            self._publications.append(publication)
            self._size += len(publication.frame)
            self.top = publication.position
            self._places[self.top] = self._first + len(self._publications)
            self._answers.clear()
            while self._size > self._limit_bytes:
                oldest = self._publications.popleft()
                self._size -= len(oldest.frame)
                self._first += 1
                del self._places[oldest.previous]

    def after(self, position: Position) -> list[Run] | None:
        """Return what follows `position` up to the top; None = it cannot be told from here."""
        if position not in self._answers:
            place = self._places.get(position)
            if place is None:
                return None
            missed = list(islice(self._publications, place - self._first, None))
            if not all(publication.frame for publication in missed):
                return None
            self._answers[position] = runs_of(missed)
        return self._answers[position]
