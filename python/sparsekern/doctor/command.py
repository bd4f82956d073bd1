"""``python -m sparsekern doctor``: its options, the run, and the table that it prints."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .._library import LOAD_ERROR
from .._version import __version__
from ..benchmark import report
from ..benchmark.command import format_spec
from ..benchmark.progress import progress
from ..isolation import Failure, Worker
from .cases import DTYPES, PRODUCTS, TRITON, Case, plan
from .check import check, no_device, no_triton, unavailable

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

ABOUT = """\
Runs every kernel that this machine can run, on random numbers, and compares it with the same product in
float64. Shapes are small and odd, or fit the kernels' tiles; x lies in memory as torch's do, transposed, and
between NaNs. Figures are the largest error over what rounding can explain: up to 1 is right."""

STATUS = """\
exit status:
  0    everything that is available here is right
  1    something is wrong, raised an error, crashed or hung; or nothing could be checked
  2    bad options
  130  interrupted"""

_SHOWN = 20
"""So many failures are listed in full."""

Run = Callable[[Case], "float | Failure"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.description = ABOUT
    parser.epilog = STATUS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--device",
        nargs="+",
        type=_device,
        metavar="NAME",
        help="cpu, cuda, cuda:1 (default: cpu and every GPU)",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        type=format_spec,
        metavar="SPEC",
        help="csr, bsr32, 2:4, 64:2:8, ... (default: 15)",
    )
    parser.add_argument("--dtype", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="fewer formats, shapes and layouts")
    parser.add_argument("--seed", type=int, metavar="N", help="repeats a run (default: another each time)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="a call that takes longer is stopped (default: 60)",
    )


@dataclass
class Cell:
    """What is known of one kernel in one dtype."""

    errors: list[float] = field(default_factory=list)
    failures: int = 0
    absent: bool = False

    def __str__(self) -> str:
        if self.failures:
            return f"{self.failures} of {self.failures + len(self.errors)} WRONG"
        if self.errors:
            return f"ok {max(self.errors):.2g}" if any(self.errors) else "ok"
        return "no" if self.absent else ""


def main(arguments: argparse.Namespace, run: Run | None = None) -> int:
    """Check what the parsed options ask for; ``run`` takes the place of :func:`check` in a child process.

    Returns the exit status.
    """
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    devices = arguments.device or ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    print(f"sparsekern {__version__}, torch {torch.__version__}; --seed {seed} repeats this run")
    if arguments.device is None and len(devices) == 1:
        print(f"no GPU: {no_device('cuda')}")
    for device in devices:
        print(f"{device}: {no_device(device) or _describe(device)}")
    dtypes = [NAMES[name] for name in arguments.dtype] if arguments.dtype else list(DTYPES)
    todo, absent = _available(
        case
        for device in devices
        if no_device(device) is None or no_triton(device) is None
        for case in plan(device, arguments.format, dtypes, quick=arguments.quick, seed=seed)
    )
    status = 0
    with Worker(arguments.timeout) as worker:
        results: list[tuple[Case, float | Failure]] = []
        try:
            for case in progress(todo):
                results.append((case, run(case) if run else worker(check, case)))
        except KeyboardInterrupt:
            status = 130
            print(f"\ninterrupted after {len(results)} of {len(todo)} calls")
    failures = _report(results, absent, dtypes)
    if not results:
        print("nothing was checked")
    return status or int(bool(failures) or not results)


def _available(cases: Iterable[Case]) -> tuple[list[Case], dict[Case, str]]:
    """Those that can run, and why the others cannot."""
    todo, absent = [], {}
    for case in cases:
        reason = unavailable(case.device, case.format, case.product, case.dtype)
        if reason is None:
            todo.append(case)
        else:
            absent[case] = reason
    return todo, absent


def _report(
    results: Sequence[tuple[Case, float | Failure]], absent: dict[Case, str], dtypes: Sequence[torch.dtype]
) -> list[str]:
    """Print the table, why kernels are missing, and what is wrong. Returns the latter."""
    cells: dict[tuple[str, str, torch.dtype], Cell] = {}

    def cell(case: Case) -> Cell:
        return cells.setdefault((case.device, case.kernel, case.dtype), Cell())

    missing = {f"{case.device} {_name(case.dtype)}: {reason}": None for case, reason in absent.items()}
    wrong = []
    for case, result in results:
        if isinstance(result, Failure) and "no kernel image" in result.reason:
            capability = ".".join(map(str, torch.cuda.get_device_capability(case.device)))
            missing[f"{case.device}: the library holds no code for compute capability {capability}"] = None
            cell(case).absent = True
        elif isinstance(result, Failure):
            wrong.append(f"{case}: {result.reason}")
            cell(case).failures += 1
        elif not result <= 1.0:
            wrong.append(f"{case}: {result:.3g} times what rounding explains")
            cell(case).failures += 1
        else:
            cell(case).errors.append(result)
    for case in absent:
        cell(case).absent = True
    kernels = list(dict.fromkeys((device, kernel) for device, kernel, _ in cells))
    order = {product: i for i, product in enumerate((*PRODUCTS, *TRITON))}
    stems = list(dict.fromkeys(kernel.partition("_")[0] for _, kernel in kernels))

    def place(row: tuple[str, str]) -> tuple[str, int, int]:
        stem, _, product = row[1].partition("_")
        return row[0], stems.index(stem), order[product]

    lines = [
        [
            device,
            kernel.replace("_pattern", " pattern"),
            *(str(cells.get((device, kernel, d), "")) for d in dtypes),
        ]
        for device, kernel in sorted(kernels, key=place)
    ]
    if lines:
        print("\n" + report.table(["device", "kernel", *map(_name, dtypes)], lines, left=5))
    if missing:
        print("\nno:\n" + "\n".join(f"  {line}" for line in missing))
    if wrong:
        rest = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        print("\nWRONG:\n" + "\n".join(f"  {line}" for line in wrong[:_SHOWN]) + rest)
    if results:
        print(f"\n{len(results) - len(wrong)} of {len(results)} calls are right")
    return wrong


def _describe(device: str) -> str:
    if device == "cpu":
        isa = "no library" if LOAD_ERROR else str(torch.ops.sparsekern.isa())
        return f"{isa} kernels, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(text: str) -> str:
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a device such as cpu or cuda:0, got {text!r}") from None
