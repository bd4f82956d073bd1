"""Whether Triton's kernels can run.

Triton is imported when it is first needed: a torch for CPUs comes without.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

OLDEST = (8, 0)
"""Compute capability that they are written for: bfloat16 and asynchronous copies."""


def unusable(kind: str) -> str | None:
    """Why they cannot run on tensors of a device type, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch for CUDA brings it along"
    try:
        from .triton_kernels.common import INTERPRETED

        if kind == "cuda" and torch.cuda.is_available():
            importlib.import_module("triton").runtime.driver.active.get_current_target()  # needs a C compiler
    except Exception as error:  # whatever an installation that does not fit this torch or machine raises
        return f"Triton cannot be used: {type(error).__name__}: {error}"
    if kind == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU that it can use"
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            got = ".".join(map(str, capability))
            return f"its kernels need compute capability {'.'.join(map(str, OLDEST))} or later, got {got}"
    elif kind == "cpu":
        if not INTERPRETED:
            return "on the CPU it is only interpreted, for tests, with TRITON_INTERPRET=1 from the start"
    elif kind != "meta":
        return f"there are kernels for CUDA, none for {kind}"
    return None
