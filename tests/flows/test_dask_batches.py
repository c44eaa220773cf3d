"""A batch over Dask workers: each loads its own engine, and what a killed one leaves goes on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow.parquet as pq
import pytest

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel
from prefect_huggingface.flows.batches import batch_embedding, batch_inference
from prefect_huggingface.tasks.batching.run import cut_shards
from prefect_huggingface.tasks.engines.cores import allowed_cores
from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.vector_models import TEXTS, make_embedder

pytest.importorskip("prefect_dask", reason='needs pip install "prefect-huggingface[dask]"')
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

ROWS, SHARDS = 500, 8
CANARY = "hf_canarycanarycanarycanary"
PROMPT = "What is the number {number} in French?"
OPTIONS = {"max_new_tokens": 24, "ignore_eos": True}


def attempts(journal: Journal) -> set[tuple[int, str]]:
    """Shards and attempts that have committed rows."""
    cut = cut_shards(range(ROWS), SHARDS)
    shards = {name: next(part[0] for part in cut if name.first <= part[-1]) for name in journal.names()}
    return {(start, name.attempt) for name, start in shards.items()}


def count_with_canary(canary: str, dask_scheduler: Any = None) -> tuple[int, int]:
    """Return how many tasks the scheduler holds, and in how many of them the canary is. It runs in the scheduler."""
    specs = [cloudpickle.dumps(task.run_spec) for task in dask_scheduler.tasks.values()]
    return len(specs), sum(canary.encode() in spec for spec in specs)


def kill_a_worker(journal: Journal, cluster: Any, killed: list[int], seen: list[Any]) -> None:
    """Wait until two shards are under way, look for the token, and kill the process of a worker."""
    deadline = time.monotonic() + 240
    while len({start for start, _ in attempts(journal)}) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    with cluster.get_client() as client:
        seen.append(client.run_on_scheduler(count_with_canary, CANARY))
        seen.append([settings for found in client.run(settings_of_engines).values() for settings in found])
        pids = client.run(os.getpid)
    killed.append(pids[next(iter(pids))])
    os.kill(killed[0], signal.SIGKILL)


def settings_of_engines() -> list[dict[str, Any]]:
    """Return the properties of the engines of a worker."""
    from prefect_huggingface.tasks.engines.registry import _registry

    return [json.loads(json.loads(key.settings)[0])["ov_config"] for key in _registry.entries]


def test_a_killed_worker_is_made_up_for(tmp_path: Path, bundled_model: Path) -> None:
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    source, whole, destination = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"number": index}) + "\n" for index in range(ROWS)))
    model = LocalModel(model_id=str(bundled_model), credentials=HuggingFaceCredentials(token=CANARY))
    batch_inference(model, str(source), str(whole), PROMPT, OPTIONS)

    journal, killed, seen = Journal.beside(str(destination)), [], []
    kwargs = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None,
              "local_directory": str(tmp_path / "dask")}  # fmt: skip
    with LocalCluster(host="127.0.0.1", **kwargs) as cluster:
        thread = threading.Thread(target=kill_a_worker, args=(journal, cluster, killed, seen), daemon=True)
        thread.start()
        on_dask = batch_inference.with_options(task_runner=DaskTaskRunner(address=cluster.scheduler_address))
        summary = on_dask(
            model,
            str(source),
            str(destination),
            PROMPT,
            OPTIONS,
            shards=SHARDS,
            max_concurrency=4,
            keep_journal="always",
        )
        thread.join()

    assert killed
    assert seen[0][0] > 0
    assert seen[0][1] == 0  # no token is in what was sent
    # Two workers on one machine have a part of its cores each.
    assert seen[1]
    share = max(len(allowed_cores()) // 2, 1) if allowed_cores() == allowed_cores(1) else None
    assert {properties.get("INFERENCE_NUM_THREADS") for properties in seen[1]} == {share}
    assert not any(CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert summary.rows == summary.succeeded == ROWS
    assert destination.read_bytes() == whole.read_bytes()
    assert journal.count().rows == ROWS  # no row was committed twice
    found = attempts(journal)
    print(f"{len(found)} attempts at {len({start for start, _ in found})} shards")
    assert len({start for start, _ in found}) == SHARDS
    assert len(found) >= SHARDS


def test_vectors_are_computed_over_workers(tmp_path: Path, session_folder: Path) -> None:
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    folder = make_embedder(session_folder / "dask" / "embedder", "xlm-roberta")
    model = LocalModel(model_id=str(folder), task="feature-extraction", backend="torch", dtype="float32")
    source, whole, destination = tmp_path / "in.jsonl", tmp_path / "whole.parquet", tmp_path / "out.parquet"
    source.write_text(
        "".join(json.dumps({"id": number, "text": f"{number} {TEXTS[number % 6]}"}) + "\n" for number in range(ROWS))
    )
    batch_embedding(model, str(source), str(whole), "{text}")

    kwargs = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None,
              "local_directory": str(tmp_path / "dask")}  # fmt: skip
    with LocalCluster(host="127.0.0.1", **kwargs) as cluster:
        on_dask = batch_embedding.with_options(task_runner=DaskTaskRunner(address=cluster.scheduler_address))
        summary = on_dask(model, str(source), str(destination), "{text}", shards=SHARDS, keep_journal="always")

    assert summary.rows == summary.succeeded == ROWS
    assert len(attempts(Journal.beside(str(destination)))) == SHARDS
    one, other = pq.read_table(destination), pq.read_table(whole)
    assert one["id"].to_pylist() == other["id"].to_pylist()
    assert np.allclose(one["embedding"].to_pylist(), other["embedding"].to_pylist(), atol=1e-5)
