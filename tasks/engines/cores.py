"""Which cores of the machine an engine computes on, where several processes have one each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import EngineError

NODES_FOLDER = Path("/sys/devices/system/node")
THREADS_PROPERTY = "INFERENCE_NUM_THREADS"


def allowed_cores(process_id: int = 0) -> list[int]:
    """Return the cores that a process may use, by default this one."""
    try:
        return sorted(os.sched_getaffinity(process_id))
    except (AttributeError, OSError):  # Windows and macOS bind nothing to cores
        return list(range(os.cpu_count() or 1))


def read_nodes(folder: Path = NODES_FOLDER) -> list[list[int]]:
    """Return the cores that may be used, those that share a memory together; one list where the system does not tell.

    Cores that are threads of one physical core stand beside each other.

    Args:
        folder: Where Linux describes its NUMA nodes: each with a `cpulist` such as "0-3,8-11" and a folder per core.
    """
    allowed, nodes = allowed_cores(), []
    for file in sorted(folder.glob("node*/cpulist"), key=lambda file: int(file.parent.name[4:])):
        cores = [core for core in _read_list(file) if core in allowed]
        if cores:
            siblings = {core: file.parent / f"cpu{core}" / "topology" / "thread_siblings_list" for core in cores}
            nodes.append(sorted(cores, key=lambda core: (min(_read_list(siblings[core]) or [core]), core)))
    return nodes or [allowed]


def _read_list(file: Path) -> list[int]:
    try:
        spans = [span.split("-") for span in file.read_text(encoding="utf-8").strip().split(",") if span]
    except OSError:
        return []
    return [core for span in spans for core in range(int(span[0]), int(span[-1]) + 1)]


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
    is_on_cpu = (model.device or "CPU").upper() in ("CPU", "-1")
    # What all processes of a machine or a container may use is what its first one may.
    cores, is_bound = len(allowed_cores()), allowed_cores() != allowed_cores(1)
    if model.backend != "openvino" or not is_on_cpu or is_bound or model.engine.processes > 1:
        return model
    workers = _workers_here()
    if workers < 2:
        return model
    share = {THREADS_PROPERTY: max(cores // workers, 1), "ENABLE_CPU_PINNING": False}
    # The workers are the processes.
    engine = model.engine.model_copy(update={"instances": 1})
    return model.model_copy(update={"ov_config": {**share, **model.ov_config}, "engine": engine})


def _workers_here() -> int:
    """Return how many workers of the Dask cluster of this one are processes of its machine, 1 where this is none."""
    if "distributed" not in sys.modules:
        return 1
    from distributed import get_worker

    try:
        address = get_worker().address
    except ValueError:  # not in a worker
        return 1
    return _workers_beside(address)


@cache
def _workers_beside(address: str) -> int:
    """Return how many workers there were when it was first asked: with another number, models would load again."""
    from distributed import get_client

    place = urlsplit(address)
    if place.scheme == "inproc":  # they are threads of this process and have one engine together
        return 1
    try:
        client: Any = get_client()
        return sum(urlsplit(other).hostname == place.hostname for other in client.nthreads())
    except Exception:  # a matter of speed does not end a shard
        return 1
