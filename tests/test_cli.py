"""The command line: ``python -m sparsekern info | bench``."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsekern import _library, cli
from sparsekern.benchmark import read

TINY = ["bench", "--shape", "12x20x16", "--sparsity", "0.5", "0.9", "--rounds", "1", "--min-time", "0.01"]


@pytest.fixture(autouse=True)
def keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def without(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import module`` fail as if it were not installed."""
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "info"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert done.stderr == ""


def test_info_says_what_runs_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    native = _library.LOAD_ERROR is None
    for op in ("csr_linear", "csr_linear_backward_input", "csr_linear_backward_weight"):
        assert lines[op].split()[1].rstrip(":") == ("native" if native else "reference")
    assert ("ISA" in lines) == native
    assert {
        "sparsekern",
        "python",
        "torch",
        "machine",
        "library",
        "CUDA kernels",
        "GPU",
        "_native",
    } <= lines.keys()


@pytest.mark.skipif(_library.LOAD_ERROR is not None, reason=str(_library.LOAD_ERROR))
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("generic", "generic, as SPARSEKERN_ISA=generic asks"),
        ("sse9", "SPARSEKERN_ISA must name an instruction set of this CPU"),
    ],
)
def test_info_says_which_isa_and_why(asked: str, answer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", "info"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "SPARSEKERN_ISA": asked},
    )
    assert answer in done.stdout


def test_info_says_why_the_library_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "LOAD_ERROR", "libsparsekern.so is not built: because")
    monkeypatch.setattr(_library, "has_kernel", lambda op, device: False)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "libsparsekern.so is not built: because" in out
    assert "dense: no library" in out
    assert "ISA" not in out


def test_bench_prints_appends_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "results.csv", tmp_path / "run.png"
    for _ in range(2):
        assert cli.main([*TINY, "--threads", "1", "--output", str(output), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody looks
    assert "8 cases, 1 rounds" in out
    for product in ("forward", "backward_input", "backward_weight", "forward_backward"):
        assert f"\n{product}, float32  batch" in out
    assert "geometric mean" in out
    rows = read(output)
    assert len(rows) == 2 * 8 * 4
    assert {row.threads for row in rows} == {1}
    assert {row.sparsity for row in rows} == {0.5, 0.9}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_chooses_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY, "--product", "forward", "--dtype", "float32", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "4 cases" in out
    assert "forward, bfloat16" in out
    assert "sits out some cases: torch.sparse:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "12x20"], "must be OUTxINxBATCH, such as 4096x1024x256, got '12x20'"),
        (["--shape", "0x20x4"], "must be OUTxINxBATCH"),
        (["--sparsity", "1"], r"must be a number in \[0, 1\), got '1'"),
        (["--sparsity", "most"], r"must be a number in \[0, 1\), got 'most'"),
        (["--rounds", "0"], "must be a positive whole number, got '0'"),
        (["--threads", "1.5"], "must be a positive whole number, got '1.5'"),
        (["--min-time", "nan"], "must be a positive number, got 'nan'"),
        (["--suite", "all"], "invalid choice: 'all'"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_bad_results_file_stops_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("my,own,table\n")
    assert cli.main([*TINY, "--output", str(tmp_path / "mine.csv")]) == 1
    out, err = capsys.readouterr()
    assert "mine.csv must be a results file" in err
    assert out == ""
    assert (tmp_path / "mine.csv").read_text() == "my,own,table\n"


def test_plotting_without_matplotlib_stops_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("matplotlib", monkeypatch)
    assert cli.main([*TINY, "--plot", str(tmp_path / "run.png")]) == 1
    out, err = capsys.readouterr()
    assert "plotting needs matplotlib: pip install 'sparsekern[bench]'" in err
    assert out == ""


def test_nothing_to_draw_stops_before_measuring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--suite", "decode", "--plot", str(tmp_path / "run.png")]) == 1
    out, err = capsys.readouterr()
    assert (
        "a picture needs layer-sized cases (batch above 8, warm) at two sparsities or more, got none" in err
    )
    assert out == ""


def test_a_terminal_without_tqdm_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("tqdm", monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main([*TINY, "--product", "forward"]) == 0
    assert "no progress bar without tqdm: pip install 'sparsekern[bench]'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsekern.benchmark import command

    real = command.run_case
    done: list[Any] = []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(real(*arguments, **keywords))
        return done[-1]

    monkeypatch.setattr(command, "run_case", interrupted)
    assert cli.main([*TINY, "--output", str(tmp_path / "results.csv")]) == 130
    assert "interrupted after 3 of 8 cases" in capsys.readouterr().out
    assert len(read(tmp_path / "results.csv")) == 3 * 4
