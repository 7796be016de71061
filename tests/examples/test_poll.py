"""The poll of both examples, live by htmx and server-sent events. What pages load from a CDN comes from npm here."""

import asyncio
import json
import re

import httpx
import pytest
from playwright.async_api import Browser, Page, Route

from tests.examples.conftest import DJANGO, Site
from tests.tools.browser import PageErrors
from tests.tools.clock import MS, eventually_async
from tests.tools.npm import node_modules

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

_CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/(?P<package>[^@]+)@(?P<version>[^/]+)/(?P<path>.+)")


async def from_npm(route: Route) -> None:
    """Answer for the CDN with the file of the same package in the same version; the page's hash decides on it."""
    found = _CDN.fullmatch(route.request.url)
    assert found, f"{route.request.url} is not a file of a package"
    package = node_modules() / found["package"]
    assert json.loads((package / "package.json").read_text())["version"] == found["version"]
    headers = {"Access-Control-Allow-Origin": "*", "Content-Type": "text/javascript"}
    await route.fulfill(body=(package / found["path"]).read_bytes(), headers=headers)


async def open_poll(page: Page, site: Site) -> None:
    """Open it, and wait until it listens."""
    await asyncio.to_thread(node_modules)
    await page.route("https://cdn.jsdelivr.net/**", from_npm)
    await page.add_init_script(
        "document.addEventListener('htmx:sseOpen', ({ detail }) => { window.source = detail.source; })"
    )
    await page.goto(site.address + "/poll")
    await page.wait_for_function("window.source?.readyState === 1")


async def vote(page: Page, answer: int) -> None:
    async with page.expect_response(lambda response: response.request.method == "POST") as voting:
        await page.click(f"li:nth-child({answer}) button")
    assert (await voting.value).status == 204


async def votes(page: Page) -> list[int]:
    return [int(text) for text in await page.locator("li b").all_inner_texts()]


async def shows(page: Page, *expected: int) -> None:
    async def is_so() -> bool:
        assert await votes(page) == [*expected]
        return True

    await eventually_async(is_so, 20_000 * MS, f"the page does not show {expected}")


@pytest.fixture
async def other_page(browser_page: Page, browser: Browser) -> Page:
    """A page of another visitor."""
    assert browser_page
    return await (await browser.new_context(ignore_https_errors=True)).new_page()


async def test_a_vote_is_put_in_place_on_every_page(site: Site, browser_page: Page, other_page: Page) -> None:
    for page in (browser_page, other_page):
        await open_poll(page, site)
        await page.evaluate("window.isTheSamePage = true")

    await vote(browser_page, 2)
    await shows(other_page, 0, 1, 0, 0)
    await vote(other_page, 2)  # by a button that was put in place
    await vote(other_page, 4)

    for page in (browser_page, other_page):
        await shows(page, 0, 2, 0, 1)
        assert await page.evaluate("window.isTheSamePage")
    await browser_page.reload()
    await shows(browser_page, 0, 2, 0, 1)


async def test_a_vote_while_a_page_loads_is_shown_by_it(one_process: Site, browser_page: Page) -> None:
    may_go_on = asyncio.Event()

    async def hold(route: Route) -> None:
        await may_go_on.wait()
        await route.continue_()

    await browser_page.route("**/realtime/events?*", hold)
    opening = asyncio.create_task(open_poll(browser_page, one_process))
    await browser_page.wait_for_selector("li")
    await vote(browser_page, 1)
    assert await votes(browser_page) == [0, 0, 0, 0]
    may_go_on.set()
    await opening

    await shows(browser_page, 1, 0, 0, 0)


async def test_all_votes_are_counted_and_every_page_ends_with_the_last_count(
    deployment: Site, browser_page: Page, other_page: Page
) -> None:
    """Two processes of the app answer at once; what they publish is in the order of what they count."""
    for page in (browser_page, other_page):
        await open_poll(page, deployment)

    async with deployment.client() as client:
        token = await csrf_token(client, deployment)
        form = {"answer": await browser_page.get_attribute("li:nth-child(3) button", "value"), **token}
        answers = await asyncio.gather(
            *(client.post("/poll", data=form, headers={"HX-Request": "true"}) for _ in range(40))
        )

    assert {answer.status_code for answer in answers} == {204}
    for page in (browser_page, other_page):
        await shows(page, 0, 0, 40, 0)


async def test_a_page_survives_the_realtime_server(
    deployment: Site, browser_page: Page, page_errors: PageErrors
) -> None:
    """An EventSource that is answered by an error gives up for good; nginx does not let it come to that."""
    await open_poll(browser_page, deployment)
    await browser_page.evaluate("window.first = window.source")
    assert deployment.realtime is not None

    deployment.realtime.kill()
    await browser_page.wait_for_function("window.source.readyState === 0")
    await vote(browser_page, 1)
    await vote(browser_page, 1)
    assert await votes(browser_page) == [0, 0, 0, 0]
    await asyncio.to_thread(deployment.start_realtime)

    await shows(browser_page, 2, 0, 0, 0)
    assert await browser_page.evaluate("window.first === window.source"), "the browser came back by itself"
    assert not page_errors.uncaught


@pytest.mark.parametrize("settings", [{"PUBSUB_HISTORY_SIZE": "1"}], ids=["short history"])
async def test_a_page_that_missed_something_asks_the_app(deployment: Site, browser_page: Page) -> None:
    await open_poll(browser_page, deployment)
    assert deployment.realtime is not None
    deployment.realtime.kill()
    for _ in range(3):
        await vote(browser_page, 1)
    async with browser_page.expect_response("**/poll/bars"):
        await asyncio.to_thread(deployment.start_realtime)

    await shows(browser_page, 3, 0, 0, 0)


async def test_the_form_works_without_javascript(one_process: Site, browser: Browser) -> None:
    context = await browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(one_process.address + "/poll")

    await page.click("li:nth-child(2) button")

    await page.wait_for_url("**/poll")
    await shows(page, 0, 1, 0, 0)
    await context.close()


async def test_what_is_no_answer_is_refused(one_process: Site) -> None:
    async with one_process.client() as client:
        token = await csrf_token(client, one_process)
        assert (await client.post("/poll", data={"answer": "gin", **token})).status_code == 400
        if one_process.example is DJANGO:
            assert (await client.post("/poll", data={"answer": "always on"})).status_code == 403


async def csrf_token(client: httpx.AsyncClient, site: Site) -> dict[str, str]:
    client.headers["Referer"] = site.address + "/poll"  # Django asks for it over TLS
    await client.get("/poll")
    return {"csrfmiddlewaretoken": client.cookies["csrftoken"]} if site.example is DJANGO else {}
