"""The letter that the chat's worker writes, word by word: it survives what happens to the deployment meanwhile."""

import asyncio
import dataclasses
import os
import re

import pytest
from playwright.async_api import Page

from tests.examples.conftest import FLASK, Site
from tests.tools.clock import MS
from tests.tools.servers import PROJECT

BRISK = dataclasses.replace(FLASK, app="tests.apps.brisk_chat:app")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("example", [BRISK], ids=["flask"], indirect=True),
]


@pytest.fixture(autouse=True)
def _brisk_chat_is_found(env: dict[str, str]) -> None:
    env["PYTHONPATH"] = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("replaced", ["realtime", "worker", "nginx"])
async def test_a_letter_goes_on_in_the_middle_after_a_part_of_the_deployment_was_replaced(
    deployment: Site, browser_page: Page, replaced: str
) -> None:
    await browser_page.goto(deployment.address + "/letter")
    await browser_page.wait_for_selector("[data-state=connected]")
    await browser_page.click("#write")
    await _reads(browser_page, "Somewhere a worker runs")

    if replaced == "realtime":
        assert deployment.realtime is not None
        deployment.realtime.kill()
        await browser_page.wait_for_selector("[data-state=waiting]")
        before = await browser_page.inner_text("#text")
        await asyncio.to_thread(deployment.start_realtime)
        assert not before.endswith("a view")
    elif replaced == "worker":
        assert deployment.worker is not None
        deployment.worker.kill()
        deployment.start_worker()
    else:
        assert deployment.nginx is not None
        deployment.nginx.reload()

    await _reads(browser_page, "a view")
    await browser_page.wait_for_selector("#write:enabled")
    assert await browser_page.text_content("#text") == _letter()
    assert await browser_page.inner_text("#problem") == ""


async def test_a_letter_that_is_stopped_ends_for_its_writer_too(one_process: Site, browser_page: Page) -> None:
    await browser_page.goto(one_process.address + "/letter")
    await browser_page.click("#write")
    await _reads(browser_page, "Dear reader")

    await browser_page.click("#stop")
    await browser_page.wait_for_selector("#write:enabled")
    text = await browser_page.text_content("#text")
    assert text
    assert _letter().startswith(text)
    one_process.app.wait_for_log("the letter was not read to its end")
    await browser_page.click("#write")
    await _reads(browser_page, "a view")
    assert await browser_page.text_content("#text") == _letter()


async def _reads(page: Page, text: str) -> None:
    await page.locator("#text", has_text=text).wait_for(timeout=1000 * 30_000 * MS)


def _letter() -> str:
    match = re.search(r'(?s)TEXT = """\\\n(.*)"""', (FLASK.folder / "letter.py").read_text())
    assert match
    return match[1].replace("\\\n", "")
