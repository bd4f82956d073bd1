"""What ``bench/gpu.py`` measures, most wanted first, and the goals that its figures are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from sparsekern.benchmark import Case, Row
from sparsekern.benchmark.goals import Goal
from sparsekern.benchmark.report import versus

BF16 = torch.bfloat16
ALL = ("forward", "backward_input", "backward_weight", "forward_backward")


@dataclass(frozen=True)
class Section:
    """Cases that share a part of the time.

    Attributes:
        share: of the time that is left when the section begins, beside the shares of those after it.
        auto: whether ``backend="auto"`` takes part too, which alone runs along masks.
    """

    name: str
    about: str
    share: float
    cases: tuple[Case, ...]
    auto: bool = False


def _cases(
    formats: Sequence[tuple[str, float]],
    shapes: Sequence[tuple[int, int, int]],
    products: Sequence[str] = ALL,
    dtype: torch.dtype = BF16,
) -> Iterator[Case]:
    """Those of one weight after each other: it is built once."""
    for spec, sparsity in formats:
        for out_features, in_features, batch in shapes:
            for product in products:
                yield Case(out_features, in_features, batch, sparsity, product, dtype, True, spec)


_LAYER, _CUBE = (4096, 4096, 4096), (8192, 8192, 8192)
_VNM = (("128:2:16", 0.875), ("128:2:8", 0.75), ("64:2:16", 0.875), ("64:2:8", 0.75))
_DECODED = (("csr", 0.8), ("csr", 0.9), ("2:4", 0.5), ("128:2:16", 0.875), ("64:2:8", 0.75), ("bsr32", 0.9))

SECTIONS = (
    Section(
        "goals",
        "the training products that kernels are held to",
        5.0,
        (
            *_cases([("bsr128", 0.9), ("bsr64", 0.9)], [_LAYER], ALL),
            *_cases([("2:4", 0.5)], [_CUBE], ["forward", "forward_backward"]),
            *_cases(_VNM, [_LAYER], ["forward"]),
            *_cases([("csr", 0.98), ("csr", 0.99)], [_LAYER], ALL),
        ),
    ),
    Section(
        "decode",
        "1 to 64 rows of x: bound by the bytes of the weight",
        4.0,
        (
            *_cases(_DECODED, [(4096, 4096, batch) for batch in (1, 4, 16)], ["forward"]),
            *_cases([("csr", s) for s in (0.5, 0.7)], [(4096, 4096, 1), (4096, 4096, 16)], ["forward"]),
            *_cases([("csr", 0.8), ("2:4", 0.5)], [(4096, 4096, 64), (1024, 4096, 4)], ["forward"]),
            *_cases([("csr", 0.5), ("csr", 0.8)], [(4096, 4096, 64)], ["forward_backward"]),
        ),
        auto=True,
    ),
    Section(
        "layers",
        "other sparsities and backward products",
        3.0,
        (
            *_cases([("bsr128", s) for s in (0.5, 0.8, 0.95)], [_LAYER], ["forward", "forward_backward"]),
            *_cases([("bsr64", s) for s in (0.5, 0.8, 0.95)], [_LAYER], ["forward", "forward_backward"]),
            *_cases([("bsr32", s) for s in (0.8, 0.9, 0.95)], [_LAYER], ["forward", "forward_backward"]),
            *_cases([("csr", s) for s in (0.8, 0.9, 0.95)], [_LAYER], ["forward", "forward_backward"]),
            *_cases([("2:4", 0.5)], [_LAYER, (11008, 4096, 4096)], ALL),
            *_cases(_VNM, [_LAYER], ["forward_backward"]),
        ),
    ),
    Section(
        "auto",
        'backend="auto" against cuBLAS',
        2.0,
        tuple(
            case
            for batch in (1, 16, 256, 4096)
            for case in _cases(
                [("csr", 0.5), ("csr", 0.95), ("bsr32", 0.5), ("bsr64", 0.9), ("2:4", 0.5), ("64:2:8", 0.75)],
                [(4096, 4096, batch), (1024, 4096, batch)],
                ["forward", "forward_backward"] if batch >= 256 else ["forward"],
            )
        ),
        auto=True,
    ),
    Section(
        "dtypes",
        "float16 and float32",
        1.0,
        tuple(
            case
            for dtype in (torch.float16, torch.float32)
            for case in _cases(
                [("csr", 0.98), ("bsr64", 0.9), ("2:4", 0.5), ("64:2:8", 0.75)],
                [_LAYER, (4096, 4096, 1)],
                ["forward"],
                dtype,
            )
        ),
    ),
)

_SMALL = [(96, 128, 40), (64, 64, 4)]
REHEARSAL = (
    Section("goals", "small stand-ins", 3.0, tuple(_cases([("bsr16", 0.5), ("2:4", 0.5)], _SMALL[:1]))),
    Section("decode", "a stand-in", 1.0, tuple(_cases([("csr", 0.9)], _SMALL[1:], ["forward"]))),
    Section(
        "auto",
        "a stand-in",
        1.0,
        tuple(_cases([("64:2:8", 0.75)], _SMALL[:1], ["forward"], torch.float32)),
        auto=True,
    ),
)
"""What runs where no GPU is, in seconds: every step, on shapes whose times mean nothing."""


def _versus(row: Row, peers: dict[str, Row]) -> float | None:
    return versus(row, peers.get("dense"))


def _is(
    spec: str, sparsity: float, product: str, *, few: bool = False, backend: str = "native"
) -> Callable[[Row], bool]:
    case = (spec, sparsity, product, "bfloat16")
    return lambda row: (
        row.backend == backend
        and (row.format, row.sparsity, row.product, row.dtype) == case
        and (row.batch <= 16) == few
    )


GOALS = (
    *(
        Goal(f"{product}, 90 %, vs cuBLAS", bound, _versus, _is(spec, 0.9, product))
        for spec, bound in (("bsr128", 7.0), ("bsr64", 3.0))
        for product in ("forward", "backward_input", "backward_weight")
    ),
    Goal("forward vs cuBLAS", 1.35, _versus, _is("2:4", 0.5, "forward")),
    Goal("forward+backward vs cuBLAS", 1.2, _versus, _is("2:4", 0.5, "forward_backward")),
    Goal("forward vs cuBLAS", 2.5, _versus, _is("128:2:16", 0.875, "forward")),
    Goal("forward vs cuBLAS", 1.4, _versus, _is("128:2:8", 0.75, "forward")),
    *(
        Goal(f"{product}, {100 * s:g} %, vs cuBLAS", bound, _versus, _is("csr", s, product))
        for s, bound in ((0.98, 1.2), (0.99, 2.0))
        for product in ("forward", "forward_backward")
    ),
    *(
        Goal(
            f"1-16 rows, {100 * s:g} %, vs cuBLAS",
            bound,
            _versus,
            _is(spec, s, "forward", few=True, backend=backend),
        )
        for spec, s, bound, backend in (
            ("csr", 0.8, 2.8, "auto"),
            ("csr", 0.9, 4.5, "auto"),
            ("128:2:16", 0.875, 5.0, "native"),
        )
    ),
    Goal("auto vs cuBLAS, worst case", 0.97, _versus, lambda row: row.backend == "auto", worst=True),
)
"""On the shapes of :data:`SECTIONS`, in bfloat16."""
