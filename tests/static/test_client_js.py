"""Hold the browser client to its tests, its types, its size and its npm package. Node does the work."""

import asyncio
import gzip
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from pubsub_mw.realtime.script import slim
from tests.client_world import Endpoint
from tests.journeys.page_world import flask_app
from tests.tools.npm import node_modules, run

HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "src" / "pubsub_mw" / "static"

MAX_GZIPPED_BYTES = 6_000

LISTEN = """
import { connect } from "pubsub-mw";

const realtime = connect(process.argv[2]);
realtime.subscribe("room:1", async (data) => {
  const response = await realtime.fetch("/echo", { json: data });
  console.log(JSON.stringify([data, (await response.json()).json]));
  realtime.close();
}, { onSubscribed: () => console.error("listening") });
"""

TYPED = """
import { connect, type Message, type Realtime } from "pubsub-mw";

const realtime: Realtime = connect("https://example.org/realtime", { transports: ["sse"] });
realtime.subscribe("room:1", (data, { position }: Message) => console.log(data, position));
"""

pytestmark = pytest.mark.timeout(120)


def served() -> str:
    return slim((STATIC / "client.js").read_text())


@pytest.fixture(scope="module")
def tsc() -> str:
    """The TypeScript compiler of package-lock.json."""
    return str(node_modules() / ".bin" / "tsc")


@pytest.mark.parametrize("form", ["as it is", "as it is served"])
def test_the_client_passes_its_tests_in_node(form: str, tmp_path: Path) -> None:
    folder = HERE
    if form == "as it is served":
        folder, static = tmp_path / "tests" / "static", tmp_path / "src" / "pubsub_mw" / "static"
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("node_modules"))
        shutil.copy(HERE.parent / "frames.json", folder.parent)
        static.mkdir(parents=True)
        (static / "client.js").write_text(served())
    output = run("node", "--test", "--test-reporter=tap", folder=folder)
    assert "# fail 0" in output
    assert "# pass 0" not in output


def test_it_is_what_its_types_say(tsc: str) -> None:
    run(tsc)
    declared = re.findall(r"^export function (\w+)", (STATIC / "client.d.ts").read_text(), re.MULTILINE)
    exported = f"import({json.dumps((STATIC / 'client.js').as_uri())}).then((m) => console.log(Object.keys(m).join()))"
    assert run("node", "--eval", exported).strip().split(",") == sorted(declared)


def test_a_typescript_page_can_use_it_and_is_kept_from_misusing_it(tsc: str) -> None:
    # Files on the command line make tsc pass over tsconfig.json, so that the shipped client.d.ts is what it reads.
    run(
        tsc,
        "--noEmit",
        "--strict",
        "--target",
        "es2022",
        "--module",
        "es2022",
        "--moduleResolution",
        "bundler",
        "usage.ts",
    )


def test_it_is_small_as_it_is_served() -> None:
    size_bytes = len(gzip.compress(served().encode(), 9))
    assert size_bytes < MAX_GZIPPED_BYTES


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has installed what `npm pack` makes."""
    folder = tmp_path_factory.mktemp("project")
    (packed,) = json.loads(run("npm", "pack", "--json", f"--pack-destination={folder}", str(STATIC)))
    assert sorted(file["path"] for file in packed["files"]) == ["README.md", "client.d.ts", "client.js", "package.json"]
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    run("npm", "install", "--offline", "--no-audit", "--no-fund", f"./{packed['filename']}", folder=folder)
    return folder


def test_the_npm_package_has_the_version_of_the_python_package() -> None:
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    package = json.loads((STATIC / "package.json").read_text())
    assert (package["name"], package["version"]) == (project["name"], project["version"])
    assert package["license"] == project["license"]


@pytest.mark.anyio
async def test_the_npm_package_listens_and_requests_from_node(installed: Path, prefix: str) -> None:
    (installed / "listen.js").write_text(LISTEN)
    async with Endpoint("memory://", app=flask_app(), prefix=prefix, secret="s" * 32) as site:
        node = await asyncio.create_subprocess_exec(
            shutil.which("node") or "node",
            "listen.js",
            site.url,
            cwd=installed,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert node.stdout is not None
        assert node.stderr is not None
        assert await node.stderr.readline() == b"listening\n"
        await site.publisher.publish("room:1", {"text": "日本"})
        assert json.loads(await node.stdout.readline()) == [{"text": "日本"}, {"text": "日本"}]
        assert await node.wait() == 0


def test_the_npm_package_brings_its_types(installed: Path, tsc: str) -> None:
    (installed / "typed.ts").write_text(TYPED)
    run(
        tsc, "--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext",
        "typed.ts", folder=installed,
    )  # fmt: skip
