"""Hold the documents to the code: what they show runs, what they name is there, their tables are true.

`python -m tests.test_readme` writes the README's table of the source anew.
"""

import ast
import asyncio
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import flask
import pytest
import uvicorn
from flask import Flask
from playwright.async_api import Page

from pubsub_mw import Publisher, PubSub
from pubsub_mw.cli import main
from pubsub_mw.errors import CloseCode, ErrorCode, may_reconnect
from pubsub_mw.grants import GrantVerifier
from pubsub_mw.middleware import RequestPublisher
from pubsub_mw.protocol import decode_command
from pubsub_mw.settings import Settings
from pubsub_mw.testing import capture
from tests.test_reading_order import ORDER, SOURCE
from tests.tools.clock import MS
from tests.tools.servers import Processes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

SECRET = "of thirty-two bytes, and of tests"

# How far a line count in the README may be off before the table is to be written anew.
TOLERANCE_LINES, TOLERANCE = 20, 0.15


@dataclass(frozen=True, slots=True)
class Snippet:
    """One fenced block."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    def run(self, namespace: dict[str, Any]) -> None:
        exec(compile(self.text, str(self), "exec"), namespace)


def snippets(*languages: str, document: Path | None = None) -> list[Snippet]:
    found = []
    for path in DOCUMENTS if document is None else [document]:
        text = path.read_text()
        for match in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", text):
            if match[1] in languages:
                found.append(Snippet(path, text.count("\n", 0, match.start()) + 2, match[1], match[2]))
    return found


def docs(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


def rows(document: Path) -> Iterator[list[str]]:
    """The cells of every row of every table, without backticks around them."""
    for line in document.read_text().splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            yield [cell.strip().strip("`") for cell in cells]


# Python.


@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_python_is_python(snippet: Snippet) -> None:
    ast.parse(snippet.text)


def readme_app() -> Flask:
    namespace: dict[str, Any] = {"__name__": __name__}
    snippets("python", document=README)[0].run(namespace)
    app = namespace["app"]
    assert isinstance(app, Flask)
    return app


def test_the_flask_app_of_the_readme_publishes() -> None:
    with capture() as published:
        answer = readme_app().test_client().post("/rooms/42/messages", json={"text": "hi"})
    assert answer.status_code == 204
    assert [(item.channel, item.data) for item in published] == [("room:42", {"text": "hi"})]


def test_the_django_app_of_the_readme_publishes_and_can_be_tested_as_shown(tmp_path: Path) -> None:
    wsgi, view = (snippet.text for snippet in snippets("python", document=README)[1:3])
    clients = [item.text for item in snippets("python", document=docs("publishing")) if "import Client" in item.text]
    (tmp_path / "myproject").mkdir()
    (tmp_path / "myproject" / "__init__.py").touch()
    (tmp_path / "myproject" / "urls.py").write_text(
        "from django.http import HttpResponse\nfrom django.urls import path\n"
        f"{view}\n"
        'urlpatterns = [path("rooms/<room>/messages", say)]\n'
    )
    (tmp_path / "myproject" / "wsgi.py").write_text(
        "from django.conf import settings\n"
        'settings.configure(ROOT_URLCONF="myproject.urls", ALLOWED_HOSTS=["*"], SECRET_KEY="tests")\n'
        f"{wsgi}"
    )
    test = "import myproject.wsgi\nfrom pubsub_mw.testing import capture\n" + "".join(
        f"{client}\n"
        "with capture() as published:\n"
        '    assert client.post("/rooms/42/messages", data={"text": "hi"}).status_code == 204\n'
        'assert [(item.channel, item.data) for item in published] == [("room:42", {"text": "hi"})]\n'
        for client in clients
    )
    assert len(clients) == 2
    subprocess.run([sys.executable, "-c", test], check=True, cwd=tmp_path)


def flask_app() -> Flask:
    app = Flask("snippets")
    app.secret_key = SECRET
    app.wsgi_app = PubSub(app.wsgi_app, secret=SECRET)  # type: ignore[method-assign]
    return app


def run_all(document: Path, app: Flask, **names: Any) -> dict[str, Any]:
    """Run a document's snippets, one after another, in what they take for granted. Not those of Django's tests."""
    from flask import request, session

    publisher = Publisher(secret=SECRET)
    namespace: dict[str, Any] = {
        "__name__": __name__, "PubSub": PubSub, "app": app, "request": request, "session": session,
        "publisher": publisher, "publish": RequestPublisher(publisher, None), **names,
    }  # fmt: skip
    with app.test_request_context(headers={"X-Connection": "c1"}):
        for snippet in snippets("python", document=document):
            if "import Client" not in snippet.text:
                snippet.run(namespace)
                if "task" in namespace:
                    result = namespace.pop("task")()
                    if result is not None:
                        asyncio.run(result)
    return namespace


def test_publishing_does_what_is_shown() -> None:
    with capture() as published:
        namespace = run_all(docs("publishing"), flask_app())
    assert [(item.channel, item.data, item.exclude) for item in published] == [
        ("room:42", {"text": "hi"}, None),
        ("room:42", {"text": "hi"}, "c1"),
        ("room:42", {"text": "hi"}, None),
        ("lobby", {"room": 42, "unread": 7}, None),
        ("room:42", {"text": "hi"}, None),
        ("room:42", {"text": "from a task"}, None),
        ("room:42", {"text": "hi"}, None),
    ]
    namespace["test_say"](readme_app().test_client())


def test_a_grant_is_made_as_shown() -> None:
    app = flask_app()
    with capture() as published:
        run_all(docs("permissions"), app, connection="c1")
        client = app.test_client()
        with client.session_transaction() as session:
            session["user_id"] = 7
        answer = client.post("/realtime-grant").get_json()
    grant = GrantVerifier(SECRET).verify(answer["grant"], now=time.time())
    assert (grant.user, grant.channels) == ("7", ("private-room:42", "private-team:*"))
    assert [item.channel for item in published] == ["#user-7", "#connection-c1"]


def test_a_page_gets_the_position_that_was_taken_before_its_state() -> None:
    app = flask_app()

    def load_messages(room: str) -> list[str]:
        publisher.publish(f"room:{room}", "said while the page is made")
        return ["said while the page is made"]

    def render_template(_name: str, **values: Any) -> dict[str, Any]:
        return {name: str(value) for name, value in values.items()}

    publisher = Publisher(secret=SECRET)
    with capture():
        namespace = run_all(docs("listening"), app, load_messages=load_messages, render_template=render_template)
        page = app.test_client().get("/rooms/42").get_json()
    assert page["position"].split(".")[1] == "0"
    unreachable = Publisher("redis://127.0.0.1:1/0", publish_timeout=0.5)
    assert namespace["position_or_none"](unreachable, "room:42") is None


def test_a_view_streams_as_shown() -> None:
    app = flask_app()
    (shown,) = (item for item in snippets("python", document=docs("requests")) if "def tokens" in item.text)
    model = SimpleNamespace(generate=str.split)
    shown.run({"app": app, "request": flask.request, "Response": flask.Response, "model": model})
    answer = app.test_client().get("/answer?prompt=what+is+it", buffered=False)
    assert [answer.status_code, *answer.response] == [200, b"what", b"is", b"it"]


def test_mounting_is_as_shown() -> None:
    namespace = run_all(docs("deploy"), flask_app())
    assert callable(namespace["app"])


# JavaScript, and the first screen as a whole.


def test_javascript_is_javascript(tmp_path: Path) -> None:
    for index, snippet in enumerate(snippets("js")):
        path = tmp_path / f"{index}.mjs"
        path.write_text(snippet.text)
        checked = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
        assert not checked.returncode, f"{snippet}\n{checked.stderr}"


@pytest.mark.anyio
async def test_the_first_screen_works(tmp_path: Path, processes: Processes, browser_page: Page) -> None:
    """The README's app, served by the README's command; the README's script in a page of it."""
    script = snippets("js", document=README)[0].text
    (tmp_path / "app.py").write_text(
        f"{snippets('python', document=README)[0].text}\n"
        '@app.get("/")\n'
        "def page():\n"
        f"    return {'<body><script type=module>' + script + '</script>'!r}\n"
    )
    assert "pubsub-mw serve app:app " in README.read_text()
    served = processes.pubsub_mw("serve", "app:app", cwd=tmp_path)
    async with browser_page.expect_websocket() as socket:
        await browser_page.goto(served.url)
    async with (await socket.value).expect_event("framereceived", lambda frame: '"subscribed"' in frame):
        pass
    answer = await browser_page.request.post(f"{served.url}/rooms/42/messages", data={"text": "hi there"})
    assert answer.status == 204
    await browser_page.get_by_text("hi there").wait_for(timeout=1_000 * 15_000 * MS)


