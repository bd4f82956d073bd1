"""The benchmark: what its suites and its command line measure."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_rows import made_up
from sparsekern._library import LOAD_ERROR
from sparsekern.benchmark import SUITES, Case, Row, command, read
from sparsekern.benchmark.cases import Suite


def test_the_suites_hold_the_figures_shapes() -> None:
    layers = list(SUITES["layers"].cases())
    assert len(layers) == 4 * 4 * (7 + 3 * 4 + 4)
    assert Case(4096, 1024, 256, 0.9, "forward_backward") in layers
    assert Case(4096, 1024, 256, 0.875, "forward", format="64:2:16") in layers
    decode = list(SUITES["decode"].cases())
    assert {case.cold for case in decode} == {False, True}
    assert {case.dtype for case in decode} == {torch.float32, torch.bfloat16}
    assert {case.sparsity for case in decode if case.format == "bsr32"} == {0.9}
    for suite in SUITES.values():
        cases = list(suite.cases())
        assert len(set(cases)) == len(cases)
        weights = [
            (case.dtype, case.format, case.sparsity, case.out_features, case.in_features) for case in cases
        ]
        assert len(list(itertools.groupby(weights))) == len(set(weights))  # each is built once


def test_the_sample_of_auto_holds_every_pair() -> None:
    auto = SUITES["auto"]
    sample = list(auto.cases())
    assert len(sample) <= 200  # 10 minutes
    sample = [case for case in sample if case.batch < 4096]  # of those, many are too large
    for names in itertools.combinations(("format", "batch", "product", "dtype"), 2):
        lists = ({getattr(case, name) for case in sample} for name in names)
        pairs = {tuple(getattr(case, name) for name in names) for case in sample}
        assert len(pairs) == len(list(itertools.product(*lists)))
    assert len(list(auto.cases(formats=["csr"], products=["forward"]))) == 7 * (5 * 7 - 1) * 2


def test_lists_of_a_suite_are_replaced() -> None:
    suite = Suite(
        "", ((3, 4, 5), (300, 400, 500)), {"csr": (0.5, 0.9), "2:4": ()}, ("forward",), max_macs=1e6
    )
    assert list(suite.cases()) == [
        Case(3, 4, 5, 0.5),
        Case(3, 4, 5, 0.9),
        Case(3, 4, 5, 0.5, format="2:4"),
    ]
    asked = {"shapes": [(300, 400, 500)], "sparsities": [0.1, 0.2], "formats": ["2:8", "bsr4"]}
    assert list(suite.cases(**asked)) == [  # type: ignore[arg-type]
        Case(300, 400, 500, 0.75, format="2:8"),
        Case(300, 400, 500, 0.1, format="bsr4"),
        Case(300, 400, 500, 0.2, format="bsr4"),
    ]
    unknown = suite.cases(formats=["bsr4"])
    assert [case.sparsity for case in unknown] == [0.5, 0.9]


def test_the_command_plans_formats_and_backends() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def plan(text: str) -> dict[Case, list[str]]:
        found = command.plan(parser.parse_args(text.split()))
        return {case: [contender.backend for contender in joined] for case, joined in found.items()}

    shape = "--shape 64x64x16 --sparsity 0.5 --product forward"
    native = "native" if LOAD_ERROR is None else "reference"
    assert plan(shape) == {Case(64, 64, 16, 0.5): [native, native, "dense", "torch.sparse"]}
    assert list(plan(f"{shape} --format 2:4 bsr32x32 2:4")) == [
        Case(64, 64, 16, 0.5, format="2:4"),
        Case(64, 64, 16, 0.5, format="bsr32"),
    ]
    both = plan(f"{shape} --format csr --dtype float32 --suite layers auto")
    assert both == {Case(64, 64, 16, 0.5): [native, native, "dense", "torch.sparse", "auto"]}
    with pytest.raises(SystemExit):
        plan("--format 5:4")


def test_a_slow_auto_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds: list[int] = []

    def measured(case: Case, *arguments: object, **options: Any) -> list[Row]:
        rounds.append(options["rounds"])
        return [made_up(case.sparsity, "auto", "batch", 0.5 if case.sparsity < 0.5 else 2.0)]

    monkeypatch.setattr(command, "run_case", measured)
    output = tmp_path / "results.csv"
    text = "--suite auto --shape 8x8x4 --format csr --sparsity 0.1 0.9 --product forward --dtype float32"
    text += " --rounds 2"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args([*text.split(), "--output", str(output)])) == 0
    assert rounds == [2, 6, 2]
    assert len(read(output)) == 2
