"""Translates what LangChain code puts into keyword arguments into a `LocalModel` and `GenerationOptions`.

There, one dictionary holds arguments for loading the model and settings for generating text. Here each goes to its
place, with the meaning it was given for; what is not known is refused, because a setting must never be lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple, get_args

from pydantic import SecretStr

from prefect_huggingface.blocks import (
    GenerationOptions,
    HuggingFaceCredentials,
    LocalModel,
    ModelStore,
    QuantizationOptions,
    ResponseFormat,
)
from prefect_huggingface.blocks.model import PLACEMENT_KEYS, TASKS
from prefect_huggingface.blocks.options import SAMPLING_FIELDS
from prefect_huggingface.blocks.quantization import WeightFormat
from prefect_huggingface.tasks.errors import GenerationError, SettingsError

RENAMED = {
    "max_tokens": "max_new_tokens",
    "chat_template_kwargs": "template_options",
    "eos_token_id": "stop_token_ids",
    "num_return_sequences": "n",
    "return_full_text": "echo",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stop_strings": "stop",
}
# The pipelines of Transformers know these; here they mean nothing (padding), or are always so (text out, no tensors).
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "pad_token_id": None,
    "use_cache": None,
    "return_text": (True,),
    "return_tensors": (False,),
    "clean_up_tokenization_spaces": (False,),
    "padding": None,
}
# What a generation configuration says about the model or the cache and not about the text.
CONFIG_ONLY = frozenset({
    "transformers_version", "_from_model_config", "bos_token_id", "decoder_start_token_id", "cache_implementation",
    "return_dict_in_generate", "trust_remote_code",
})  # fmt: skip
TOTAL_LENGTHS = ("max_length", "min_length")
SPECIAL = ("skip_prompt", "truncation", "handle_long_generation", "generation_config")
GENERATION_NAMES = frozenset({*GenerationOptions.model_fields, *RENAMED, *WITHOUT_EFFECT, *TOTAL_LENGTHS, *SPECIAL})
PARAMETERS = ("_preprocess_params", "_forward_params", "_postprocess_params")
# Values that the pipeline puts there itself.
OWN_NAMES = (
    "assistant_model", "assistant_tokenizer", "tokenizer", "prefix", "prefix_length", "pad_token_id",
    "transformers_version", "_from_model_config",
)  # fmt: skip
# The decoder of a seq2seq model begins with an empty text, so that a total length is a number of new tokens.
DECODER_ONLY_TASKS = ("text-generation", "image-text-to-text")

BACKENDS = {"default": "torch", "torch": "torch", "openvino": "openvino"}

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
LOADING_WITHOUT_EFFECT = frozenset(
    {"export", "low_cpu_mem_usage", "use_fast", "use_cache", "use_safetensors", "_commit_hash"}
)

BIT_FORMATS = {8: "int8", 4: "int4"}
EIGHT_BIT_VALUES = (("group_size", -1), ("ratio", 1.0))
# Optimum Intel gives these settings the same names.
RECIPE_NAMES = frozenset(QuantizationOptions.model_fields) - {"awq", "quant_mode"}


class Generation(NamedTuple):
    """Generation settings of one model or one call.

    Attributes:
        options: The options that are set, and only those.
        max_length: Upper limit of the tokens of prompt and answer together, in place of `max_new_tokens`.
        min_length: Lower limit of the same.
    """

    options: GenerationOptions
    max_length: int | None = None
    min_length: int | None = None


def read_generation(given: Mapping[str, Any], task: str = "text-generation", *, warn: bool = True) -> Generation:
    """Return the generation settings that a dictionary of LangChain code means.

    A temperature of 0 means greedy text, and a sampling setting alone means sampling.

    Args:
        given: Settings by the names of LangChain and Hugging Face.
        task: Task of the model.
        warn: Whether to warn of settings that contradict one another.

    Raises:
        SettingsError: If a setting is unknown.
        pydantic.ValidationError: If a value is out of its range.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    unknown = {name for name in settings if name not in GENERATION_NAMES}
    if unknown:
        raise SettingsError(
            f"{sorted(unknown)!r} are no known generation settings. "
            f"Remove them, or choose from {sorted(GENERATION_NAMES)!r}."
        )
    options = _rename(_with_config(settings))
    lengths = {name: _check_length(name, options.pop(name)) for name in TOTAL_LENGTHS if name in options}
    if task not in DECODER_ONLY_TASKS:
        options = {**{name.replace("length", "new_tokens"): value for name, value in lengths.items()}, **options}
        lengths = {}
    if "max_new_tokens" in options:
        lengths.pop("max_length", None)
    if "response_format" in options:
        options["response_format"] = read_response_format(options["response_format"])
    return Generation(GenerationOptions(**_decide_sampling(options, warn)), **lengths)


