"""Checkpoints that are whole or absent, and are checked before they are used."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

FORMAT = "sparsekern/train_vision/1"
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)


class CheckpointError(Exception):
    """A checkpoint is missing, corrupt, or of other options; the message says the rule and what was found."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, lists and dicts of them) to `path` in one step.

    The bytes go to a temporary file beside it, reach the disk, and then take its name: whoever is interrupted
    here, by Ctrl-C or a power cut, leaves the previous checkpoint as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # In memory first: torch.save makes a RuntimeError of a Ctrl-C that meets it while it writes to a file.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    try:
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, with its tensors on the CPU.

    Every byte is checked against the CRCs that torch.save wrote (torch.load does not look at them), and no
    code from the file is run.

    Raises:
        CheckpointError: there is no such file, or it is corrupt, truncated, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: must be a checkpoint to resume from, got no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
        if corrupt is not None:
            raise zipfile.BadZipFile(f"wrong CRC in {corrupt}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        got = f"got a corrupt or truncated file ({reason})"
        raise CheckpointError(f"{path}: must be a whole checkpoint, {got}") from None
    found = state.get("format") if isinstance(state, dict) else type(state)
    if found != FORMAT:
        raise CheckpointError(f"{path}: must be a checkpoint of format {FORMAT!r}, got {found!r}")
    return state
