"""How LangChain code says with which weights, and with whose token, a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any, get_args

from pydantic import SecretStr

from prefect_huggingface.blocks import HuggingFaceCredentials, QuantizationOptions
from prefect_huggingface.blocks.quantization import WeightFormat
from prefect_huggingface.tasks.errors import SettingsError

BIT_FORMATS = {8: "int8", 4: "int4"}
EIGHT_BIT_VALUES = (("group_size", -1), ("ratio", 1.0))
# Optimum Intel gives these settings the same names.
RECIPE_NAMES = frozenset(QuantizationOptions.model_fields) - {"awq", "quant_mode"}


def credentials_of(token: Any) -> HuggingFaceCredentials | None:
    """Return the credentials that a `token` argument means, None where everything is as usual.

    They are for the Hub in `HF_ENDPOINT`, as they are for LangChain, or for the default Hub.

    Args:
        token: A token, True for the token of the machine, False for none. An empty text and None mean the default.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    fields: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if isinstance(token, bool):
        fields["use_ambient_token"] = token
    elif token is not None:
        text = token.get_secret_value() if isinstance(token, SecretStr) else str(token)
        # A token that was pasted or read from a file often ends in a line break.
        fields |= {"token": SecretStr(text.strip())} if text.strip() else {}
    return HuggingFaceCredentials(**fields) if fields else None


def read_quantization(given: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """Return the fields of the block that `load_in_8bit`, `load_in_4bit` and `quantization_config` mean.

    Raises:
        SettingsError: If the configuration has a setting that the backend does not know.
    """
    fields: dict[str, Any] = {}
    for name, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
        if given.get(name):
            fields |= {"weight_format": BIT_FORMATS[bits]} if backend == "openvino" else {"load_in": f"{bits}bit"}
    if backend == "openvino" and given.get("load_in_8bit") is False and not fields:
        fields["weight_format"] = "fp32"
    if "quantization_config" in given:
        config = _as_dict(given["quantization_config"])
        if backend == "openvino":
            return {**fields, **_openvino_recipe(config)}
        fields["model_kwargs"] = {"quantization_config": config}
    return fields


def _as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration object as a dictionary of plain values, which can be compared, hashed and saved."""
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise SettingsError(f"`quantization_config` must be a configuration or a dictionary, got {config!r}.")
        config = config.to_dict()
    values = {name: value.value if isinstance(value, Enum) else value for name, value in config.items()}
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _openvino_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return weight format and quantization options of a configuration in the form of Optimum Intel."""
    settings = {name: value for name, value in config.items() if value not in (None, False, {}, [])}
    bits = settings.pop("bits", 8)
    weight_format = settings.pop("dtype", None) or BIT_FORMATS.get(bits)
    if weight_format not in get_args(WeightFormat):
        raise SettingsError(f"`bits` of `quantization_config` must be 8 or 4, got {bits!r}. Choose one of them.")
    recipe: dict[str, Any] = {"awq": True} if settings.get("quant_method") == "awq" else {}
    if settings.get("quant_method") in ("awq", "default"):
        del settings["quant_method"]
    recipe |= {name: settings.pop(name) for name in list(settings) if name in RECIPE_NAMES}
    if bits == 8:
        # Weights of 8 bits have one scale per channel; these are their only values.
        recipe = {name: value for name, value in recipe.items() if (name, value) not in EIGHT_BIT_VALUES}
    if settings:
        raise SettingsError(
            f"{sorted(settings)!r} of `quantization_config` are no known settings. Use `quantization` of `LocalModel`."
        )
    return {"weight_format": weight_format, "quantization": QuantizationOptions(**recipe) if recipe else None}