def read_response_format(value: Any) -> Any:
    """Return the response format that a value in the forms of OpenAI and Hugging Face means.

    Args:
        value: A `ResponseFormat`, a pydantic class, or a dictionary with the `type` "json_object", "json_schema" or
            "regex" and its schema.
    """
    if not isinstance(value, Mapping) or "type" not in value:
        return value
    inner = value.get("json_schema", value.get("schema", value.get("value")))
    if value["type"] == "text":
        return None
    if value["type"] == "regex" and isinstance(inner, str):
        return ResponseFormat(regex=inner)
    if value["type"] in ("json_object", "json_schema", "json") and (inner is None or isinstance(inner, Mapping)):
        inner = inner or {"type": "object"}
        return ResponseFormat(json_schema=dict(inner.get("schema", inner)))
    raise SettingsError(
        f"`response_format` has no known form, got {dict(value)!r}. "
        "Use `{'type': 'json_schema', 'json_schema': {'schema': ...}}`."
    )


def _with_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the values of a `generation_config` of Transformers under the other settings."""
    config = settings.pop("generation_config", None)
    if config is None:
        return settings
    if not hasattr(config, "to_diff_dict"):
        raise SettingsError(f"`generation_config` must be a GenerationConfig, got {config!r}. Give its values instead.")
    values = {name: value for name, value in config.to_diff_dict().items() if name not in CONFIG_ONLY}
    unknown = sorted(name for name, value in values.items() if name not in GENERATION_NAMES and value is not None)
    if unknown:
        raise SettingsError(f"{unknown!r} of `generation_config` cannot be honoured here. Set them to None.")
    return {**{name: value for name, value in values.items() if value is not None}, **settings}


def _rename(settings: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "skip_prompt":
            options["echo"] = not value
        elif name == "truncation":
            options |= {"context_overflow": "truncate_right"} if value else {}
        elif name == "handle_long_generation":
            options["context_overflow"] = "truncate_left"
        elif name == "eos_token_id":
            options["stop_token_ids"] = [value] if isinstance(value, int) else list(value)
        elif name in WITHOUT_EFFECT:
            _check_without_effect(name, value)
        else:
            options[RENAMED.get(name, name)] = value
    return options


def _check_without_effect(name: str, value: Any) -> None:
    allowed = WITHOUT_EFFECT[name]
    if allowed is not None and value not in allowed:
        raise SettingsError(f"`{name}` must be {allowed[0]!r}, got {value!r}. Remove it.")


def _check_length(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"`{name}` must be a number of tokens of at least 1, got {value!r}. Correct it.")
    return value


def _decide_sampling(options: dict[str, Any], warn: bool) -> dict[str, Any]:
    """Switch sampling on or off as the sampling settings mean it."""
    # These values of the original switch the filter off.
    options = {name: value for name, value in options.items() if (name, value) not in (("top_k", 0), ("top_p", 1.0))}
    if options.get("temperature") == 0:
        if options.get("do_sample") and warn:
            warnings.warn("`temperature` is 0, so that `do_sample` has no effect.", UserWarning, stacklevel=2)
        options = {name: value for name, value in options.items() if name not in SAMPLING_FIELDS}
        options["do_sample"] = False
    elif "do_sample" not in options and any(name in options for name in SAMPLING_FIELDS):
        options["do_sample"] = True
    return options


def merge_generation(defaults: Generation, call: Generation) -> Generation:
    """Return the settings of one call put over the defaults.

    Stop strings and variables of the chat template add up, and the last length given counts.

    Raises:
        pydantic.ValidationError: If the two do not go together.
    """
    options = defaults.options.merged(call.options)
    if call.options.stop:
        stop = dict.fromkeys([*defaults.options.stop, *call.options.stop])
        options = options.model_copy(update={"stop": list(stop)})
    if call.options.template_options:
        variables = {**defaults.options.template_options, **call.options.template_options}
        options = options.model_copy(update={"template_options": variables})
    by_new_tokens = "max_new_tokens" in call.options.model_fields_set
    max_length = None if by_new_tokens else call.max_length or defaults.max_length
    return Generation(options, max_length, call.min_length or defaults.min_length)


def fit_options(generation: Generation, prompt_tokens: Callable[[], int]) -> GenerationOptions:
    """Return options that leave nothing to defaults, with total lengths made numbers of new tokens.

    Args:
        generation: All settings of the call.
        prompt_tokens: Returns the number of tokens of the prompt; called only where a total length is set.

    Raises:
        GenerationError: If the prompt alone is as long as prompt and answer may be.
    """
    # Set explicitly, because the engine puts its own defaults under what is not set.
    values = {name: getattr(generation.options, name) for name in GenerationOptions.model_fields}
    if generation.max_length is not None:
        values["max_new_tokens"] = generation.max_length - prompt_tokens()
        if values["max_new_tokens"] < 1:
            raise GenerationError(
                f"`max_length` ({generation.max_length}) leaves no room for an answer: the prompt has "
                f"{prompt_tokens()} tokens. Raise it, or set `max_new_tokens` instead.",
                error_code="too_long",
            )
    if generation.min_length is not None:
        values["min_new_tokens"] = max(0, min(generation.min_length - prompt_tokens(), values["max_new_tokens"]))
    return GenerationOptions(**values)


def pipeline_settings(pipeline: Any) -> Generation:
    """Return the generation settings that a pipeline was made with.

    Its built-in defaults, which sample, do not count, nor do those of the model.

    Raises:
        SettingsError: If the object is no pipeline, or has a setting that is unknown here.
    """
    if not hasattr(pipeline, "_forward_params") or not hasattr(pipeline, "model"):
        raise SettingsError(f"`pipeline` must be a pipeline of Transformers, got {type(pipeline)!r}. Correct it.")
    given = _configured(pipeline)
    for name in PARAMETERS:
        given |= getattr(pipeline, name, {})
    for name in OWN_NAMES:
        given.pop(name, None)
    if "eos_token_id" in given:
        given |= _stop_of(given.pop("eos_token_id"), pipeline.tokenizer)
    if "return_type" in given:
        given |= _echo_of(given.pop("return_type"))
    return read_generation(given, pipeline.task)


def _configured(pipeline: Any) -> dict[str, Any]:
    """Return what the generation configuration of a pipeline has over its defaults and those of the model."""
    config = getattr(pipeline, "generation_config", None)
    prepare = getattr(pipeline.model, "_prepare_generation_config", None)
    if config is None or prepare is None:
        return {}
    # The same call made the configuration, from the arguments of the pipeline and these defaults.
    defaults = prepare(type(pipeline)._default_generation_config)[0].to_dict()
    values = config.to_dict()
    given = {name: value for name, value in values.items() if value != defaults.get(name)}
    if any(name in given for name in SAMPLING_FIELDS):
        given["temperature"] = values.get("temperature")
    return given


def _stop_of(eos_token_id: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what end tokens stand for: special tokens, or the stop string of the pipeline's `stop_sequence`."""
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    special = [one for one in ids if one in tokenizer.all_special_ids and one != tokenizer.eos_token_id]
    others = [one for one in ids if one not in tokenizer.all_special_ids]
    return {"stop": [tokenizer.decode(others)] if others else None, "eos_token_id": special or None}


