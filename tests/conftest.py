"""Give every test real parts of its own, and hold the event loop to its rules."""

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from blockbuster import BlockBuster
from playwright.async_api import Browser, Page

from tests.tools.browser import PageErrors, open_browser, open_page
from tests.tools.clock import MS
from tests.tools.raw_client import RawClient
from tests.tools.raw_stream import RawStream
from tests.tools.redis_server import RedisServer
from tests.tools.servers import Processes
from tests.tools.tcp_proxy import TcpProxy

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let fixtures know at their end whether the test failed."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stretch pytest-timeout's limit as every other deadline."""
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(float(config.getini("timeout")) * 1000 * MS))


def _has_failed(request: pytest.FixtureRequest) -> bool:
    item: pytest.Item = request.node
    return item.stash.get(_FAILED, False)


@pytest.fixture(scope="session", autouse=True)
def _settings_from_tests_alone() -> Iterator[None]:
    """Keep the PUBSUB_* of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PUBSUB_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _processes_hear_an_interrupt() -> None:
    """A shell that runs the tests in the background has SIGINT ignored, and all that they start would inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _workers_end_soon() -> Iterator[None]:
    """Let a worker within the tests' process look more often whether it is to stop: many tests end with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pubsub_mw.worker.loop._WAIT_SECONDS", 0.02)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Run every async test on asyncio in debug mode; what that finds slow it logs, and the log fails nothing."""
    return "asyncio", {"debug": True}


@pytest.fixture(scope="session")
def _blocking_call_detector() -> BlockBuster:
    # Calls with a frame of ours on the stack, however deep below it they happen. Tests and their tools may block
    # the loop: they start and stop processes, and that holds up nobody but themselves.
    return BlockBuster("pubsub_mw")


@pytest.fixture(autouse=True)
def _blocking_calls_fail(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an async test in which our code makes the event loop wait for a socket, a file, a lock or the clock."""
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    detector: BlockBuster = request.getfixturevalue("_blocking_call_detector")
    detector.activate()
    try:
        yield
    finally:
        detector.deactivate()


@pytest.fixture
def prefix() -> str:
    """A key prefix, or the start of a channel's name, that no other test uses."""
    return f"test-{uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests that leave it whole; keep apart with `prefix`."""
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """Each engine in turn, Redis on the shared server."""
    if request.param == "memory":
        return "memory://"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that this test may kill, restart, pause, fill and flush."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def tcp_proxy() -> Iterator[Callable[[int], TcpProxy]]:
    """Put a bendable network in front of a port: `proxy = tcp_proxy(own_redis.port)`."""
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(TcpProxy(port))


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    """Start servers as processes; they end with the test, and a failed test shows their logs."""
    with Processes() as processes:
        yield processes
        if _has_failed(request):
            request.node.add_report_section("teardown", "log of its processes", processes.logs())


@pytest.fixture
async def raw_client() -> AsyncIterator[Callable[..., Awaitable[RawClient]]]:
    """Open WebSockets that close with the test: `client = await raw_client(url, origin=..., headers=...)`."""
    clients: list[RawClient] = []

    async def connect(url: str, **options: Any) -> RawClient:
        clients.append(await RawClient.connect(url, **options))
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()


@pytest.fixture
async def raw_stream() -> AsyncIterator[Callable[..., Awaitable[RawStream]]]:
    """Open streams that close with the test: `stream = await raw_stream(url, params=..., headers=...)`."""
    streams: list[RawStream] = []

    async def connect(url: str, **options: Any) -> RawStream:
        streams.append(await RawStream.open(url, **options))
        return streams[-1]

    yield connect
    for stream in streams:
        await stream.close()


@pytest.fixture(scope="module")
async def browser(anyio_backend: object) -> AsyncIterator[Browser]:  # noqa: ARG001 - it makes the fixture async
    async with open_browser() as browser:
        yield browser


@pytest.fixture
async def _page_and_errors(browser: Browser, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Page, PageErrors]]:
    async with open_page(browser) as (page, errors):
        yield page, errors
        if _has_failed(request):
            shot = Path(tempfile.mkdtemp(prefix="pubsub-browser-")) / "page.png"
            await page.screenshot(path=shot)
            said = "\n".join([*errors.uncaught, *errors.console])
            request.node.add_report_section("teardown", "browser", f"screenshot: {shot}\n{said}")
        assert not errors.uncaught, "\n".join(errors.uncaught)


@pytest.fixture
def browser_page(_page_and_errors: tuple[Page, PageErrors]) -> Page:
    """A fresh page in a real browser. An error that no script in it catches fails the test."""
    return _page_and_errors[0]


@pytest.fixture
def page_errors(_page_and_errors: tuple[Page, PageErrors]) -> PageErrors:
    """What `browser_page` complained about so far; a test that provokes an error clears it here."""
    return _page_and_errors[1]
