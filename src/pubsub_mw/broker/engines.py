"""Choose the engine that a url names.

In:     settings
Out:    a broker for threads, or one for an event loop
Owns:   the schemes; the stand-in that a test puts before every engine of the process
Never:  imports Redis for a process that uses memory
"""

import contextlib
from collections.abc import Iterator

from pubsub_mw.broker.interface import AsyncBroker, Broker
from pubsub_mw.broker.memory import AsyncMemoryBroker, MemoryBroker, memory_broker
from pubsub_mw.errors import SettingsError
from pubsub_mw.settings import Settings

__all__ = ["current_stand_in", "expect_endpoint", "load_engine", "open_async_broker", "open_broker", "stand_in"]

_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


def open_broker(settings: Settings) -> Broker:
    """Return a broker for synchronous code.

    Raises:
        SettingsError: the url names no engine, or is malformed.
    """
    if _scheme(settings) == "memory":
        return memory_broker(settings)
    from pubsub_mw.broker.redis.publisher import RedisBroker

    return RedisBroker(settings)


def load_engine(settings: Settings) -> None:
    """Check the url and import what `open_async_broker` needs, so that no event loop has to wait for that.

    Raises:
        SettingsError: the url names no engine, or is malformed.
    """
    if _scheme(settings) != "memory":
        from pubsub_mw.broker.redis.reader import AsyncRedisBroker

        AsyncRedisBroker(settings)


def expect_endpoint(settings: Settings) -> None:
    """Note that this process has a realtime endpoint, so that publishing to memory here is no mistake."""
    if _scheme(settings) == "memory":
        memory_broker(settings).expect_endpoint()


def open_async_broker(settings: Settings) -> AsyncBroker:
    """Return a broker for the running event loop.

    Raises:
        SettingsError: the url names no engine, or is malformed.
    """
    if _scheme(settings) == "memory":
        return AsyncMemoryBroker(memory_broker(settings))
    from pubsub_mw.broker.redis.reader import AsyncRedisBroker

    return AsyncRedisBroker(settings)


def _scheme(settings: Settings) -> str:
    scheme = settings.url.partition("://")[0]
    if scheme == "memory" or scheme in _REDIS_SCHEMES:
        return scheme
    if scheme.startswith("redis+"):
        raise SettingsError(f"{scheme}:// is not there yet; use redis:// to one server, or redis+sentinel://")
    raise SettingsError(
        f"url {settings.safe_url!r} names no broker; use memory://, redis://host:6379/0, rediss://, unix:// or "
        "redis+sentinel://host:26379,host:26379/mymaster"
    )


_stand_in: MemoryBroker | None = None


@contextlib.contextmanager
def stand_in(broker: MemoryBroker) -> Iterator[None]:
    """Let every publisher of the process use `broker`, whatever its url. For `pubsub_mw.testing`."""
    global _stand_in
    if _stand_in is not None:
        raise RuntimeError("another capture is open; they cannot be nested")
    _stand_in = broker
    try:
        yield
    finally:
        _stand_in = None


def current_stand_in() -> MemoryBroker | None:
    """Return the broker that stands in for all, or None."""
    return _stand_in
