"""What a GPU's time is bound by, from the FLOP and bytes of a product: an expectation, not a measurement.

``t = max(FLOP / rate, bytes / HBM, bytes / L2, loads / L1)``, each of what a well-made kernel cannot avoid:

* FLOP on tensor cores: dense for BSR's blocks; for 2:4, and for V:N:M on its 4 of M columns, half of the
  dense ones at a pipe that yields 1.77 times the dense rate, not 2 (as measured by others on H100).
* HBM: the weight with its positions, x (or the gradient) and y, once each. Few rows of x read a CSR weight as
  bits that say where values are, 1 per weight.
* L2: x is read again for each block of rows of W that shares its columns: 256 rows of 2:4 (two tiles of a
  cluster), V of V:N:M, the block's height of BSR. That, not the tensor cores, bounds small blocks and V.
  The rate of dense products is a measured one and holds it already; a panel of x for CSR stays on the SM.
* L1: CSR on CUDA cores loads one number of x per multiply-add, 128 bytes per clock and SM.

The transposed product of 2:4 is the same, its mask being 2:4 both ways; that of V:N:M expands the 2 of 4: no
gain. Gradients of W are dense products that are computed where W has values: per block, on 4 of M columns, or
whole for 2:4; for CSR whole, or a dot product per nonzero with two loads per multiply-add, what is less. A
layer is the sum of its three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..formats import BSR, CSR, NM, VNM, parse_format
from .cases import Case


@dataclass(frozen=True)
class Gpu:
    """Rates per second. ``l2`` is what H100s are measured at; ``l1`` is 128 bytes · clock · SMs."""

    name: str
    flops: float
    hbm: float
    l2: float
    l1: float
    sparse_gain: float = 1.77


H200 = Gpu("H200", flops=790e12, hbm=4.3e12, l2=5.5e12, l1=128 * 1.755e9 * 132)
"""132 SMs; dense bfloat16 and HBM as torch's products and copies reach them."""

TILE = 256
"""Rows of W that share what they read of x, of 2:4."""

FEW = 64
"""Rows of x up to which a CSR product is bound by the weight's bytes, not by loads of x."""


@dataclass(frozen=True)
class Limit:
    """The seconds of a product, what bounds it, and its FLOP and bytes of HBM."""

    seconds: float
    bound: str
    flop: float
    bytes: float


_LAYER = ("forward", "backward_input", "backward_weight")


def limit(case: Case, gpu: Gpu = H200, *, dense: bool = False) -> Limit:
    """The expected time of ``case``, or of the ``dense`` product, in 16 bits."""
    if case.product == "forward_backward":
        parts = [limit(replace(case, product=product), gpu, dense=dense) for product in _LAYER]
        slowest = max(parts, key=lambda part: part.seconds)
        return Limit(
            sum(part.seconds for part in parts),
            slowest.bound,
            sum(part.flop for part in parts),
            sum(part.bytes for part in parts),
        )
    size, element = case.out_features * case.in_features, case.dtype.itemsize
    kind = parse_format(case.format)
    density = 1.0 if dense else 1.0 - case.sparsity
    for_weight = case.product == "backward_weight"
    index = loads = 0.0  # bytes of positions, bytes of x that pass L1
    share = density  # of the dense FLOP that run on tensor cores, at ``gain`` times their rate
    rows, gain = 0, 1.0  # of W that share what they read of x
    if dense:
        pass
    elif kind.kind is CSR:
        share = 0.0
        if case.batch <= FEW:
            index = size / 8
        else:
            index = 4.0 * density * size
            loads = (1 + for_weight) * density * size * case.batch * element
    elif kind.kind is BSR:
        rows = kind.options["block"][0]
    else:
        index = density * size / 4  # 2 bits each
        rows, share = TILE, 1.0
        if kind.kind is VNM:
            rows, share = min(kind.options["v"], TILE), 4 / kind.options["m"]
        if case.product == "forward" or (kind.kind is NM and not for_weight):
            gain = gpu.sparse_gain
    moved = density * size * element + index + case.batch * (case.in_features + case.out_features) * element
    whole = 2.0 * size * case.batch / gpu.flops
    reread = -(-case.out_features // rows) * share * case.in_features * case.batch * element if rows else 0.0
    times = {
        "tensor cores": whole * share / gain,
        "HBM": moved / gpu.hbm,
        "L2": reread / gpu.l2,
        "L1": loads / gpu.l1,
    }
    if for_weight and times["L1"] > whole:
        times.update({"tensor cores": whole, "L1": 0.0})
    bound = max(times, key=times.__getitem__)
    return Limit(times[bound], bound, 2.0 * density * size * case.batch, moved)
