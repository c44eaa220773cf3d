"""A plan that cannot work fails in a moment and says what to do; nothing is started for it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.exports import export_model, plan_model
from prefect_huggingface.tasks.storage.exports.plan import ExportSource, estimate_room, make_plan
from prefect_huggingface.tasks.storage.exports.recipes import installed_version, resolve_recipe, support_table
from prefect_huggingface.tasks.storage.folders import SourceWeights

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    """Function that writes a checkpoint folder with a configuration and few weights."""

    def make(config: dict[str, Any], **settings: Any) -> LocalModel:
        import numpy as np
        from safetensors.numpy import save_file

        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"weight": np.zeros((1000, 10), dtype=np.float32)}, folder / "model.safetensors")
        return LocalModel(model_id=str(folder), store=ModelStore(path=tmp_path / "store"), **settings)

    return make


def test_a_plan_says_what_would_happen(tiny_llama: Path, tmp_path: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), weight_format="int4", store=ModelStore(path=tmp_path))
    plan = plan_model(model)
    assert plan.problems == ()
    assert plan.path is None
    assert plan.recipe["quantization"]["group_size"] == 32
    assert 300_000 < plan.parameters < 500_000
    assert plan.disk_bytes > 1_000_000
    assert plan.memory_bytes > 600_000_000
    assert plan.free_disk_bytes > 0
    assert not (tmp_path / "exports").exists(), "a plan makes nothing"


def test_a_plan_knows_what_is_there(exported: LocalModel) -> None:
    plan = plan_model(exported)
    assert plan.path == export_model(exported).path
    assert plan.key == export_model(exported).key


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, {}, "does not generate text"),
        ({"model_type": "t5", "is_encoder_decoder": True}, {}, "Set `task` to 'summarization'"),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, {},
            "'bart'|encoder-decoder model",
        ),
        (LLAMA, {"task": "translation"}, "cannot do 'translation'"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, {}, "LlamaForSequenceClassification"),
        ({"model_type": "lama"}, {}, "nearest supported ones are .*'llama'"),
        ({"model_type": "my-own", "auto_map": {"AutoConfig": "x.Y"}}, {}, "trust_remote_code"),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "quantized already"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, {}, "gptqmodel"),
        ({"model_type": "qwen2_vl"}, {"task": "image-text-to-text"}, "Transformers up to 5.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(
    checkpoint: Any, config: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    model = checkpoint(config, **settings)
    started = time.process_time()
    with pytest.raises(PlanError, match=words):
        export_model(model)
    assert time.process_time() - started < 2.0
    assert not (model.store_path / "exports").exists(), "something was started"


@pytest.mark.skipif(installed_version("datasets") is not None, reason="the package is installed")
def test_a_missing_package_is_named(checkpoint: Any) -> None:
    options = QuantizationOptions(scale_estimation=True, dataset="wikitext2")
    with pytest.raises(PlanError, match=r"'datasets'.*prefect-huggingface\[calibration\]"):
        export_model(checkpoint(LLAMA, weight_format="int4", quantization=options))


def test_an_unknown_data_set_is_refused(checkpoint: Any) -> None:
    options = QuantizationOptions(awq=True, dataset="wikitext3")
    plan = plan_model(checkpoint(LLAMA, weight_format="int4", quantization=options))
    assert any("'wikitext3'" in problem and "wikitext2" in problem for problem in plan.problems)


def test_the_torch_backend_has_no_export(checkpoint: Any) -> None:
    with pytest.raises(PlanError, match="backend 'openvino'"):
        export_model(checkpoint(LLAMA, backend="torch"))


def test_a_model_that_is_too_large_is_refused(checkpoint: Any) -> None:
    model = checkpoint(LLAMA)
    weights = SourceWeights(2**42, 2**43)
    _, memory, least = estimate_room(weights, "int8")
    assert memory > least > 8e12
    plan = make_plan(model, resolve_recipe(model, None), ExportSource("c", LLAMA, weights))
    assert any("of disk" in problem for problem in plan.problems)
    assert any("of memory" in problem and "OpenVINO repository" in problem for problem in plan.problems)


def test_the_table_of_architectures_is_that_of_optimum() -> None:
    import optimum.exporters.openvino.model_configs  # noqa: F401
    from optimum.exporters.tasks import TasksManager

    real = {
        name: set(exporters["openvino"])
        for name, exporters in TasksManager._SUPPORTED_MODEL_TYPE.items()
        if "openvino" in exporters
    }
    assert {name: set(support.tasks) for name, support in support_table().items()} == real
