"""IDX, the file format of MNIST and its relatives: a magic number, the sizes, the bytes."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08


class DataError(Exception):
    """A data file or folder is not what it must be; the message names it, the rule, and what was found."""


def read_idx(path: Path, dimensions: int, sha256: str | None = None) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The file is ``00 00 08 d``, then ``d`` big-endian uint32 sizes, then the elements in row-major order.

    Args:
        path: the file.
        dimensions: the number of sizes the file must have: 3 for images, 1 for labels.
        sha256: what the SHA-256 of the (decompressed) content must be; None for any.

    Returns:
        A uint8 tensor of the sizes in the file.

    Raises:
        DataError: the file is corrupt, truncated, not IDX, of other dimensions, or has another SHA-256.
    """
    content = _read(path)
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise DataError(
            f"{path}: must start with the IDX magic {magic.hex(' ')} (unsigned bytes, {dimensions} "
            f"dimensions), got {content[:4].hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: must have a header of {start} bytes, got {len(content)} bytes in all")
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        shape = " x ".join(map(str, sizes))
        raise DataError(
            f"{path}: must hold {math.prod(sizes)} bytes of data ({shape}, says its header), "
            f"got {len(content) - start}"
        )
    if sha256 is not None and (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path}: the SHA-256 of its content must be {sha256}, got {got}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def _read(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = f"got a corrupt or truncated one ({error})"
        raise DataError(f"{path}: must be a whole gzip file, {reason}") from None
