"""``python -m sparsekern bench``: its options, and the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .._library import LOAD_ERROR
from ..formats import parse_format
from ..ops import NATIVE_DTYPES
from . import goals, plot, report, results
from .cases import PRODUCTS, SUITES, Case, Shape
from .contenders import Contender, line_up, refusals
from .progress import progress
from .results import Row
from .roofline import SOURCES, Roofline
from .run import Facts, kernel_seconds, run_case

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NATIVE_DTYPES}

ABOUT = """\
Measures ratios, not lone times: sparsekern, dense torch and torch.sparse compute the same product with the
same weight, their results are compared, and they are timed in turns in this process. A line of the tables is
one product of W [out, in] at one sparsity; "2.00x" means twice as fast as the contender to its left."""

FORMATS = """\
formats:
  csr              unstructured
  bsr32, bsr64x32  blocks, height x width: sides 4, 8, 16, 32, 64 or 128
  2:4              N:M, N of each M columns; it fixes the sparsity, at 1 - N/M
  64:2:8           V:N:M, N of the 4 of each M columns that V rows share; likewise"""

TOLERANCE = 0.95
"""A case of "auto" below this speed-up over dense is measured again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.description = ABOUT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    suites = "\n".join(f"  {name:<16} {suite.about}" for name, suite in SUITES.items())
    products = "\n".join(f"  {name:<16} {about}" for name, about in PRODUCTS.items())
    parser.epilog = f"suites:\n{suites}\n\n{FORMATS}\n\nproducts:\n{products}"
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--suite", nargs="+", choices=SUITES, metavar="NAME", help="suites of cases (default: all)"
    )
    what.add_argument(
        "--shape",
        nargs="+",
        type=_shape,
        metavar="OUTxINxBATCH",
        help="these shapes, not the suite's; without --suite it means --suite layers, and csr if no --format",
    )
    what.add_argument(
        "--format", nargs="+", type=format_spec, metavar="SPEC", help="sparsity formats, not the suite's"
    )
    what.add_argument(
        "--sparsity",
        nargs="+",
        type=_sparsity,
        metavar="S",
        help="sparsities in [0, 1), not the suite's; formats that fix theirs keep it",
    )
    what.add_argument(
        "--product", nargs="+", choices=PRODUCTS, metavar="NAME", help="products, not the suite's"
    )
    what.add_argument(
        "--dtype", nargs="+", choices=DTYPES, metavar="NAME", help="float32 or bfloat16, not the suite's"
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
    out.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="draw speed-up over dense against sparsity into this .png, .svg or .pdf; "
        "or, into a folder, a picture per format and the roofline",
    )


def plan(arguments: argparse.Namespace, extra: Sequence[Contender] = ()) -> dict[Case, tuple[Contender, ...]]:
    """The cases that the parsed options ask for, and who measures them. A case of two suites runs once."""
    suites = arguments.suite or (["layers"] if arguments.shape else list(SUITES))
    formats = arguments.format or (["csr"] if arguments.shape and not arguments.suite else None)
    found: dict[Case, dict[tuple[str, str], Contender]] = {}
    for name in suites:
        suite = SUITES[name]
        for case in suite.cases(
            shapes=arguments.shape,
            formats=formats,
            sparsities=arguments.sparsity,
            products=arguments.product,
            dtypes=[DTYPES[name] for name in arguments.dtype] if arguments.dtype else None,
        ):
            joined = found.setdefault(case, {})
            for contender in line_up(suite, case, extra):
                joined.setdefault((contender.backend, contender.layout), contender)
    return {case: tuple(joined.values()) for case, joined in found.items()}


def main(arguments: argparse.Namespace, extra: Sequence[Contender] = ()) -> int:
    """Run the benchmark with the parsed options; ``extra`` peers join. Returns the exit status."""
    todo = plan(arguments, extra)
    if arguments.plot is not None:
        plot.require()  # before minutes of measuring, not after
        plot.pictures(todo, arguments.plot)
    if arguments.output is not None and arguments.output.exists():
        results.read(arguments.output)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    facts = Facts.now()
    roofline = Roofline(facts.threads)
    print(
        f"{facts.machine}, {facts.device}, torch {facts.torch} on {facts.threads} threads, "
        f"sparsekern {facts.commit}"
    )
    peaks = {SOURCES[roofline.source(case.dtype)]: None for case in todo}
    print(f"{len(todo)} cases, {arguments.rounds} rounds; peak: {'; '.join(peaks)}")
    if LOAD_ERROR is not None:
        print(f"sparsekern runs its reference, which is slow: {LOAD_ERROR}")
    for reason in refusals(todo.items()):
        print(f"sits out some cases: {reason}")

    def measure(case: Case, rounds: int) -> list[Row]:
        return run_case(
            case, todo[case], facts, roofline, rounds=rounds, min_seconds=1e-3 * arguments.min_time
        )

    rows: list[Row] = []
    interrupted = False
    try:
        for case in progress(list(todo)):
            done = measure(case, arguments.rounds)
            if any(row.backend == "auto" and (row.speedup_vs_dense or 1.0) < TOLERANCE for row in done):
                done = measure(case, 3 * arguments.rounds)
            rows += done
            if arguments.output is not None:
                results.append(arguments.output, done)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted after {len({row.case for row in rows})} of {len(todo)} cases")
    texts = (report.cases(rows), report.means(rows), report.auto(rows), goals.goals(rows), report.noise(rows))
    for text in texts:
        if text:
            print(f"\n{text}")
    if interrupted:
        return 130
    if any(case in todo for case in _OVERHEAD):
        _print_kernel_share()
    if arguments.plot is not None:
        for path in plot.plot(rows, arguments.plot):
            print(f"picture: {path}")
    return 0


_OVERHEAD = list(SUITES["overhead"].cases(products=["forward"]))


def _print_kernel_share() -> None:
    (case,) = _OVERHEAD
    seconds = kernel_seconds(case)
    alone = (
        "not measured, sparsekern._native is not built"
        if seconds is None
        else f"at most {1e6 * seconds:.2f} us"
    )
    print(f"\nkernel alone, {case}, one thread: {alone}")


def _shape(text: str) -> Shape:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be OUTxINxBATCH, such as 4096x1024x256, got {text!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def format_spec(text: str) -> str:
    """An argument that must be a format, as its spec."""
    try:
        return parse_format(text).spec
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
