"""``python bench/gpu.py``: check and time everything on an NVIDIA GPU, in under 8 minutes.

Every case runs in a child process and every contender in its own try: what raises, crashes or hangs is a line
at the end, and the rest goes on. Rows go to ``bench/results/gpu.csv`` as they are measured, pictures beside.
``--device cpu`` rehearses all of it with small shapes and a clock; its figures mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import torch
from gpu_cases import GOALS, REHEARSAL, SECTIONS, Section
from gpu_peers import PEERS
from sparsekern.benchmark import Case, Contender, Facts, Row, goals, plot, report, results
from sparsekern.benchmark.contenders import Dense, Sparsekern
from sparsekern.benchmark.gpu import Settings, measure
from sparsekern.benchmark.gpu_limits import H200, Gpu, limit
from sparsekern.benchmark.progress import progress
from sparsekern.doctor.cases import TRITON, plan
from sparsekern.doctor.check import check, no_device, unavailable
from sparsekern.isolation import Failure, Worker

RESULTS = Path(__file__).resolve().parent / "results"
REHEARSED = "rehearsal, no GPU"
"""The device of rows that a CPU gave."""

_WARNING = "REHEARSAL on the CPU, by the clock, on small shapes: no figure here is a GPU's, and none is kept."
_CHECKED = 0.15  # of the time, at most, for the check of all kernels on odd shapes


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        wrong: what failed of sparsekern: this is what the exit status is about.
        lines: what failed of peers, was left out, or needs a remark.
    """

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class Budget:
    """Time, shared out to sections in turn: what one leaves goes to those after it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def part(self, share: float) -> Budget:
        """Of what is left."""
        return Budget(max(0.0, self.left()) * share, self.clock)

    def left(self) -> float:
        """Seconds."""
        return self.end - self.clock()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.expect:
        print(expectations())
        return 0
    rehearsal = arguments.device == "cpu"
    if (reason := no_device(arguments.device)) and not rehearsal:
        print(f"bench/gpu.py: {reason}; --device cpu rehearses the run without one", file=sys.stderr)
        return 1
    output = arguments.output or (None if rehearsal else RESULTS / "gpu.csv")
    facts = Facts.now()
    facts = replace(facts, device=REHEARSED if rehearsal else torch.cuda.get_device_name(arguments.device))
    if output is not None and (reason := refused(output, facts.device)):
        print(f"bench/gpu.py: {reason}", file=sys.stderr)
        return 1
    print(
        _WARNING
        if rehearsal
        else f"{facts.device}, {facts.machine}, torch {facts.torch}, sparsekern {facts.commit}"
    )
    settings = Settings(arguments.device, facts, arguments.rounds, 1e-3 * arguments.min_time)
    sections = [
        s for s in (REHEARSAL if rehearsal else SECTIONS) if s.name in (arguments.section or [s.name])
    ]
    budget = Budget(60.0 * arguments.minutes)
    found = Outcome()
    with Worker(arguments.timeout) as worker:
        try:
            check_all(arguments.device, worker, budget.part(_CHECKED), found)
            for i, section in enumerate(sections):
                share = section.share / sum(later.share for later in sections[i:])
                run_section(section, worker, settings, budget.part(share), output, found)
        except KeyboardInterrupt:
            found.lines.append("interrupted")
    print_all(found, rehearsal)
    if arguments.plot or not rehearsal:
        draw(found.rows, arguments.plot or RESULTS / "gpu")
    if rehearsal:
        print(f"\n{_WARNING}")
    return int(bool(found.wrong))


def check_all(device: str, worker: Worker, budget: Budget, found: Outcome) -> None:
    """The doctor's quick check, as far as time allows."""
    seed = random.SystemRandom().randrange(2**31)
    formats = ["csr", "2:4"] if device == "cpu" else None
    cases = [
        case
        for case in plan(device, formats, quick=True, seed=seed)
        if case.product not in TRITON  # to compile them takes longer than there is: the doctor does
        and unavailable(device, case.format, case.product, case.dtype) is None
    ]
    random.Random(seed).shuffle(cases)  # so that a check that ends early has seen some of everything
    wrong = done = 0
    for case in progress(cases, "check"):
        if budget.left() <= 0:
            found.lines.append(f"check: out of time, {len(cases) - done} of {len(cases)} calls not run")
            break
        result = worker(check, case)
        done += 1
        if isinstance(result, Failure) or not result <= 1.0:
            wrong += 1
            found.wrong.append(f"check: {case}: {result.reason if isinstance(result, Failure) else result}")
    print(f"check: {done - wrong} of {done} calls are right (--seed {seed} of `python -m sparsekern doctor`)")


def run_section(
    section: Section,
    worker: Worker,
    settings: Settings,
    budget: Budget,
    output: Path | None,
    found: Outcome,
) -> None:
    """Measure the section's cases until its time is up."""
    before = len(found.rows)
    for i, case in enumerate(progress(section.cases)):
        if budget.left() <= 0:
            rest = len(section.cases) - i
            found.lines.append(f"{section.name}: out of time, {rest} of {len(section.cases)} cases not run")
            break
        names = ("native", "triton", *(("auto",) if section.auto else ()))
        ours = [Sparsekern("batch", backend) for backend in names]
        rows = run_case(case, [*ours, Dense(), *PEERS], worker, settings, found)
        found.rows += rows
        if output is not None:
            results.append(output, rows)
    print(f"{section.name} ({section.about}): {len(found.rows) - before} rows")


