"""``python bench/plot.py RESULTS.csv PICTURE.png``: draw the newest run of a results file."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsekern.benchmark import last_run, plot, read


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench/plot.py", description="Draw the newest run of a results file."
    )
    parser.add_argument("results", type=Path, help="a CSV file that the benchmark wrote")
    parser.add_argument("picture", type=Path, help="where to draw: .png, .svg or .pdf")
    arguments = parser.parse_args()
    plot.plot(last_run(read(arguments.results)), arguments.picture)


if __name__ == "__main__":
    main()
