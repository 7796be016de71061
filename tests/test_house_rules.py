"""Hold the rules of the house that no linter knows."""

import ast
import dataclasses
import functools
import importlib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pubsub_mw.errors import CloseCode, ErrorCode
from pubsub_mw.settings import Settings

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pubsub_mw"

# Lines of code: blank lines, comments and docstrings are not counted, so that nobody saves on them. Of all lines
# 235 are for metrics (what counts, what tells it, how one process tells of all), 165 for sentinels.
LONGEST_FILE_LINES = 350
ALL_LINES = 11_120

# Files that may be longer, each with what it would cost to cut it.
LONGER: dict[str, str] = {
    "cli.py": "one function per command, each short; cut in two, options would be shared across files",
    "broker/memory.py": "the whole second engine: what Redis does in scripts and six files is here in one class",
    "realtime/connection.py": "who a client is and what it may do are decided together; cut, each half asks the other",
    "realtime/hub.py": "its two jobs, sending and catching up, share every field of a channel",
}

# Module names that say nothing about what is inside.
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core"}

# Whatever turns bytes from outside into behaviour.
BANNED_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def modules() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse((SOURCE / module).read_text())


def dotted(module: str) -> str:
    parts = ["pubsub_mw", *Path(module).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def defined_in(tree: ast.Module) -> Iterator[str]:
    """The names that a module makes itself, at its top level."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def documentation() -> str:
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])


@functools.cache
def imports() -> list[ast.ImportFrom]:
    nodes = (node for module in modules() for node in ast.walk(parse(module)))
    return [node for node in nodes if isinstance(node, ast.ImportFrom)]


def imported_from(name: str) -> set[str]:
    """What other modules of ours import from the module called `name`."""
    return {alias.name for node in imports() if node.module == name for alias in node.names}


def undocumented(words: Iterable[object]) -> list[str]:
    """Those of `words` that neither the README nor docs/ show as code: between backticks, or in a code block."""
    texts = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]
    code = "\n".join(span for text in texts for span in re.findall(r"(?s)```.*?```|`[^`\n]+`", text))
    return [str(word) for word in words if not re.search(rf"(?<![\w.-]){re.escape(str(word))}(?![\w-])", code)]


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith("__init__.py")])
def test_exports_are_what_others_may_use(module: str) -> None:
    """Public classes and functions, whatever else another module of ours imports, and nothing that is not there.

    Not the commands of `pubsub-mw`, which are used by typing them.
    """
    tree = parse(module)
    defined = set(defined_in(tree))
    made = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and "main.command()" not in map(ast.unparse, node.decorator_list)
    }
    exported = set(importlib.import_module(dotted(module)).__all__)
    assert not {name for name in made | imported_from(dotted(module)) if not name.startswith("_")} - exported
    assert not exported - defined or "__getattr__" in defined


@pytest.mark.parametrize("module", [m for m in modules() if m.endswith("__init__.py")])
def test_packages_export_what_they_have(module: str) -> None:
    package = importlib.import_module(dotted(module))
    assert not [name for name in getattr(package, "__all__", []) if not hasattr(package, name)]


@pytest.mark.parametrize("module", modules())
def test_a_module_opens_with_a_sentence_and_its_room_card(module: str) -> None:
    text = ast.get_docstring(parse(module)) or ""
    first, *rest = text.splitlines() or [""]
    assert re.fullmatch(r"[A-Z`].*\.", first), "the first line is one sentence"
    if not module.endswith("__init__.py"):
        card = [line.split(":")[0] for line in rest if re.match(r"(In|Out|Owns|Never): +\S", line)]
        assert card == ["In", "Out", "Owns", "Never"]


def test_names_of_modules_say_what_is_inside() -> None:
    assert not VAGUE & {Path(module).stem for module in modules()}


def test_no_file_does_two_jobs_unless_it_says_why() -> None:
    lines = {path.relative_to(SOURCE).as_posix(): count for path, count in line_counts()}
    long = {name for name, count in lines.items() if count > LONGEST_FILE_LINES}
    assert long == set(LONGER), {name: lines.get(name) for name in long ^ set(LONGER)}


def test_all_of_it_is_read_in_an_afternoon() -> None:
    assert sum(count for _, count in line_counts()) <= ALL_LINES


def line_counts() -> list[tuple[Path, int]]:
    return [(path, code_lines(path)) for path in SOURCE.rglob("*") if path.suffix in (".py", ".lua")]


@functools.cache
def code_lines(path: Path) -> int:
    text = path.read_text()
    if path.suffix == ".lua":
        return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith("--"))
    spare = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in spare:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_types_and_the_files_that_are_not_python_ship_with_the_package() -> None:
    assert (SOURCE / "py.typed").exists()
    assert (SOURCE / "static" / "client.js").exists()


@pytest.mark.parametrize("module", modules())
def test_nothing_turns_data_into_code(module: str) -> None:
    found = []
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in BANNED_MODULES else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            found.append(node.func.id)
    assert not found


def test_every_setting_is_documented() -> None:
    assert not undocumented(setting.name for setting in dataclasses.fields(Settings))


def test_every_environ_key_is_documented() -> None:
    constants = (node for module in modules() for node in ast.walk(parse(module)) if isinstance(node, ast.Constant))
    keys = {node.value for node in constants if re.fullmatch(r"pubsub\.[a-z_]+", str(node.value))}
    assert keys, "the middleware sets keys"
    assert not undocumented(keys)


def test_every_code_is_documented() -> None:
    assert not undocumented([*ErrorCode, *CloseCode])