def run_case(
    case: Case, contenders: list[Contender], worker: Worker, settings: Settings, found: Outcome
) -> list[Row]:
    """The rows of a case. One that ends the process is left out when the others run again."""
    while contenders:
        measured = worker(measure, case, contenders, settings)
        if not isinstance(measured, Failure):
            for name, reason in measured.failures:
                _blame(name, f"{case}: {name}: {reason}", found)
            found.lines += [f"{case}: {name}: {remark}" for name, remark in measured.notes]
            return measured.rows
        _blame(measured.at, f"{case}: {measured.at or 'start'}: {measured.reason}", found)
        left = [c for c in contenders if f"{c.backend} {c.layout}" != measured.at]
        if len(left) == len(contenders):
            break  # nobody's fault that is known
        contenders = left
    return []


def _blame(name: str, line: str, found: Outcome) -> None:
    peers = [f"{peer.backend} {peer.layout}" for peer in (Dense(), *PEERS)]
    (found.lines if name in peers else found.wrong).append(line)


def print_all(found: Outcome, rehearsal: bool) -> None:
    """Tables of times, goals and expectations, then what went wrong."""
    rows = found.rows
    texts = [report.cases(rows), report.means(rows), report.auto(rows)]
    if not rehearsal:
        texts += [goals.goals(rows, GOALS), against_expectations(rows)]
    for text in (*texts, report.noise(rows)):
        if text:
            print(f"\n{text}")
    for title, lines in (("failed or left out:", found.lines), ("WRONG:", found.wrong)):
        if lines:
            print("\n" + "\n  ".join([title, *dict.fromkeys(lines)]))


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Pictures of training batches and of up to 8 rows of x: 16 are neither."""
    try:
        plot.require()
        for path in plot.plot([row for row in rows if not 8 < row.batch < 32], folder):
            print(f"picture: {path}")
    except (RuntimeError, ValueError) as error:
        print(f"no pictures: {error}")


def refused(path: Path, device: str) -> str | None:
    """Why rows of ``device`` do not belong in the file at ``path``: a rehearsal's never join a GPU's."""
    if not path.exists():
        return None
    others = {row.device for row in results.read(path)} - {device}
    if (device == REHEARSED and others) or REHEARSED in others:
        return f"{path} must hold no rows of {', '.join(sorted(others))} beside those of {device}"
    return None


def expectations(gpu: Gpu = H200) -> str:
    """What FLOP and bytes let expect of every bfloat16 case, with the dense product beside."""
    lines = []
    for section in SECTIONS[:3]:
        for case in section.cases:
            ours, dense = limit(case, gpu), limit(case, gpu, dense=True)
            size = f"{case.out_features}x{case.in_features}x{case.batch}"
            numbers = [f"{1e-9 * ours.flop:.3g}", f"{1e-6 * ours.bytes:.3g}", ours.bound]
            times = [f"{1e6 * ours.seconds:.3g}", f"{1e6 * dense.seconds:.3g}"]
            ratio = report.times(dense.seconds / ours.seconds)
            name = f"{case.format} {report.percent(case.sparsity)}"
            lines.append([section.name, name, case.product, size, *numbers, *times, ratio])
    header = ["section", "format", "product", "size", "GFLOP", "MB", "bound by", "us", "dense us", "at most"]
    note = f"Expected of an {gpu.name} from FLOP and bytes (gpu_limits.py), bfloat16. Not measured."
    return f"{note}\n\n{report.table(header, lines, left=4)}"


def against_expectations(rows: Sequence[Row]) -> str:
    """Our times over those that the run's own peaks let expect."""
    lines = []
    for row in rows:
        if row.backend != "native" or row.dtype == "float32":
            continue
        dtype = getattr(torch, row.dtype)
        size = (row.out_features, row.in_features, row.batch)
        case = Case(*size, row.sparsity, row.product, dtype, True, row.format)
        expected = limit(case, replace(H200, flops=1e9 * row.peak_gflops, hbm=1e9 * row.read_gbs))
        share = 1e3 * expected.seconds / row.median_ms
        name = f"{row.format} {report.percent(row.sparsity)}"
        place = "x".join(map(str, size))
        lines.append(
            [name, row.product, place, report.milliseconds(row), expected.bound, report.percent(share)]
        )
    header = ["native, 16 bits", "product", "size", "ms", "bound by", "of expectation"]
    return report.table(header, lines, left=3) if lines else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu rehearses (default: cuda)")
    parser.add_argument("--minutes", type=float, default=6.5, help="for all that is measured (default: 6.5)")
    parser.add_argument("--section", nargs="+", choices=[s.name for s in SECTIONS], help="only these")
    parser.add_argument("--rounds", type=int, default=7, help="readings per contender (default: 7)")
    parser.add_argument("--min-time", type=float, default=5.0, help="of a reading, in ms (default: 5)")
    parser.add_argument(
        "--timeout", type=float, default=40.0, help="s that a contender may take (default: 40)"
    )
    parser.add_argument("--output", type=Path, help="append rows to this file (default: results/gpu.csv)")
    parser.add_argument("--plot", type=Path, help="a folder for pictures (default: results/gpu)")
    parser.add_argument(
        "--expect", action="store_true", help="print expectations from FLOP and bytes, and end"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
