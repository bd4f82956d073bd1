"""The peers on an NVIDIA GPU: what torch brings for each format. cuBLAS is ``dense``, a torch.nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from sparsekern.benchmark import Case, Contender
from sparsekern.benchmark.contenders import TorchSparse
from sparsekern.formats import parse_format
from torch import Tensor, nn


class CuSparse(TorchSparse):
    """``torch.sparse`` CSR: cuSPARSE. Its gradient of W is one of float32 only."""

    def refuses(self, case: Case) -> str | None:
        if case.format != "csr":
            return "measured for CSR only"
        if case.product in ("backward_weight", "forward_backward") and case.dtype != torch.float32:
            return "its sampled_addmm takes float32 and float64"
        return None


class TritonBsr(Contender):
    """torch's own BSR product, in Triton. It has no backward products."""

    backend = "triton bsr"

    def refuses(self, case: Case) -> str | None:
        if not case.format.startswith("bsr"):
            return "blocks only"
        height, width = parse_format(case.format).options["block"]
        if min(height, width) < 16 or case.out_features % height or case.in_features % width:
            return "sides of 16 and more that divide W"
        return None if case.product == "forward" else "forward only"

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        return _TritonBsrLinear(linear, parse_format(case.format).options["block"])


class _TritonBsrLinear(nn.Module):
    """Values are the parameter."""

    crow: Tensor
    col: Tensor

    def __init__(self, linear: nn.Linear, block: tuple[int, int]) -> None:
        super().__init__()
        weight = linear.weight.detach().to_sparse_bsr(block)
        self.values = nn.Parameter(weight.values())
        self.register_buffer("crow", weight.crow_indices().int())
        self.register_buffer("col", weight.col_indices().int())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.shape = (linear.out_features, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        from torch.sparse._triton_ops import bsr_dense_addmm

        weight = torch.sparse_bsr_tensor(
            self.crow, self.col, self.values.detach(), self.shape, check_invariants=False
        )
        bias = self.bias.detach()[:, None].expand(-1, x.shape[0])
        y: Tensor = bsr_dense_addmm(bias, weight, x.t())
        return y.t()


class CuSparseLt(Contender):
    """cuSPARSELt's 2:4 product, with the algorithm that its own search finds for the shape."""

    backend = "cusparselt"

    def refuses(self, case: Case) -> str | None:
        if case.format != "2:4":
            return "2:4 only"
        if case.dtype not in (torch.bfloat16, torch.float16):
            return "measured in 16 bits"
        return None if case.product != "backward_weight" else "that product is dense"

    def variant(self, case: Case) -> object:
        return case.product, case.batch

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        return _CuSparseLtLinear(linear, mask, case)


class _CuSparseLtLinear(nn.Module):
    """W and Wᵀ compressed once; in a training step anew, as W has changed. The gradient of W is dense."""

    def __init__(self, linear: nn.Linear, mask: Tensor, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.mask = mask
        self.step = case.product == "forward_backward"
        self.packed = torch._cslt_compress(self.weight.detach())
        self.weight_bytes = int(self.packed.nbytes)
        self.algorithm = self.search(self.packed, case.batch, case.in_features)
        if case.product != "forward":
            self.packed_t = self.compress_t()
            self.algorithm_t = self.search(self.packed_t, case.batch, case.out_features)

    def search(self, packed: Tensor, batch: int, features: int) -> int:
        like = self.weight.new_zeros((batch, features))
        return int(torch._cslt_sparse_mm_search(packed, like.t(), transpose_result=True))

    def compress_t(self) -> Tensor:
        return torch._cslt_compress(self.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _CuSparseLtFunction.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class _CuSparseLtFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: _CuSparseLtLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        packed = torch._cslt_compress(weight) if layer.step else layer.packed
        return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=layer.algorithm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        layer, (need_x, need_weight, need_bias, _) = ctx.layer, ctx.needs_input_grad
        grad_x = grad_weight = None
        if need_x:
            packed = layer.compress_t() if layer.step else layer.packed_t
            grad_x = torch._cslt_sparse_mm(packed, grad.t(), transpose_result=True, alg_id=layer.algorithm_t)
        if need_weight:
            grad_weight = (grad.t() @ x) * layer.mask
        return grad_x, grad_weight, grad.sum(0) if need_bias else None, None


PEERS: tuple[Contender, ...] = (CuSparse(), TritonBsr(), CuSparseLt())
