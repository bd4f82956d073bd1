"""A progress bar for long measurements."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(todo: Sequence[T], unit: str = "case") -> Iterable[T]:
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
    with tqdm(todo, unit=unit, leave=False) as bar:
        for case in bar:
            bar.set_description(str(case))
            yield case
