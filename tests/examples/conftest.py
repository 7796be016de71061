"""Run an example in development and in production, and open windows on it."""

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page

from tests.tools.browser import open_page
from tests.tools.clock import MS, eventually_async
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
    newest_first: bool


FLASK = Example(
    folder=PROJECT / "examples" / "flask",
    app="app:app",
    page="/rooms/lobby",
    messages="/rooms/lobby/messages",
    newest_first=False,
)
DJANGO = Example(
    folder=PROJECT / "examples" / "django",
    app="comments.wsgi:application",
    page="/",
    messages="/comments",
    newest_first=True,
)


@dataclass(slots=True, kw_only=True)
class Site:
    """A running example."""

    example: Example
    app: Served
    processes: Processes
    env: dict[str, str] = field(repr=False)
    realtime: Served | None = None  # None: in the app's process

    @property
    def url(self) -> str:
        return self.app.url + self.example.page

    @property
    def messages_url(self) -> str:
        return self.app.url + self.example.messages

    def start_realtime(self) -> Served:
        """Start the realtime server, again on the port it had."""
        port = self.realtime.port if self.realtime else int(self.env["REALTIME_PORT"])
        self.realtime = self.processes.uvicorn(env=self.env, port=port)
        return self.realtime


class Window:
    """One window on a page of an example."""

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self._newest_first = site.example.newest_first

    async def write(self, text: str, name: str = "Ada") -> None:
        """Fill in the form, send it, and wait until it went through."""
        await self.fill_in(text, name)
        await self.send()
        await self.has_sent()

    async def fill_in(self, text: str, name: str = "Ada") -> None:
        await self.page.fill("form[method=post] [name=name]", name)
        await self.page.fill("form[method=post] [name=text]", text)

    async def send(self) -> None:
        await self.page.click("form[method=post] button")

    async def has_sent(self) -> None:
        """Wait until the page says that it went through by emptying the field."""

        async def is_so() -> bool:
            return await self.page.input_value("form[method=post] [name=text]") == ""

        await eventually_async(is_so, message="the page did not send")

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


OpenWindow = Callable[[Site], Awaitable[Window]]


@pytest.fixture(params=[FLASK, DJANGO], ids=["flask", "django"])
def example(request: pytest.FixtureRequest) -> Example:
    param: Example = request.param
    return param


@pytest.fixture
def env(example: Example, tmp_path: Path) -> dict[str, str]:
    """Where the example keeps its data, which is there and empty."""
    env = {"CHAT_DB": str(tmp_path / "chat.sqlite3"), "COMMENTS_DB": str(tmp_path / "comments.sqlite3")}
    if example is DJANGO:
        command = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
        subprocess.run(command, cwd=example.folder, env=env, check=True)
    return env


@pytest.fixture
def one_process(example: Example, env: dict[str, str], processes: Processes) -> Site:
    """As in development: `pubsub-mw serve`, publications go through memory."""
    served = processes.pubsub_mw("serve", example.app, env=env, cwd=example.folder, ready_path="/realtime/health")
    return Site(example=example, app=served, processes=processes, env=env)


@pytest.fixture
def settings() -> dict[str, str]:
    """Settings of a deployment beyond what it needs; a test may parametrize them."""
    return {}


@pytest.fixture
def deployment(
    example: Example, env: dict[str, str], settings: dict[str, str], processes: Processes, own_redis: RedisServer
) -> Site:
    """As in production: two processes of the app, one realtime server at an origin of its own, Redis between them."""
    app_port, realtime_port = free_port(), free_port()
    env |= {
        "PUBSUB_URL": own_redis.url,
        "PUBSUB_SECRET": "a secret of thirty-two bytes or more",
        "PUBSUB_ORIGINS": f"http://127.0.0.1:{app_port}",
        "REALTIME_URL": f"http://127.0.0.1:{realtime_port}/realtime",
        "REALTIME_PORT": str(realtime_port),
        **settings,
    }
    app = processes.gunicorn(example.app, env=env, port=app_port, cwd=example.folder, ready_path=example.page)
    site = Site(example=example, app=app, processes=processes, env=env)
    site.start_realtime()
    return site


@pytest.fixture(params=["one_process", "deployment"])
def site(request: pytest.FixtureRequest, example: Example) -> Site:  # noqa: ARG001 - so that it varies too
    """The example in development and in production, one after the other."""
    site: Site = request.getfixturevalue(request.param)
    return site


@pytest.fixture
async def open_window(browser: Browser) -> AsyncIterator[OpenWindow]:
    """Open windows that close with the test: `ada = await open_window(site)`, when it is live. They share nothing.

    An error that no script in them catches fails the test.
    """
    async with AsyncExitStack() as stack:
        opened = []

        async def open_one(site: Site) -> Window:
            page, errors = await stack.enter_async_context(open_page(browser))
            opened.append(errors)
            window = Window(page, site)
            await page.goto(site.url)
            await window.becomes("connected")
            return window

        yield open_one
        uncaught = [error for errors in opened for error in errors.uncaught]
        assert not uncaught, "\n".join(uncaught)
