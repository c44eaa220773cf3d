"""What an export needs of the disk and of the memory, and what this machine has of them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from prefect_huggingface.tasks.storage.exports.source_weights import SourceWeights

# Python with torch, Transformers, Optimum and NNCF, before there is any model.
BASE_MEMORY_BYTES = 650 << 20
# Graph, tokenizer and temporary files.
BASE_DISK_BYTES = 64 << 20
BITS = {"checkpoint": 16.0, "fp32": 32.0, "fp16": 16.0, "int8": 8.1, "int4": 4.5, "nf4": 4.3, "mxfp4": 4.3, "cb4": 4.1}
CGROUP = Path("/sys/fs/cgroup")


def estimate_disk(weights: SourceWeights, weight_format: str) -> int:
    """Return the bytes of disk that an export needs at its fullest: the converted and the quantized model together."""
    final = weights.parameters * bits_per_weight(weight_format) / 8
    converted = weights.size_bytes if bits_per_weight(weight_format) < 16 else 0
    return int(converted + final) + BASE_DISK_BYTES


def estimate_memory(weights: SourceWeights, weight_format: str) -> int:
    """Return the bytes of memory that an export needs at its fullest, as measured with plain exports."""
    final = weights.parameters * bits_per_weight(weight_format) / 8
    return int(2.0 * weights.size_bytes + final) + BASE_MEMORY_BYTES


def least_memory(weights: SourceWeights) -> int:
    """Return the bytes of memory without which an export cannot succeed: every weight is in memory once."""
    return weights.size_bytes + BASE_MEMORY_BYTES // 2


def bits_per_weight(weight_format: str) -> float:
    """Return the bits that one weight takes, with its part of the scales."""
    return BITS.get(weight_format, 4.5 if weight_format.startswith(("cb4", "int4")) else 8.1)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int | None:
    """Return the bytes of memory that can be had, swap included, or None where the system does not tell."""
    try:
        available = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    except (OSError, RuntimeError, psutil.Error):
        return None
    limit, used = _read_number(CGROUP / "memory.max"), _read_number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def _read_number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None
