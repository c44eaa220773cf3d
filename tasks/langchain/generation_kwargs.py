"""Translates the names and meanings of generation settings in LangChain code into `GenerationOptions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prefect_huggingface.blocks import GenerationOptions, ResponseFormat
from prefect_huggingface.blocks.options import SAMPLING_FIELDS
from prefect_huggingface.tasks.errors import GenerationError, SettingsError

RENAMED = {
    "max_tokens": "max_new_tokens",
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
TOTAL_LENGTHS = ("max_length", "min_length")
SPECIAL = ("skip_prompt", "truncation", "handle_long_generation", "generation_config")
GENERATION_NAMES = frozenset({*GenerationOptions.model_fields, *RENAMED, *WITHOUT_EFFECT, *TOTAL_LENGTHS, *SPECIAL})
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


def read_generation(given: Mapping[str, Any], task: str = "text-generation") -> Generation:
    """Return the generation settings that a dictionary of LangChain code means.

    A temperature of 0 means greedy text, and a sampling setting alone means sampling.

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
    return Generation(GenerationOptions(**_decide_sampling(options)), **lengths)


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
    values = {name: value for name, value in config.to_diff_dict().items() if name in GENERATION_NAMES}
    return {**values, **settings}


def _rename(settings: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "skip_prompt":
            options["echo"] = not value
        elif name == "truncation":
            options |= {"context_overflow": "truncate_right"} if value else {}
        elif name == "handle_long_generation":
            options["context_overflow"] = "truncate_left"
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


def _decide_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Switch sampling on or off as the sampling settings mean it."""
    # These values of the original switch the filter off.
    options = {name: value for name, value in options.items() if (name, value) not in (("top_k", 0), ("top_p", 1.0))}
    if options.get("temperature") == 0 and not options.get("do_sample"):
        del options["temperature"]
        options["do_sample"] = False
    elif "do_sample" not in options and any(name in options for name in SAMPLING_FIELDS):
        options["do_sample"] = True
    return options


def merge_generation(defaults: Generation, call: Generation) -> Generation:
    """Return the settings of one call put over the defaults. Stop strings add up, and the last length given counts.

    Raises:
        pydantic.ValidationError: If the two do not go together.
    """
    options = defaults.options.merged(call.options)
    if call.options.stop:
        stop = dict.fromkeys([*defaults.options.stop, *call.options.stop])
        options = options.model_copy(update={"stop": list(stop)})
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
