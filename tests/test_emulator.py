"""The emulator that CUDA kernels run on where no GPU is: it must find mistakes that a GPU does not report."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
INCLUDES = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda", "tests/emulator")]

HERE = r"at .*checks\.cpp:\d+"
EXPECTED = {
    "reversed": "ok",
    "summed": "ok",
    "ordered_by_the_warp": "ok",
    "copied": "ok",
    "one_warp_exchanges": "ok",
    "copied_in_part": "ok",
    "multiplied": "ok",
    "multiplied_sparse": "ok",
    "missing_barrier_before_a_read": rf"store {HERE}: .* written after thread \d+ or others read it, with no",
    "missing_barrier_before_a_write": rf"load {HERE}: .* read after thread \d+ wrote it, with no barrier",
    "lanes_race": rf"load {HERE}: .* read after thread 0 wrote it, with no barrier",
    "two_writers": rf"store {HERE}: .* written after thread 0 wrote it, with no barrier",
    "unwritten": rf"load {HERE}: shared byte 12 is read, but was never written",
    "out_of_bounds": rf"store {HERE}: shared bytes 256 to 260 of 256",
    "misaligned": rf"store {HERE}: shared byte 4 must be a multiple of 8",
    "some_threads_at_the_barrier": rf"divergent: thread 0 waits in barrier {HERE}, thread 40 in its end",
    "threads_at_two_barriers": rf"divergent: thread 0 waits in barrier {HERE}, thread 32 in barrier {HERE}",
    "some_lanes_exchange": rf"divergent: thread 0 waits in shuffle {HERE}, thread 3 in its end",
    "lanes_in_two_exchanges": rf"divergent: thread 0 waits in shuffle {HERE}, thread 3 in votes {HERE}",
    "copy_not_waited_for": rf"load {HERE}: .* asynchronous copy that was not waited for",
    "copy_not_waited_for_at_the_end": "thread 0 ends with asynchronous copies that it did not wait for",
    "copy_seen_without_a_barrier": rf"load {HERE}: shared byte 32 is read, but was never written",
    "copy_from_an_odd_address": rf"copy_async {HERE}: the source must be aligned to 16 bytes",
    "metadata_does_not_ascend": rf"multiply_sparse {HERE}: the positions of metadata 44445444 must ascend",
    "half_a_warp": "a warp exchange needs whole warps, got a block of 16 threads",
    "too_many_threads": "a block must have 1 to 1024 threads, got 2048",
    "too_much_shared_memory": "a block has at most 232448 bytes of shared memory, got 262144",
    "reversed again": "ok",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the emulator says of each kernel of checks.cpp."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("emulator") / "checks"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = ROOT / "tests/emulator/checks.cpp"
    built = subprocess.run(
        [COMPILER, *flags, *INCLUDES, source, "-o", program], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr or "_Float16" in built.stderr:
        pytest.skip("the compiler lacks sanitizers or _Float16")
    assert built.returncode == 0, built.stderr
    # Threads that are stopped by an error leave their strings behind.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([program], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


def test_every_kernel_is_expected(found: dict[str, str]) -> None:
    assert list(found) == list(EXPECTED)


@pytest.mark.parametrize("kernel", EXPECTED)
def test_kernel(found: dict[str, str], kernel: str) -> None:
    assert re.match(EXPECTED[kernel], found[kernel]), found[kernel]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_same_source_compiles_for_a_gpu(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = ROOT / "tests/emulator/checks.cpp"
    code = f"arch=compute_{arch[3:]},code={arch}"
    built = subprocess.run(
        [
            nvcc,
            "-std=c++17",
            "-x",
            "cu",
            "-gencode",
            code,
            *INCLUDES,
            "-c",
            source,
            "-o",
            tmp_path / "checks.o",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
