"""``python bench/run.py``: ``python -m sparsekern bench`` with the optional peers, into ``bench/results``.

Rows are always kept there; the pictures are redrawn by a run that leaves no case out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import peers
from sparsekern.benchmark import command

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run.py")
    command.add_arguments(parser)
    parser.set_defaults(output=RESULTS / "cpu.csv")
    arguments = parser.parse_args()
    chosen = ("suite", "shape", "format", "sparsity", "product", "dtype", "plot")
    if not any(getattr(arguments, name) for name in chosen):
        arguments.plot = RESULTS
    found = peers.installed()
    if not found:
        print("no optional peer is installed: see bench/README.md")
    return command.main(arguments, found)


if __name__ == "__main__":
    sys.exit(main())
