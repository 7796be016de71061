"""Run an example in development and in production, and open windows on it."""

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import Browser, Page, Request

from tests.tools.browser import PageErrors, open_page
from tests.tools.clock import MS, eventually_async
from tests.tools.nginx import Nginx
from tests.tools.ports import free_port
from tests.tools.redis_server import RedisServer
from tests.tools.servers import PROJECT, Processes, Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a test needs to know of one of the two. Their pages share the ids and classes that `Window` uses."""

    folder: Path
    app: str
    page: str  # path
    messages: str  # path of what is posted and listed
    requests: str  # `PUBSUB_REQUESTS` of a deployment
    newest_first: bool


FLASK = Example(
    folder=PROJECT / "examples" / "flask",
    app="app:app",
    page="/rooms/lobby",
    messages="/rooms/lobby/messages",
    requests="/rooms/*/messages /letter/text",
    newest_first=False,
)
DJANGO = Example(
    folder=PROJECT / "examples" / "django",
    app="comments.wsgi:application",
    page="/",
    messages="/comments",
    requests="/comments",
    newest_first=True,
)


@dataclass(slots=True, kw_only=True)
class Site:
    """A running example."""

    example: Example
    address: str  # where a visitor finds it
    processes: Processes
    env: dict[str, str] = field(repr=False)
    app: Served
    nginx: Nginx | None = None  # this and the rest: None in one process
    realtime: Served | None = None
    worker: Served | None = None

    @property
    def url(self) -> str:
        return self.address + self.example.page

    @property
    def messages_url(self) -> str:
        return self.address + self.example.messages

    def client(self, **options: Any) -> httpx.AsyncClient:
        """What knows HTTP and nothing else."""
        trust = self.nginx.trust if self.nginx else True
        return httpx.AsyncClient(base_url=self.address, verify=trust, **options)

    def start_realtime(self, port: int | None = None) -> Served:
        """Start the realtime server, again on the port it had."""
        port = self.realtime.port if self.realtime else port
        self.realtime = self.processes.uvicorn(env=self.env, port=port)
        return self.realtime

    def start_worker(self) -> Served:
        self.worker = self.processes.pubsub_mw("worker", self.example.app, env=self.env, cwd=self.example.folder)
        return self.worker


class Window:
    """One window on a page of an example."""

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self.posted: list[str] = []  # paths of the app that were posted to by HTTP; a connection may do so itself
        self._newest_first = site.example.newest_first
        page.on("request", self._on_request)

    def _on_request(self, request: Request) -> None:
        if request.method == "POST" and not urlsplit(request.url).path.startswith("/realtime/"):
            self.posted.append(urlsplit(request.url).path)

    async def log_in(self, name: str) -> None:
        await self.page.fill("#name", name)
        async with self.page.expect_navigation():
            await self.page.click("form:has(#name) button")
        assert await self.name() == name

    async def log_out(self) -> None:
        async with self.page.expect_navigation():
            await self.page.click("#leave")
        assert not await self.name()

    async def name(self) -> str | None:
        return await self.page.get_attribute("body", "data-name")

    async def write(self, text: str) -> None:
        """Fill in the form, send it, and wait until it went through."""
        await self.page.fill("#text", text)
        await self.send()
        await self.has_sent()

    async def send(self) -> None:
        await self.page.click("form:has(#text) button")

    async def has_sent(self) -> None:
        """Wait until the page says that it went through by emptying the field."""

        async def is_so() -> bool:
            return await self.page.input_value("#text") == ""

        await eventually_async(is_so, 15_000 * MS, message="the page did not send")

    async def texts(self) -> list[str]:
        """What the page shows, oldest first."""
        texts = await self.page.locator("ol .text").all_inner_texts()
        return texts[::-1] if self._newest_first else texts

    async def state(self) -> str | None:
        return await self.page.locator("#state").get_attribute("data-state")

    async def becomes(self, *states: str) -> None:
        async def is_so() -> bool:
            return await self.state() in states

        await eventually_async(is_so, 15_000 * MS, f"the page never was {' or '.join(states)}")

    async def shows(self, *texts: str) -> None:
        """Wait until the page shows exactly `texts`, in this order."""

        async def is_so() -> bool:
            assert await self.texts() == [*texts]
            return True

        await eventually_async(is_so, 15_000 * MS, f"the page does not show {texts}")


class OpenWindow(Protocol):
    def __call__(self, site: Site, name: str | None = "Ada", beside: Window | None = None) -> Awaitable[Window]: ...


@pytest.fixture(params=[FLASK, DJANGO], ids=["flask", "django"])
def example(request: pytest.FixtureRequest) -> Example:
    param: Example = request.param
    return param


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of the Django example, there and empty; to be copied."""
    path = tmp_path_factory.mktemp("django") / "comments.sqlite3"
    command = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
    subprocess.run(command, cwd=DJANGO.folder, env={"COMMENTS_DB": str(path)}, check=True)
    return path


