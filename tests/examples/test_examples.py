"""What both examples promise to whoever opens them."""

import asyncio
from pathlib import Path

import anyio
import httpx
import pytest
from playwright.async_api import Browser, Route

from tests.examples.conftest import DJANGO, FLASK, OpenWindow, Site, Window
from tests.tools.clock import MS
from tests.tools.redis_server import RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


async def test_what_one_window_posts_the_other_shows_without_reloading(site: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(site), await open_window(site, "Basho")
    for window in (ada, basho):
        await window.page.evaluate("window.isTheSamePage = true")
        window.posted.clear()

    await ada.write("one")
    await basho.write("two")
    await ada.write("three")

    for window in (ada, basho):
        await window.shows("one", "two", "three")
        assert await window.page.evaluate("window.isTheSamePage")
        assert window.posted == [], "it went over the connection"

    await basho.page.reload()
    await basho.shows("one", "two", "three")
    await basho.becomes("connected")
    await ada.write("four")
    await basho.shows("one", "two", "three", "four")
    names = await basho.page.locator("ol b").all_inner_texts()
    assert sorted(names) == ["Ada", "Ada", "Ada", "Basho"], "each was seen as who had logged in"


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


async def test_who_has_not_logged_in_listens_and_cannot_post(site: Site, open_window: OpenWindow) -> None:
    ada, visitor = await open_window(site), await open_window(site, None)
    await ada.write("hello")
    await visitor.shows("hello")
    assert await visitor.page.locator("#text").count() == 0

    async with site.client() as client:
        token = await _csrf_token(client, site)
        answer = await client.post(site.messages_url, data={"text": "hi", "key": "k", **token})

    assert answer.status_code == 401
    assert await ada.texts() == ["hello"]


async def test_markup_is_shown_as_text(one_process: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(one_process, "<b>Ada</b>"), await open_window(one_process)
    markup = """<img src=x onerror="document.body.remove()"></script><b>{{ 7 * 7 }}</b> "it's" &amp;"""

    await ada.write(markup)

    await basho.shows(markup)
    await basho.page.reload()
    await basho.shows(markup)
    assert await basho.page.locator("ol b").all_inner_texts() == ["<b>Ada</b>"]


async def test_all_of_it_works_without_javascript(site: Site, open_window: OpenWindow, browser: Browser) -> None:
    ada = await open_window(site)
    context = await browser.new_context(java_script_enabled=False, ignore_https_errors=True)
    plain = Window(await context.new_page(), site)
    await plain.page.goto(site.url)

    await plain.log_in("Basho")
    await plain.write("by a plain form")
    await plain.shows("by a plain form")
    assert plain.page.url == site.url
    await ada.shows("by a plain form")
    await plain.log_out()
    await context.close()


async def test_without_a_connection_it_goes_by_http_and_what_is_sent_again_is_shown_once(
    one_process: Site, open_window: OpenWindow
) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process, "Basho")

    async def lose_the_answer(route: Route) -> None:
        if route.request.method == "POST":
            assert (await route.fetch()).ok
        await route.abort()

    await ada.page.route("**/realtime/client.js", _without_realtime)
    await ada.page.reload()
    await ada.becomes("waiting")
    ada.posted.clear()
    await ada.page.route(one_process.messages_url, lose_the_answer)
    await ada.page.fill("#text", "is this on?")
    await ada.send()
    await ada.page.wait_for_selector("#problem:not(:empty)")
    await ada.page.unroute(one_process.messages_url)
    await ada.send()
    await ada.has_sent()
    await ada.write("it is")

    assert ada.posted == [one_process.example.messages] * 3
    for window in (ada, basho):
        await window.shows("is this on?", "it is")
    await basho.page.reload()
    await basho.shows("is this on?", "it is")


async def _without_realtime(route: Route) -> None:
    """Answer with a client that never gets through."""
    body = """export const connect = () => ({
        state: "waiting", subscribe() {}, on() {}, fetch: () => Promise.reject(new Error("there is no connection")),
    });"""
    await route.fulfill(body=body, content_type="text/javascript")


async def test_what_is_posted_while_servers_are_replaced_is_said_once(
    deployment: Site, open_window: OpenWindow
) -> None:
    """The worker is replaced before it answers, then the realtime server before the answer reached the page."""
    ada, basho = await open_window(deployment), await open_window(deployment, "Basho")
    assert deployment.worker is not None
    assert deployment.realtime is not None
    await ada.write("before")
    ada.posted.clear()

    deployment.worker.pause()
    await ada.page.fill("#text", "meanwhile")
    await ada.send()
    await asyncio.to_thread(deployment.realtime.stop)
    deployment.worker.kill()
    await asyncio.to_thread(deployment.start_realtime)
    deployment.start_worker()

    await ada.has_sent()
    await ada.becomes("connected")
    await ada.write("after")
    for window in (ada, basho):
        await window.shows("before", "meanwhile", "after")
    assert ada.posted == []


async def test_without_redis_a_page_is_shown_that_says_it_is_not_live_and_becomes_so_later(
    deployment: Site, open_window: OpenWindow, own_redis: RedisServer
) -> None:
    ada = await open_window(deployment)
    await ada.write("kept by the app")
    own_redis.kill()

    answer = await ada.page.reload()
    assert answer is not None
    assert answer.status == 200
    await ada.shows("kept by the app")
    await ada.page.get_by_text("Live updates are off").wait_for()
    assert "a page goes out that is not live" in deployment.app.log

    own_redis.start()
    await ada.page.locator("#notice").wait_for(state="hidden", timeout=1000 * 20_000 * MS)
    await ada.becomes("connected")
    basho = await open_window(deployment, "Basho")
    await basho.write("live again")
    await ada.shows("kept by the app", "live again")


async def test_what_is_not_complete_is_refused(one_process: Site) -> None:
    async with one_process.client() as client:
        token = await _csrf_token(client, one_process)
        await client.post("/session", data={"name": "Ada", **token})
        whole = {"text": "hello", "key": "k", **await _csrf_token(client, one_process)}
        for field, value in {"text": "", "key": "k" * 41}.items():
            answer = await client.post(one_process.messages_url, data={**whole, field: value})
            assert answer.status_code == 400, field
        assert (await client.get(one_process.messages_url)).json() == []
        answer = await client.post(one_process.messages_url, data=whole, headers={"Accept": "application/json"})
        assert answer.status_code == 201


async def _csrf_token(client: httpx.AsyncClient, site: Site) -> dict[str, str]:
    """What a form of the page would send along."""
    assert (await client.get(site.url, headers={"Referer": site.url})).status_code == 200
    client.headers["Referer"] = site.url  # Django asks for it over TLS
    return {"csrfmiddlewaretoken": client.cookies["csrftoken"]} if site.example is DJANGO else {}


@pytest.mark.parametrize("settings", [{"PUBSUB_HISTORY_SIZE": "1000"}], ids=["long history"])
@pytest.mark.parametrize("is_orderly", [True, False], ids=["stopped", "killed"])
async def test_a_page_catches_up_by_itself_when_the_realtime_server_comes_back(
    deployment: Site, open_window: OpenWindow, is_orderly: bool
) -> None:
    ada, basho = await open_window(deployment), await open_window(deployment, "Basho")
    said: list[str] = []
    is_over = False

    async def keep_talking() -> None:
        while not is_over and len(said) < 400:  # the chat keeps 500 on a page
            said.append(f"message {len(said) + 1}")
            await ada.write(said[-1])

    async with anyio.create_task_group() as group:
        group.start_soon(keep_talking)
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
    ada, basho = await open_window(deployment), await open_window(deployment, "Basho")
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
    for page in (FLASK.folder / "letter.py", FLASK.folder / "poll.py", DJANGO.folder / "poll" / "views.py"):
        assert _lines([page]) < 80


def _lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)
