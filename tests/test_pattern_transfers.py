"""Pruning and building patterns where the tensors are: what would make a GPU wait for the host is counted.

CPU tensors stand in. Counted is what reads a number of a tensor into Python, or makes a tensor of a size that
its numbers decide: on a GPU each of these waits until it has caught up. Copies between devices are refused.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import free
from sparsekern.formats import groups, parse_format
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"),
        *("_unique2", "unique_consecutive", "unique_dim"),
    )
}
"""Beside these: ``tolist``, an index by a mask, and ``repeat_interleave`` that is not told the size."""

LOOPS = {("4:8", "transposable"), ("64:2:16", "prune")}
"""Searches that go on while the numbers say so: they wait in each round, but not once per chunk of scores."""

MOST = 12


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        masks = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or masks or unsized:
            self.found[name] += 1
        assert name != "aten::_to_copy" or kwargs.get("device") is None, "a copy to another device"
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The count of a block; with a GPU's chunks, and without what only CPUs have."""
    mode = Waits()
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:  # on CPU tensors it calls no op
        mode.found["tolist"] += 1
        return tolist(tensor)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("to the host")

    monkeypatch.setattr(Tensor, "tolist", counted)
    for name in ("numpy", "cpu", "__array__"):
        monkeypatch.setattr(Tensor, name, refused)
    monkeypatch.setattr("sparsekern.formats.csr.has_kernel", lambda *_: False)
    large = groups.chunk(torch.device("cuda"))
    for module in ("groups", "transposable", "vnm", "vnm_columns"):
        monkeypatch.setattr(f"sparsekern.formats.{module}.chunk", lambda device: large)
    return mode


def count(waits: Waits, what: str, format: str, shape: tuple[int, int]) -> int:
    kind, scores = parse_format(format), torch.rand(shape)
    mask = kind.prune(scores, free(format, 0.8))
    pattern = kind.from_mask(mask)
    calls = {
        "prune": lambda: kind.prune(scores, free(format, 0.8)),
        "transposable": lambda: kind.prune(scores, transposable=True),
        "from_mask": lambda: kind.from_mask(mask),
        "from_state": lambda: kind.from_state(shape, dict(pattern.state())),
        "flat_index": pattern.flat_index,
        "to_mask": pattern.to_mask,
        "gather": lambda: pattern.gather(scores),
    }
    waits.found.clear()
    with waits:
        calls[what]()
    return sum(waits.found.values())


FORMATS = ("csr", "bsr32", "bsr16x8", "2:4", "4:8", "64:2:8", "64:2:16")


@pytest.mark.parametrize("what", ["prune", "from_mask", "from_state", "flat_index", "to_mask", "gather"])
@pytest.mark.parametrize("format", FORMATS)
def test_few_waits_whatever_the_size(waits: Waits, format: str, what: str) -> None:
    small, large = (count(waits, what, format, shape) for shape in ((100, 123), (700, 987)))
    if (format, what) in LOOPS:
        assert large <= 60, waits.found
    else:
        assert small == large <= MOST, waits.found
        assert what not in ("flat_index", "to_mask", "gather") or large == 0


@pytest.mark.parametrize(("format", "most"), [("2:4", 2), ("4:8", 60)])
def test_transposable_masks(waits: Waits, format: str, most: int) -> None:
    assert count(waits, "transposable", format, (512, 1024)) <= most, waits.found


@pytest.mark.parametrize("format", ["2:4", "1:4", "64:2:8"])
def test_what_sparse_tensor_cores_are_told(waits: Waits, format: str) -> None:
    """One number of 2:4: whether the transpose is 2:4 too."""
    for transposable in (False, True) if format == "2:4" else (False,):
        kind = parse_format(format)
        pattern = kind.from_mask(kind.prune(torch.rand(512, 1024), transposable=transposable))
        assert isinstance(pattern, groups.GroupPattern)
        waits.found.clear()
        with waits:
            pattern.metadata()
        assert sum(waits.found.values()) == (format == "2:4"), waits.found


def test_what_is_counted(waits: Waits) -> None:
    x = torch.arange(4.0)
    with waits:
        _ = (
            int(x[0]),
            x.tolist(),
            x[x > 1],
            x.nonzero(),
            torch.repeat_interleave(x, torch.tensor([1, 0, 2, 1])),
        )
    assert sum(waits.found.values()) == 5, waits.found
    for transfer in (lambda: x.cpu(), lambda: x.numpy(), lambda: x.to("meta")):
        with pytest.raises(AssertionError, match=r"to the host|to another device"), waits:
            transfer()
