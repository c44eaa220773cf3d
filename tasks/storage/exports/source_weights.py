"""Sizes of the weights of a checkpoint, read from the headers of its files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prefect_huggingface.tasks.storage.folders import is_pickled_weight, is_safe_weight

LARGEST_HEADER_BYTES = 100_000_000
BYTES_PER_ELEMENT = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """Number of weights of a checkpoint and their size in bytes."""

    parameters: int
    size_bytes: int

    @property
    def bytes_each(self) -> float:
        """Size of one weight in bytes."""
        return self.size_bytes / self.parameters if self.parameters else 0.0


def measure_weights(folder: Path, names: Iterable[str]) -> SourceWeights:
    """Return number and size of the weights in the files of a folder; only headers are read.

    Of weights in pickle format the number is estimated at two bytes each.
    """
    parameters = size = 0
    for name in names:
        if is_safe_weight(name):
            of_file = _read_header(folder / name)
        elif is_pickled_weight(name):
            of_file = estimate_weights((folder / name).stat().st_size)
        else:
            continue
        parameters += of_file.parameters
        size += of_file.size_bytes
    return SourceWeights(parameters, size)


def estimate_weights(size_bytes: int) -> SourceWeights:
    """Return the weights that files of a size hold when each takes two bytes."""
    return SourceWeights(size_bytes // 2, size_bytes)


def _read_header(path: Path) -> SourceWeights:
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, LARGEST_HEADER_BYTES)))
    except (OSError, ValueError, struct.error):
        return estimate_weights(size)
    parameters = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            parameters += (end - begin) // BYTES_PER_ELEMENT.get(tensor["dtype"], 1)
    return SourceWeights(parameters, size)
