"""``python -m sparsekern doctor``: it passes what is right, finds what is wrong, and says what is missing."""

import argparse
import os
import subprocess
import sys

import pytest
import sparsekern.doctor.check as check_module
import torch
from sparsekern import _library, cli
from sparsekern.doctor import command
from sparsekern.doctor.cases import DTYPES, LAYOUTS, MASKED, PRODUCTS, plan
from sparsekern.doctor.check import check, unavailable
from sparsekern.isolation import Failure

native = pytest.mark.skipif(_library.LOAD_ERROR is not None, reason=str(_library.LOAD_ERROR))


def options(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(text.split())


def test_the_plan():
    cases = list(plan("cpu", seed=3))
    assert cases == list(plan("cpu", seed=3))
    assert cases != list(plan("cpu", seed=4))
    for attribute, values in (("product", PRODUCTS), ("dtype", DTYPES), ("layout", LAYOUTS)):
        assert {getattr(case, attribute) for case in cases} == set(values)
    assert {case.density for case in cases if case.format == "csr"} == {0.0, 0.02, 0.1, 0.4, 1.0}
    assert len(list(plan("cpu", quick=True))) < len(cases) / 10


@native
@pytest.mark.parametrize("format", ["csr", "bsr16x8", "2:4", "64:2:8"])
def test_every_kernel_is_right(format):
    for case in plan("cpu", [format], DTYPES, quick=True, seed=torch.initial_seed()):
        if unavailable(case.device, case.format, case.product, case.dtype) is None:
            assert check(case) <= 1.0, case


@native
@pytest.mark.parametrize("product", PRODUCTS[1:])
def test_what_is_wrong_is_found(product, monkeypatch):
    """One number of a result, off by about one term of its sum."""
    op = check_module._op

    def spoiled(case):
        def call(*arguments, **options):
            found = op(case)(*arguments, **options)
            result = found[1] if isinstance(found, tuple) else found
            result[(-1,) * result.dim()] += 1
            return found

        return call

    monkeypatch.setattr(check_module, "_op", spoiled)
    case = next(c for c in plan("cpu", ["4:4"], quick=True) if (c.product, c.shape) == (product, (333, 129)))
    assert check(case) > 1.0


@native
def test_results_that_change_are_found(monkeypatch):
    op, calls = check_module._op, []

    def call(*arguments, **options):
        calls.append(op(case)(*arguments, **options) + len(calls))
        return calls[-1]

    monkeypatch.setattr(check_module, "_op", lambda case: call)
    case = next(c for c in plan("cpu", ["4:4"], quick=True) if c.product == "linear_backward_input")
    with pytest.raises(RuntimeError, match="the same call must give the same bits twice"):
        check(case)


@native
def test_another_pattern_is_found(monkeypatch):
    other = check_module.parse_format("2:4").from_mask(torch.tensor([[True, False, True, False]]))
    monkeypatch.setattr(check_module, "_on", lambda *_: other)
    case = next(c for c in plan("cpu", ["2:4"], quick=True) if c.product == "pattern")
    with pytest.raises(RuntimeError, match="index must be what it is on the CPU"):
        check(case)


@native
@pytest.mark.parametrize("isa", ["generic", None])
def test_as_a_command(isa):
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "doctor", "--quick", "--device", "cpu", "--format", "2:4"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ({"SPARSEKERN_ISA": isa} if isa else {}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"cpu: {isa or torch.ops.sparsekern.isa()} kernels" in done.stdout
    for product in PRODUCTS[1:]:
        assert f"cpu     {product if product in MASKED else f'nm_{product}'} " in done.stdout
    assert "cpu float16: it takes torch.float32 or torch.bfloat16" in done.stdout
    assert "63 of 63 calls are right" in done.stdout


@native
def test_failures_are_rows(capsys):
    def run(case):
        if case.product == "scatter":
            return Failure("the process died of SIGSEGV")
        return 31.0 if case.product == "linear" and case.dtype == torch.bfloat16 else 0.5

    assert command.main(options("--device cpu --quick --format bsr4 --seed 5"), run) == 1
    out = capsys.readouterr().out
    lines = {
        line[8:35].strip(): line[35:].split("  ") for line in out.splitlines() if line.startswith("cpu  ")
    }
    assert [cell.strip() for cell in lines["bsr_linear"] if cell.strip()] == ["ok 0.5", "3 of 3 WRONG", "no"]
    assert "bsr_linear bfloat16 on cpu, bsr4, W 7x5" in out
    assert ": 31 times what rounding explains" in out
    assert ": the process died of SIGSEGV" in out
    assert "--seed 5 repeats this run" in out


@native
def test_many_failures_are_counted(capsys):
    assert command.main(options("--device cpu --format csr --dtype float32"), lambda case: torch.nan) == 1
    assert "and 160 more" in capsys.readouterr().out


@native
def test_ctrl_c_prints_what_is_known(capsys):
    left = iter([0.25, 0.5])

    def run(case):
        try:
            return next(left)
        except StopIteration:
            raise KeyboardInterrupt from None

    assert command.main(options("--device cpu --quick --format csr"), run) == 130
    out = capsys.readouterr().out
    assert "interrupted after 2 of" in out
    assert "ok 0.5" in out


def test_a_library_without_code_for_this_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    (case, *_) = plan("cuda", ["csr"], quick=True)
    failure = Failure("RuntimeError: CUDA says: no kernel image is available for execution on the device")
    assert command._report([(case, failure)], {}, DTYPES) == []
    assert "cuda: the library holds no code for compute capability 8.0" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["doctor", "--device", "cuda:3"]) == 1
    out = capsys.readouterr().out
    assert "cuda:3: " in out
    assert "nothing was checked" in out


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"version": None}, "this torch was built without CUDA"),
        ({"available": False}, "torch finds no GPU that it can use"),
        ({"count": 1}, "torch finds 1 GPUs, numbered from 0"),
        ({"capability": (7, 5)}, "its compute capability is 7.5, the kernels need 8.0 or later"),
        ({"kernels": False}, "the library was built without CUDA"),
        ({}, None),
    ],
)
def test_why_a_gpu_cannot_be_used(found, reason, monkeypatch):
    facts = {"version": "13.0", "available": True, "count": 2, "capability": (9, 0), "kernels": True} | found
    monkeypatch.setattr(check_module, "LOAD_ERROR", None)
    monkeypatch.setattr(check_module, "has_kernel", lambda op, kind: facts["kernels"])
    monkeypatch.setattr(torch.version, "cuda", facts["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: facts["available"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: facts["count"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    assert check_module.no_device("cuda:1") == reason
    assert check_module.no_device("mps") == "there are kernels for cpu and cuda, none for mps"


def test_no_library(capsys, monkeypatch):
    for module in (check_module, command):
        monkeypatch.setattr(module, "LOAD_ERROR", "libsparsekern.so is not built: because")
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "cpu: libsparsekern.so is not built: because" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--device nowhere", "--format 3:2", "--dtype int8", "--seed many"])
def test_bad_options(bad, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *bad.split()])
    assert caught.value.code == 2
    assert bad.split()[1] in capsys.readouterr().err
