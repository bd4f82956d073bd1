"""The code that Triton makes of its kernels for GPUs: shared memory, spills, tensor cores, reading ahead."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs Triton, not interpreted: pip install triton", allow_module_level=True)

import torch
import triton_compile
from cases import op
from sparsekern.formats import parse_format, triton_products
from sparsekern.triton_kernels import bsr, bsr_weight, csr_weight, groups_launch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton_compile import Job


def chosen() -> list[Job]:
    """Each tile once, with any product, dtype, block, layout and architecture: all take some 10 minutes."""
    found: dict[object, list[Job]] = {}
    for job in triton_compile.jobs():
        kind = "16 bits" if "float16" in job.dtype else job.dtype
        found.setdefault((job.config, kind), []).append(job)
    return [random.choice(similar) for similar in found.values()]


def test_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    todo = chosen()
    wrong = [f"{job}: {', '.join(found)}" for job, found in triton_compile.compile_all(todo) if found]
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> str:
    """The ops as on a GPU, under a name of their own: on the CPU none are registered."""
    monkeypatch.setattr(triton_products, "LIBRARY", "sparsekern_triton_traced")
    for module in (bsr, bsr_weight, csr_weight, groups_launch):
        monkeypatch.setattr(module, "gpu_of", lambda device: triton_compile.GPUS[90])
    for format in triton_products.FORMATS:
        if not hasattr(torch.ops.sparsekern_triton_traced, f"{format}_linear"):
            triton_products._register(format, interpreted=False)
    return "sparsekern_triton_traced"


@pytest.mark.parametrize("spec", ["bsr32", "csr", "2:4", "5:11", "64:2:8"])
def test_torch_compile_sees_the_kernels(spec: str, ops: str) -> None:
    """As it traces, for any batch of about this size. What Inductor makes of it needs a GPU."""
    kind = parse_format(spec)
    pattern = kind.random((128, 64), 0.5 if kind.fixed_sparsity is None else None, None)
    linear = op(pattern, "linear", ops)

    def step(x: torch.Tensor, values: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        at = [*index], pattern.sizes()
        y = linear(x, values, None, *at, activation=1)
        return op(pattern, "linear_backward", ops)(y, x, values, *at, True, True, False)

    tensors = [torch.empty(48, 64), torch.empty(pattern.values_shape), *pattern.gpu_tensors()]
    any_batch = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(tensors[0], symbolic_context=any_batch)
        rest = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors[1:]]
        graph = make_fx(dispatch_functionalize(step))(x, *rest)
    assert graph.code.count("higher_order.triton_kernel_wrapper_functional(") == 3, graph.code
    assert f"{pattern.format}_linear" not in graph.code
    assert not isinstance(x.shape[0], int)
    assert not x.shape[0].node.expr.is_number, "one graph must serve more than one batch"
