"""As ``test_triton_compiled.py``, of CSR, N:M and V:N:M."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs Triton, not interpreted: pip install triton", allow_module_level=True)

import triton_compile_rows
from triton_compile_rows import Job


def chosen() -> list[Job]:
    """Some, of each dtype, format and architecture one or more: all take an hour."""
    found: dict[object, list[Job]] = {}
    for job in triton_compile_rows.jobs():
        kind = "16 bits" if "float16" in job.dtype else job.dtype
        found.setdefault((len(job.spec.split(":")), kind, job.arch), []).append(job)
    return [random.choice(similar) for similar in found.values()]


def test_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = [
        f"{job}: {', '.join(found)}" for job, found in triton_compile_rows.compile_all(chosen()) if found
    ]
    assert not wrong, "\n".join(wrong)
