"""What the chat promises beyond what both examples do."""

import pytest

from tests.examples.conftest import FLASK, OpenWindow, Site, Window
from tests.tools.clock import MS, eventually_async

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("example", [FLASK], ids=["flask"], indirect=True),
]


async def test_the_front_door_leads_to_a_room_whatever_its_name(one_process: Site) -> None:
    async with one_process.client() as client:
        for asked, room in {"": "lobby", "Tea & Cake!": "tea-cake", "../../x": "x", "日本": "lobby"}.items():
            answer = await client.get("/", params={"room": asked})
            assert answer.headers["Location"] == f"/rooms/{room}"
        for name in ("Lobby", "a b", "a" * 41, "#user-1", "-"):
            assert (await client.get("/rooms/" + name.replace("#", "%23"))).status_code == 404


async def test_rooms_do_not_hear_each_other(one_process: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process, "Basho")
    await basho.page.fill("#new-room", "Tea & Cake")
    await basho.page.press("#new-room", "Enter")
    await basho.page.wait_for_url("**/rooms/tea-cake")
    await basho.becomes("connected")

    await ada.write("in the lobby")
    await basho.write("over tea")

    await ada.shows("in the lobby")
    await basho.shows("over tea")
    await ada.page.reload()
    assert await ada.page.locator("nav > a").all_inner_texts() == ["lobby", "tea-cake"]


async def test_a_window_knows_its_own_messages(one_process: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process, "Basho")

    await ada.write("mine")
    await basho.write("yours")
    await ada.shows("mine", "yours")

    assert await ada.page.locator(".mine .text").all_inner_texts() == ["mine"]
    await ada.page.reload()
    assert await ada.page.locator(".mine .text").all_inner_texts() == ["mine"]


async def test_a_logout_is_felt_in_the_other_windows_of_the_browser(site: Site, open_window: OpenWindow) -> None:
    first, basho = await open_window(site), await open_window(site, "Basho")
    second = await open_window(site, beside=first)
    assert await second.name() == "Ada"
    await second.write("still here")

    await first.log_out()

    await second.page.wait_for_selector("#join")
    await second.becomes("connected")
    await first.log_in("Carmen")
    await first.becomes("connected")
    await first.write("somebody else now")
    await basho.write("and I am the same")
    for window in (first, second, basho):
        await window.shows("still here", "somebody else now", "and I am the same")


async def test_a_room_shows_its_last_fifty_messages(one_process: Site, open_window: OpenWindow) -> None:
    async with one_process.client(headers={"Accept": "application/json"}) as client:
        await client.post("/session", data={"name": "Ada"})
        for number in range(60):
            message = {"text": f"message {number}", "key": f"key {number}"}
            assert (await client.post(one_process.messages_url, data=message)).status_code == 201

    window = await open_window(one_process)

    await window.shows(*(f"message {number}" for number in range(10, 60)))


async def test_the_chat_shows_who_is_here(site: Site, open_window: OpenWindow) -> None:
    ada, visitor = await open_window(site), await open_window(site, None)
    second = await open_window(site, beside=ada)
    await _here(ada, "Ada")
    basho = await open_window(site, "Basho")
    for window in (ada, second, basho):
        await _here(window, "Ada, Basho")
    assert await visitor.page.is_hidden("#here")

    await second.page.close()
    await basho.log_out()

    await _here(ada, "Ada")


async def _here(window: Window, names: str) -> None:
    async def is_so() -> bool:
        assert await window.page.inner_text("#here span") == names
        return True

    await eventually_async(is_so, 15_000 * MS)
