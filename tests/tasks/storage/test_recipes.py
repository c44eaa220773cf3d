"""A recipe is decided before anything starts: explicit, by repository id only, and refused where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, QuantizationOptions
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.storage.exports.recipes import (
    Recipe,
    export_key,
    fitting_group_size,
    group_size_notes,
    recipe_notes,
    resolve_recipe,
)

SMOLLM_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
PHI = "microsoft/Phi-3-mini-4k-instruct"


def recipe_of(weight_format: str = "int4", repo_id: str | None = None, **options: Any) -> Recipe:
    quantization = QuantizationOptions(**options) if options else None
    model = LocalModel(model_id="org/name", weight_format=weight_format, quantization=quantization)
    return resolve_recipe(model, repo_id)


PLAIN = {
    "dtype": "int4", "bits": 4, "sym": False, "group_size": 128, "group_size_fallback": "adjust", "ratio": 1.0,
    "backup_precision": None, "all_layers": False, "sensitivity_metric": None, "quant_method": "default",
    "scale_estimation": False, "gptq": False, "lora_correction": False, "dataset": None, "num_samples": None,
}  # fmt: skip
MEASURED = {"group_size": 32, "ratio": 0.8, "backup_precision": "int8_asym", "quant_method": "awq"}


def test_int4_is_explicit() -> None:
    assert recipe_of().quantization == PLAIN | MEASURED
    assert recipe_of(group_size_fallback="error").quantization == PLAIN | MEASURED | {"group_size_fallback": "error"}
    assert recipe_of(group_size=128).quantization == PLAIN, "whoever chooses one option chooses all"


def test_the_default_of_int4_is_for_models_that_generate_text() -> None:
    model = LocalModel(model_id="org/name", weight_format="int4", task="summarization")
    assert resolve_recipe(model, None).quantization == PLAIN


@pytest.mark.parametrize(
    ("weight_format", "group_size"), [("int4", 32), ("nf4", 128), ("mxfp4", 32), ("cb4", -1), ("int8", -1)]
)
def test_each_format_has_its_group_size(weight_format: str, group_size: int) -> None:
    quantization = recipe_of(weight_format).quantization
    assert quantization is not None
    assert quantization["group_size"] == group_size


@pytest.mark.parametrize("weight_format", ["fp32", "fp16"])
def test_full_precision_is_not_quantized(weight_format: str) -> None:
    assert recipe_of(weight_format).quantization is None


def test_options_are_kept() -> None:
    quantization = recipe_of(sym=True, group_size=64, ratio=0.8, awq=True, all_layers=True).quantization
    assert quantization is not None
    assert quantization["sym"] is True
    assert (quantization["group_size"], quantization["ratio"]) == (64, 0.8)
    assert quantization["quant_method"] == "awq"
    assert quantization["all_layers"] is True


def test_a_known_repository_has_its_recommended_recipe() -> None:
    recipe = recipe_of(repo_id=PHI)
    assert recipe.quantization is not None
    assert recipe.quantization["scale_estimation"] is True
    assert recipe.quantization["dataset"] == "wikitext2"
    assert PHI in recipe.notes[0]


def test_only_the_repository_id_chooses_a_recommendation() -> None:
    plain = recipe_of()
    assert recipe_of(repo_id="org/Phi-3-mini-4k-instruct") == plain
    local = LocalModel(model_id="/models/Phi-3-mini-4k-instruct", weight_format="int4")
    assert resolve_recipe(local, None) == plain
    own = recipe_of(repo_id=PHI, group_size=128)
    assert own.quantization == PLAIN, "an option of the user's takes its place"
    assert not own.notes


def test_a_table_of_optimum_that_was_renamed_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_huggingface.tasks.storage.exports import recipes

    monkeypatch.setitem(recipes.TABLES, ("int4", None), "_A_NAME_OF_TOMORROW")
    with pytest.raises(PlanError, match="has no table '_A_NAME_OF_TOMORROW'"):
        recipe_of(repo_id=PHI)
    assert recipe_of().weight_format == "int4", "a folder needs no table"


def test_the_recommendations_are_those_of_optimum() -> None:
    from optimum.intel.openvino.configuration import _DEFAULT_4BIT_WQ_CONFIGS

    from prefect_huggingface.tasks.storage.exports.recipes import INT4_WEIGHTS, recommended_options

    assert len(_DEFAULT_4BIT_WQ_CONFIGS) > 50
    kept = 0
    for repo_id, options in _DEFAULT_4BIT_WQ_CONFIGS.items():
        plain = {name: getattr(value, "value", value) for name, value in options.items()}
        # Those with one recipe in another are for parts of a model.
        is_flat = not any(isinstance(value, dict) for value in plain.values())
        assert recommended_options(INT4_WEIGHTS, repo_id) == (plain if is_flat else None)
        kept += is_flat
    assert kept > 50


def test_every_recommendation_is_a_configuration_of_optimum_without_unknown_settings() -> None:
    from optimum.intel import OVQuantizationConfig
    from optimum.intel.openvino.configuration import _DEFAULT_4BIT_WQ_CONFIGS, _DEFAULT_INT8_FQ_CONFIGS

    from prefect_huggingface.tasks.storage.exports.exporter import make_quantization_config

    for repo_id in _DEFAULT_4BIT_WQ_CONFIGS:
        made = make_quantization_config(recipe_of(repo_id=repo_id).as_dict())
        assert not made.kwargs, repo_id
    flat = [repo_id for repo_id, found in _DEFAULT_INT8_FQ_CONFIGS.items() if "quantization_configs" not in found]
    assert flat
    for repo_id in flat:
        full = resolve_recipe(LocalModel(model_id=repo_id, quantization={"quant_mode": "int8"}), repo_id)
        assert isinstance(make_quantization_config(full.as_dict()), OVQuantizationConfig), repo_id


def test_a_group_size_that_does_not_divide_is_adjusted_and_said() -> None:
    notes = list(recipe_notes(recipe_of(group_size=128), SMOLLM_135M))
    assert notes == ["Group size 128 does not divide 576 (hidden_size): these layers get groups of 64."]


def test_a_layer_without_a_fitting_group_is_said() -> None:
    (note,) = group_size_notes({"hidden_size": 520, "intermediate_size": 1024}, 128, "adjust")
    assert "backup precision" in note


def test_a_group_size_may_not_be_adjusted() -> None:
    recipe = recipe_of(group_size=128, group_size_fallback="error")
    with pytest.raises(PlanError, match=r"128 does not divide 576.*`group_size=64`"):
        list(recipe_notes(recipe, SMOLLM_135M))


@pytest.mark.parametrize(
    ("size", "group_size", "fitting"),
    [(576, 128, 64), (1536, 128, 128), (520, 128, None), (96, 64, 32), (7, -1, -1)],
)
def test_fitting_group_sizes(size: int, group_size: int, fitting: int | None) -> None:
    assert fitting_group_size(size, group_size) == fitting


@pytest.mark.parametrize(
    ("weight_format", "options", "words"),
    [
        ("int8", {"group_size": 64}, "`group_size` does not go with weight format 'int8'"),
        ("int8", {"awq": True}, "`awq` does not go"),
        ("int8", {"all_layers": True}, "`all_layers` does not go"),
        ("fp16", {"sym": True}, "`sym` does not go with weight format 'fp16'"),
        ("mxfp4", {"gptq": True, "dataset": "auto"}, "`gptq` does not go with weight format 'mxfp4'"),
        ("mxfp4", {"group_size": 64}, "`group_size` 64 does not go with weight format 'mxfp4'"),
        ("int4", {"group_size": 0}, "`group_size` 0 does not go"),
        ("int4", {"ratio": 0.5, "sensitivity_metric": "best"}, "`sensitivity_metric` must be one of"),
        ("int4", {"ratio": 0.5, "sensitivity_metric": "hessian_input_activation"}, "needs calibration data"),
        ("int4", {"smooth_quant_alpha": 0.5}, "`smooth_quant_alpha` does not go"),
        ("int4", {"scale_estimation": True}, "`scale_estimation` needs calibration data"),
        ("int4", {"gptq": True, "lora_correction": True, "dataset": "auto"}, "exclude each other"),
        ("int8", {"quant_mode": "int8"}, "needs data"),
        ("int8", {"quant_mode": "f8e4m3", "dataset": "auto", "ratio": 0.5}, "`ratio` does not go"),
    ],
)
def test_options_that_do_not_fit_are_refused(weight_format: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        recipe_of(weight_format, **options)


def test_ratio_with_int8_is_refused_by_the_block() -> None:
    with pytest.raises(ValueError, match="`ratio` is for 4-bit formats"):
        recipe_of("int8", ratio=0.5)


def test_weights_and_activations_in_two_precisions() -> None:
    quantization = recipe_of("int4", quant_mode="int4_f8e4m3", dataset="auto").quantization
    assert quantization is not None
    assert quantization["weight_quantization_config"]["dtype"] == "int4"
    assert quantization["full_quantization_config"]["dtype"] == "f8e4m3"


def test_the_key_changes_with_everything_that_decides_the_content() -> None:
    recipe, versions = recipe_of(), {"nncf": "3.4.0"}
    base = export_key("a" * 40, recipe, versions, 1)
    assert base == export_key("a" * 40, recipe_of(), {"nncf": "3.4.0"}, 1)
    others = {
        export_key("b" * 40, recipe, versions, 1),
        export_key("a" * 40, recipe_of("int8"), versions, 1),
        export_key("a" * 40, recipe_of(group_size=64), versions, 1),
        export_key("a" * 40, recipe, {"nncf": "3.5.0"}, 1),
        export_key("a" * 40, recipe, versions, 2),
    }
    assert len(others | {base}) == 6
