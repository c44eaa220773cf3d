"""Where and how precisely OpenVINO runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import EngineError

# With these, a row's greedy text is the same alone, in any batch, and streamed. OpenVINO's own defaults compute in
# bfloat16 where the processor has it, quantize activations to 8 bits by groups, and keep keys and values in 8 bits;
# all three round differently for different batches.
EXACT_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


def compile_properties(model: LocalModel) -> dict[str, Any]:
    """Return the properties to compile a model with.

    Full precision that is asked for (`INFERENCE_PRECISION_HINT` of f32, or `EXECUTION_MODE_HINT` of ACCURACY) is meant
    for all of the model, so that the properties of `EXACT_PROPERTIES` go with it unless they are given.
    """
    return {**EXACT_PROPERTIES, **model.ov_config} if wants_full_precision(model.ov_config) else dict(model.ov_config)


def wants_full_precision(properties: Mapping[str, Any]) -> bool:
    """Tell whether properties ask for full precision."""
    precision, mode = properties.get("INFERENCE_PRECISION_HINT"), properties.get("EXECUTION_MODE_HINT")
    return str(precision).lower() in ("f32", "fp32", "float32") or str(mode).upper() == "ACCURACY"


def choose_device(model: LocalModel) -> str:
    """Return OpenVINO's name of the device of a model.

    Raises:
        EngineError: If there is no such device.
    """
    device = "CPU" if model.device is None else model.device.upper()
    if device.lstrip("-").isdigit():
        device = "CPU" if int(device) < 0 else f"GPU.{device}"
    if device == "CPU":
        return device
    from openvino import Core

    available = Core().available_devices
    first = device.split(":")[0].split(".")[0]
    known = {name.split(".")[0] for name in available} | {"AUTO", "HETERO", "MULTI"}
    if first not in known or (device.startswith("GPU.") and device not in available):
        raise EngineError(
            f"`device` must be one of {', '.join(available)} here, got {model.device!r}. Choose one of them.",
            device=model.device,
        )
    return device


def kv_cache_precision(device: str, properties: dict[str, Any]) -> str:
    """Return the precision that keys and values are kept in, "u8" for instance."""
    given = properties.get("KV_CACHE_PRECISION")
    if given is not None:
        return str(given).lower()
    return "u8" if device == "CPU" else "f16"