@pytest.fixture
def env(example: Example, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Where the example keeps its data, which is there and empty."""
    env = {"CHAT_DB": str(tmp_path / "chat.sqlite3"), "COMMENTS_DB": str(tmp_path / "comments.sqlite3")}
    if example is DJANGO:
        shutil.copy(request.getfixturevalue("migrated"), env["COMMENTS_DB"])
    return env


@pytest.fixture
def one_process(example: Example, env: dict[str, str], processes: Processes) -> Site:
    """As in development: `pubsub-mw serve`, publications go through memory."""
    served = processes.pubsub_mw("serve", example.app, env=env, cwd=example.folder, ready_path="/realtime/health")
    return Site(example=example, address=served.url, app=served, processes=processes, env=env)


@pytest.fixture
def settings() -> dict[str, str]:
    """Settings of a deployment beyond what it needs; a test may parametrize them."""
    return {}


@pytest.fixture
def deployment(
    example: Example,
    env: dict[str, str],
    settings: dict[str, str],
    processes: Processes,
    own_redis: RedisServer,
    tmp_path: Path,
) -> Site:
    """As in production: two processes of the app, a realtime server and a worker, behind nginx and TLS."""
    env |= {
        "PUBSUB_URL": own_redis.url,
        "PUBSUB_SECRET": "a secret of thirty-two bytes or more",
        "PUBSUB_REQUESTS": example.requests,
        "PUBSUB_DRAIN": "1",
        "PUBSUB_LEASE": "3",  # so long a request waits whose worker was killed
        **settings,
    }
    app = processes.gunicorn(example.app, env=env, cwd=example.folder, ready_path=example.page, wait=False)
    realtime_port = free_port()
    nginx = Nginx(processes, tmp_path, app.port, [realtime_port])
    site = Site(example=example, address=nginx.url, processes=processes, env=env, app=app, nginx=nginx)
    site.start_worker()
    site.start_realtime(realtime_port)
    app.wait_until_ready()
    return site


@pytest.fixture(params=["one_process", "deployment"])
def site(request: pytest.FixtureRequest, example: Example) -> Site:  # noqa: ARG001 - so that it varies too
    """The example in development and in production, one after the other."""
    site: Site = request.getfixturevalue(request.param)
    return site


@pytest.fixture
async def open_window(browser: Browser) -> AsyncIterator[OpenWindow]:
    """Open windows that close with the test: `ada = await open_window(site)`, when it is live.

    Each is a browser of its own and logged in under `name` (None: not), or a second window of the browser `beside`.
    An error that no script in them catches fails the test.
    """
    async with AsyncExitStack() as stack:
        opened = []

        async def open_one(site: Site, name: str | None = "Ada", beside: Window | None = None) -> Window:
            if beside is None:
                page, errors = await stack.enter_async_context(open_page(browser))
            else:
                page = await beside.page.context.new_page()
                errors = PageErrors(page)
            opened.append(errors)
            window = Window(page, site)
            await page.goto(site.url)
            if name is not None and beside is None:
                await window.log_in(name)
            await window.becomes("connected")
            return window

        yield open_one
        uncaught = [error for errors in opened for error in errors.uncaught]
        assert not uncaught, "\n".join(uncaught)
