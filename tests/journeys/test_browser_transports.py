"""The browser's client on networks that refuse, hold back or cut: it finds the way that delivers, and loses nothing."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page

from tests.client_world import Endpoint
from tests.journeys.page_world import becomes, flask_app, heard, hears, listen
from tests.tools.clock import MS, eventually_async
from tests.tools.http_proxy import HttpProxy
from tests.tools.ports import free_port
from tests.tools.servers import Processes

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BLOCKED = {"websocket": [], "sse": ["websocket"], "longpoll": ["websocket", "sse"]}
"""What a network refuses, by the transport that is left."""

HASTE = 0.1 * MS * 1000
"""By which the page's clock is faster: what takes it seconds takes it tenths of one."""

HURRY = f"""
  const wait = setTimeout;
  window.setTimeout = (call, delay, ...rest) => wait(call, delay * {HASTE}, ...rest);
"""


@pytest.fixture
async def site(prefix: str) -> AsyncIterator[Endpoint]:
    async with Endpoint(
        "memory://", app=flask_app(), prefix=prefix, secret="s" * 32, ping_interval=0.3, history_size=10_000
    ) as endpoint:
        yield endpoint


@pytest.fixture
async def proxy(site: Endpoint) -> AsyncIterator[HttpProxy]:
    async with HttpProxy(site.port).run() as proxy:
        yield proxy


@pytest.fixture
async def page(browser_page: Page) -> Page:
    await browser_page.add_init_script(HURRY)
    return browser_page


async def uses(page: Page, transport: str, timeout: float = 15_000 * MS) -> None:
    """Wait until the page is connected by this transport."""

    async def is_so() -> bool:
        now = await page.evaluate("[realtime.state, realtime.transport]")
        assert now == ["connected", transport]
        return True

    await eventually_async(is_so, timeout, f"not connected by {transport}")


@pytest.mark.parametrize("transport", BLOCKED)
async def test_a_page_gets_through_by_what_the_network_leaves(
    site: Endpoint, proxy: HttpProxy, page: Page, transport: str
) -> None:
    proxy.refuse(*BLOCKED[transport])
    await listen(page, proxy.port)
    await uses(page, transport)
    connection = await page.evaluate("realtime.connection")
    await site.publisher.publish("room:1", "日本\n\r\u2028 \x00 <b>")
    await site.publisher.publish(f"#connection-{connection}", "for you alone")
    answer = await page.evaluate("realtime.fetch('/echo', { json: [1] }).then((response) => response.json())")
    assert answer == {"method": "POST", "json": [1], "transport": transport}
    await hears(page, "日本\n\r\u2028 \x00 <b>")
    await hears(page, "for you alone", about="private")

    # A channel more, from where the page was rendered, while others go on.
    position = await site.publisher.position("room:2")
    for number in range(5):
        await site.publisher.publish("room:2", number)
    await page.evaluate("void ['a', 'b', 'c'].map((name) => follow(name))")
    await page.evaluate(f"follow('room:2', {{ position: {str(position)!r} }})")
    await site.publisher.publish("room:1", "after")
    await site.publisher.publish("c", "there")
    await hears(page, *range(5), about="room:2")
    await hears(page, "日本\n\r\u2028 \x00 <b>", "after")
    await hears(page, "there", about="c")

    # A restart.
    await site.stop()
    await becomes(page, "waiting")
    await site.publisher.publish("room:1", "while away")
    await site.start()
    await uses(page, transport)
    await site.publisher.publish("room:1", "back")
    await hears(page, "日本\n\r\u2028 \x00 <b>", "after", "while away", "back")
    assert await page.evaluate("realtime.connection") == connection
    assert await heard(page, "gap") == []


