"""``python -m sparsekern bench``: its options, and the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .._library import LOAD_ERROR
from ..ops import NATIVE_DTYPES
from . import plot, report, results
from .cases import PRODUCTS, SUITES, Case, Shape
from .contenders import OURS, PEERS, Contender, refusals
from .results import Row
from .roofline import SOURCES, Roofline
from .run import Facts, kernel_seconds, run_case

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NATIVE_DTYPES}

ABOUT = """\
Measures ratios, not lone times: sparsekern, dense torch and torch.sparse compute the same product with the
same weight, their results are compared, and they are timed in turns in this process. A line of the tables is
one product of W [out, in] at one sparsity; "2.00x" means twice as fast as the contender to its left."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.description = ABOUT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    suites = "\n".join(f"  {name:<16} {suite.about}" for name, suite in SUITES.items())
    products = "\n".join(f"  {name:<16} {about}" for name, about in PRODUCTS.items())
    parser.epilog = f"suites:\n{suites}\n\nproducts:\n{products}"
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--suite", nargs="+", choices=SUITES, metavar="NAME", help="suites of cases (default: all)"
    )
    what.add_argument(
        "--shape",
        nargs="+",
        type=_shape,
        metavar="OUTxINxBATCH",
        help="these shapes, not the suite's; alone it means --suite layers",
    )
    what.add_argument(
        "--sparsity", nargs="+", type=_sparsity, metavar="S", help="sparsities in [0, 1), not the suite's"
    )
    what.add_argument(
        "--product", nargs="+", choices=PRODUCTS, metavar="NAME", help="products, not the suite's"
    )
    what.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="storage types (default: float32)"
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--threads", type=_positive(int), metavar="N", help="torch's threads (default: as torch chose)"
    )
    how.add_argument(
        "--rounds", type=_positive(int), default=11, metavar="N", help="readings per contender (default: 11)"
    )
    how.add_argument(
        "--min-time",
        type=_positive(float),
        default=10.0,
        metavar="MS",
        help="least time of a reading (default: 10 ms)",
    )
    out = parser.add_argument_group("what to keep")
    out.add_argument(
        "--output", type=Path, metavar="CSV", help="append one row per contender and case to this file"
    )
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw speed-up over dense against sparsity")


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the parsed options ask for."""
    suites = arguments.suite or (["layers"] if arguments.shape else list(SUITES))
    return [
        case
        for name in suites
        for case in SUITES[name].cases(
            shapes=arguments.shape,
            sparsities=arguments.sparsity,
            products=arguments.product,
            dtypes=[DTYPES[name] for name in arguments.dtype],
        )
    ]


def main(arguments: argparse.Namespace, extra: Sequence[Contender] = ()) -> int:
    """Run the benchmark with the parsed options; ``extra`` peers join. Returns the exit status."""
    todo = cases(arguments)
    if arguments.plot is not None:
        plot.require()  # before minutes of measuring, not after
        plot.shown(todo)
    if arguments.output is not None and arguments.output.exists():
        results.read(arguments.output)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    contenders = (*OURS, *PEERS, *extra)
    facts = Facts.now()
    roofline = Roofline(facts.threads)
    print(
        f"{facts.machine}, {facts.device}, torch {facts.torch} on {facts.threads} threads, "
        f"sparsekern {facts.commit}"
    )
    print(f"{len(todo)} cases, {arguments.rounds} rounds; peak: {SOURCES[roofline.source]}")
    if LOAD_ERROR is not None:
        print(f"sparsekern runs its reference, which is slow: {LOAD_ERROR}")
    for reason in refusals(contenders, todo):
        print(f"sits out some cases: {reason}")
    rows: list[Row] = []
    interrupted = False
    try:
        for case in _progress(todo):
            done = run_case(
                case,
                contenders,
                facts,
                roofline,
                rounds=arguments.rounds,
                min_seconds=1e-3 * arguments.min_time,
            )
            rows += done
            if arguments.output is not None:
                results.append(arguments.output, done)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len({row.case for row in rows})} of {len(todo)} cases")
    for text in (report.cases(rows), report.means(rows), report.goals(rows), report.noise(rows)):
        if text:
            print(f"\n{text}")
    if interrupted:
        return 130
    if "overhead" in (arguments.suite or ()) or not (arguments.suite or arguments.shape):
        _print_kernel_share()
    if arguments.plot is not None:
        plot.plot(rows, arguments.plot)
        print(f"\npicture: {arguments.plot}")
    return 0


def _print_kernel_share() -> None:
    case = next(SUITES["overhead"].cases(products=["forward"]))
    seconds = kernel_seconds(case)
    alone = (
        "not measured, sparsekern._native is not built"
        if seconds is None
        else f"at most {1e6 * seconds:.2f} us"
    )
    print(f"\nkernel alone, {case}, one thread: {alone}")


def _progress(todo: Sequence[Case]) -> Iterable[Case]:
    """``todo`` behind a progress bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield from todo
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar without tqdm: pip install 'sparsekern[bench]'", file=sys.stderr)
        yield from todo
        return
    with tqdm(todo, unit="case", leave=False) as bar:
        for case in bar:
            bar.set_description(str(case))
            yield case


def _shape(text: str) -> Shape:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be OUTxINxBATCH, such as 4096x1024x256, got {text!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return value


def _positive(kind: type[int] | type[float]):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not value > 0:
            raise argparse.ArgumentTypeError(
                f"must be a positive {'whole ' * (kind is int)}number, got {text!r}"
            )
        return value

    return parse
