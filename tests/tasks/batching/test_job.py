"""What a model is known by: settings that tuning found decide texts, so a batch does not go on with others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.batching.job import BatchJob, check_same_job, plan_job, resolve_model
from prefect_huggingface.tasks.engines.openvino_runtime import write_settings
from prefect_huggingface.tasks.errors import BatchError

FOUND = {"KV_CACHE_PRECISION": "u4", "max_num_seqs": 32}


@pytest.fixture
def model(tiny_openvino: Path, tmp_path: Path) -> LocalModel:
    return LocalModel(model_id=str(tiny_openvino), weight_format="fp32", store=ModelStore(path=tmp_path / "store"))


@pytest.fixture
def tuned(model: LocalModel, tiny_openvino: Path) -> Iterator[LocalModel]:
    path = write_settings(model, tiny_openvino, FOUND, {})
    yield model
    path.unlink(missing_ok=True)


def make_job(folder: Path, model: dict[str, Any]) -> BatchJob:
    from dataclasses import replace

    source = folder / "in.csv"
    source.write_text("id\n1\n")
    return replace(plan_job(str(source), "{id}"), models=(model,))


def test_a_model_that_was_tuned_meanwhile_is_another(model: LocalModel, tiny_openvino: Path, tmp_path: Path) -> None:
    before = make_job(tmp_path, resolve_model(model).identity)
    record = json.loads(json.dumps(before.as_dict()))
    check_same_job(make_job(tmp_path, resolve_model(model).identity), record, "j")

    write_settings(model, tiny_openvino, FOUND, {})
    after = make_job(tmp_path, resolve_model(model).identity)
    with pytest.raises(BatchError, match=r"\(model, tuned settings: null there, .*u4.* now\).*`engine.tuned` off"):
        check_same_job(after, record, "j")

    untuned = model.model_copy(update={"engine": model.engine.model_copy(update={"tuned": False})})
    check_same_job(make_job(tmp_path, resolve_model(untuned).identity), record, "j")


def test_sizes_and_what_the_user_gives_are_no_tuned_settings(tuned: LocalModel) -> None:
    assert resolve_model(tuned).identity["tuned settings"] == {"KV_CACHE_PRECISION": "u4"}
    given = tuned.model_copy(update={"ov_config": {"KV_CACHE_PRECISION": "u8"}})
    assert "tuned settings" not in resolve_model(given).identity


def test_every_field_that_differs_is_named_by_itself(tmp_path: Path) -> None:
    old, new = (make_job(tmp_path, {"task": "text-generation", "export": key}) for key in ("a", "b"))
    with pytest.raises(BatchError, match=r"\(model, export: \"a\" there, \"b\" now\)"):
        check_same_job(new, json.loads(json.dumps(old.as_dict())), "j")


def test_a_journal_of_another_version_says_so_and_no_more(tmp_path: Path) -> None:
    job = make_job(tmp_path, {})
    record = {"key": "old", "fingerprint": {"journal version": 1, "system prompt": "Be brief."}}
    with pytest.raises(BatchError, match=r"another job \(journal version: 1 there, \d+ now\)\. Start again"):
        check_same_job(job, record, "j")
