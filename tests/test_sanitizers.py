"""Kernels under the compiler's sanitizers: the CPU's on every ISA that it has, CUDA's on the emulator."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
X86 = platform.machine() in ("x86_64", "AMD64")
DOT_FLAGS = {
    "generic_bf16": ["-DSK_BASE=generic", "-DSK_PLAIN_DOTS"],
    **({"avx512_bf16": ["-DSK_BASE=avx512", "-march=x86-64-v4", "-mavx512bf16"]} if X86 else {}),
}
ISA_FLAGS = {"generic": [], **({"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]} if X86 else {})}


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_random_products(sanitizers: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread", f"-fsanitize={sanitizers}"]
    flags += ["-fno-sanitize-recover=all", f"-I{ROOT}/csrc/include"]
    sources = [("", ROOT / f"csrc/cpu/{name}.cpp") for name in ("isa", "csr_pattern", "dense")]
    sources += [
        (isa, ROOT / f"csrc/cpu/{name}.cpp")
        for isa in ISA_FLAGS
        for name in ("csr", "bsr", "nm", "vnm", "mask", "peak")
    ]
    sources += [(isa, ROOT / "csrc/cpu/dots.cpp") for isa in DOT_FLAGS]
    sources += [(isa, ROOT / "csrc/cpu/peak.cpp") for isa in DOT_FLAGS if isa != "generic_bf16"]
    programs = [ROOT / f"tests/cpp/{name}_random.cpp" for name in ("csr", "bsr", "nm")]

    def compile_one(job: tuple[str, Path]) -> Path:
        isa, source = job
        target = tmp_path / f"{source.stem}{isa}.o"
        options = [f"-DSK_ISA={isa}", *(ISA_FLAGS | DOT_FLAGS)[isa]] if isa else ["-DSK_PLAIN_DOTS"]
        subprocess.run([COMPILER, *flags, *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, *(("", program) for program in programs)]))
    kernels, mains = objects[: len(sources)], objects[len(sources) :]
    seed = random.randrange(2**31)
    for main in mains:
        program = main.with_suffix("")
        linked = subprocess.run(
            [COMPILER, *flags, *kernels, main, "-o", program], capture_output=True, text=True, check=False
        )
        if linked.returncode and "cannot find" in linked.stderr:
            pytest.skip(f"the compiler lacks the runtime of -fsanitize={sanitizers}")
        assert linked.returncode == 0, linked.stderr
        run = subprocess.run(
            [program, str(seed), "40"], capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, f"{program.name}, seed {seed}\n{run.stdout}{run.stderr}"


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_cuda_kernels_stay_in_bounds() -> None:
    """The emulator checks shared memory; global memory is torch's, between red zones of the sanitizer here.

    Of one dtype: compiled and run so, everything takes 20 minutes.
    """
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler lacks the runtimes of -fsanitize=address,undefined")
    dtype = random.choice(("float32", "bfloat16", "float16"))
    shapes = f"{dtype} and (groups_of_columns or wide_shape or (small_shapes and batch-major))"
    masks = "full_beside_empty or masks_of_groups"
    tests = ["test_cuda_emulated.py", "-k", f"({shapes}) or views_at_odd_addresses or {masks}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests],
        cwd=ROOT / "tests",
        env={
            **os.environ,
            "SPARSEKERN_TEST_SANITIZERS": "address,undefined",
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )
    if "lacks _Float16" in run.stdout:
        pytest.skip("the compiler lacks _Float16")
    if run.returncode != 0:
        pytest.fail(f"{dtype}\n{run.stdout[-4000:]}{run.stderr[:8000]}")
