"""Run a benchmark where a process may open a million files, on a machine whose limit is lower and stays.

    python -m benchmarks.machine benchmarks.crowd [its options]

gVisor is a kernel that is a program: what runs in it opens files and sockets of its own, within its own limits, and
sees the files of its host. It needs root, and no virtualization. A system call costs 16 µs there instead of 0.2, and a
delivery ten times as much: its figures are to be compared with each other, or are upper bounds.

It comes from Debian: apt-get downloads `runsc`, which is unpacked, not installed. Debian 12's is too old, and that of
sid ends with "running on goroutine".
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.loadgen import BUILD, compiled

__all__ = ["main"]

_MACHINE = BUILD / "machine"
_SUITE = "trixie"
_SOURCE = f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {_SUITE} main\n"
_ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("module", help="such as benchmarks.crowd")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for program in ("loadgen", "reference"):
        compiled(program)
    command = shlex.join([sys.executable, "-m", options.module, *options.arguments])
    inside = f"ulimit -n 1000000 && cd {shlex.quote(str(_ROOT))} && exec {command}"
    # Without the overlay what is measured is written to the host's `build/`.
    words = ["--ignore-cgroups", "--platform=systrap", "--network=none", "do", "-force-overlay=false"]
    raise SystemExit(subprocess.run([_runsc(), *words, "sh", "-c", inside], check=False).returncode)


def _runsc() -> str:
    program = _MACHINE / "debian/usr/bin/runsc"
    if not program.exists():
        if shutil.which("apt-get") is None:
            raise SystemExit("apt-get is needed, which brings runsc")
        _download("runsc")
    return str(program)


def _download(package: str) -> None:
    """Bring a package of another suite than this system's: apt-get is given places of its own."""
    for folder in ("debian", "lists/partial", "cache/archives/partial"):
        (_MACHINE / folder).mkdir(parents=True, exist_ok=True)
    (_MACHINE / "sources.list").write_text(_SOURCE)
    places = {
        "Dir::Etc::sourcelist": _MACHINE / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": _MACHINE / "lists",
        "Dir::Cache": _MACHINE / "cache",
    }
    apt = ["apt-get", "-qq", *(word for name, place in places.items() for word in ("-o", f"{name}={place}"))]
    for command in ([*apt, "update"], [*apt, "download", package]):
        subprocess.run(command, cwd=_MACHINE, check=True)
    (archive,) = _MACHINE.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", str(archive), "debian"], cwd=_MACHINE, check=True)


if __name__ == "__main__":
    main()
