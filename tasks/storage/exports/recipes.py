"""Recipes: every setting of an export, explicit, decided before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefect_huggingface.blocks import LocalModel, QuantizationOptions
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.storage.exports import recommendations
from prefect_huggingface.tasks.storage.exports.layer_sizes import group_size_notes

EXPORT_TASKS = {
    "text-generation": "text-generation-with-past",
    "text2text-generation": "text2text-generation-with-past",
    "summarization": "text2text-generation-with-past",
    "translation": "text2text-generation-with-past",
    "image-text-to-text": "image-text-to-text",
    "feature-extraction": "feature-extraction",
    "text-ranking": "text-classification",
}
GROUP_SIZES = {"int4": 128, "nf4": 128, "mxfp4": 32, "cb4": -1}
SENSITIVITY_METRICS = (
    "weight_quantization_error", "hessian_input_activation", "mean_activation_variance", "max_activation_variance",
    "mean_activation_magnitude",
)  # fmt: skip
DATA_AWARE = ("awq", "scale_estimation", "gptq", "lora_correction")
ONLY_FOUR_BITS = ("group_size", "ratio", "backup_precision", "sensitivity_metric", "all_layers", *DATA_AWARE)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an export is made.

    Attributes:
        task: Task of Optimum, with the cache of keys and values.
        weight_format: Format of the weights, or the mode of weights and activations.
        quantization: Arguments of Optimum's quantization configuration, or None for weights that are not quantized.
        trust_remote_code: Whether Python code of the model is run.
        notes: What was decided for this model, in sentences. They do not change the export.
    """

    task: str
    weight_format: str
    quantization: Mapping[str, Any] | None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, without the notes."""
        return {
            "task": self.task,
            "weight_format": self.weight_format,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "trust_remote_code": self.trust_remote_code,
        }


def resolve_recipe(model: LocalModel, repo_id: str | None) -> Recipe:
    """Decide every setting of the export of a model. Imports nothing heavy and reads no file of the model.

    Args:
        model: Model with its weight format and quantization options.
        repo_id: Repository of the model, None for a local folder. A known repository may have a recommended recipe.

    Raises:
        PlanError: If the options do not fit each other.
    """
    options = model.quantization or QuantizationOptions()
    weight_format = options.quant_mode or model.weight_format or "int8"
    recommended = _recommended(repo_id, options, weight_format)
    quantization = _quantization(model, options, weight_format, recommended)
    ignored = recommendations.recommended_options(recommendations.IGNORED_SCOPES, repo_id)
    if quantization is not None and ignored:
        quantization = {**quantization, "ignored_scopes": dict(ignored)}
    notes: tuple[str, ...] = ()
    if recommended is not None:
        notes = (f"The recipe is the one that optimum-intel recommends for {repo_id!r} in {weight_format}.",)
    return Recipe(EXPORT_TASKS[model.task], weight_format, quantization, model.trust_remote_code, notes)


def recipe_notes(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a recipe means for a model, in sentences.

    Args:
        recipe: Every setting.
        config: Content of `config.json` of the model.

    Raises:
        PlanError: If the group size does not divide a layer and must not be adjusted.
    """
    yield from recipe.notes
    settings = dict(recipe.quantization or {})
    settings = settings.get("weight_quantization_config", settings)
    if settings.get("bits") == 4:
        yield from group_size_notes(config, int(settings.get("group_size", 128)), settings.get("group_size_fallback"))


