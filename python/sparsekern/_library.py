"""The compiled library: where it is, whether it loaded, and the schemas that its kernels register under."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_DEFINITIONS = torch.library.Library("sparsekern", "DEF")

LIBRARY = Path(__file__).with_name("libsparsekern.so")


def define(schema: str) -> None:
    """Define the op ``sparsekern::<schema>``."""
    _DEFINITIONS.define(schema)


def _load() -> str | None:
    """Load the library. Returns None, or why there is none."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: reinstall with a C++17 compiler at hand (`pip install .`)"
    try:
        torch.ops.load_library(str(LIBRARY))
        if error := torch.ops.sparsekern.isa_error():
            warnings.warn(f"{error}; using {torch.ops.sparsekern.isa()}", RuntimeWarning, stacklevel=2)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


LOAD_ERROR: str | None = _load()
"""Why the native kernels are not there, or None."""


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the library holds a kernel of ``sparsekern::<op>`` for ``device_type``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{op}", key)
