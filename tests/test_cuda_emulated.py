"""The CUDA kernels on the emulator, through their torch bindings: the CPU's cases on CPU tensors.

The sources of :data:`STEMS` are compiled as C++ with ``SPARSEKERN_EMULATED``; the ops stand in
``torch.ops.sparsekern_emulated``.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, MEDIUM_SHAPES, SMALL_SHAPES, Case, cases, check_products, op, random_pattern
from sparsekern import CSR, Pattern, copies, dense
from sparsekern.formats import parse_format
from sparsekern.formats.csr import Transposed
from sparsekern.formats.mask import mask_on_gpu
from sparsekern.formats.metadata import Metadata
from sparsekern.formats.pattern import DevicePattern, Memo
from sparsekern.formats.products import ACTIVATIONS
from tolerance import Exact
from torch import Tensor

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
EMULATED = "sparsekern_emulated"
SANITIZERS = os.environ.get("SPARSEKERN_TEST_SANITIZERS", "")
"""For the compiler, e.g. ``address,undefined``, with their runtimes preloaded: see ``test_sanitizers.py``."""

STEMS = ("csr", "bsr", "nm", "vnm")
"""Formats that have CUDA kernels."""
SHARED = ("matrix", "groups", "groups_linear", "groups_backward", "mask")
"""Sources of kernels that formats share."""
MASK_OPS = ("mask_linear", "mask_linear_backward")
FORMATS = ("csr", "bsr4", "bsr16x8", "bsr16", "bsr32", "bsr128x64")
OPS = ("linear", "linear_backward", "linear_backward_input", "linear_backward_weight", "scatter", "gather")
GROUPS = (
    "2:4",
    "1:4",
    "1:2",
    "2:8",
    "4:8",
    "8:16",
    "5:11",
    "64:2:8",
    "128:2:16",
    "32:2:5",
    "16:2:16",
    "4:2:5",
)
"""N:M and V:N:M: those that sparse tensor cores run, with and without gaps, others, and V of all kinds."""
GROUP_SHAPES = ((7, 5), (33, 70), (72, 144))
"""The last one in whole runs of 16 bytes: W is copied as it is stored."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = (torch.bfloat16, torch.float16)


def gpu_operands(pattern: Pattern) -> tuple[list[Tensor], list[int]]:
    """A pattern as the ops of its format take it on a GPU."""
    if not isinstance(pattern, DevicePattern):
        return pattern.tensors(), pattern.sizes()
    there = copy.copy(pattern)
    there.derived = pattern._build(Transposed if isinstance(pattern, CSR) else Metadata)
    return there.tensors(), there.sizes()


