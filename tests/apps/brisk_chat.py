"""The chat of examples/flask, whose letter is written in a third of its time."""

import letter  # type: ignore[import-not-found]
from app import app  # type: ignore[import-not-found]

__all__ = ["app"]

letter.SECONDS_PER_WORD = 0.02
