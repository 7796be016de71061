"""`realtime.fetch` and presence in a real browser, over each transport, while the network breaks."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page

from tests.client_world import Endpoint
from tests.journeys.page_world import Gate, flask_app, listen
from tests.journeys.test_browser_transports import BLOCKED, uses
from tests.tools.clock import MS, eventually_async
from tests.tools.http_proxy import HttpProxy

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

READ = """
  window.read = async (path, options) => {
    window.chunks = [];
    try {
      const { body } = await realtime.fetch(path, options);
      for (const reader = body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) return chunks.push("done");
        chunks.push(value);
      }
    } catch ({ name, code }) {
      chunks.push(typeof code === "string" ? code : name);
    }
  };
"""


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def ping_interval() -> float:
    """Short, so that a page soon notices a silent network; a busy machine looks like one at times."""
    return 0.3


@pytest.fixture
async def site(prefix: str, gate: Gate, ping_interval: float) -> AsyncIterator[Endpoint]:
    settings: dict[str, Any] = {
        "ping_interval": ping_interval,
        "request_backlog": 3,
        "request_timeout": 1.0,
        "request_grace": 0.2,
    }
    async with Endpoint("memory://", app=flask_app(gate), prefix=prefix, secret="s" * 32, **settings) as endpoint:
        yield endpoint
    gate.open(100)


@pytest.fixture
async def proxy(site: Endpoint) -> AsyncIterator[HttpProxy]:
    async with HttpProxy(site.port).run() as proxy:
        yield proxy


@pytest.fixture(params=BLOCKED)
async def page(browser_page: Page, proxy: HttpProxy, request: pytest.FixtureRequest) -> Page:
    """A page that is connected, by the transport that the network leaves."""
    proxy.refuse(*BLOCKED[request.param])
    await browser_page.add_init_script(READ)
    await listen(browser_page, proxy.port)
    await uses(browser_page, request.param)
    return browser_page


async def reads(page: Page, *expected: str) -> None:
    async def is_so() -> bool:
        assert await page.evaluate("chunks") == list(expected)
        return True

    await eventually_async(is_so, 10_000 * MS)


@pytest.mark.parametrize("page", ["websocket"], indirect=True)
async def test_a_page_posts_json_and_gets_a_response(page: Page) -> None:
    post = """async (json) => {
      const response = await realtime.fetch("/echo", { method: "POST", json });
      const { status, headers } = response;
      return [response instanceof Response, status, headers.get("content-type"), await response.json()];
    }"""
    value = {"text": "日本 \u2028 <b>", "none": None}
    is_response, status, content_type, told = await page.evaluate(post, value)
    assert (is_response, status, content_type) == (True, 200, "application/json")
    assert told == {"method": "POST", "json": value, "transport": await page.evaluate("realtime.transport")}


@pytest.mark.parametrize("page", ["longpoll"], indirect=True)
async def test_requests_of_a_page_run_in_the_order_of_the_calls(page: Page, gate: Gate) -> None:
    post = """() => Promise.all([1, 2, 3].map((json) => realtime.fetch("/echo", { json }))).then((all) => all.length)"""
    assert await page.evaluate(post) == 3
    assert gate.runs == ["1", "2", "3"]


async def test_a_stream_is_read_chunk_by_chunk_and_goes_on_in_the_middle_after_a_cut(
    page: Page, gate: Gate, proxy: HttpProxy
) -> None:
    await page.evaluate("void read('/numbers/4')")
    gate.open(2)
    await reads(page, "0,", "1,")
    proxy.cut()
    gate.open(2)
    await reads(page, "0,", "1,", "2,", "3,", "done")
    assert gate.runs == ["numbers"]


@pytest.mark.parametrize("page", ["sse"], indirect=True)
async def test_an_abort_ends_the_stream_here_and_the_iterator_there(page: Page, gate: Gate) -> None:
    await page.evaluate("void (window.abort = new AbortController())")
    await page.evaluate("void read('/numbers/100000', { signal: abort.signal })")
    gate.open(1)
    await reads(page, "0,")
    await page.evaluate("abort.abort()")
    await reads(page, "0,", "AbortError")

    def is_closed() -> bool:
        gate.open(1)  # the worker looks between two parts
        return gate.closed.is_set()

    await eventually_async(is_closed)
    assert await page.evaluate("realtime.fetch('/echo').then(({ ok }) => ok)")


@pytest.mark.parametrize("page", ["websocket"], indirect=True)
async def test_what_takes_too_long_is_answered_504_and_what_is_too_much_is_refused(page: Page, gate: Gate) -> None:
    fetch_all = """() => Promise.all(Array.from({ length: 6 }, () =>
      realtime.fetch("/gated").then(({ status }) => status, ({ code }) => code)))"""
    answers = await page.evaluate(fetch_all)
    assert answers == [504, 504, 504, 504, "busy", "busy"]
    gate.open(100)
    assert await page.evaluate("realtime.fetch('/forbidden/../..%2f').catch(({ code }) => code)") == "bad_frame"


@pytest.mark.parametrize("ping_interval", [2.0])  # who comes back is told anew who is there
@pytest.mark.parametrize("page", ["websocket", "longpoll"], indirect=True)
async def test_two_tabs_see_each_other_come_and_go(page: Page, site: Endpoint, proxy: HttpProxy) -> None:
    async def enter(tab: Page, user: str) -> None:
        grant = await site.grant(user=user, channels=["presence-*"], info={"name": user.upper()})
        follow = """(grant) => {
          realtime.close();
          window.changes = [];
          listen({ grant });
          follow("presence-room", {
            onMembers(members, { type, member }) {
              changes.push([type, member?.user, ...members.map(({ user }) => user)]);
            },
          });
        }"""
        await tab.evaluate(follow, grant)

    async def sees(tab: Page, *expected: list[Any]) -> None:
        async def is_so() -> bool:
            assert await tab.evaluate("changes") == list(expected)
            return True

        await eventually_async(is_so, 10_000 * MS)

    await enter(page, "ada")
    await sees(page, ["subscribed", None, "ada"])
    other = await page.context.new_page()
    await listen(other, proxy.port)
    await enter(other, "basho")
    await sees(other, ["subscribed", None, "ada", "basho"])
    await sees(page, ["subscribed", None, "ada"], ["join", "basho", "ada", "basho"])
    await other.close()
    await sees(page, ["subscribed", None, "ada"], ["join", "basho", "ada", "basho"], ["leave", "basho", "ada"])