def _echo_of(return_type: Any) -> dict[str, Any]:
    names = {"FULL_TEXT": True, "NEW_TEXT": False}
    name = getattr(return_type, "name", str(return_type))
    if name not in names:
        raise SettingsError(f"The pipeline must return text, got {name!r}. Make it without `return_tensors`.")
    return {"return_full_text": names[name]}


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
    fields = read_fields(given, backend)
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
        for name, value in flat_settings(source):
            if name in joined and name not in GENERATION_NAMES and not _is_same(name, joined[name], value):
                raise SettingsError(f"`{name}` is given twice, with two values. Give it once.")
            joined[name] = value
    return joined


def _is_same(name: str, first: Any, second: Any) -> bool:
    if name == "device" and {str(first).lower(), str(second).lower()} <= {"-1", "cpu"}:
        return True
    return bool(first == second)


def flat_settings(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is set, also of a `model_kwargs` inside."""
    for name, value in source.items():
        if name == "model_kwargs" and isinstance(value, Mapping):
            yield from flat_settings(value)
        elif value is not None:
            yield name, value


def _check_placement(given: Mapping[str, Any]) -> None:
    if all(key in given for key in PLACEMENT_KEYS):
        raise SettingsError(
            f"`device` ({given['device']!r}) and `device_map` ({given['device_map']!r}) exclude each other, "
            "wherever they are given. Remove one of them."
        )


def read_fields(given: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the fields of the block, other than id, task, backend and options.

    Raises:
        SettingsError: If an argument is unknown.
    """
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
    _refuse_unknown({name for name in given if name not in LOADING_WITHOUT_EFFECT})
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


def read_images(given: Any) -> tuple[str, ...]:
    """Return the sources of images that are given alone, in a list, or in one list for each prompt."""
    if isinstance(given, (list, tuple)):
        return tuple(source for one in given for source in read_images(one))
    if not hasattr(given, "save"):
        return (str(given),)
    import base64
    import io

    # An image of Pillow: PNG keeps every pixel.
    data = io.BytesIO()
    given.save(data, "PNG")
    return (f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}",)
