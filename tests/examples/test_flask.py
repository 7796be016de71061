"""What the chat promises beyond what both examples do."""

import httpx
import pytest

from tests.examples.conftest import FLASK, OpenWindow, Site

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("example", [FLASK], ids=["flask"], indirect=True),
]


async def test_the_front_door_leads_to_a_room_whatever_its_name(one_process: Site) -> None:
    async with httpx.AsyncClient(base_url=one_process.app.url) as client:
        for asked, room in {"": "lobby", "Tea & Cake!": "tea-cake", "../../x": "x", "日本": "lobby"}.items():
            answer = await client.get("/", params={"room": asked})
            assert answer.headers["Location"] == f"/rooms/{room}"
        for name in ("Lobby", "a b", "a" * 41, "#user-1", "-"):
            assert (await client.get("/rooms/" + name.replace("#", "%23"))).status_code == 404


async def test_rooms_do_not_hear_each_other(one_process: Site, open_window: OpenWindow) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process)
    await basho.page.fill("#new-room", "Tea & Cake")
    await basho.page.press("#new-room", "Enter")
    await basho.page.wait_for_url("**/rooms/tea-cake")
    await basho.becomes("connected")

    await ada.write("in the lobby")
    await basho.write("over tea")

    await ada.shows("in the lobby")
    await basho.shows("over tea")
    await ada.page.reload()
    assert await ada.page.locator("nav a").all_inner_texts() == ["lobby", "tea-cake"]


async def test_each_window_has_a_name_of_its_own_and_knows_its_own_messages(
    one_process: Site, open_window: OpenWindow
) -> None:
    ada, basho = await open_window(one_process), await open_window(one_process)
    async with ada.page.context.expect_page() as opening:
        await ada.page.click("#second-window")
    second = await opening.value
    await second.wait_for_selector("[data-state=connected]")
    names = {await page.input_value("[name=name]") for page in (ada.page, second)}
    assert len(names - {""}) == 2

    await ada.write("mine", name="Ada")
    await basho.write("yours", name="Basho")
    await ada.shows("mine", "yours")

    assert await ada.page.locator(".mine .text").all_inner_texts() == ["mine"]
    await ada.page.reload()
    assert await ada.page.input_value("[name=name]") == "Ada"
    assert await ada.page.locator(".mine .text").all_inner_texts() == ["mine"]


async def test_a_room_shows_its_last_fifty_messages(one_process: Site, open_window: OpenWindow) -> None:
    async with httpx.AsyncClient(headers={"Accept": "application/json"}) as client:
        for number in range(60):
            message = {"name": "Ada", "text": f"message {number}", "key": f"key {number}"}
            assert (await client.post(one_process.messages_url, data=message)).status_code == 201

    window = await open_window(one_process)

    await window.shows(*(f"message {number}" for number in range(10, 60)))
