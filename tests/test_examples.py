"""The example `train_vision.py`: its command line, its checkpoints, and resuming to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

for package in ("tqdm", "sklearn", "matplotlib"):
    pytest.importorskip(package)

import train_vision  # noqa: E402
from vision import checkpoint, data, options  # noqa: E402
from vision.checkpoint import CheckpointError  # noqa: E402
from vision.run import METHODS, Recipe, Run  # noqa: E402

SCRIPT = Path(train_vision.__file__)
TINY = ["--dataset=digits", "--hidden", "48", "32", "--sparsity=0.8", "--batch-size=100", "--update-every=5"]


def recipe(**changes: Any) -> Recipe:
    chosen = options.parser().parse_args(TINY)
    fields = {name: getattr(chosen, name) for name in Recipe.__dataclass_fields__}
    return Recipe(**{**fields, "epochs": 4, **changes})


def main(out: Path, *arguments: str) -> int:
    return train_vision.main([*TINY, "--epochs", "3", "--out", str(out), *arguments])


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same to the bit, but for the seconds that their epochs took."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- checkpoints ---


@pytest.mark.parametrize(("module", "name"), [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_an_interrupted_save_leaves_the_previous_checkpoint(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is made, once it is written, and before it takes its name."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.ones(3)})

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"x": torch.zeros(3)})
    assert checkpoint.load(path)["x"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no\.pt: must be a checkpoint to resume from, got no such file"
    ):
        checkpoint.load(tmp_path / "no.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_refuses_a_truncated_checkpoint(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.arange(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match="must be a whole checkpoint, got a corrupt or truncated file"):
        checkpoint.load(path)


def test_refuses_one_flipped_bit_in_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    weights = torch.rand(1000)
    checkpoint.save(path, {"x": weights})
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong CRC in"):
        checkpoint.load(path)


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"must be a checkpoint of format '.*', got None"):
        checkpoint.load(path)
    torch.save({"code": SCRIPT}, path)  # an object of a class: loading it would run code
    with pytest.raises(CheckpointError, match="must be a whole checkpoint"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "not torch's")
    with pytest.raises(CheckpointError, match="must be a whole checkpoint"):
        checkpoint.load(path)


# --- runs ---


@pytest.mark.parametrize("name", METHODS)
def test_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    images = data.load("digits")
    straight = Run(name, recipe(), images)
    for _ in range(4):
        straight.train_epoch()

    first = Run(name, recipe(), images)
    for _ in range(2):
        first.train_epoch()
    checkpoint.save(tmp_path / "checkpoint.pt", first.state_dict())
    torch.rand(7)  # whatever else happens in between
    second = Run(name, recipe(), images)
    second.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    for _ in range(2):
        second.train_epoch()

    assert equal(second.state_dict(), straight.state_dict())
    assert not equal(second.state_dict(), first.state_dict())


def test_runs_start_from_the_same_weights_and_keep_their_sparsity() -> None:
    images = data.load("digits")
    dense, rigl = (Run(name, recipe(), images) for name in ("dense", "rigl"))
    for before, after in zip(dense.model, rigl.model, strict=True):
        if hasattr(after, "pattern"):
            assert torch.equal(after.values, after.pattern.gather(before.weight))
    masks = [layer.mask.clone() for layer in (rigl.model.fc1, rigl.model.fc2)]
    rigl.train_epoch()
    for mask, layer in zip(masks, (rigl.model.fc1, rigl.model.fc2), strict=True):
        assert layer.mask.sum() == mask.sum() == round(0.2 * mask.numel())
        assert not torch.equal(layer.mask, mask)
    assert isinstance(rigl.model.head, torch.nn.Linear)


def test_counts_bytes() -> None:
    images = data.load("digits")
    run = Run("dense", recipe(), images)
    run.train_epoch()
    memory = run.memory()
    weights = 64 * 48 + 48 + 48 * 32 + 32 + 32 * 10 + 10
    assert memory.weights == memory.gradients == 4 * weights
    assert memory.gradients == sum(p.grad.nbytes for p in run.model.parameters())
    assert memory.optimizer == 8 * weights + 4 * 6  # two moments; one step count for each of 6 tensors
    assert memory.indices == 0
    assert Run("rigl", recipe(), images).memory().indices > 0


def test_stops_when_the_loss_diverges() -> None:
    run = Run("dense", recipe(lr=float("inf")), data.load("digits"))
    with pytest.raises(FloatingPointError, match="dense: training must stay finite, got inf or NaN"):
        run.train_epoch()


def test_stops_when_weights_diverge_before_the_masks_move() -> None:
    run = Run("rigl", recipe(lr=1e30, update_every=3), data.load("digits"))
    with pytest.raises(FloatingPointError, match="rigl: training must stay finite, got inf or NaN"):
        run.train_epoch()


def test_refuses_images_of_one_colour() -> None:
    split = data.Split(torch.full((3, 4), 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.long))
    with pytest.raises(
        data.DataError, match="training images must not be all of one colour, got 5 everywhere"
    ):
        data._dataset("grey", "here", 2, split, split)


# --- command line ---


def test_trains_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path, "--method", "dense", "rigl", "static") == 0
    said = capsys.readouterr()
    assert said.err == ""  # no progress bars where there is no terminal
    assert said.out.count("test accuracy") == 3 * 3 + 1
    lines = said.out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("run ")) :][:5]
    assert "speed-up" in table[0]
    assert "s / epoch" in table[0]
    assert "indices" in table[0]
    assert [row.split()[0] for row in table[2:]] == ["dense", "rigl", "static"]
    assert "1.00x" in table[2]
    assert table[2].endswith("100.0 %")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_resumes_an_interrupted_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the fourth of six epochs; --resume alone ends where an uninterrupted session ends."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(straight) == 0
    train_epoch, calls = Run.train_epoch, iter([False, False, False, True])

    def interrupted(run: Run) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return train_epoch(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_epoch", interrupted)
        assert main(broken) == 130
    assert f"--resume --out {broken}" in capsys.readouterr().err
    assert train_vision.main(["--resume", "--out", str(broken)]) == 0
    ends = [checkpoint.load(place / "checkpoint.pt") for place in (straight, broken)]
    assert equal(*ends)

    capsys.readouterr()
    assert train_vision.main(["--resume", "--out", str(broken)]) == 0  # finished: only the report again
    said = capsys.readouterr().out
    assert "epoch 3/3" not in said
    assert "speed-up" in said


def test_a_real_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *TINY, "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would the programs that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = tmp_path / "checkpoint.pt"
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert error.strip().startswith("Stopped. Continue with:")
    assert "\n" not in error.strip()
    assert checkpoint.load(path)["runs"][0]["history"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "--sparsity: must be a number in (0, 1), got '1'"),
        (["--sparsity", "0"], "--sparsity: must be a number in (0, 1), got '0'"),
        (["--sparsity", "many"], "--sparsity: must be a number in (0, 1), got 'many'"),
        (["--threads", "99999999999"], "--threads: must be at most 1024, got '99999999999'"),
        (["--device", "meta"], "--device: must be a device of this machine, got 'meta'"),
        (["--drop-fraction", "0"], "--drop-fraction: must be a number in (0, 1], got '0'"),
        (["--epochs", "0"], "--epochs: must be a whole number of 1 or more, got '0'"),
        (["--method", "magic"], "--method: invalid choice: 'magic'"),
        (["--device", "abacus"], "--device: must be a device of this machine, got 'abacus'"),
        (["--format", "xyz"], "'xyz'"),
    ],
)
def test_refuses_options(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(tmp_path, *arguments)
    assert message in (capsys.readouterr().err if caught.value.code == 2 else str(caught.value.code))


def test_one_line_for_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path, "--dataset", "fashion-mnist", "--data", str(tmp_path / "no")) == 1
    assert main(tmp_path, "--resume") == 1
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 garbage")
    assert main(tmp_path, "--resume") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" error"] * 3
    assert "must hold train-images-idx3-ubyte" in lines[0]
    assert "got no such file" in lines[1]
    assert "corrupt or truncated" in lines[2]


def test_refuses_to_resume_with_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path, "--method", "dense") == 0
    assert main(tmp_path, "--method", "dense", "--resume", "--lr", "0.5") == 1
    assert "--lr must be 0.004 as in the checkpoint, got 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("recipe"), "must hold runs and a recipe of"),
        (lambda state: state["recipe"].pop("lr"), "must hold runs and a recipe of"),
        (lambda state: state.pop("runs"), "must hold runs and a recipe of"),
        (lambda state: state["runs"].clear(), "must hold the state of"),
        (lambda state: state["runs"][0]["model"].clear(), "must hold the state of"),
        (lambda state: state["runs"][0].pop("history"), "must hold the state of"),
    ],
)
def test_refuses_a_checkpoint_without_something(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path, "--method", "static") == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    change(state)
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert main(tmp_path, "--resume") == 1
    assert message in capsys.readouterr().err


def test_help_names_every_option_and_default() -> None:
    command = [sys.executable, str(SCRIPT), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in (*Recipe.__dataclass_fields__, "out", "resume", "device", "threads"):
        assert f"--{name.replace('_', '-')}" in text
    assert "(default: 0.9)" in text
    assert "(default: 0)" in text
    assert "None" not in text
