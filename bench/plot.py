"""``python bench/plot.py RESULTS.csv PATH``: draw runs of a results file again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparsekern.benchmark import last_run, plot, read


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/plot.py", description="Draw runs of a results file again.")
    parser.add_argument("results", type=Path, help="a CSV file that the benchmark wrote")
    parser.add_argument(
        "path",
        type=Path,
        help="a .png, .svg or .pdf, for one picture of speed-ups; or a folder, for one per format family and "
        "the roofline",
    )
    parser.add_argument(
        "--run", nargs="+", metavar="TIME", help="as in the column run (default: the newest run)"
    )
    arguments = parser.parse_args()
    rows = read(arguments.results)
    if unknown := set(arguments.run or ()) - {row.run for row in rows}:
        parser.error(f"--run must name runs in {arguments.results}, got {', '.join(sorted(unknown))}")
    chosen = [row for row in rows if row.run in arguments.run] if arguments.run else last_run(rows)
    for path in plot.plot(chosen, arguments.path):
        print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
