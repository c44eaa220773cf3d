"""How much memory there is, how much this process uses, and how much of it the tokens of a model take."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Of a container: its limit, what it uses, and of that what it holds of files and can let go of.
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)  # fmt: skip
CACHE_NAMES = ("inactive_file", "active_file")


def available_bytes(swap: bool = False) -> int:
    """Return the memory that is free for this process, on disk too (`swap`), within the limit of its container."""
    import psutil

    available = int(psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0))
    for limit_file, used_file, stat_file in CGROUP_FILES:
        with suppress(OSError, ValueError):
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
            available = min(available, max(limit - used + _cached_bytes(Path(stat_file)), 0))
    return available


def _cached_bytes(stat: Path) -> int:
    """Return how much of the memory that a container uses is cache of files."""
    with suppress(OSError, ValueError):
        found = dict(line.split() for line in stat.read_text().splitlines())
        # The first version counts what is in groups below with a prefix.
        return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in CACHE_NAMES)
    return 0


def total_bytes() -> int:
    """Return the memory of the machine, or the limit of the container where that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit_file, *_ in CGROUP_FILES:
        with suppress(OSError, ValueError):
            total = min(total, int(Path(limit_file).read_text()))
    return total


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def give_back_memory() -> None:
    """Give memory that is free inside this process back to the system."""
    gc.collect()
    # Only the C library of GNU keeps freed memory and has a call to release it.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def kv_bytes_per_token(settings: Mapping[str, Any], number_bytes: float) -> float:
    """Return how many bytes the keys and values of one token take, or 0 where a configuration does not say.

    Args:
        settings: Configuration of the model.
        number_bytes: Bytes of one number of the cache.
    """
    settings = {**settings, **(settings.get("text_config") or {})}
    layers = settings.get("num_hidden_layers") or settings.get("n_layer")
    heads = settings.get("num_attention_heads") or settings.get("n_head")
    hidden = settings.get("hidden_size") or settings.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0.0
    size = settings.get("head_dim") or hidden // heads
    return 2.0 * layers * (settings.get("num_key_value_heads") or heads) * size * number_bytes
