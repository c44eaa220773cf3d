"""The tasks of exports as Prefect runs them: the log of the child is the log of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.exports import export_to_openvino, list_store, plan_export
from support.export_requests import LoggedExport

STEPS = ("Step 1 of 3: converting", "Step 2 of 3: quantizing", "Step 3 of 3", "Exported")


def test_a_flow_makes_an_export(logged_export: LoggedExport) -> None:
    export = logged_export.export
    assert not export.reused
    assert export.recipe["weight_format"] == "int4"
    assert (export.path / "openvino_model.xml").is_file()


@pytest.mark.parametrize("words", [*STEPS, "to OpenVINO in int4"])
def test_the_log_of_the_export_is_in_the_run(logged_export: LoggedExport, words: str) -> None:
    assert any(words in message for message in logged_export.messages), logged_export.messages


def test_the_tasks_work_without_prefect(logged_export: LoggedExport, tmp_path: Path) -> None:
    model = logged_export.model
    assert export_to_openvino.fn(model).reused
    assert export_to_openvino.fn(model, verify=True).reused
    assert plan_export.fn(model).path == logged_export.export.path
    entries = list_store.fn(model.store)
    assert {entry.recipe["weight_format"] for entry in entries} == {"int8", "int4"}
    assert list_store.fn(ModelStore(path=tmp_path)) == []
    assert plan_export.fn(LocalModel(model_id=model.model_id, store=ModelStore(path=tmp_path))).path is None
