"""What the comments promise beyond what both examples do."""

import subprocess
import sys
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.examples.conftest import DJANGO, OpenWindow, Site
from tests.tools.raw_client import RawClient

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("example", [DJANGO], ids=["django"], indirect=True),
]


async def test_a_comment_without_the_csrf_token_is_refused(site: Site) -> None:
    async with site.client() as client:
        await log_in(client, site)
        comment = {"text": "from elsewhere", "key": "k"}
        cookie_alone = await client.post(site.messages_url, data=comment)
        foreign = await client.post(
            site.messages_url,
            data={**comment, "csrfmiddlewaretoken": client.cookies["csrftoken"]},
            headers={"Origin": "http://elsewhere.example"},
        )
        comments = await client.get(site.messages_url)

    assert (cookie_alone.status_code, foreign.status_code) == (403, 403)
    assert comments.json() == []


async def test_over_the_connection_the_cookie_alone_is_refused_and_with_the_token_it_is_accepted(
    site: Site, raw_client: Callable[..., Awaitable[RawClient]]
) -> None:
    async with site.client() as http:
        await log_in(http, site)
        cookies = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
        token = http.cookies["csrftoken"]
        trust = site.nginx.trust if site.nginx else None
        url = site.address.replace("http", "ws", 1) + "/realtime/"
        client = await raw_client(url, origin=site.address, headers={"Cookie": cookies}, ssl=trust)
        await client.hello()

        async def post(**headers: str) -> int:
            number = str(len(client.received))
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            await client.send(
                {
                    "type": "request",
                    "id": number,
                    "method": "POST",
                    "path": "/comments",
                    "headers": headers,
                    "body": f"text=hello&key={number}",
                }
            )
            answer = await client.recv("response")
            assert answer["id"] == number
            status: int = answer["status"]
            return status

        assert await post(Accept="application/json") == 403
        assert await post(Accept="application/json", **{"X-CSRFToken": "x" * 32}) == 403
        assert (await http.get(site.messages_url)).json() == []
        assert await post(Accept="application/json", **{"X-CSRFToken": token}) == 201
        (comment,) = (await http.get(site.messages_url)).json()
        assert (comment["name"], comment["text"]) == ("Ada", "hello")


async def test_the_page_s_client_sends_the_token_by_itself(site: Site, open_window: OpenWindow) -> None:
    ada = await open_window(site)
    await ada.page.evaluate("document.querySelectorAll('[name=csrfmiddlewaretoken]').forEach((item) => item.remove())")
    ada.posted.clear()

    await ada.write("the form has no token")

    await ada.shows("the form has no token")
    assert ada.posted == []


async def test_a_logout_is_felt_in_the_other_windows_of_the_browser(site: Site, open_window: OpenWindow) -> None:
    first = await open_window(site)
    second = await open_window(site, beside=first)
    await second.write("still here")

    await first.log_out()
    await second.page.fill("#text", "and now?")
    await second.send()

    await second.page.get_by_text("you are logged out").wait_for()
    assert second.posted == []
    await first.shows("still here")


async def log_in(client: httpx.AsyncClient, site: Site) -> None:
    """As the form does. Django asks for a Referer over TLS, and gives a new token at login."""
    client.headers["Referer"] = site.url
    await client.get(site.url)
    token = client.cookies["csrftoken"]
    answer = await client.post("/session", data={"name": "Ada", "csrfmiddlewaretoken": token})
    assert answer.status_code == 302


def test_the_migration_is_that_of_the_model(example: object, env: dict[str, str]) -> None:  # noqa: ARG001
    command = [sys.executable, "manage.py", "makemigrations", "--check", "--dry-run"]

    assert subprocess.run(command, cwd=DJANGO.folder, env=env, capture_output=True, text=True).stdout == (
        "No changes detected\n"
    )
