"""Each supported architecture goes to OpenVINO and back: its exports answer as its source does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.tasks.evaluation import compare_formats
from prefect_huggingface.tasks.storage.exports.store import get_export, read_manifest
from support.export_models import CAUSAL, SEQ2SEQ, make_model
from support.smollm_models import make_smollm

PROMPTS = ["The capital of France is", "One, two, three,", "What is the number 42 in French?", "A small model says"]
TEXTS = ["The capital of France is Paris and the capital of Spain is Madrid.", "One, two, three, four, five."] * 4
DATA: dict[str, Any] = {"dataset": TEXTS, "num_samples": 4}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("architecture", [*CAUSAL, *SEQ2SEQ])
def test_round_trip(architecture: str, tmp_path: Path) -> None:
    task = "text-generation" if architecture in CAUSAL else "translation"
    folder = make_model(tmp_path / architecture, architecture)
    model = LocalModel(model_id=str(folder), task=task, store=ModelStore(path=tmp_path / "store"))
    eight, four = compare_formats(model, PROMPTS, formats=["int8", "int4"], max_new_tokens=16).formats
    # An export that computes something else agrees on one token of four hundred and diverges by several nats.
    assert eight.agreement > 0.8
    assert eight.divergence < 0.1
    assert four.agreement > 0.15
    assert four.divergence < 2.0
    manifest = read_manifest(get_export(model.model_copy(update={"weight_format": "int4"})).path)
    assert manifest is not None
    assert manifest.weights["u4"] > 0.4


@pytest.mark.parametrize(
    ("weight_format", "options"),
    [
        ("fp32", {}), ("fp16", {}), ("nf4", {}), ("mxfp4", {}), ("cb4", {}),
        ("int4", {"awq": True}),
        ("int4", {"ratio": 0.5, "all_layers": True, "sym": True, "backup_precision": "int8_sym", "group_size": 32}),
        ("int4", {"ratio": 0.5, "sensitivity_metric": "hessian_input_activation", **DATA}),
        ("int4", {"awq": True, "scale_estimation": True, **DATA}),
        ("int4", {"gptq": True, **DATA}),
        ("int4", {"lora_correction": True, **DATA}),
        ("int4", {"scale_estimation": True, "dataset": "auto", "num_samples": 2}),
        ("int8", {"quant_mode": "int8", "smooth_quant_alpha": 0.6, **DATA}),
        ("int8", {"quant_mode": "f8e4m3", **DATA}),
        ("int8", {"quant_mode": "f8e5m2", **DATA}),
        ("int8", {"quant_mode": "cb4_f8e4m3", **DATA}),
        ("int8", {"quant_mode": "int4_f8e4m3", **DATA}),
        ("int8", {"quant_mode": "int4_f8e5m2", **DATA}),
    ],
)  # fmt: skip
def test_every_option_makes_an_export(
    tiny_llama: Path, tmp_path: Path, weight_format: str, options: dict[str, Any]
) -> None:
    quantization = QuantizationOptions(**options) if options else None
    store = ModelStore(path=tmp_path)
    export = get_export(
        LocalModel(model_id=str(tiny_llama), weight_format=weight_format, quantization=quantization, store=store)
    )
    assert export.recipe["weight_format"] == options.get("quant_mode", weight_format)


def test_the_shape_of_smollm2_goes_to_int4_without_any_option(tmp_path: Path) -> None:
    folder = make_smollm(tmp_path / "SmolLM2-135M")
    model = LocalModel(model_id=str(folder), weight_format="int4", store=ModelStore(path=tmp_path / "store"))
    manifest = read_manifest(get_export(model).path)
    assert manifest is not None
    # The default: groups of 32, which divide every size, and a fifth of the layers, the head among them, in 8 bits.
    assert manifest.notes == ()
    assert manifest.weights["u4"] > 0.6
    assert manifest.weights["u8"] > 0.2
    assert manifest.recipe["quantization"]["group_size"] == 32
