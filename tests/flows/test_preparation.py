from __future__ import annotations

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.flows import prepare_model
from prefect_huggingface.tasks.errors import ModelSourceError, QualityError
from prefect_huggingface.tasks.records import Export, Snapshot
from support.flow_logs import messages_of

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_an_export_is_made_once(bundled_model):
    model = LocalModel(model_id=str(bundled_model), weight_format="int8")
    first, second = prepare_model(model), prepare_model(model)
    assert isinstance(first, Export)
    assert second.reused
    assert (second.key, second.path) == (first.key, first.path)


def test_a_torch_model_is_used_as_it_is(bundled_model):
    prepared = prepare_model(LocalModel(model_id=str(bundled_model), backend="torch"))
    assert isinstance(prepared, Snapshot)
    assert prepared.path == bundled_model


@pytest.mark.parametrize(
    ("fixture", "settings", "said"),
    [
        ("tiny_llama", {"backend": "torch"}, "for backend 'openvino', got 'torch'"),
        ("tiny_openvino", {}, "its source is not here"),
        ("tiny_openvino", {"task": "image-text-to-text"}, "for models of text"),
    ],
)
def test_what_cannot_be_compared_is_prepared_with_a_warning(request, tmp_path, fixture, settings, said):
    """The weekly deployment has a least agreement, whatever the block `default` is."""
    model = LocalModel(model_id=str(request.getfixturevalue(fixture)), store=ModelStore(path=tmp_path), **settings)
    state = prepare_model(model, min_agreement=0.8, return_state=True)
    assert state.result().path
    (warning,) = [line for line in messages_of(state.state_details.flow_run_id) if "`min_agreement` is left" in line]
    assert said in warning


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ModelSourceError, match="nowhere"):
        prepare_model(LocalModel(model_id=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_an_export_that_is_worse_than_allowed_fails_and_leaves_its_table(tiny_llama, tmp_path):
    from prefect.artifacts import Artifact

    # Random weights answer at random, and int4 moves them: they never agree on every token.
    model = LocalModel(model_id=str(tiny_llama), weight_format="int4", store=ModelStore(path=tmp_path))
    prepare_model(model, min_agreement=0.0)
    with pytest.raises(QualityError, match="less than 100.0%"):
        prepare_model(model, min_agreement=1.0)
    assert Artifact.get(f"export-quality-{tiny_llama.name}").type == "table"
