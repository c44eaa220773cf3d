from __future__ import annotations

import shutil

import pytest
import yaml
from prefect.artifacts import Artifact

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.deployments.services import PREFECT_FILE
from prefect_huggingface.flows import prune_models
from prefect_huggingface.tasks.errors import PlanError

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_store_comes_down_to_its_size(tiny_openvino, tmp_path):
    store = ModelStore(path=tmp_path / "store")
    export = shutil.copytree(tiny_openvino, store.path / "exports" / tiny_openvino.name)
    kept = prune_models(store, 1.0)
    assert kept.removed == ()
    assert export.is_dir()

    report = prune_models(store, 0)
    assert [model.path for model in report.removed] == [export]
    assert report.kept_bytes == 0
    assert not export.exists()
    assert "export" in str(Artifact.get("pruned-models").data)


def test_the_weekly_deployment_obeys_the_limit_of_the_block(tiny_openvino, tmp_path):
    (weekly,) = (each for each in yaml.safe_load(PREFECT_FILE.read_text())["deployments"] if "prune" in each["name"])
    store = ModelStore(path=tmp_path / "store", max_size_gb=1e-6)
    export = shutil.copytree(tiny_openvino, store.path / "exports" / tiny_openvino.name)
    store.save("default", overwrite=True)
    assert prune_models(**weekly["parameters"]).removed
    assert not export.exists()

    shutil.copytree(tiny_openvino, export)
    ModelStore(path=store.path).save("default", overwrite=True)
    assert not prune_models(**weekly["parameters"]).removed
    assert prune_models(**{**weekly["parameters"], "default_size_gb": 1e-6}).removed


def test_a_store_without_a_limit_says_what_to_give(tmp_path):
    with pytest.raises(PlanError, match="no size limit. Give `max_size_gb`"):
        prune_models(ModelStore(path=tmp_path))
