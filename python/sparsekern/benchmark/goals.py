"""The project's goals on a CPU, and what a run reached of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .report import mean, peers_of, percent, table, times, versus, versus_dense
from .results import Row

Measure = Callable[[Row, dict[str, Row]], "float | None"]
"""A figure of a row of ours, given the peers' rows of the same case by backend."""


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of our rows that ``select`` takes: on their geometric mean or the worst of them.

    It is held per format, layout of x and warm or cold weights; ``worst`` is over all formats.
    """

    text: str
    bound: float
    measure: Measure
    select: Callable[[Row], bool]
    at_most: bool = False
    worst: bool = False


def _versus(backend: str) -> Measure:
    return lambda row, peers: versus(row, peers.get(backend))


def _peak(row: Row, peers: dict[str, Row]) -> float | None:
    return row.peak_fraction


def _slowdown(row: Row, peers: dict[str, Row]) -> float | None:
    ratio = versus(row, peers.get("dense"))
    return None if ratio is None else 1 / ratio


def _layers(formats: str | tuple[str, ...], product: str, *sparsities: float) -> Callable[[Row], bool]:
    """Float32 rows of layer-sized batches; of all sparsities where none is named."""
    names = (formats,) if isinstance(formats, str) else formats
    return lambda row: (
        row.backend != "auto"
        and row.format in names
        and (row.dtype, row.product) == ("float32", product)
        and row.batch > 8
        and (not sparsities or row.sparsity in sparsities)
    )


def _decode(spec: str, sparsity: float, dtype: str, *batches: int) -> Callable[[Row], bool]:
    return lambda row: (
        row.backend != "auto"
        and (row.format, row.sparsity, row.dtype) == (spec, sparsity, dtype)
        and row.product == "forward"
        and row.out_features == row.in_features == 4096
        and row.batch in batches
    )


def _tiny(product: str) -> Callable[[Row], bool]:
    size = (64, 64, 1)
    return lambda row: row.product == product and (row.out_features, row.in_features, row.batch) == size


_BLOCKS = ("bsr16", "bsr32", "bsr64")
_dense = _versus("dense")

GOALS = (
    Goal(
        "forward vs torch.sparse, 80-95 %",
        3.0,
        _versus("torch.sparse"),
        _layers("csr", "forward", 0.8, 0.9, 0.95),
    ),
    Goal("forward, share of the FMA peak, 80-90 %", 0.6, _peak, _layers("csr", "forward", 0.8, 0.9)),
    *(
        Goal(
            f"forward+backward vs dense, {100 * s:g} %", bound, _dense, _layers("csr", "forward_backward", s)
        )
        for s, bound in ((0.8, 3.0), (0.9, 6.0), (0.95, 9.0), (0.98, 14.0))
    ),
    Goal(
        "forward+backward vs SparseProp, 80-98 %",
        2.0,
        _versus("sparseprop"),
        _layers("csr", "forward_backward", 0.8, 0.9, 0.95, 0.98),
    ),
    *(
        Goal(f"{text} vs dense, 60 %: break-even", 1.0, _dense, _layers("csr", product, 0.6))
        for text, product in (("forward", "forward"), ("forward+backward", "forward_backward"))
    ),
    *(
        Goal(f"{product}, share of the FMA peak", 0.75, _peak, _layers(_BLOCKS, product))
        for product in ("forward", "backward_input", "backward_weight")
    ),
    Goal("forward+backward vs dense, 90 %", 7.0, _dense, _layers(_BLOCKS, "forward_backward", 0.9)),
    *(
        Goal("forward vs dense", bound, _dense, _layers(spec, "forward"))
        for spec, bound in (("2:4", 1.2), ("2:8", 2.0), ("64:2:8", 2.5), ("64:2:16", 4.5))
    ),
    *(
        Goal("forward+backward vs dense", bound, _dense, _layers(spec, "forward_backward"))
        for spec, bound in (("2:8", 1.6), ("64:2:8", 2.0), ("64:2:16", 3.5))
    ),
    Goal("batch 1-8, 4096x4096, 90 %, vs dense", 5.0, _dense, _decode("csr", 0.9, "float32", 1, 2, 4, 8)),
    *(
        Goal(
            f"batch 1, 4096x4096, {100 * s:g} %, bfloat16, vs the faster dense",
            bound,
            versus_dense,
            _decode(spec, s, "bfloat16", 1),
        )
        for spec, s, bound in (("2:4", 0.5, 1.5), ("64:2:8", 0.75, 3.0), ("csr", 0.9, 4.0))
    ),
    Goal("auto vs dense, worst case", 0.95, _dense, lambda row: row.backend == "auto", worst=True),
    *(
        Goal(
            f"{product}, 64x64, batch 1: time over nn.Linear's", 3.0, _slowdown, _tiny(product), at_most=True
        )
        for product in ("forward", "forward_autograd")
    ),
)
"""The suites' shapes, on which the bounds were set; :mod:`.cases` has them."""


def goals(rows: Sequence[Row], of: Sequence[Goal] = GOALS) -> str:
    """What was reached of the goals; "" where the rows touch none."""
    peers = peers_of(rows)
    lines = []
    for goal in of:
        found: dict[tuple[str, str, str], list[float | None]] = {}
        for row in rows:
            if row.ours and goal.select(row):
                key = (row.format, row.layout, row.weights)
                found.setdefault(key, []).append(goal.measure(row, peers[row.case]))
        for key, measured in found.items():
            known = [figure for figure in measured if figure is not None]
            reached = min(known, default=None) if goal.worst else mean(known)
            if reached is None:
                continue
            met = reached <= goal.bound if goal.at_most else reached >= goal.bound
            show = percent if goal.measure is _peak else times
            bound = f"{'<=' if goal.at_most else '>='} {show(goal.bound)}"
            lines.append([goal.text, *key, show(reached), bound, "met" if met else "not met"])
    header = ["goal (geometric mean)", "format", "x major", "weights", "reached", "goal", ""]
    return table(header, lines, left=4) if lines else ""