async def test_five_thousand_publications_arrive_once_and_in_order_over_every_change_of_transport(
    site: Endpoint, proxy: HttpProxy, page: Page
) -> None:
    total, sent = 5_000, 0

    async def publish_until(count: int) -> None:
        nonlocal sent
        while sent < count:
            batch = range(sent, min(sent + 50, count))
            await site.publisher.many([("room:1", number) for number in batch])
            sent = batch.stop
            await asyncio.sleep(0.01)

    await listen(page, proxy.port)
    await uses(page, "websocket")
    way = [("longpoll", ["websocket", "sse"]), ("sse", ["websocket", "longpoll"]), ("websocket", [])]
    for step, (transport, refused) in enumerate(way, 1):
        publishing = asyncio.create_task(publish_until(total * step // len(way)))
        await asyncio.sleep(0.1)
        proxy.refuse(*refused)
        await uses(page, transport)
        await publishing

    async def is_complete() -> bool:
        return bool(await page.evaluate(f"said.filter(([name]) => name === 'room:1').length >= {total}"))

    await eventually_async(is_complete, 15_000 * MS)
    assert await heard(page) == list(range(total))
    assert await heard(page, "gap") == []


async def test_a_proxy_that_holds_streams_back_is_noticed(site: Endpoint, proxy: HttpProxy, page: Page) -> None:
    proxy.refuse("websocket")
    proxy.held = {"sse"}
    await page.goto(f"http://127.0.0.1:{proxy.port}/")
    await page.wait_for_function("typeof follow === 'function'")
    await page.evaluate("listen()")
    await page.evaluate("void (window.following = follow('room:1'))")
    await uses(page, "longpoll")
    await page.evaluate("following")
    await site.publisher.publish("room:1", "through")
    await hears(page, "through")


async def test_a_proxy_that_begins_to_hold_back_in_the_middle_is_noticed(
    site: Endpoint, proxy: HttpProxy, page: Page
) -> None:
    """As when its buffer takes the beginning of a stream and not the next small piece, or a laptop was asleep."""
    proxy.refuse("websocket")
    await listen(page, proxy.port)
    await uses(page, "sse")
    states = len(await heard(page, "state"))
    proxy.freeze()
    await site.publisher.publish("room:1", "kept back")
    await hears(page, "kept back")
    assert "waiting" in (await heard(page, "state"))[states:]  # for how long is drawn: it may be over in a moment


@pytest.mark.parametrize("transport", BLOCKED)
async def test_a_proxy_that_cuts_what_is_idle_loses_nothing(prefix: str, browser_page: Page, transport: str) -> None:
    settings: dict[str, Any] = {"ping_interval": 25, "secret": "s" * 32}
    async with (
        Endpoint("memory://", app=flask_app(), prefix=prefix, **settings) as site,
        HttpProxy(site.port).run() as proxy,
    ):
        proxy.idle_seconds = 600 * MS
        proxy.refuse(*BLOCKED[transport])
        await browser_page.add_init_script(HURRY)
        await listen(browser_page, proxy.port)
        for number in range(3):
            await asyncio.sleep(750 * MS)
            await site.publisher.publish("room:1", number)
        await hears(browser_page, 0, 1, 2)
        assert await heard(browser_page, "gap") == []


async def test_what_delivered_is_remembered_and_better_is_tried_beside_it(
    site: Endpoint, proxy: HttpProxy, page: Page
) -> None:
    proxy.refuse("websocket")
    await listen(page, proxy.port)
    await uses(page, "sse")
    proxy.seen.clear()
    await listen(page, proxy.port)  # a reload
    assert await page.evaluate("realtime.transport") == "sse"
    assert proxy.seen["websocket"] == 0
    await eventually_async(lambda: proxy.seen["websocket"] > 0, 15_000 * MS)
    assert await page.evaluate("realtime.state") == "connected"
    proxy.refuse()
    await uses(page, "websocket", 30_000 * MS)
    await site.publisher.publish("room:1", "up again")
    await hears(page, "up again")


async def test_two_tabs_by_different_transports_hear_each_other(site: Endpoint, proxy: HttpProxy, page: Page) -> None:
    other = await page.context.new_page()
    await listen(other, site.port)
    proxy.refuse("websocket", "sse")
    await listen(page, proxy.port)
    await uses(other, "websocket")
    await uses(page, "longpoll")
    for tab, text in ((page, "by a poll"), (other, "by a socket")):
        await tab.evaluate("(text) => realtime.fetch('/publish', { json: text }).then(({ ok }) => ok)", text)
    for tab in (page, other):
        await hears(tab, "by a poll", "by a socket")


NGINX = """
daemon off; worker_processes 1; pid {here}/pid; error_log {here}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {here}/body; proxy_temp_path {here}/proxy; fastcgi_temp_path {here}/fastcgi;
  uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{target}; {more} }}
  }}
}}
"""
"""Nothing of what the documentation asks for: no upgrade, so no WebSocket; buffering and time limits as they come. But
with another Host than the browser's, which nginx sends by default, no page connects at all."""
KEEP_HOST = "proxy_set_header Host $http_host;"


async def start_nginx(site: Endpoint, processes: Processes, directory: Path, more: str) -> str:
    port = free_port()
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "no nginx: install it, or run `make test`, which does"
    (directory / "nginx.conf").write_text(NGINX.format(here=directory, port=port, target=site.port, more=more))
    await asyncio.to_thread(processes.start, [program, "-p", str(directory), "-c", "nginx.conf"], port=port)
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("more", ["", "proxy_ignore_headers X-Accel-Buffering;"], ids=["as it comes", "buffering all"])
async def test_a_page_gets_through_an_nginx_that_keeps_the_host_and_nothing_more(
    site: Endpoint, page: Page, processes: Processes, tmp_path: Path, more: str
) -> None:
    url = await start_nginx(site, processes, tmp_path, KEEP_HOST + more)
    await page.goto(f"{url}/")
    await page.wait_for_function("typeof follow === 'function'")
    await page.evaluate("listen()")
    await page.evaluate("void follow('room:1', { position: document.body.dataset.position })")
    for number in range(5):
        await site.publisher.publish("room:1", number)
    await hears(page, *range(5), timeout=20_000 * MS)
    assert await page.evaluate("realtime.transport") in ("sse", "longpoll")
    assert (await page.evaluate("realtime.fetch('/echo', { json: 1 }).then((response) => response.json())"))[
        "json"
    ] == 1


async def test_an_nginx_that_changes_the_host_is_told_what_it_needs(
    site: Endpoint, page: Page, processes: Processes, tmp_path: Path
) -> None:
    url = await start_nginx(site, processes, tmp_path, "")
    await page.goto(f"{url}/")
    send = """fetch("/realtime/send", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ frames: [{ type: "connect" }] }),
    }).then(async (response) => [response.status, (await response.json()).error.message])"""
    status, message = await page.evaluate(send)
    assert status == 403
    assert f"'127.0.0.1:{site.port}'" in message
    assert KEEP_HOST in message