@pytest.fixture(autouse=True)
def one_thread(keep_threads: None) -> None:
    """The reference is small: its threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> torch.library.Library:
    """The ops of ``sparsekern_emulated``, with the schemas of ``sparsekern``."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    includes = [f"-I{ROOT / name}" for name in ("csrc/include", "csrc/cuda", "csrc/torch", "tests/emulator")]
    torch_include = Path(torch.__file__).parent / "include"
    options = "-std=c++17 -O2 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas -Wno-psabi"
    options += " -DSPARSEKERN_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
    sanitize = f"-fsanitize={SANITIZERS} -fno-sanitize-recover=all -O1 -g1".split() if SANITIZERS else []
    flags = [*options.split(), *sanitize, f"-isystem{torch_include}"]
    sources = [
        ROOT / path for stem in STEMS for path in (f"csrc/cuda/{stem}.cu", f"csrc/torch/{stem}_cuda.cpp")
    ]
    sources += [ROOT / f"csrc/cuda/{name}.cu" for name in SHARED] + [ROOT / "csrc/torch/mask_cuda.cpp"]
    builds = [
        subprocess.Popen(
            [COMPILER, *flags, *includes, "-x", "c++", "-c", source, "-o", folder / f"{source.name}.o"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source in sources
    ]
    errors = "".join(build.communicate()[1] for build in builds)
    if "_Float16" in errors:
        pytest.skip("the compiler lacks _Float16")
    assert not any(build.returncode for build in builds), errors
    objects = [folder / f"{source.name}.o" for source in sources]
    linked = [f"-L{torch_include.parent / 'lib'}", "-ltorch_cpu", "-o", folder / "libemulated.so"]
    subprocess.run([COMPILER, "-shared", *sanitize, *objects, *linked], check=True)
    defined = torch.library.Library(EMULATED, "DEF")
    for name in (*(f"{stem}_{name}" for stem in STEMS for name in OPS), *MASK_OPS):
        schema = getattr(torch.ops.sparsekern, name).default._schema
        defined.define(str(schema).removeprefix("sparsekern::"))
    torch.ops.load_library(str(folder / "libemulated.so"))
    return defined


def check(case: Case) -> None:
    check_products(case, EMULATED, gpu_operands)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_small_shapes(format: str, dtype: torch.dtype, layout: str) -> None:
    for case in cases(SMALL_SHAPES, [format], [layout], [dtype], sample=3):
        check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_medium_shape(format: str, dtype: torch.dtype, layout: str) -> None:
    for case in cases(MEDIUM_SHAPES[:1], [format], [layout], [dtype], sample=1):
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_wide_shape(format: str, dtype: torch.dtype) -> None:
    """More columns than a panel of x in shared memory holds."""
    check(Case(format, (20, 1100), 70, 0.1, dtype, "batch-major"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", GROUPS)
def test_groups_of_columns(format: str, dtype: torch.dtype) -> None:
    for shape in GROUP_SHAPES:
        batch, layout = random.choice((1, 7, 16, 40, 130)), random.choice(list(LAYOUTS))
        check(Case(format, shape, batch, 1.0, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["2:4", "5:11", "96:2:8"])
def test_blocks_of_rows(format: str, dtype: torch.dtype) -> None:
    """A row tile is cut into blocks of 128 rows, and the last one is not whole."""
    check(Case(format, (130, 67), 33, 1.0, dtype, "batch-major"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["2:4", "64:2:8", "20:2:8"])
def test_nothing_is_ragged(format: str, layout: str) -> None:
    """The ordinary case: no operand is packed, and whole tiles are multiplied.

    Where V is no multiple of 8, a row tile's part of a batch-major gradient begins at no whole run.
    """
    check(Case(format, (128, 256), 64, 1.0, torch.bfloat16, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("format", ["128:2:16", "192:2:19", "64:2:32", "64:2:50"])
def test_wide_groups(format: str, dtype: torch.dtype, layout: str) -> None:
    """The gradient of x from the selected columns alone, 64, 32 or 16 of them at a time."""
    for shape in ((64, 40), random.choice(((70, 610), (300, 401), (256, 512)))):
        check(Case(format, shape, random.choice((1, 67, 130)), 1.0, dtype, layout))


# --- W and its transpose 2:4 ------------------------------------------------------------------------------


def transposable(shape: tuple[int, int]) -> Pattern:
    kind = parse_format("2:4")
    return kind.from_mask(kind.prune(torch.rand(shape), transposable=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposable_masks(dtype: torch.dtype, layout: str) -> None:
    """The gradient of x is a sparse product too; 1028 rows of W are a sum in parts."""
    for shape in ((4, 8), random.choice(((72, 100), (260, 68), (128, 192))), (1028, 12)):
        pattern, batch = transposable(shape), random.choice((1, 33, 65, 131))
        check_products(Case("2:4", shape, batch, 1.0, dtype, layout), EMULATED, gpu_operands, pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_when_the_transpose_is_used(dtype: torch.dtype) -> None:
    """With another one's metadata results are others exactly there: in 16 bits."""
    pattern, other = transposable((64, 32)), transposable((64, 32))
    values = torch.randn(pattern.values_shape).to(dtype)
    backward = op(pattern, "linear_backward_input", EMULATED)
    (*rest, right), sizes = gpu_operands(pattern)
    wrong, without = gpu_operands(other)[0][-1], right.new_empty(0)
    for batch in (1, 65):
        grad = torch.randn(batch, 64).to(dtype)
        expected = Exact(lambda g, v: g @ pattern.scatter(v), grad, values)
        same = backward(grad, values, [*rest, wrong], sizes)
        if dtype == torch.float32:
            expected.check(same)
        else:
            assert expected.worst(same) > 1
        expected.check(backward(grad, values, [*rest, right], sizes))
        expected.check(backward(grad, values, [*rest, without], sizes))
        at_an_odd_address = torch.cat([values.new_zeros(1), values.view(-1)])[1:].view(values.shape)
        expected.check(backward(grad, at_an_odd_address, [*rest, right], sizes))


def test_others_are_not_transposed() -> None:
    for format, shape in (("2:4", (64, 64)), ("2:4", (66, 64)), ("1:4", (64, 64)), ("2:8", (64, 64))):
        pattern = random_pattern(format, shape, 1.0)
        (*rest, words), sizes = gpu_operands(pattern)
        assert not len(words)
        backward = op(pattern, "linear_backward_input", EMULATED)
        grad, values = torch.randn(70, shape[0]).half(), torch.randn(pattern.values_shape).half()
        Exact(lambda g, v, p=pattern: g @ p.scatter(v), grad, values).check(
            backward(grad, values, [*rest, words], sizes)
        )
        there_can_be = (format, shape) == ("2:4", (64, 64))
        size = len(gpu_operands(transposable(shape))[0][-1]) if there_can_be else 0
        for bad in (words.new_zeros(64), words.new_zeros(32, 4), words.new_zeros(128).long()):
            message = rf"transposed metadata must be contiguous int32 \[{size}\]"
            with pytest.raises(RuntimeError, match=message):
                backward(grad, values, [*rest, bad], sizes)
        with pytest.raises(RuntimeError, match="pattern must be the 4 tensors"):
            backward(grad, values, rest, sizes)


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("format", [*FORMATS, "2:4", "5:11", "32:2:5"])
def test_activations(format: str, batch: int) -> None:
    pattern = random_pattern(format, (37, 50), 0.3)
    x, values = torch.randn(batch, 50), torch.randn(pattern.values_shape)
    y = Exact(lambda x, v: x @ pattern.scatter(v).t(), x, values)
    for code, (name, function) in enumerate(ACTIVATIONS.items()):
        got = op(pattern, "linear", EMULATED)(x, values, None, *gpu_operands(pattern), activation=code)
        y.check_activated(function, got, f"{format} {name}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("format", [*FORMATS, "2:4", "5:11", "32:2:5"])
def test_scatter_and_gather(format: str, dtype: torch.dtype) -> None:
    for shape, density in itertools.product([*SMALL_SHAPES, MEDIUM_SHAPES[0]], (0.0, 0.3, 1.0)):
        pattern = random_pattern(format, shape, density)
        dense = torch.randn(shape).to(dtype)
        values = op(pattern, "gather", EMULATED)(dense, *gpu_operands(pattern))
        assert torch.equal(values, pattern.gather(dense))
        again = op(pattern, "scatter", EMULATED)(values, *gpu_operands(pattern))
        assert torch.equal(again, pattern.scatter(values))


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_is_refused(format: str) -> None:
    pattern = random_pattern(format, (32, 32), 0.3)
    index, sizes = gpu_operands(pattern)
    x, values = torch.randn(2, 32), torch.randn(pattern.values_shape)
    linear = op(pattern, "linear", EMULATED)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got float64"):
        linear(x.double(), values.double(), None, index, sizes)
    with pytest.raises(RuntimeError, match=r"pattern must be the 5 tensors of [A-Z]+\.tensors\(\), got 1"):
        linear(x, values, None, index[:1], sizes)
    with pytest.raises(RuntimeError, match="col_idx must be contiguous int32"):
        linear(x, values, None, [index[0], index[1].long(), *index[2:]], sizes)


def test_views_at_odd_addresses() -> None:
    """CSR takes them entry by entry; BSR says what it must have."""
    pattern = random_pattern("csr", (40, 50), 0.5)
    index, sizes = gpu_operands(pattern)
    moved = [torch.cat([tensor.new_zeros(1), tensor])[1:] for tensor in index]
    x, values = torch.randn(3, 50), torch.randn(pattern.nnz + 1)[1:]
    y = Exact(lambda x, v: x @ pattern.scatter(v).t(), x, values)
    y.check(op(pattern, "linear", EMULATED)(x, values, None, moved, sizes))
    pattern = random_pattern("bsr16", (32, 32), 1.0)
    values = torch.randn(pattern.nnz + 1)[1:].view(pattern.values_shape)
    with pytest.raises(RuntimeError, match="values must be aligned to 16 bytes, got a view"):
        op(pattern, "linear", EMULATED)(torch.randn(3, 32), values, None, *gpu_operands(pattern))


# --- along a bit mask -------------------------------------------------------------------------------------

MASK_SHAPES = ((1, 1), (7, 5), (17, 63), (33, 257), (130, 300), (20, 1100), (16, 2048))


def framed(values: Tensor, ahead: int) -> Tensor:
    """The same values between NaNs, ``ahead`` numbers after an aligned address."""
    frame = values.new_full((values.numel() + 32,), torch.nan)
    inside = frame[ahead : ahead + values.numel()]
    inside.copy_(values.flatten())
    return inside


def check_mask(case: Case, ahead: int = 8) -> None:
    """Both ops on a mask, against dense products in float64."""
    out_features, in_features = case.shape
    pattern = random_pattern(case.format, case.shape, case.density)
    at = mask_on_gpu(pattern.shape, pattern.flat_index().view(-1))
    lay, ops = LAYOUTS[case.layout], torch.ops.sparsekern_emulated
    x = lay(torch.randn(case.batch, in_features).to(case.dtype))
    grad = lay(torch.randn(case.batch, out_features).to(case.dtype))
    values = torch.randn(pattern.values_shape).to(case.dtype)
    placed, bias = framed(values, ahead), torch.randn(out_features).to(case.dtype)

    y = Exact(lambda x, v, b: x @ pattern.scatter(v).t() + b, x, values, bias)
    y.check(ops.mask_linear(x, placed, bias, *at), f"linear {case}")
    y = Exact(lambda x, v: x @ pattern.scatter(v).t(), x, values)
    y.check(ops.mask_linear(x, placed, None, *at), f"linear without bias {case}")
    found = ops.mask_linear_backward(grad, x, placed, *at, False, True)
    assert found[0].numel() == 0
    grad_values = Exact(lambda g, x: pattern.gather(g.t() @ x), grad, x)
    grad_values.check(found[1].view(pattern.values_shape), f"gradient of the values {case}")
    Exact(lambda g: g.sum(0), grad).check(found[2], f"gradient of the bias {case}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_products_along_a_mask(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    for case in cases([shape], ["csr"], [layout], [dtype], sample=4):
        check_mask(case, random.randrange(16))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("format", ["2:4", "5:11", "64:2:8", "4:2:5"])
def test_masks_of_groups(format: str, dtype: torch.dtype) -> None:
    case = Case(format, (72, 300), random.choice((1, 9, 40)), 1.0, dtype, random.choice(list(LAYOUTS)))
    check_mask(case, random.randrange(16))


@pytest.mark.parametrize("batch", [1, 4, 5, 8, 9, 16, 17, 33, 64, 65, 130])
def test_rows_of_x_along_a_mask(batch: int) -> None:
    """On both sides of where blocks change their height, and more than pass through at a time."""
    check_mask(Case("csr", (150, 600), batch, 0.4, torch.bfloat16, "batch-major"))


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 20])
def test_rings_of_values(batch: int, density: float) -> None:
    """A warp has more columns than its rings hold, whose values begin anywhere."""
    for ahead in (0, 1, 7, 13):
        check_mask(Case("csr", (18, 5000), batch, density, torch.float16, "batch-major"), ahead)


def test_rows_that_are_full_beside_empty_ones() -> None:
    mask = torch.zeros(300, 1030, dtype=torch.bool)
    mask[[0, 5, 131, 299]] = True
    mask[:, 256:258] = True
    mask[128:256, 512:] = False  # tiles of the gradient without a value
    pattern = CSR.from_mask(mask)
    at = mask_on_gpu(pattern.shape, pattern.flat_index())
    x, values = torch.randn(11, 1030).bfloat16(), torch.randn(pattern.nnz).bfloat16()
    grad = torch.randn(11, 300).bfloat16()
    y = torch.ops.sparsekern_emulated.mask_linear(x, values, None, *at)
    Exact(lambda x, v: x @ pattern.scatter(v).t(), x, values).check(y)
    found = torch.ops.sparsekern_emulated.mask_linear_backward(grad, x, values, *at, False, True)
    Exact(lambda g, x: pattern.gather(g.t() @ x), grad, x).check(found[1])


@pytest.mark.parametrize("shape", [(600, 700), (20, 3000)], ids=str)
@pytest.mark.parametrize("batch", [3, 30])
def test_activations_along_a_mask(batch: int, shape: tuple[int, int]) -> None:
    """With and without the second kernel, which adds up parts of the sums."""
    pattern = random_pattern("csr", shape, 0.3)
    at = mask_on_gpu(pattern.shape, pattern.flat_index())
    x, values = torch.randn(batch, shape[1]).bfloat16(), torch.randn(pattern.values_shape).bfloat16()
    y = Exact(lambda x, v: x @ pattern.scatter(v).t(), x, values)
    for code, (name, function) in enumerate(ACTIVATIONS.items()):
        got = torch.ops.sparsekern_emulated.mask_linear(x, values, None, *at, activation=code)
        y.check_activated(function, got, str(name))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", ["csr", "2:4"])
def test_a_step_along_a_mask(format: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``"auto"`` runs it on a GPU: y and the gradients of values and bias."""
    there = random_pattern(format, (40, 200), 0.3)
    pattern = copy.copy(there)
    pattern.memo = Memo()
    pattern.derived = there._build(Transposed if format == "csr" else Metadata)  # type: ignore[attr-defined]
    for name in ("linear", "linear_backward"):
        monkeypatch.setattr(dense.mask, name, getattr(torch.ops.sparsekern_emulated, f"mask_{name}"))
    x, grad = torch.randn(9, 200).bfloat16(), torch.randn(9, 40).bfloat16()
    values = torch.randn(there.values_shape).bfloat16().requires_grad_()
    b = torch.randn(40).bfloat16().requires_grad_() if bias else None
    plan = dense.Plan(dense.By.MASK, dense.By.NATIVE, dense.By.MASK)
    y = dense.planned_linear(x, values, b, pattern, plan)
    zero = torch.zeros(40).bfloat16() if b is None else b
    Exact(lambda x, v, b: x @ there.scatter(v).t() + b, x, values, zero).check(y.detach())
    found = torch.autograd.grad(y, [values] if b is None else [values, b], grad)
    Exact(lambda g, x: there.gather(g.t() @ x), grad, x).check(found[0])
    if bias:
        Exact(lambda g: g.sum(0), grad).check(found[1])
    with torch.no_grad():
        fused = dense.planned_linear(x, values, b, pattern, plan, "relu")
    assert torch.equal(fused, y.relu())
    bits, starts = copies.mask_operands(pattern)
    assert copies.kept_bytes(pattern) == bits.nbytes + starts.nbytes


def test_what_masks_do_not_take() -> None:
    pattern = random_pattern("csr", (32, 300), 0.3)
    bits, starts = mask_on_gpu(pattern.shape, pattern.flat_index())
    x, values = torch.randn(2, 300).half(), torch.randn(pattern.nnz).half()
    ops = torch.ops.sparsekern_emulated
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16 on a GPU, got float32"):
        ops.mask_linear(x.float(), values.float(), None, bits, starts)
    with pytest.raises(RuntimeError, match=r"bits must be contiguous uint8 \[32, 48\]"):
        ops.mask_linear(x, values, None, bits[:, :38].contiguous(), starts)
    with pytest.raises(RuntimeError, match=r"row_ptr must be contiguous int32 \[97\]"):
        ops.mask_linear(x, values, None, bits, starts[:33])
    with pytest.raises(RuntimeError, match="need_x must be false on a GPU"):
        ops.mask_linear_backward(torch.randn(2, 32).half(), x, values, bits, starts, True, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["2:4", "5:11", "32:2:5"])
def test_blocks_divide_the_columns(format: str, layout: str) -> None:
    """Where there are few blocks: parts of the sums, of which a second kernel makes y."""
    for shape, batch, dtype in (((33, 1200), 5, torch.bfloat16), ((70, 1030), 9, torch.float32)):
        check(Case(format, shape, batch, 1.0, dtype, layout))
