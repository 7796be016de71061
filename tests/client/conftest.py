"""Let a client come back after a time that is the same in each run, and short."""

import pytest

from pubsub_mw.errors import CloseCode
from pubsub_mw.realtime import socket


@pytest.fixture(autouse=True)
def _no_luck_in_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a fifth of each back-off: never too short to be seen, never so long that a test gives up on it.

    What a server that goes away asks for is cut likewise.
    """
    monkeypatch.setattr("random.random", lambda: 0.2)
    monkeypatch.setitem(socket._RETRY_SECONDS, CloseCode.SHUTDOWN, 0.3)
