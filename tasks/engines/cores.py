"""Which cores of the machine an engine computes on, where several processes have one each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import EngineError

NODES_FOLDER = Path("/sys/devices/system/node")
THREADS_PROPERTY = "INFERENCE_NUM_THREADS"


def allowed_cores() -> list[int]:
    """Return the cores that this thread, and what it starts, may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # Windows and macOS bind nothing to cores
        return list(range(os.cpu_count() or 1))


def read_nodes(folder: Path = NODES_FOLDER) -> list[list[int]]:
    """Return the cores that may be used, those that share a memory together; one list where nothing is told.

    Args:
        folder: Where Linux describes its NUMA nodes, a `cpulist` such as "0-3,8-11" in each.
    """
    allowed, nodes = allowed_cores(), []
    for file in sorted(folder.glob("node*/cpulist"), key=lambda file: int(file.parent.name[4:])):
        spans = [span.split("-") for span in file.read_text(encoding="utf-8").strip().split(",") if span]
        cores = [core for span in spans for core in range(int(span[0]), int(span[-1]) + 1) if core in allowed]
        if cores:
            nodes.append(cores)
    return nodes or [allowed]


def divide_cores(nodes: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Divide cores among processes: nearly as many for each, and of as few nodes as can be.

    Raises:
        EngineError: If there are fewer cores than processes.
    """
    cores = [core for node in nodes for core in node]
    if count > len(cores):
        raise EngineError(
            f"`instances` must be at most the number of cores that this process may use, {len(cores)}, got {count}. "
            "Lower it."
        )
    return [cores[len(cores) * place // count : len(cores) * (place + 1) // count] for place in range(count)]


def share_cores(model: LocalModel) -> LocalModel:
    """Return a model that computes on its part of the cores, in a worker of a Dask cluster that shares its machine.

    Engines that take all cores each are slower beside each other than with a part. What the block gives is kept, and
    a worker that somebody has bound to some cores. Threads are not pinned, or each process would take the first core.
    """
    if (model.backend, model.device) not in (("openvino", None), ("openvino", "CPU")):
        return model
    workers, cores = _workers_here(), len(allowed_cores())
    if workers < 2 or cores < (os.cpu_count() or 1):
        return model
    share = {THREADS_PROPERTY: max(cores // workers, 1), "ENABLE_CPU_PINNING": False}
    return model.model_copy(update={"ov_config": {**share, **model.ov_config}})


def _workers_here() -> int:
    """Return how many workers of the Dask cluster of this one are on its machine, 1 where this is none."""
    if "distributed" not in sys.modules:
        return 1
    from distributed import get_client, get_worker

    try:
        host = urlsplit(get_worker().address).hostname
    except ValueError:  # not in a worker
        return 1
    client: Any = get_client()
    return sum(urlsplit(address).hostname == host for address in client.nthreads())
