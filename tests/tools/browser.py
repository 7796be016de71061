"""Drive the Chromium of this machine, as a visitor's browser.

In:     the first of `chromium`, `chromium-browser`, `google-chrome` on the path
Out:    a page of its own for each test, and what went wrong in it
Owns:   one browser process per module of tests
Never:  downloads a browser; reaches for anything beyond the loopback on its own account
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, ConsoleMessage, Error, Page, async_playwright

__all__ = ["PageErrors", "open_browser", "open_page"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGS = (
    "--no-sandbox",  # Chromium refuses to run as root with it, and what it loads here is ours
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class PageErrors:
    """What a page complained about, in order.

    Attributes:
        uncaught: errors no script caught. The `browser_page` fixture fails a test that leaves any here
        console: what was logged as an error. A lost connection writes here too, so a test judges for itself
    """

    def __init__(self, page: Page) -> None:
        self.uncaught: list[str] = []
        self.console: list[str] = []
        page.on("pageerror", self._on_page_error)
        page.on("console", self._on_console)

    def _on_page_error(self, error: Error) -> None:
        self.uncaught.append(error.stack or error.message)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console.append(message.text)


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        raise RuntimeError(f"no browser: install one of {', '.join(_NAMES)}, or run `make test`, which does")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=_ARGS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def open_page(browser: Browser) -> AsyncIterator[tuple[Page, PageErrors]]:
    """A page with storage, cookies and cache of its own, as on a visitor's first visit. It believes any certificate."""
    context = await browser.new_context(ignore_https_errors=True)
    context.set_default_timeout(15_000)
    page = await context.new_page()
    try:
        yield page, PageErrors(page)
    finally:
        await context.close()
