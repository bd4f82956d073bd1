"""What ptxas made of the CUDA kernels in the built library, read with cuobjdump; a GPU is not needed.

``python tests/cuda_report.py`` writes it to ``docs/cuda_kernels.md``; ``test_cuda_compiled.py`` holds that
file against the library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

from sparsekern._library import LIBRARY

TABLE = Path(__file__).parents[1] / "docs/cuda_kernels.md"
ARCHS = ("sm_80", "sm_90")
HOPPER = "sm_90a"
"""Hopper with what no other GPU has: for one kernel, ``nm_hopper``, where CUTLASS was there to build it."""
REGISTERS = 65536  # of a multiprocessor

LAUNCH = {
    "few": (128, 0),
    "many": (256, 68),
    "dots": (128, 0),
    "pack_tile": (256, 17),
    "batch_sums": (256, 1),
    "product": (256, 72),
    "weight_gradient": (256, 66),
    "simple_product": (128, 0),
    "simple_weight_gradient": (128, 0),
    "scatter": (256, 0),
    "gather": (256, 0),
    "linear_tile": (256, 96),
    "backward_input_tile": (256, 96),
    "backward_weight_tile": (256, 96),
    "backward_input_selected": (512, 226),
    "scatter_groups": (256, 0),
    "gather_groups": (256, 0),
    "transpose_pairs": (256, 17),
    "mask_few": (256, 110),
    "part_sums": (256, 0),
    "mask_weight": (256, 96),
    "nm_hopper": (384, 182),
}
"""Threads of a block and KB of shared memory that it asks for, at most, by kernel."""

SHARED_KB = {"sm_80": 163, "sm_90": 227}
"""Of a multiprocessor; each block takes 1 KB more than it asks for."""

INSTRUCTIONS = {
    "few": ("LDG.E.128",),
    "many": ("LDGSTS.E.BYPASS.128", "LDS.128"),
    "dots": ("LDG.E.128",),
    "product": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
    "weight_gradient": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
    "mask_few": ("HMMA.16816.F32", "LDS.128", "LDS.U16", "LDGSTS.E.BYPASS.128"),
    "mask_weight": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
    "linear_tile<bf16, true>": ("HMMA.SP.16832.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
    "linear_tile<fp16, true>": ("HMMA.SP.16832.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
    "backward_input_tile<bf16>": ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
    "backward_input_selected": ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "LDS.64"),
    "backward_weight_tile<bf16>": ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"),
}
"""What instructions in the code of a kernel must begin with, for every type where none is named."""
HOPPER_INSTRUCTIONS = {"nm_hopper": ("HGMMA.SP.64x256x32.F32", "UTMALDG.3D.MULTICAST", "UTMASTG.3D")}
"""The same for :data:`HOPPER`."""


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: on the path or in a wheel of this environment."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, wheels)]))


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump says of the library."""
    found = {name: tool(name) for name in ("cuobjdump", "nvdisasm")}
    env = {**os.environ, "NVDISASM_PATH": str(found["nvdisasm"])}
    command = [str(found["cuobjdump"]), *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def kernel(symbol: str) -> str:
    """``"few<bf16, 8>"`` for a mangled name; ``"csr gather<...>"`` where others have one."""
    if "cutlass" in symbol:  # which names its kernel by all of its types
        return f"nm_hopper<{'bf16' if 'bfloat16_t' in symbol else 'fp16'}>"
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    for noise in ("(anonymous namespace)::", "sk::gpu::", "groups::", "void "):
        name = name.replace(noise, "")
    name = name[: name.index("(")].replace("unsigned short", "2 bytes")
    name = name.replace("unsigned int", "4 bytes").replace("unsigned long", "8 bytes")
    own = re.search(r"GLOBAL__N__\w*?_([a-z]+)_cu_", symbol)
    return f"{own[1]} {name}" if own and name.startswith(("scatter<", "gather<")) else name


def base(name: str) -> str:
    """``"few"`` for ``"few<bf16, 8>"``."""
    return name.split("<")[0].split()[-1]


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """By kernel and :data:`ARCHS`: ``{"REG": 114, "STACK": 0, "LOCAL": 0, ...}``; the largest of each."""
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    arch = symbol = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1].replace(HOPPER, "sm_90")
        elif match := re.match(r" Function (\w+):", line):
            symbol = match[1]
        elif symbol and line.startswith("  REG"):
            now = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            name = kernel(symbol)
            old = found[name].get(arch, now)
            found[name][arch] = {key: max(value, old[key]) for key, value in now.items()}
            symbol = ""
    return dict(found)


def instructions(arch: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in the code of each kernel."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    name = ""
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            name = kernel(match[1])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            found[name][match[1]] += 1
    return dict(found)


def blocks(name: str, arch: str, registers: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    threads, shared = LAUNCH[base(name)]
    fits = [
        REGISTERS // (-(-registers // 8) * 8 * threads),
        SHARED_KB[arch] // (shared + 1),
        2048 // threads,
        32,
    ]
    return min(fits)


def compiler() -> str:
    """``"13.0"``: the release of the nvcc that is there."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "unknown"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def table() -> str:
    """The contents of ``docs/cuda_kernels.md``."""
    columns = ["kernel", "threads", "shared KB", *(f"registers {arch}" for arch in ARCHS)]
    columns += [f"blocks {arch}" for arch in ARCHS]
    lines = [
        "# CUDA kernels: registers and occupancy",
        "",
        f"Compiled by nvcc {compiler()}, read from the library by `python tests/cuda_report.py`.",
        "No kernel spills or has local memory. Shared memory is what a block asks for at most; blocks are",
        "how many a multiprocessor holds at once. Not yet measured on a GPU. `nm_hopper` is CUTLASS's, for",
        "sm_90a alone, and there where nvidia-cutlass was installed when the library was built.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, used in sorted(resources().items()):
        registers = [used[arch]["REG"] if arch in used else None for arch in ARCHS]
        held = [count and blocks(name, arch, count) for arch, count in zip(ARCHS, registers, strict=True)]
        cells = [f"`{name}`", *LAUNCH[base(name)], *(count or "-" for count in (*registers, *held))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
