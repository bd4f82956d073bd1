"""The command line of `train_vision.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vision import data
from vision.run import METHODS

DESCRIPTION = "Trains an image classifier dense and sparse side by side; compares accuracy, time and memory."
DETAILS = (
    "All runs share the seed, the initial dense weights, the batch order and the learning-rate schedule; the "
    "last layer stays dense. A checkpoint is written after every epoch of every run: stop with Ctrl-C, go on "
    "with --resume."
)


def parser() -> argparse.ArgumentParser:
    """The parser; every field of `Recipe` is one of its options, and --out, --resume, --device, --threads."""
    result = argparse.ArgumentParser(
        usage="%(prog)s [option ...]", description=DESCRIPTION, epilog=DETAILS, formatter_class=_Help
    )
    group = result.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=data.NAMES, default="auto", help="auto: Fashion-MNIST, else the digits"
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files, .gz or not; without it Fashion-MNIST is found or fetched",
    )

    group = result.add_argument_group("what to train")
    group.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["dense", "rigl"],
        metavar="NAME",
        help=f"the runs, the first being the baseline: {', '.join(METHODS)}",
    )
    group.add_argument(
        "--hidden",
        nargs="+",
        type=_positive,
        default=[2048, 2048],
        metavar="N",
        help="widths of the hidden layers",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights and the batch order")

    group = result.add_argument_group("sparsity")
    group.add_argument(
        "--sparsity", type=_sparsity, default=0.9, metavar="S", help="share of absent weights, in (0, 1)"
    )
    group.add_argument("--format", default="csr", metavar="NAME", help="how sparse weights are stored")
    group.add_argument(
        "--distribution", choices=("uniform", "erk"), default="uniform", help="sparsity over the layers"
    )
    group.add_argument(
        "--drop-fraction",
        type=_share,
        default=0.3,
        metavar="F",
        help="share of the weights that the first move takes",
    )
    group.add_argument(
        "--update-every", type=_positive, default=100, metavar="N", help="steps between two moves"
    )

    group = result.add_argument_group("recipe")
    group.add_argument("--epochs", type=_positive, default=6, metavar="N", help="epochs of every run")
    group.add_argument("--batch-size", type=_positive, default=256, metavar="N", help="images per step")
    group.add_argument(
        "--lr", type=float, default=4e-3, metavar="LR", help="peak learning rate of AdamW (one cycle)"
    )
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="WD", help="of AdamW")

    group = result.add_argument_group("session")
    group.add_argument(
        "--out", type=Path, default=Path("runs/train_vision"), metavar="DIR", help="checkpoint and picture"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out, with its options"
    )
    group.add_argument("--device", type=_device, default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ...")
    group.add_argument("--threads", type=_threads, metavar="N", help="CPU threads; without it torch's choice")
    return result


class _Help(argparse.HelpFormatter):
    """Ends each option's help with its default, where it has one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {shown})"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    count = _positive(text)
    if count > 1024:
        raise argparse.ArgumentTypeError(f"must be at most 1024, got {text!r}")
    return count


def _sparsity(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1), got {text!r} (dense: --method dense)")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # in no interval


def _device(text: str) -> torch.device:
    try:
        device = torch.empty(0, device=text).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0][:100]
        raise argparse.ArgumentTypeError(
            f"must be a device of this machine, got {text!r} ({reason})"
        ) from None
