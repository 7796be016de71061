"""The browser's client in a real browser, on the page of a small Flask app, over a network that breaks."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from playwright.async_api import Browser, Page

from pubsub_mw.broker.memory import memory_broker
from tests.client_world import Endpoint
from tests.journeys.page_world import becomes, flask_app, heard, hears, listen
from tests.tools.browser import PageErrors, open_page
from tests.tools.clock import MS, eventually_async
from tests.tools.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

HURRY = """
  const wait = setTimeout;
  window.setTimeout = (call, delay, ...rest) => wait(call, delay / 5, ...rest);
"""
"""What takes the page five seconds takes it one."""


@pytest.fixture
async def site(prefix: str) -> AsyncIterator[Endpoint]:
    async with Endpoint("memory://", app=flask_app(), prefix=prefix, secret="s" * 32) as endpoint:
        yield endpoint


async def test_what_a_view_publishes_arrives_in_order(site: Endpoint, browser_page: Page) -> None:
    await listen(browser_page, site.port)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}") as http:
        for number in range(20):
            await http.post("/publish", json={"number": number, "text": "日本 <b>"})

    await hears(browser_page, *({"number": number, "text": "日本 <b>"} for number in range(20)))
    assert await heard(browser_page, "state") == ["connected"]


async def test_a_page_goes_on_from_the_position_it_was_rendered_at(site: Endpoint, browser_page: Page) -> None:
    await site.publisher.publish("room:1", "shown by the page itself")
    await browser_page.goto(f"http://127.0.0.1:{site.port}/")
    await browser_page.wait_for_function("typeof follow === 'function'")
    await site.publisher.publish("room:1", "between page and subscription")
    await browser_page.evaluate("listen()")
    await browser_page.evaluate("follow('room:1', { position: document.body.dataset.position })")
    await site.publisher.publish("room:1", "live")

    await hears(browser_page, "between page and subscription", "live")


async def test_nothing_is_lost_or_doubled_over_a_server_restart(site: Endpoint, browser_page: Page) -> None:
    await listen(browser_page, site.port)
    id_before = await browser_page.evaluate("realtime.connection")
    await site.publisher.publish("room:1", "before")
    await hears(browser_page, "before")
    await site.stop()
    await site.publisher.publish("room:1", "while away")
    await site.publisher.publish(f"#connection-{id_before}", "for you alone")
    await becomes(browser_page, "waiting")
    await site.start()
    await becomes(browser_page, "connected")
    await site.publisher.publish("room:1", "after")

    await hears(browser_page, "before", "while away", "after")
    await hears(browser_page, "for you alone", about="private")
    assert await browser_page.evaluate("realtime.connection") == id_before
    assert await heard(browser_page, "gap") == []


async def test_coming_online_again_ends_the_wait_at_once(
    site: Endpoint, browser_page: Page, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    proxy = tcp_proxy(site.port)
    await listen(browser_page, proxy.port)
    await browser_page.evaluate("void (Math.random = () => 60)")  # so that the first wait takes 30 s
    await browser_page.context.set_offline(True)
    proxy.refuse()
    proxy.reset()
    await becomes(browser_page, "waiting")
    await site.publisher.publish("room:1", "while offline")
    proxy.accept()
    began = time.monotonic()
    await browser_page.context.set_offline(False)

    await hears(browser_page, "while offline")
    assert time.monotonic() - began < 10


async def test_a_link_that_freezes_is_noticed_by_its_silence(
    prefix: str, browser_page: Page, tcp_proxy: Callable[[int], TcpProxy]
) -> None:
    async with Endpoint("memory://", app=flask_app(), prefix=prefix, ping_interval=0.1, ping_timeout=600) as site:
        proxy = tcp_proxy(site.port)
        await browser_page.add_init_script(HURRY)
        await listen(browser_page, proxy.port)
        proxy.blackhole()
        await site.publisher.publish("room:1", "into the void")
        began = time.monotonic()

        async def has_waited() -> bool:  # for how long is drawn: it may be over in a moment
            return "waiting" in await heard(browser_page, "state")

        await eventually_async(has_waited)
        assert time.monotonic() - began > 7 / 5
        proxy.pass_through()

        await hears(browser_page, "into the void")


async def test_lost_history_is_told_to_the_subscription_and_the_page(site: Endpoint, browser_page: Page) -> None:
    await listen(browser_page, site.port)
    await browser_page.evaluate("follow('room:2', { onGap: (gap) => said.push(['onGap', gap.reason]) })")
    for channel in ("room:1", "room:2"):
        await site.publisher.publish(channel, "before")
    await hears(browser_page, "before", about="room:2")
    memory_broker(site.publisher.settings).lose()
    await hears(browser_page, "epoch", "epoch", about="gap")
    await site.publisher.publish("room:2", "after")

    await hears(browser_page, "before", "after", about="room:2")
    await hears(browser_page, "epoch", about="onGap")


async def test_a_grant_comes_from_a_function_and_is_renewed_in_time(site: Endpoint, browser_page: Page) -> None:
    lifetimes = [1, 3600]

    async def fetch() -> str:
        return await site.grant(user="7", channels=["private-1"], expires=lifetimes.pop(0))

    await browser_page.expose_function("fetchGrant", fetch)
    await listen(browser_page, site.port, "private-1", "{ grant: () => fetchGrant() }")
    assert await browser_page.evaluate("realtime.user") == "7"
    await eventually_async(lambda: not lifetimes)
    await site.publisher.publish("private-1", "still allowed")
    await site.publisher.publish("#user-7", "still you")

    await hears(browser_page, "still allowed", about="private-1")
    await hears(browser_page, "still you", about="private")
    assert await heard(browser_page, "state") == ["connected"]


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_what_the_page_opens_while_its_grant_is_renewed_is_heard(
    site: Endpoint, browser_page: Page, transport: str
) -> None:
    calls = 0

    async def fetch_slowly() -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            await browser_page.evaluate(
                "void (window.followed = Promise.all(['a', 'b', 'c'].map((name) => follow(`private-${name}`))))"
            )
        if calls > 1:
            await asyncio.sleep(300 * MS)
        return await site.grant(user="7", channels=["private-*"], expires=3600 if calls > 1 else 1)

    await browser_page.expose_function("fetchGrant", fetch_slowly)
    await listen(browser_page, site.port, "private-1", f"{{ transports: ['{transport}'], grant: () => fetchGrant() }}")
    await browser_page.wait_for_function("window.followed")
    await browser_page.evaluate("followed")
    for channel in ("private-a", "private-b", "private-c", "private-1"):
        await site.publisher.publish(channel, channel)
        await hears(browser_page, channel, about=channel)
    assert await heard(browser_page, "error") == []
    assert calls == 2


async def test_what_is_not_allowed_is_an_error_of_the_page(site: Endpoint, browser_page: Page) -> None:
    await listen(browser_page, site.port)
    await browser_page.evaluate("void follow('private-1', { onError: (error) => said.push(['onError', error.code]) })")
    await hears(browser_page, "forbidden", about="onError")
    await hears(browser_page, "forbidden", about="error")
    await browser_page.evaluate("realtime.close(); listen({ grant: 'no grant' })")
    await hears(browser_page, "forbidden", 3500, about="error")
    await becomes(browser_page, "closed")


async def test_two_tabs_hear_each_other_and_one_does_not_hear_itself(site: Endpoint, browser_page: Page) -> None:
    ada, basho = browser_page, await browser_page.context.new_page()
    for page in (ada, basho):
        await listen(page, site.port)
    assert await ada.evaluate("realtime.connection") != await basho.evaluate("realtime.connection")
    post = """async (text) => {
      const headers = { "Content-Type": "application/json", "X-Connection": realtime.connection };
      await fetch("/publish", { method: "POST", headers, body: JSON.stringify(text) });
    }"""
    await ada.evaluate(post, "from ada")
    await basho.evaluate(post, "from basho")
    await site.publisher.publish("room:1", "to all")
    await hears(ada, "from basho", "to all")
    await hears(basho, "from ada", "to all")
    await basho.close()
    await site.publisher.publish("room:1", "to who is left")

    await hears(ada, "from basho", "to all", "to who is left")


async def test_a_page_that_leaves_is_forgotten_and_one_from_history_comes_back(
    site: Endpoint, browser_page: Page
) -> None:
    async def connections() -> int:
        async with httpx.AsyncClient() as http:
            return int((await http.get(f"{site.url}/health")).json()["connections"])

    await listen(browser_page, site.port)
    assert await connections() == 1
    await browser_page.goto("about:blank")
    await eventually_async(lambda: is_zero(connections()))
    await browser_page.go_back()
    await browser_page.wait_for_function("typeof follow === 'function'")
    if not await browser_page.evaluate("window.realtime !== undefined"):
        await browser_page.evaluate("listen()")
        await browser_page.evaluate("follow('room:1')")
    await becomes(browser_page, "connected")
    await site.publisher.publish("room:1", "welcome back")

    await hears(browser_page, "welcome back")


async def is_zero(count: Awaitable[int]) -> bool:
    return await count == 0


async def test_a_page_of_another_origin_connects_only_where_it_is_allowed(
    site: Endpoint, browser: Browser, browser_page: Page, page_errors: PageErrors, prefix: str
) -> None:
    origins = (f"http://127.0.0.1:{site.port}",)
    async with Endpoint("memory://", prefix=prefix, origins=origins) as other:
        query = f"?mount={other.url}"
        await listen(browser_page, site.port, query=query)
        await other.publisher.publish("room:1", "from over there")
        await hears(browser_page, "from over there")

        async with open_page(browser) as (stranger, _):
            await stranger.goto(f"http://localhost:{site.port}/{query}")
            await stranger.wait_for_function("typeof follow === 'function'")
            await stranger.evaluate("listen()")
            await becomes(stranger, "waiting")
            assert "connected" not in await heard(stranger, "state")
    assert page_errors.uncaught == []


async def test_many_publications_at_once_arrive_complete(site: Endpoint, browser_page: Page) -> None:
    await listen(browser_page, site.port)
    await asyncio.gather(*(site.publisher.many([("room:1", [n, i]) for i in range(50)]) for n in range(20)))

    async def count() -> bool:
        return len(await heard(browser_page)) == 1_000

    await eventually_async(count)
    got = [tuple(item) for item in await heard(browser_page)]
    assert len(set(got)) == 1_000
    assert all([i for m, i in got if m == n] == list(range(50)) for n in range(20))
