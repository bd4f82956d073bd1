"""What ``tune`` measured of Triton's kernels on a GPU, and the file that it writes.

These are the fastest tiles, and how much faster they are than the native kernels. Without a file, tiles are
chosen by arithmetic, and ``backend="auto"`` prefers native kernels. Nothing is measured when a layer first
runs.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch

if TYPE_CHECKING:
    from .triton_kernels.common import Config

VERSION = 1
"""Of the file's layout, and of what its names mean."""

BATCHES = (16, 64, 256, 4096)
"""That ``tune`` measures; each stands for those below it, the last for larger ones too."""

SPEEDUPS: dict[str, float] = {}
"""How many times as fast as the native kernels, where both were measured: by :func:`speedup_key`."""


def speedup_key(family: str, dtype: torch.dtype, batch: int, training: bool) -> str:
    """Names a measured ratio, e.g. ``"bsr32/bfloat16/256/training"``: of y alone, or with both gradients."""
    end = next((end for end in BATCHES if batch <= end), BATCHES[-1])
    return f"{family}/{str(dtype).removeprefix('torch.')}/{end}/{'training' if training else 'inference'}"


def profile_path(device: int = 0) -> Path:
    """Where ``python -m sparsekern tune`` keeps what it measured on a GPU: a file for each model of GPU.

    ``SPARSEKERN_TRITON_PROFILE`` names another one.
    """
    if path := os.environ.get("SPARSEKERN_TRITON_PROFILE"):
        return Path(path)
    model = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return Path(platformdirs.user_data_dir("sparsekern", appauthor=False)) / f"triton-{model}.json"


def load(path: Path) -> None:
    """Let what is in a file, if there is one, be used. A file that cannot be used is warned of."""
    if not path.exists():
        return
    try:
        tiles, speedups = read(path)
    except (OSError, ValueError) as error:
        again = "`python -m sparsekern tune` makes a new one"
        warnings.warn(f"{error}; tiles are chosen by arithmetic. {again}", RuntimeWarning, stacklevel=2)
        return
    use(tiles, speedups)


def use(tiles: Mapping[str, Config], speedups: Mapping[str, float]) -> None:
    """From now on, beside what is used already."""
    from .triton_kernels import common

    common.TUNED.update(tiles)
    common.forget()
    SPEEDUPS.update(speedups)


def read(path: Path) -> tuple[dict[str, Config], dict[str, float]]:
    """Tiles and speed-ups in a file. Raises ``ValueError`` that names it if it is not one of this version."""
    from .triton_kernels.common import Config

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {data['version']!r}")
        tiles, speedups = data["tiles"], data["speedups"]
        for name, numbers in tiles.items():
            good = isinstance(numbers, list) and len(numbers) == len(Config._fields)
            good = good and all(type(n) is int and 1 <= n <= 1024 for n in numbers)
            # All but the number of stages must be powers of 2.
            if not good or any(n & (n - 1) for n in numbers[:-1]):
                raise ValueError(f"{name!r} must be {', '.join(Config._fields)}, got {numbers!r}")
        for name, ratio in speedups.items():
            if not isinstance(ratio, int | float) or not 0 < ratio < 1e3:
                raise ValueError(f"{name!r} must be how many times as fast, got {ratio!r}")
        return {name: Config(*numbers) for name, numbers in tiles.items()}, speedups
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} must be a profile of Triton's kernels: {what}") from None


def write(path: Path, tiles: Mapping[str, Config], speedups: Mapping[str, float], source: str) -> None:
    """Save; a reader sees the old file or the new one, never half of it."""
    data = {
        "version": VERSION,
        "source": source,
        "tiles": {name: list(tiles[name]) for name in sorted(tiles)},
        "speedups": dict(sorted(speedups.items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
