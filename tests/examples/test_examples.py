"""What both examples promise to whoever opens them."""

import asyncio
from pathlib import Path

import anyio
import httpx
import pytest
from playwright.async_api import Browser, Route

from tests.examples.conftest import DJANGO, FLASK, OpenWindow, Site, Window

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


async def test_what_one_window_posts_the_other_shows_without_reloading(site: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(site), await open_window(site)
    for window in (ada, basho):
        await window.page.evaluate("window.isTheSamePage = true")

    await ada.write("one", name="Ada")
    await basho.write("two", name="Basho")
    await ada.write("three", name="Ada")

    for window in (ada, basho):
        await window.shows("one", "two", "three")
        assert await window.page.evaluate("window.isTheSamePage")

    await basho.page.reload()
    await basho.shows("one", "two", "three")
    await basho.becomes("connected")
    await ada.write("four")
    await basho.shows("one", "two", "three", "four")


async def test_what_is_posted_while_a_page_loads_is_shown_by_it(site: Site, open_window: OpenWindow) -> None:
    ada = await open_window(site)
    may_go_on = asyncio.Event()

    async def hold(route: Route) -> None:
        await may_go_on.wait()
        await route.continue_()

    late = await open_window(site)
    await late.page.route("**/client.js", hold)
    await late.page.goto(site.url, wait_until="commit")
    await late.page.wait_for_selector("#state")
    await ada.write("said before you listened")
    assert await late.texts() == []
    may_go_on.set()

    await late.shows("said before you listened")


async def test_markup_is_shown_as_text(one_process: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process)
    markup = """<img src=x onerror="document.body.remove()"></script><b>{{ 7 * 7 }}</b> "it's" &amp;"""

    await ada.write(markup, name="<b>Ada</b>")

    await basho.shows(markup)
    await basho.page.reload()
    await basho.shows(markup)
    assert await basho.page.locator("ol b").all_inner_texts() == ["<b>Ada</b>"]


async def test_the_form_works_without_javascript(one_process: Site, open_window: OpenWindow, browser: Browser) -> None:
    ada = await open_window(one_process)
    context = await browser.new_context(java_script_enabled=False)
    plain = Window(await context.new_page(), one_process)
    await plain.page.goto(one_process.url)

    await plain.write("by a plain form")
    await plain.shows("by a plain form")
    assert plain.page.url == one_process.url
    await ada.shows("by a plain form")
    await context.close()


async def test_what_is_sent_again_because_the_answer_was_lost_is_shown_once(
    one_process: Site, open_window: OpenWindow
) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process)

    async def lose_the_answer(route: Route) -> None:
        if route.request.method == "POST":
            assert (await route.fetch()).ok
        await route.abort()

    await ada.page.route(one_process.messages_url, lose_the_answer)
    await ada.fill_in("is this on?")
    await ada.send()
    await ada.page.wait_for_selector("#problem:not(:empty)")
    await ada.page.unroute(one_process.messages_url)
    await ada.send()
    await ada.has_sent()
    await ada.write("it is")

    for window in (ada, basho):
        await window.shows("is this on?", "it is")
    await basho.page.reload()
    await basho.shows("is this on?", "it is")


async def test_what_is_not_complete_is_refused(one_process: Site) -> None:
    async with httpx.AsyncClient() as client:
        page = await client.get(one_process.url)
        token = {"csrfmiddlewaretoken": client.cookies["csrftoken"]} if one_process.example is DJANGO else {}
        assert page.status_code == 200
        whole = {"name": "Ada", "text": "hello", "key": "k", **token}
        for field, value in {"name": " ", "text": "", "key": "k" * 41}.items():
            answer = await client.post(one_process.messages_url, data={**whole, field: value})
            assert answer.status_code == 400, field
        assert (await client.get(one_process.messages_url)).json() == []
        answer = await client.post(one_process.messages_url, data=whole, headers={"Accept": "application/json"})
        assert answer.status_code == 201


@pytest.mark.parametrize("settings", [{"PUBSUB_HISTORY_SIZE": "1000"}], ids=["long history"])
@pytest.mark.parametrize("is_orderly", [True, False], ids=["stopped", "killed"])
async def test_a_page_catches_up_by_itself_when_the_realtime_server_comes_back(
    deployment: Site, open_window: OpenWindow, is_orderly: bool
) -> None:
    ada, basho = await open_window(deployment), await open_window(deployment)
    said: list[str] = []
    is_over = False

    async def keep_talking() -> None:
        while not is_over and len(said) < 400:  # the chat keeps 500 on a page
            said.append(f"message {len(said) + 1}")
            await ada.write(said[-1])

    async with anyio.create_task_group() as group:
        group.start_soon(keep_talking)
        for _ in range(2):
            assert deployment.realtime is not None
            await asyncio.to_thread(deployment.realtime.stop if is_orderly else deployment.realtime.kill)
            await basho.becomes("waiting", "connecting")
            await asyncio.to_thread(deployment.start_realtime)
            await basho.becomes("connected")
        is_over = True

    assert said
    for window in (ada, basho):
        await window.shows(*said)


@pytest.mark.parametrize("settings", [{"PUBSUB_HISTORY_SIZE": "2"}], ids=["short history"])
async def test_a_page_that_missed_more_than_the_history_keeps_asks_the_app(
    deployment: Site, open_window: OpenWindow
) -> None:
    ada, basho = await open_window(deployment), await open_window(deployment)
    await ada.write("before")
    await basho.shows("before")
    assert deployment.realtime is not None

    deployment.realtime.kill()
    said = [f"message {number}" for number in range(1, 5)]
    for text in said:
        await ada.write(text)
    deployment.start_realtime()

    await basho.shows("before", *said)
    await basho.becomes("connected")
    await ada.write("after")
    for window in (ada, basho):
        await window.shows("before", *said, "after")


def test_the_examples_stay_under_80_lines_of_python() -> None:
    app = [FLASK.folder / "app.py"]
    project = [DJANGO.folder / "comments" / f"{name}.py" for name in ("models", "urls", "views", "wsgi")]

    assert _lines(app) < 80
    assert _lines(project) < 80


def _lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)