def export_key(commit: str, recipe: Recipe, versions: Mapping[str, str], schema: int) -> str:
    """Return the key of an export: the sha256 of everything that decides what it contains."""
    content = {"schema": schema, "commit": commit, "recipe": recipe.as_dict(), "versions": dict(versions)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _recommended(repo_id: str | None, options: QuantizationOptions, weight_format: str) -> Mapping[str, Any] | None:
    """Return the recommended options where the user leaves the choice; fallbacks and modes leave it."""
    chosen = options.model_fields_set - {"quant_mode", "group_size_fallback"}
    if chosen:
        return None
    tables = {"int4": recommendations.INT4_WEIGHTS, "int8": recommendations.INT8_WEIGHTS}
    if options.quant_mode is None:
        table = tables.get(weight_format)
    else:
        table = recommendations.INT8_FULL if options.quant_mode == "int8" else None
    return recommendations.recommended_options(table, repo_id) if table else None


def _quantization(
    model: LocalModel, options: QuantizationOptions, weight_format: str, recommended: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the arguments for the quantization in a weight format, None for one without."""
    if options.quant_mode is not None:
        return _full_quantization(model, options, recommended)
    _refuse_options(model, weight_format, ("smooth_quant_alpha",))
    if weight_format in ("fp32", "fp16"):
        _refuse_options(model, weight_format, ("sym", "dataset", "num_samples", *ONLY_FOUR_BITS))
        return None
    if weight_format == "int8":
        _refuse_options(model, weight_format, ("dataset", "num_samples", *ONLY_FOUR_BITS))
        return _eight_bits(options, recommended)
    return _four_bits(model, weight_format, options, recommended)


def _eight_bits(options: QuantizationOptions, recommended: Mapping[str, Any] | None) -> dict[str, Any]:
    base = {"dtype": "int8", "bits": 8, "sym": bool(options.sym), "group_size": -1, "ratio": 1.0}
    return {**base, **(recommended or {})}


def _four_bits(
    model: LocalModel, weight_format: str, options: QuantizationOptions, recommended: Mapping[str, Any] | None
) -> dict[str, Any]:
    group_size = GROUP_SIZES[weight_format] if options.group_size is None else options.group_size
    fallback = options.group_size_fallback
    if weight_format == "mxfp4":
        _refuse_options(model, weight_format, DATA_AWARE)
        # The format has groups of 32 and no others, so there is nothing to adjust.
        fallback = "ignore" if fallback == "adjust" else fallback
    if group_size == 0 or (weight_format == "mxfp4" and group_size != GROUP_SIZES["mxfp4"]):
        raise PlanError(f"`group_size` {group_size!r} does not go with weight format {weight_format!r}. Leave it out.")
    base: dict[str, Any] = {
        "dtype": weight_format,
        "bits": 4,
        "sym": bool(options.sym),
        "group_size": group_size,
        "group_size_fallback": fallback,
        "ratio": 1.0 if options.ratio is None else options.ratio,
        "backup_precision": options.backup_precision,
        "all_layers": options.all_layers,
        "sensitivity_metric": options.sensitivity_metric,
        "quant_method": "awq" if options.awq else "default",
        "scale_estimation": options.scale_estimation,
        "gptq": options.gptq,
        "lora_correction": options.lora_correction,
        "dataset": options.dataset,
        "num_samples": options.num_samples,
    }
    base.update(recommended or {})
    _check_data(base)
    return base


def _full_quantization(
    model: LocalModel, options: QuantizationOptions, recommended: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the arguments for quantizing weights and activations."""
    mode = str(options.quant_mode)
    if recommended is not None:
        return dict(recommended)
    if options.dataset is None:
        raise PlanError(
            f"Mode {mode!r} quantizes activations too and needs data. Set `dataset` to texts of yours or 'auto'."
        )
    weights, _, activations = mode.rpartition("_")
    full = {
        "dtype": activations,
        "bits": 8,
        "sym": bool(options.sym),
        "smooth_quant_alpha": options.smooth_quant_alpha,
        "dataset": options.dataset,
        "num_samples": options.num_samples or 128,
    }
    if not weights:
        _refuse_options(model, mode, ONLY_FOUR_BITS)
        return {**full, "weight_only": False}
    return {
        "weight_quantization_config": _four_bits(model, weights, options, None),
        "full_quantization_config": full,
        "dataset": options.dataset,
        "num_samples": options.num_samples or 128,
    }


def _refuse_options(model: LocalModel, weight_format: str, names: tuple[str, ...]) -> None:
    """Refuse options that a weight format does not have, and do not drop them silently."""
    options = model.quantization or QuantizationOptions()
    for name in names:
        default = QuantizationOptions.model_fields[name].default
        value = getattr(options, name)
        if value != default and not (name == "ratio" and value == 1.0):
            raise PlanError(f"`{name}` does not go with weight format {weight_format!r}, got {value!r}. Leave it out.")


def _check_data(quantization: Mapping[str, Any]) -> None:
    for name in ("scale_estimation", "gptq", "lora_correction"):
        if quantization.get(name) and quantization.get("dataset") is None:
            raise PlanError(f"`{name}` needs calibration data. Set `dataset` to texts of yours or 'auto'.")
    metric = quantization.get("sensitivity_metric")
    if metric is not None and metric not in SENSITIVITY_METRICS:
        raise PlanError(
            f"`sensitivity_metric` must be one of {', '.join(SENSITIVITY_METRICS)}, got {metric!r}. Correct it."
        )
    if metric not in (None, "weight_quantization_error") and quantization.get("dataset") is None:
        raise PlanError(f"`sensitivity_metric` {metric!r} needs calibration data. Set `dataset`, or leave it out.")
    if quantization.get("gptq") and quantization.get("lora_correction"):
        raise PlanError("`gptq` and `lora_correction` exclude each other. Leave one out.")
