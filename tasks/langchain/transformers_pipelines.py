"""Pipeline objects of Transformers: what they say about how text is to be generated."""

from __future__ import annotations

from typing import Any

from prefect_huggingface.blocks.options import SAMPLING_FIELDS
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.generation_settings import Generation, read_generation

PARAMETERS = ("_preprocess_params", "_forward_params", "_postprocess_params")
# Values that the pipeline puts there itself.
OWN_NAMES = (
    "assistant_model", "assistant_tokenizer", "tokenizer", "prefix", "prefix_length", "pad_token_id",
    "transformers_version", "_from_model_config",
)  # fmt: skip


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
    """Return the stop string that end tokens stand for: the pipeline makes them of its `stop_sequence`."""
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    others = [one for one in ids if one != tokenizer.eos_token_id]
    if any(one in tokenizer.all_special_ids for one in others):
        raise SettingsError(f"`eos_token_id` must be the model's own, got {eos_token_id!r}. Use `stop` for a text.")
    return {"stop": [tokenizer.decode(others)]} if others else {}


def _echo_of(return_type: Any) -> dict[str, Any]:
    names = {"FULL_TEXT": True, "NEW_TEXT": False}
    name = getattr(return_type, "name", str(return_type))
    if name not in names:
        raise SettingsError(f"The pipeline must return text, got {name!r}. Make it without `return_tensors`.")
    return {"return_full_text": names[name]}
