"""Hold the browser client to its tests, its types and its size. Node does the work; `make test` installs it."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from pubsub_mw.realtime.script import slim
from tests.tools.npm import node_modules, run

HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "src" / "pubsub_mw" / "static"

MAX_GZIPPED_BYTES = 6_000

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
