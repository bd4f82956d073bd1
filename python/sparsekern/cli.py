"""``python -m sparsekern``: what runs here (``info``), whether it is right (``doctor``), what it pays
(``bench``), measuring (``tune``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from . import _library, cost
from ._version import __version__
from .benchmark import command, report, results, tune
from .doctor import command as doctor
from .formats import triton_products
from .formats.products import PRODUCTS as FORMATS
from .ops import NATIVE_DTYPES

PRODUCTS = ("linear", "linear_backward_input", "linear_backward_weight")
DEVICES = ("cpu", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsekern", description="Weight-sparse layers for torch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, the compiled library, and what runs where and why not")
    doctor.add_arguments(
        commands.add_parser("doctor", help="check every kernel of this machine against float64")
    )
    command.add_arguments(
        commands.add_parser("bench", help="time the sparse products against dense torch and peers")
    )
    tune.add_arguments(
        commands.add_parser("tune", help='measure this machine, so that backend="auto" chooses for it')
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        try:
            print(info(), flush=True)
        except BrokenPipeError:  # `| head` has what it wants; at exit Python would flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    try:
        return _MAINS[arguments.command](arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{parser.prog} {arguments.command}: {error}", file=sys.stderr)
        return 1


_MAINS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": doctor.main,
    "bench": command.main,
    "tune": tune.main,
}


def info() -> str:
    """What ``python -m sparsekern info`` prints."""
    facts = list(_facts())
    width = max(len(name) for name, _ in facts)
    ops = [f"{format}_{product}" for format in FORMATS for product in PRODUCTS]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in NATIVE_DTYPES)
    return "\n".join(
        [
            *(f"{name.ljust(width)}  {value}" for name, value in facts),
            "",
            report.table(
                ["op", *DEVICES], ([op, *(_runs(op, device) for device in DEVICES)] for op in ops), left=3
            ),
            "",
            f"native takes {dtypes}; other dtypes run dense: torch on the scattered weight.",
        ]
    )


def _facts() -> Iterator[tuple[str, str]]:
    yield "sparsekern", f"{__version__}, sources at {results.commit()}"
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "machine", f"{results.machine()}, {torch.get_num_threads()} torch threads"
    yield "library", _library.LOAD_ERROR or "loaded"
    if _library.LOAD_ERROR is None:
        asked = os.environ.get("SPARSEKERN_ISA")
        choice = f"as SPARSEKERN_ISA={asked} asks" if asked else "the best that this CPU has"
        yield "ISA", f"{results.device()}, {torch.ops.sparsekern.isa_error() or choice}"
        yield "auto's profile", cost.current().source
    has_cuda = any(_library.has_kernel(f"{format}_{PRODUCTS[0]}", "cuda") for format in FORMATS)
    cutlass = has_cuda and torch.ops.sparsekern.cutlass()
    built = f"built, {'with' if cutlass else 'without'} CUTLASS (2:4 on Hopper)" if has_cuda else "not built"
    yield "CUDA kernels", built
    yield "Triton", _triton()
    yield "GPU", _gpu()
    native = importlib.util.find_spec("sparsekern._native") is not None
    yield "_native", "built" if native else "not built (wheels come without it): no FMA peak"


def _triton() -> str:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {format: triton_products.missing(format, kind) for format in FORMATS}
    there = [format for format, reason in reasons.items() if reason is None]
    if not there:
        return f"no: {next(reasons[format] for format in triton_products.FORMATS)}"
    interpreted = "" if kind == "cuda" else ", interpreted"
    return f"{importlib.metadata.version('triton')}{interpreted}, for {', '.join(there)}"


def _gpu() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "none" if torch.version.cuda else "none: this torch was built without CUDA"


def _runs(op: str, device: str) -> str:
    """The backend that runs ``op`` on ``device``, and why it is not the native one."""
    if _library.has_kernel(op, device):
        return "native"
    if device == "cuda" and triton_products.missing(op.partition("_")[0], device) is None:
        return "triton"
    if _library.LOAD_ERROR is not None:
        return "dense: no library"
    return f"dense: no {device} kernel in the library"
