"""Exports of models on the Hub: checked before the download, and kept when the source is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.exports import plan_model
from prefect_huggingface.tasks.storage.exports.store import get_export
from prefect_huggingface.tasks.storage.hub.cache import list_snapshots, remove_snapshot
from support.hub_server import LocalHub


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[LocalHub]:
    server = LocalHub()
    files = {path.name: path for path in tiny_llama.iterdir()}
    server.create("org/tiny", files)
    config = json.loads((tiny_llama / "config.json").read_text())
    server.create("org/strange", {**files, "config.json": json.dumps({**config, "model_type": "lama"}).encode()})
    with server:
        yield server


def model_of(hub: LocalHub, store: Path, name: str = "org/tiny", **settings: object) -> LocalModel:
    return LocalModel(
        model_id=name, credentials=HuggingFaceCredentials(endpoint=hub.endpoint), store=ModelStore(path=store),
        **settings,
    )  # fmt: skip


def test_a_plan_downloads_no_weights(hub: LocalHub, tmp_path: Path) -> None:
    plan = plan_model(model_of(hub, tmp_path, weight_format="int4"))
    assert plan.problems == ()
    assert plan.path is None
    assert plan.parameters > 100_000
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_exported_is_not_downloaded(hub: LocalHub, tmp_path: Path) -> None:
    model = model_of(hub, tmp_path, "org/strange")
    assert any("'llama'" in problem for problem in plan_model(model).problems)
    with pytest.raises(PlanError, match="nearest supported ones are .*'llama'"):
        get_export(model)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_an_export_is_enough_without_its_source(hub: LocalHub, tmp_path: Path) -> None:
    made = get_export(model_of(hub, tmp_path))
    assert not made.reused
    assert made.source == "org/tiny"
    (snapshot,) = list_snapshots(ModelStore(path=tmp_path))
    assert made.commit == snapshot.commit
    remove_snapshot(snapshot)
    again = get_export(model_of(hub, tmp_path))
    assert again.reused
    assert again.path == made.path
    assert not list_snapshots(ModelStore(path=tmp_path)), "the source was downloaded again"
    offline = model_of(hub, tmp_path, revision=made.commit, offline=True)
    assert get_export(offline).reused
