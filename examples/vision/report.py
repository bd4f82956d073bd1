"""What a session says when it is done: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle
from pathlib import Path
from statistics import median

from vision.run import Run

# Okabe and Ito's colours, told apart by everyone: grey for the baseline, then one per method.
COLOURS = ("#5f6368", "#d55e00", "#0072b2", "#009e73", "#cc79a7")


def label(run: Run) -> str:
    """``dense``, or the method with its sparsity: ``rigl 90 %``."""
    return run.name if run.method is None else f"{run.name} {100 * run.recipe.sparsity:g} %"


def table(runs: Sequence[Run]) -> str:
    """One row per run: accuracy, time and memory, and what they are next to the first run's."""
    header = ["run", "test accuracy", "s / epoch", "speed-up"]
    header += ["weights", "gradients", "optimizer", "indices", "total", "share"]
    seconds = [median(epoch.seconds for epoch in run.history) for run in runs]
    memories = [run.memory() for run in runs]
    rows = [header]
    for run, time, memory in zip(runs, seconds, memories, strict=True):
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.indices, memory.total)
        rows.append(
            [
                label(run),
                f"{100 * run.history[-1].accuracy:.2f} %",
                f"{time:.2f}",
                f"{seconds[0] / time:.2f}x",
                *(f"{part / 1e6:.1f}" for part in parts),
                f"{100 * memory.total / memories[0].total:.1f} %",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.append("Seconds: median epoch. Memory: MB. Speed-up and share: against the first run.")
    return "\n".join(lines)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draws test accuracy over seconds of training, one line per run, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    longest = max(sum(epoch.seconds for epoch in run.history) for run in runs)
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        seconds = list(accumulate(epoch.seconds for epoch in run.history))
        accuracy = [100 * epoch.accuracy for epoch in run.history]
        axes.plot(seconds, accuracy, "o-", color=colour, linewidth=2, markersize=5, markeredgecolor="white")
        axes.annotate(
            f"{label(run)}: {accuracy[-1]:.2f} %",
            (seconds[-1], accuracy[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="left" if seconds[-1] < longest / 2 else "right",  # into the picture
            color=colour,
            fontweight="bold",
        )
    first = runs[0]
    shape = "-".join(map(str, [first.data.train.images.shape[1], *first.recipe.hidden, first.data.classes]))
    axes.set_title(
        f"{first.data.name}, MLP {shape}: test accuracy over training time", loc="left", fontsize=12
    )
    axes.set_xlabel("seconds of training (a dot is an epoch)")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(color="#e0e0e0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
