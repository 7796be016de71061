"""What the comments promise beyond what both examples do."""

import subprocess
import sys

import httpx
import pytest

from tests.examples.conftest import DJANGO, Site

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(60),
    pytest.mark.parametrize("example", [DJANGO], ids=["django"], indirect=True),
]


async def test_a_comment_without_the_csrf_token_is_refused(one_process: Site) -> None:
    comment = {"name": "Mallory", "text": "from elsewhere", "key": "k"}
    async with httpx.AsyncClient() as client:
        await client.get(one_process.url)
        cookie_alone = await client.post(one_process.messages_url, data=comment)
        foreign = await client.post(
            one_process.messages_url,
            data={**comment, "csrfmiddlewaretoken": client.cookies["csrftoken"]},
            headers={"Origin": "http://elsewhere.example"},
        )
        comments = await client.get(one_process.messages_url)

    assert (cookie_alone.status_code, foreign.status_code) == (403, 403)
    assert comments.json() == []


def test_the_migration_is_that_of_the_model(example: object, env: dict[str, str]) -> None:  # noqa: ARG001
    command = [sys.executable, "manage.py", "makemigrations", "--check", "--dry-run"]

    assert subprocess.run(command, cwd=DJANGO.folder, env=env, capture_output=True, text=True).stdout == (
        "No changes detected\n"
    )
