"""A batch over the workers of Ray gives the same output as one in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.tasks.storage.journals.journal import Journal

pytest.importorskip("prefect_ray", reason='needs pip install "prefect-huggingface[ray]"')
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

ROWS, SHARDS = 300, 6
PROMPT = "What is the number {number} in French?"
LOCAL_RAY = {"num_cpus": 2, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def test_a_batch_runs_on_ray(tmp_path: Path, bundled_model: Path) -> None:
    from prefect_ray import RayTaskRunner

    source, whole, destination = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"number": index}) + "\n" for index in range(ROWS)))
    model = LocalModel(model_id=str(bundled_model))
    batch_inference(model, str(source), str(whole), PROMPT)
    on_ray = batch_inference.with_options(task_runner=RayTaskRunner(init_kwargs=LOCAL_RAY))
    summary = on_ray(model, str(source), str(destination), PROMPT, shards=SHARDS, keep_journal="always")

    assert summary.succeeded == ROWS
    assert destination.read_bytes() == whole.read_bytes()
    assert Journal.beside(str(destination)).count().rows == ROWS
