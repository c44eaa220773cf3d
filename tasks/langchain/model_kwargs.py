"""Translates what LangChain code puts into `model_kwargs` and `pipeline_kwargs` into a `LocalModel`.

There, one dictionary holds arguments for loading the model and settings for generating text. Here each goes to its
place, with the meaning it was given for; what is not known is refused, because a setting must never be lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple, get_args

from pydantic import SecretStr

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.blocks.model import PLACEMENT_KEYS, Task
from prefect_huggingface.blocks.quantization import WeightFormat
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.base_llm import read_images
from prefect_huggingface.tasks.langchain.generation_kwargs import GENERATION_NAMES, Generation, read_generation

BACKENDS = {"default": "torch", "torch": "torch", "openvino": "openvino"}
TASKS = get_args(Task)

# Arguments of `from_pretrained` and `pipeline` that are fields of the block, under this or another name.
FIELDS = {
    "device": "device",
    "device_map": "device_map",
    "ov_config": "ov_config",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "trust_remote_code": "trust_remote_code",
    "revision": "revision",
    "local_files_only": "offline",
}
# Arguments that Transformers understands and that have no field of their own.
LOADING = frozenset({"max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "variant"})
QUANTIZATION = frozenset({"load_in_8bit", "load_in_4bit", "quantization_config"})
TOKEN_NAMES = ("token", "use_auth_token")
# How the libraries below do their work; the loaded model is the same with and without them.
WITHOUT_EFFECT = frozenset({"export", "low_cpu_mem_usage", "use_fast", "use_cache", "use_safetensors", "_commit_hash"})

BIT_FORMATS = {8: "int8", 4: "int4"}
EIGHT_BIT_VALUES = (("group_size", -1), ("ratio", 1.0))
# Optimum Intel gives these settings the same names.
RECIPE_NAMES = frozenset(QuantizationOptions.model_fields) - {"awq", "quant_mode"}


class Settings(NamedTuple):
    """What the arguments of a LangChain constructor come to: the model, and settings that only this layer knows."""

    model: LocalModel
    generation: Generation
    batch_size: int | None
    images: tuple[str, ...] = ()


def read_settings(
    model_id: str,
    task: str,
    backend: str = "default",
    device: Any = None,
    device_map: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings that the arguments of `from_model_id` mean.

    Raises:
        SettingsError: If an argument is unknown, is given twice with two values, or does not go with another one.
        pydantic.ValidationError: If a value is out of its range.
    """
    backend = check_backend(backend)
    given = _join({"device": device, "device_map": device_map}, model_kwargs or {}, pipeline_kwargs or {})
    _check_placement(given)
    batch_size, images = given.pop("batch_size", None), read_images(given.pop("images", ()))
    settings = {name: given.pop(name) for name in list(given) if name in GENERATION_NAMES}
    generation = read_generation(settings, task, warn=False)  # whoever generates with them warns
    fields = _read_fields(given, backend)
    fields |= {"model_id": model_id, "task": check_task(task), "backend": backend, "chat_template": template_use(task)}
    return Settings(LocalModel(**fields, options=generation.options), generation, batch_size, images)


def template_use(task: str) -> str:
    """Return whether plain prompts of a task go through the chat template.

    LangChain's LLMs take plain text; its chat models send messages, which always go through it. Only there do images
    have a place in the prompt.
    """
    return "auto" if task == "image-text-to-text" else "never"


def check_backend(backend: str) -> str:
    """Return our name of a backend.

    Raises:
        SettingsError: If there is no such backend.
    """
    if backend == "ipex":
        warnings.warn("`backend='ipex'` is no longer supported, 'default' is used.", UserWarning, stacklevel=2)
        backend = "default"
    if backend not in BACKENDS:
        raise SettingsError(f"`backend` must be one of {sorted(BACKENDS)!r}, got {backend!r}. Choose one of them.")
    return BACKENDS[backend]


def check_task(task: str) -> str:
    """Return the task.

    Raises:
        SettingsError: If there is no such task.
    """
    if task not in TASKS:
        raise SettingsError(f"`task` must be one of {list(TASKS)!r}, got {task!r}. Choose one of them.")
    return task


def _join(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Join dictionaries; a later one may repeat a setting of generation, but not move or change the model."""
    joined: dict[str, Any] = {}
    for source in sources:
        for name, value in _flat(source):
            if name in joined and name not in GENERATION_NAMES and not _is_same(name, joined[name], value):
                raise SettingsError(f"`{name}` is given twice, with two values. Give it once.")
            joined[name] = value
    return joined


def _is_same(name: str, first: Any, second: Any) -> bool:
    if name == "device" and {str(first).lower(), str(second).lower()} <= {"-1", "cpu"}:
        return True
    return bool(first == second)


def _flat(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is set, also of a `model_kwargs` inside."""
    for name, value in source.items():
        if name == "model_kwargs" and isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None:
            yield name, value


def _check_placement(given: Mapping[str, Any]) -> None:
    if all(key in given for key in PLACEMENT_KEYS):
        raise SettingsError(
            f"`device` ({given['device']!r}) and `device_map` ({given['device_map']!r}) exclude each other, "
            "wherever they are given. Remove one of them."
        )


def _read_fields(given: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the fields of the block, other than id, task, backend and options."""
    tokens = [given.pop(name) for name in TOKEN_NAMES if name in given]
    fields: dict[str, Any] = {"credentials": credentials_of(tokens[0] if tokens else None)}
    if "cache_dir" in given:
        fields["store"] = ModelStore(path=given.pop("cache_dir"))
    fields |= read_quantization({name: given.pop(name) for name in list(given) if name in QUANTIZATION}, backend)
    fields |= {FIELDS[name]: given.pop(name) for name in list(given) if name in FIELDS}
    if "dtype" in fields:
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    if "device" in fields and not isinstance(fields["device"], int):
        fields["device"] = str(fields["device"])
    loading = {name: given.pop(name) for name in list(given) if name in LOADING}
    if loading:
        fields["model_kwargs"] = {**loading, **fields.get("model_kwargs", {})}
    _refuse_unknown({name for name in given if name not in WITHOUT_EFFECT})
    return fields


def _refuse_unknown(names: set[str]) -> None:
    if names:
        known = sorted({*FIELDS, *LOADING, *QUANTIZATION, *TOKEN_NAMES, "cache_dir", *GENERATION_NAMES})
        raise SettingsError(f"{sorted(names)!r} are no known settings. Remove them, or choose from {known!r}.")


def credentials_of(token: Any) -> HuggingFaceCredentials | None:
    """Return the credentials that a `token` argument means, None where everything is as usual.

    Args:
        token: A token, True for the token of the machine, False for none. An empty text and None mean the default.
    """
    fields: dict[str, Any] = {}
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
