"""How much memory there is, how much this process uses, and how much of it the tokens of a model take."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Where Linux limits the memory of groups of processes, containers and services for instance, and says who is in which.
CGROUP_ROOT, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit and use of a group in the second version, whose controllers stand together, and in the first.
CGROUP_FILES = ("memory.max", "memory.current")
OLD_CGROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
CACHE_NAMES = ("inactive_file", "active_file")


def available_bytes(swap: bool = False) -> int:
    """Return the memory that is free for this process, on disk too (`swap`), within the limits of its groups."""
    import psutil

    available = int(psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0))
    for limit, used, folder in _memory_groups():
        available = min(available, max(limit - used + _cached_bytes(folder / "memory.stat"), 0))
    return available


def total_bytes() -> int:
    """Return the memory of the machine, or the least limit of the groups of this process where that is lower."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _, _ in _memory_groups())])


def _memory_groups() -> Iterator[tuple[int, int, Path]]:
    """Yield limit, use and folder of each group with a limit that this process is in; a group is in those above it."""
    try:
        lines = CGROUPS_OF_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (CGROUP_ROOT / "memory", OLD_CGROUP_FILES) if controllers else (CGROUP_ROOT, CGROUP_FILES)
        folder = top / path.lstrip("/")
        # Within a container, the path may be that of the machine outside; its own group is the top one there.
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no limit is "max", or is not there
                limit, used = (int((group / name).read_text()) for name in names)
                yield limit, used, group
            if group == top:
                break


def _cached_bytes(stat: Path) -> int:
    """Return how much of the memory that a group uses is cache of files, which it can let go of."""
    with suppress(OSError, ValueError):
        found = dict(line.split() for line in stat.read_text().splitlines())
        # The first version counts what is in groups below with a prefix.
        return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in CACHE_NAMES)
    return 0


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def give_back_memory() -> None:
    """Give memory that is free inside this process back to the system, and to the GPU."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
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
