#!/usr/bin/env python3
"""Trains an image classifier dense and sparse side by side, and compares accuracy, time and memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from vision import checkpoint, data, options, report
from vision.checkpoint import CheckpointError
from vision.idx import DataError
from vision.run import Recipe, Run

STOPPED = 130  # what a shell reports for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = options.parser()
    chosen = parser.parse_args(argv)
    path = chosen.out / "checkpoint.pt"
    try:
        state = checkpoint.load(path) if chosen.resume else None
        if state is not None:  # its options become the defaults
            _check_recipe(state, path)
            parser.set_defaults(**state["recipe"])
            chosen = parser.parse_args(argv)
        recipe = Recipe(**{field.name: getattr(chosen, field.name) for field in fields(Recipe)})
        if state is not None:
            _check_same(recipe, state["recipe"], path)
        return _train(recipe, chosen, state, path)
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        print(f"train_vision: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped before training began.", file=sys.stderr)
        return STOPPED


def _train(recipe: Recipe, chosen: argparse.Namespace, state: dict[str, Any] | None, path: Path) -> int:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    images = data.load(recipe.dataset, Path(recipe.data) if recipe.data else None).to(chosen.device)
    counts = f"{len(images.train):,} training and {len(images.test):,} test images"
    print(f"{images.name} from {images.source}: {counts}")
    recipe = replace(recipe, dataset=images.name)
    try:
        runs = [Run(name, recipe, images) for name in recipe.method]
    except ValueError as error:  # a format or distribution that sparsekern does not know
        sys.exit(f"train_vision: error: {error}")
    if state is not None:
        try:
            for run, saved in zip(runs, state["runs"], strict=True):
                run.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(
                f"{path}: must hold the state of {recipe.method}, got another ({reason})"
            ) from None
    resumable = state is not None
    try:
        for number in range(recipe.epochs):
            for run in runs:
                if number < len(run.history):
                    continue
                epoch = run.train_epoch()
                states = [each.state_dict() for each in runs]
                checkpoint.save(path, {"recipe": asdict(recipe), "runs": states})
                resumable = True
                print(
                    f"epoch {number + 1}/{recipe.epochs}  {report.label(run):<12} loss {epoch.loss:.4f}  "
                    f"test accuracy {100 * epoch.accuracy:.2f} %  {epoch.seconds:.1f} s",
                    flush=True,
                )
        print(f"\n{report.table(runs)}")
        report.picture(runs, chosen.out / "accuracy.png")
        print(f"\nPicture: {chosen.out / 'accuracy.png'}   Checkpoint: {path}")
    except KeyboardInterrupt:
        resume = f"Continue with: {sys.argv[0]} --resume --out {chosen.out}"
        print(f"\nStopped. {resume if resumable else 'No epoch was finished.'}", file=sys.stderr)
        return STOPPED
    return 0


def _check_recipe(state: dict[str, Any], path: Path) -> None:
    """Raises unless a checkpoint holds every option, and no other."""
    saved, names = state.get("recipe"), {field.name for field in fields(Recipe)}
    if not isinstance(saved, dict) or saved.keys() != names or not isinstance(state.get("runs"), list):
        got = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"{path}: must hold runs and a recipe of {sorted(names)}, got {got}")


def _check_same(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    for name, value in asdict(recipe).items():
        if value != saved[name]:
            option = f"--{name.replace('_', '-')}"
            raise CheckpointError(f"{path}: {option} must be {saved[name]} as in the checkpoint, got {value}")


if __name__ == "__main__":
    sys.exit(main())
