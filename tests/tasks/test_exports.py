"""The tasks of exports as Prefect runs them."""

from __future__ import annotations

from pathlib import Path

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.exports import export_to_openvino, list_store, plan_export
from support.export_requests import LoggedExport


def test_a_flow_makes_an_export(logged_export: LoggedExport) -> None:
    export = logged_export.export
    assert not export.reused
    assert export.recipe["weight_format"] == "int4"
    assert (export.path / "openvino_model.xml").is_file()


def test_no_library_of_an_export_reports_its_work(logged_export: LoggedExport) -> None:
    assert not [path for path in logged_export.home.rglob("*") if "openvino" in path.name]


def test_the_tasks_work_without_prefect(logged_export: LoggedExport, tmp_path: Path) -> None:
    model = logged_export.model
    assert export_to_openvino.fn(model).reused
    assert export_to_openvino.fn(model, verify=True).reused
    assert plan_export.fn(model).path == logged_export.export.path
    entries = list_store.fn(model.store)
    assert {entry.recipe["weight_format"] for entry in entries} == {"int8", "int4"}
    assert list_store.fn(ModelStore(path=tmp_path)) == []
    assert plan_export.fn(LocalModel(model_id=model.model_id, store=ModelStore(path=tmp_path))).path is None
