"""Give a test a page that listens, and hear what it heard.

In:     a Playwright page; an endpoint with `flask_app` beside it
Out:    what the page said, in order, by what it is about
Owns:   the page's text and the app that renders it
Never:  knows a transport: what a page hears is the same over each
"""

import threading
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request
from playwright.async_api import Page

from tests.tools.clock import MS, eventually_async

__all__ = ["Gate", "becomes", "flask_app", "heard", "hears", "listen"]

PAGE = """<!doctype html>
<meta charset="utf-8">
<link rel="icon" href="data:,">
<body data-position="{position}">
<script type="module">
  import {{ connect }} from "{mount}/client.js";

  Math.random = () => 0.2; // a fifth of each back-off: no luck in when it comes back
  const said = (window.said = []);
  window.listen = (options) => {{
    const realtime = (window.realtime = connect(options));
    realtime.on("state", (state) => said.push(["state", state]));
    realtime.on("gap", ({{ channel, reason }}) => said.push(["gap", reason]));
    realtime.on("error", ({{ code }}) => said.push(["error", code]));
    realtime.on("private", (data) => said.push(["private", data]));
  }};
  window.follow = (channel, options) =>
    new Promise((onSubscribed) => {{
      realtime.subscribe(channel, (data) => said.push([channel, data]), {{ onSubscribed, ...options }});
    }});
</script>
"""


class Gate:
    """How far the app's views may go, and what they did."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.runs: list[str] = []
        self.closed = threading.Event()

    def open(self, by: int = 1) -> None:
        self._passes.release(by)

    def wait(self) -> None:
        if not self._passes.acquire(timeout=30):
            raise TimeoutError("the test never opened the gate")


def flask_app(gate: Gate | None = None) -> Flask:
    app, gate = Flask(__name__), gate or Gate()

    @app.get("/")
    def page() -> str:
        position = request.environ["pubsub.publisher"].position("room:1")
        return PAGE.format(position=position, mount=request.args.get("mount", "/realtime"))

    @app.post("/publish")
    def publish() -> str:
        exclude = request.headers.get("X-Connection")
        return str(request.environ["pubsub.publish"]("room:1", request.get_json(), exclude=exclude))

    @app.route("/echo", methods=["GET", "POST"])
    def echo() -> dict[str, Any]:
        connection = request.environ["pubsub.connection"]
        gate.runs.append(request.get_data(as_text=True))
        return {"method": request.method, "json": request.get_json(silent=True), "transport": connection.transport}

    @app.get("/gated")
    def gated() -> str:
        gate.runs.append("gated")
        gate.wait()
        return "through"

    @app.get("/numbers/<int:count>")
    def numbers(count: int) -> Response:
        def parts() -> Iterator[str]:
            try:
                for number in range(count):
                    gate.wait()
                    yield f"{number},"
            finally:
                gate.closed.set()

        gate.runs.append("numbers")
        return Response(parts(), mimetype="text/plain")

    return app


async def listen(page: Page, port: int, channel: str = "room:1", options: str = "{}", query: str = "") -> None:
    """Open the page and wait until it listens to `channel`."""
    await page.goto(f"http://127.0.0.1:{port}/{query}")
    await page.wait_for_function("typeof follow === 'function'")
    await page.evaluate(f"listen({options})")
    await page.evaluate(f"follow({channel!r})")


async def heard(page: Page, about: str = "room:1") -> list[Any]:
    said: list[Any] = await page.evaluate("said")
    return [what for name, what in said if name == about]


async def hears(page: Page, *expected: Any, about: str = "room:1", timeout: float = 10_000 * MS) -> None:
    async def has_heard() -> bool:
        assert await heard(page, about) == list(expected)
        return True

    await eventually_async(has_heard, timeout, f"what was heard about {about}")


async def becomes(page: Page, state: str, timeout: float = 10_000 * MS) -> None:
    async def is_so() -> bool:
        return bool(await page.evaluate("realtime.state") == state)

    await eventually_async(is_so, timeout, f"state is not {state}")
