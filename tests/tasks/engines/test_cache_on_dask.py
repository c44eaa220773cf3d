"""On a process worker of Dask the tasks of a flow, and of the next flow, use one engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prefect import flow

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks import generate_text
from prefect_huggingface.tasks.engines.registry import list_engines

pytest.importorskip("prefect_dask", reason='needs pip install "prefect-huggingface[dask]"')
pytestmark = pytest.mark.usefixtures("prefect_server")

CLUSTER = {"n_workers": 1, "threads_per_worker": 1, "processes": True, "dashboard_address": None, "host": "127.0.0.1"}


@flow
def ask_three_times(model: LocalModel) -> list[str]:
    futures = [generate_text.submit(model, [f"What is the number {number}?"]) for number in range(3)]
    return [completion.text for future in futures for completion in future.result()]


def test_tasks_and_flows_on_a_worker_share_one_engine(tiny_openvino: Path):
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    model = LocalModel(model_id=str(tiny_openvino), options=GenerationOptions(max_new_tokens=4))
    with LocalCluster(**CLUSTER) as cluster, cluster.get_client() as client:
        on_dask = ask_three_times.with_options(task_runner=DaskTaskRunner(address=cluster.scheduler_address))
        first = on_dask(model)
        (loaded,) = next(iter(client.run(list_engines).values()))
        second = on_dask(model)
        (still,) = next(iter(client.run(list_engines).values()))
        (worker,) = client.run(os.getpid).values()
    assert worker != os.getpid()
    assert first == second
    assert still.loaded_at == loaded.loaded_at
    assert still.used_at > loaded.used_at
