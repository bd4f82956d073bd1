"""The code that nvcc made of the CUDA kernels: no spills, the expected instructions, the noted registers.

It is read from the built library, so nothing is compiled here.
"""

from __future__ import annotations

import cuda_report
import pytest
import torch
from cuda_report import ARCHS, HOPPER, HOPPER_INSTRUCTIONS, INSTRUCTIONS, base
from sparsekern._library import has_kernel


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if not has_kernel("csr_linear", "cuda"):
        pytest.skip("the library was built without CUDA kernels")
    for name in ("cuobjdump", "nvdisasm"):
        if cuda_report.tool(name) is None:
            pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, dict[str, int]]]:
    found = cuda_report.resources()
    if any(set(ARCHS) - set(used) for name, used in found.items() if base(name) not in HOPPER_INSTRUCTIONS):
        pytest.skip(f"the library was built without one of {ARCHS}")
    return found


def test_nothing_is_spilled_or_in_local_memory(resources: dict[str, dict[str, dict[str, int]]]) -> None:
    spilled = {
        f"{name} for {arch}": counts
        for name, used in resources.items()
        for arch, counts in used.items()
        if counts["STACK"] or counts["LOCAL"]
    }
    assert not spilled


@pytest.mark.parametrize("arch", [*ARCHS, HOPPER])
def test_the_expected_instructions(resources: dict[str, dict[str, dict[str, int]]], arch: str) -> None:
    if arch == HOPPER and not torch.ops.sparsekern.cutlass():
        pytest.skip("the library was built without CUTLASS: make cutlass build. CI refuses a library without")
    code = cuda_report.instructions(arch)
    for name, expected in (HOPPER_INSTRUCTIONS if arch == HOPPER else INSTRUCTIONS).items():
        kernels = [kernel for kernel in code if name in (kernel, base(kernel))]
        assert kernels, f"no kernel {name}"
        for kernel in kernels:
            missing = [
                prefix for prefix in expected if not any(name.startswith(prefix) for name in code[kernel])
            ]
            assert not missing, f"{kernel} for {arch} lacks {missing}"
            # Where ptxas lets each `wgmma` wait for the last, which it only remarks (C7510), all begin anew.
            multiplies = sum(n for name, n in code[kernel].items() if name.startswith("HGMMA"))
            assert arch != HOPPER or code[kernel]["WARPGROUP.ARRIVE"] < multiplies


def test_the_committed_table(resources: dict[str, dict[str, dict[str, int]]]) -> None:
    committed = cuda_report.TABLE.read_text()
    if f"nvcc {cuda_report.compiler()}," not in committed:
        pytest.skip("the table was made with another nvcc")
    if not torch.ops.sparsekern.cutlass():
        committed = "".join(row for row in committed.splitlines(True) if not row.startswith("| `nm_hopper"))
    assert cuda_report.table() == committed, "run python tests/cuda_report.py and look at what changed"
