"""Let a page come back to a server within the tests' process as soon as it is there again."""

import pytest

from pubsub_mw.errors import CloseCode
from pubsub_mw.realtime import socket


@pytest.fixture(autouse=True)
def _soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut what a server that goes away asks for, which is up to two seconds."""
    monkeypatch.setitem(socket._RETRY_SECONDS, CloseCode.SHUTDOWN, 0.3)
