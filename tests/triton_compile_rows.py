"""As ``triton_compile.py``, of CSR, N:M and V:N:M, whose rows list their values.

``python tests/triton_compile_rows.py`` compiles every kernel for every tile, dtype, layout and architecture,
which takes an hour, and prints what is wrong. ``test_triton_compiled_rows.py`` does some of it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from sparsekern.formats import parse_format
from sparsekern.triton_kernels import csr, csr_weight, groups_launch
from triton_compile import DTYPES, GPUS, PRODUCTS, Recorder, compile_for

SPECS = ("csr", "2:4", "1:2", "8:16", "5:11", "64:2:8", "128:2:16", "64:2:100")
SPARSITIES = {"many": 0.5, "few": 0.999}
"""Of CSR: its gradient of the values is of tiles or of single ones."""
BATCHES = {"1": 1, "few": 16, "many": 512}
"""Of CSR: its products differ."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile; ``config`` counts among those of its product and format."""

    spec: str
    product: str
    dtype: str
    feature_major: bool
    config: int
    arch: int
    case: str = ""


def number(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


def configs(spec: str, product: str, dtype: str, arch: int) -> list[Any]:
    """The tiles that may be chosen, of rows of x or W enough for all of them."""
    if spec == "csr":
        return list(csr_weight.tiles(number(dtype), GPUS[arch]))
    options = parse_format(spec).options
    height = 512 if "input" in product else options.get("v", 512)
    split = options["n"] & (options["n"] - 1) == 0 or "weight" in product
    return list(groups_launch.configs(number(dtype), height, GPUS[arch], split))


def jobs() -> Iterator[Job]:
    for arch, spec, dtype, product, turned in itertools.product(GPUS, SPECS, DTYPES, PRODUCTS, (False, True)):
        if spec != "csr":
            for i in range(len(configs(spec, product, dtype, arch))):
                yield Job(spec, product, dtype, turned, i, arch)
        elif "weight" not in product:  # the sums of lanes: no TF32 there
            if dtype != "tf32":
                yield from (Job(spec, product, dtype, turned, 0, arch, batch) for batch in BATCHES)
        else:
            if dtype != "tf32":
                yield Job(spec, product, dtype, turned, 0, arch, "few")
            for i in range(len(configs(spec, product, dtype, arch))):
                yield Job(spec, product, dtype, turned, i, arch, "many")


def config_of(job: Job) -> Any:
    return configs(job.spec, job.product, job.dtype, job.arch)[job.config]


def launch(job: Job) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that the job's product would launch with its tile, and with what."""
    kind, weight = parse_format(job.spec), "weight" in job.product
    free = kind.fixed_sparsity is None
    pattern = kind.random((512, 512), SPARSITIES[job.case if weight else "many"] if free else None, None)
    batch = 512 if weight or not free else BATCHES[job.case]
    x = torch.empty(batch, 512, dtype=number(job.dtype))
    x = x.t().contiguous().t() if job.feature_major else x
    values, bias, at = x.new_empty(pattern.values_shape), x.new_empty(512), pattern.gpu_operands
    config = config_of(job)
    recorder, kept = Recorder(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if job.dtype == "tf32" else "highest")
    with contextlib.ExitStack() as stack:
        for module, name in ((csr_weight, "tile"), (groups_launch, "choice")):
            stack.enter_context(mock.patch.object(module, name, return_value=config))
        for module in (csr, csr_weight, groups_launch):
            stack.enter_context(mock.patch.object(module, "wrap_triton", recorder))
        kernels = importlib.import_module(f"sparsekern.triton_kernels.{pattern.format}")
        arguments = {"linear": (x, values, bias), "linear_backward_input": (x, values)}
        getattr(kernels, job.product)(*arguments.get(job.product, (x, x)), *at)
    torch.set_float32_matmul_precision(kept)
    (found,) = recorder.launches
    return found


def wrong(job: Job) -> list[str]:
    """What is not as it must be."""
    made, stack = compile_for(job.arch, *launch(job))
    ptx, shared, found = made.asm["ptx"], made.metadata.shared, []
    if shared > GPUS[job.arch].shared:
        found.append(f"{shared} bytes of shared memory")
    if stack:
        found.append(f"{stack} bytes spilled")
    if job.spec == "csr" and ("weight" not in job.product or job.case == "few"):
        return found
    config = config_of(job)
    high = config.rows if config.columns < 64 or "weight" in job.product else config.columns
    multiply = "wgmma.mma_async" if job.arch == 90 and high >= 64 else "mma.sync"
    if job.dtype != "float32" and multiply not in ptx:
        found.append("no tensor cores of this architecture")
    # Columns of groups of 11 are no runs of memory.
    if "cp.async" not in ptx and job.spec != "5:11":
        found.append("x is not read ahead")
    return found


def compile_all(todo: list[Job]) -> Iterator[tuple[Job, list[str]]]:
    """Each with what is wrong, in two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from zip(todo, pool.map(wrong, todo, chunksize=4), strict=True)


if __name__ == "__main__":
    every = list(jobs())
    bad = [(job, found) for job, found in compile_all(every) if found]
    print(*(f"{job}: {', '.join(found)}" for job, found in bad), sep="\n")
    sys.exit(f"{len(bad)} of {len(every)} kernels are not as they must be" if bad else 0)
