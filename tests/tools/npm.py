"""Have the packages of tests/static/package-lock.json: the TypeScript compiler, and what example pages load from a CDN.

In:     that file
Out:    `node_modules`
Owns:   `tests/static/node_modules`, installed once for each version of the file
Never:  installs anything else, or anywhere else
"""

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["node_modules", "run"]

_FOLDER = Path(__file__).parents[1] / "static"


def run(*command: str, folder: Path = _FOLDER) -> str:
    """Return what a command printed; fail the test with it if the command fails."""
    program = shutil.which(command[0])
    if program is None:
        pytest.fail(f"{command[0]} is missing: install Node 20 or newer, with npm")
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, timeout=110, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def node_modules() -> Path:
    """Return the folder with the packages, installed."""
    lock = _FOLDER / "package-lock.json"
    packages = _FOLDER / "node_modules"
    installed = packages / ".installed-lock.json"
    if not installed.exists() or installed.read_bytes() != lock.read_bytes():
        run("npm", "ci", "--no-fund", "--no-audit")
        shutil.copy(lock, installed)
    return packages