def test_the_first_screen_can_be_seen_without_a_page(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "app.py").write_text(snippets("python", document=README)[0].text)
    served = processes.pubsub_mw("serve", "app:app", cwd=tmp_path)
    address = served.url.removeprefix("http://")
    listen, say = (
        shlex.split(line.removeprefix("$ ").replace("127.0.0.1:8000", address))
        for item in snippets("console", document=README)
        for line in item.text.splitlines()
        if line.startswith("$ curl")
    )
    with subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as listening:
        try:
            lines = listening.stdout
            assert lines is not None
            assert lines.readline().startswith(":")
            subprocess.run(say, check=True, capture_output=True)
            assert any(line == 'data: {"text":"hi"}\n' for line in lines)
        finally:
            listening.kill()


# Commands.


def command_lines(program: str) -> list[str]:
    shell = "\n".join(item.text.replace("\\\n", " ") for item in snippets("console"))
    inline = "\n".join(re.findall(r"(?<!`)`([^`\n]+)`", "\n".join(path.read_text() for path in DOCUMENTS)))
    return re.findall(rf"(?m)^(?:\$ )?(?:.*\| )?({program}\b[^#\n]*)", f"{shell}\n{inline}")


def test_commands_that_are_shown_exist() -> None:
    shown = command_lines("pubsub-mw")
    assert len(shown) > 10
    for line in shown:
        _, *words = line.split()
        command = main.commands[words[0]] if words and words[0][0] != "-" else main
        options = {"--help"} | {name for item in command.params for name in item.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_every_command_is_shown() -> None:
    shown = {line.split()[1] for line in command_lines("pubsub-mw") if len(line.split()) > 1}
    assert set(main.commands) - shown <= {"demo"}
    assert "make demo" in README.read_text()


def test_flags_of_uvicorn_that_are_shown_exist() -> None:
    options = [item for item in uvicorn.main.params if isinstance(item, click.Option)]
    known = {name for item in options for name in (*item.opts, *item.secondary_opts)}
    shown = {word for line in command_lines("uvicorn") for word in line.split() if word.startswith("--")}
    assert "--ws-max-size" in shown
    assert shown <= known


# Links and tables.


def anchors(document: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", document.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = (document.parent / name).resolve() if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_table_of_settings_is_true() -> None:
    shown = {row[0]: row[1:3] for row in rows(docs("settings")) if len(row) == 5}
    assert shown == {
        knob.name: [f"PUBSUB_{knob.name.upper()}", _default(getattr(Settings(), knob.name))]
        for knob in dataclasses.fields(Settings)
    }


def _default(value: object) -> str:
    if value in (None, (), ""):
        return "none"
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) and value < 1e5 else str(value).removesuffix(".0")


def test_the_tables_of_codes_are_true() -> None:
    table = list(rows(docs("wire")))
    closing = {row[0]: row[1:3] for row in table if len(row) == 4}
    assert closing == {str(int(c)): [c.name, "yes" if may_reconnect(c) else "no"] for c in CloseCode}
    assert [row[0] for row in table if len(row) == 2 and row[0] in set(ErrorCode)] == list(ErrorCode)


def test_the_conversation_is_in_frames_that_exist() -> None:
    golden = json.loads((ROOT / "tests" / "frames.json").read_text())["frames"]["server"]
    shapes = {(frame["type"], *sorted(frame)) for frame in golden}
    (conversation,) = (item.text for item in snippets("", document=docs("wire")))
    for line in conversation.splitlines():
        side, frame = line[:2], json.loads(line[2:])
        if side == "> ":
            decode_command(line[2:])
        else:
            assert (frame["type"], *sorted(frame)) in shapes, line


# The source, in reading order.

_TABLE = re.compile(r"(?s)(<!-- reading order -->\n).*(<!-- end of reading order -->)")


def source_table() -> str:
    """The files in their order, each with its lines and the first sentence of its docstring."""
    lines = ["| file | lines | |", "|---|---|---|"]
    files = [name for name in ORDER if len((SOURCE / name).read_text().splitlines()) > 10]
    for name in [*files, "static/client.js"]:
        text = (SOURCE / name).read_text()
        if name.endswith(".py"):
            sentence = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        else:
            sentence = text.splitlines()[1].removeprefix(" * ")
        lines.append(f"| `{name}` | {len(text.splitlines())} | {sentence} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_source_is_true_within_a_little() -> None:
    shown = [row for row in rows(README) if row[0].endswith((".py", ".js"))]
    made = [re.split(r" ?\| ?", line)[1:4] for line in source_table().splitlines()[2:]]
    hint = "python -m tests.test_readme writes it anew"
    assert [row[0] for row in shown] == [row[0].strip("`") for row in made], hint
    for (name, said, _), (_, counted, _) in zip(shown, made, strict=True):
        assert abs(int(said) - int(counted)) <= max(TOLERANCE_LINES, TOLERANCE * int(counted)), f"{name}: {hint}"


if __name__ == "__main__":
    README.write_text(_TABLE.sub(lambda match: f"{match[1]}\n{source_table()}{match[2]}", README.read_text()))
