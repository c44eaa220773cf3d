"""Translates the generation settings of LangChain code and of pipelines into `GenerationOptions`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prefect_huggingface.blocks import GenerationOptions, ResponseFormat
from prefect_huggingface.blocks.options import SAMPLING_FIELDS
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


class Generation(NamedTuple):
    """Generation settings of one model or one call.

    Attributes:
        options: The options that are set, and only those.
        max_length: Upper limit of the tokens of prompt and answer together, unless `max_new_tokens` is set.
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
    if call.max_length is None and not by_new_tokens:
        by_new_tokens = "max_new_tokens" in defaults.options.model_fields_set
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
