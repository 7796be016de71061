"""Measure everything, ours and the peers, and print the table.

    python -m benchmarks [--quick] [--peers nchan ...] [--rounds 3] [--alone] [--plots FOLDER]

About an hour; with --quick, one round without curves, ten minutes. Peers are installed into `benchmarks/build/`.
"""

import argparse
import subprocess
import sys

from benchmarks.peers import PEERS
from benchmarks.servers import ALONE

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="one round, no curves")
parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=list(PEERS), help="default: all")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--alone", action="store_true", help=ALONE)
parser.add_argument("--plots", help="a folder to draw the curves into; needs `pip install --group benchmarks`")
options = parser.parse_args()


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], check=True)


alone, rounds = ["--alone"] * options.alone, "1" if options.quick else str(options.rounds)
run("run", "--servers", "pubsub-mw", "C-joining", *options.peers, "--rounds", rounds, *alone)
run("reconnect", "--rounds", rounds, *alone)
run("publishing")
run("constants", *alone)
if not options.quick:
    run("curves", *alone)
run("report", *(("--plots", options.plots) if options.plots else ()))
