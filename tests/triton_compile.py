"""What Triton's compiler makes of its kernels for GPUs that are not there: recorded launches are compiled.

``python tests/triton_compile.py [SPEC ...]`` compiles the kernels of every tile, dtype, layout and GPU, which
takes some 10 minutes, and prints what is wrong. ``test_triton_compiled.py`` does some of it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from sparsekern.formats import parse_format
from sparsekern.triton_kernels import bsr, bsr_tiles, bsr_weight, common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

GPUS = {80: common.Gpu(108, 163 << 10, False), 90: common.Gpu(132, 227 << 10, True)}
"""By architecture: an A100 and an H200."""
PRODUCTS = ("linear", "linear_backward_input", "linear_backward_weight")
DTYPES = {"bfloat16": "ieee", "float16": "ieee", "float32": "ieee", "tf32": "tf32"}
SPECS = ("bsr4", "bsr16", "bsr32", "bsr128", "bsr128x16")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    spec: str
    product: str
    dtype: str
    feature_major: bool
    config: common.Config
    arch: int


@dataclass(frozen=True)
class Code:
    """What came of it.

    Attributes:
        shared: bytes of shared memory.
        stack: bytes of each thread in local memory, which it spills to.
        wgmma, mma: whether it multiplies with these.
        ahead: whether tiles are copied to shared memory while others are multiplied.
    """

    shared: int
    stack: int
    wgmma: bool
    mma: bool
    ahead: bool

    def wrong(self, job: Job) -> list[str]:
        """What is not as it must be."""
        found = []
        if self.shared > GPUS[job.arch].shared:
            found.append(f"{self.shared} bytes of shared memory")
        if self.stack:
            found.append(f"{self.stack} bytes spilled")
        rows = max(job.config.rows, job.config.columns)
        if job.dtype != "float32" and not (self.wgmma if job.arch == 90 and rows >= 64 else self.mma):
            found.append("no tensor cores of this architecture")
        if not self.ahead:
            found.append("tiles are not read ahead")
        return found


def jobs(specs: tuple[str, ...] = SPECS) -> Iterator[Job]:
    """All of them. Tiles of rows that a format never has are left out."""
    for arch, spec, dtype in itertools.product(GPUS, specs, DTYPES):
        height, width = parse_format(spec).options["block"]
        number = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        for product, feature_major in itertools.product(PRODUCTS, (False, True)):
            high = width if product == "linear_backward_input" else height
            for config in bsr_tiles.configs(number, DTYPES[dtype], high, GPUS[arch]):
                yield Job(spec, product, dtype, feature_major, config, arch)


class Recorder:
    """In place of ``wrap_triton``: what would be launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, kernel: Any) -> Any:
        recorder = self

        class Launcher:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **options: recorder.launches.append((kernel, args, options))

        return Launcher()


def launch(job: Job) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that the job's product would launch with its tile, and with what."""
    dtype = torch.float32 if job.dtype == "tf32" else getattr(torch, job.dtype)
    pattern = parse_format(job.spec).random((512, 512), 0.5, None)
    x = torch.empty(512, 512, dtype=dtype)
    x = x.t() if job.feature_major else x
    values, bias, at = x.new_empty(pattern.values_shape), x.new_empty(512), pattern.gpu_operands
    recorder, kept = Recorder(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if job.dtype == "tf32" else "highest")
    with contextlib.ExitStack() as stack:
        for module, name in ((bsr, "product_config"), (bsr_weight, "weight_config")):
            stack.enter_context(mock.patch.object(module, name, return_value=job.config))
            stack.enter_context(mock.patch.object(module, "gpu_of", return_value=GPUS[job.arch]))
            stack.enter_context(mock.patch.object(module, "wrap_triton", recorder))
        arguments = {"linear": (x, values, bias), "linear_backward_input": (x, values)}
        getattr(bsr, job.product)(*arguments.get(job.product, (x, x)), *at)
    torch.set_float32_matmul_precision(kept)
    (found,) = recorder.launches
    return found


def compiled(job: Job) -> Code:
    """As Triton would compile it when it is launched with aligned tensors."""
    made, stack = compile_for(job.arch, *launch(job))
    ptx, wgmma = made.asm["ptx"], "wgmma.mma_async" in made.asm["ptx"]
    # `wgmma` reads from shared memory, so one more tile stays there.
    c, size = job.config, 4 if "32" in job.dtype else 2
    tiles = (c.rows + c.columns) * c.step * size * (c.stages - (not wgmma))
    return Code(made.metadata.shared, stack, wgmma, "mma.sync" in ptx, made.metadata.shared >= tiles)


def compile_for(arch: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, int]:
    """What Triton makes of a launch for an architecture, and how many bytes a thread spills."""
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = (int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", used))
    return made, stack + local


def compile_all(todo: list[Job]) -> Iterator[tuple[Job, list[str]]]:
    """Each with what is wrong, in two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from zip(todo, pool.map(_check, todo, chunksize=4), strict=True)


def _check(job: Job) -> list[str]:
    return compiled(job).wrong(job)


if __name__ == "__main__":
    every = list(jobs(tuple(sys.argv[1:]) or SPECS))
    bad = [(job, wrong) for job, wrong in compile_all(every) if wrong]
    print(*(f"{job}: {', '.join(wrong)}" for job, wrong in bad), sep="\n")
    sys.exit(f"{len(bad)} of {len(every)} kernels are not as they must be" if bad else 0)
