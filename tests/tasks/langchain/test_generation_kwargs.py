"""Names and meanings of generation settings in LangChain code."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from prefect_huggingface.tasks.errors import GenerationError, SettingsError
from prefect_huggingface.tasks.langchain.kwargs import (
    Generation,
    fit_options,
    merge_generation,
    read_generation,
)


class Answer(BaseModel):
    capital: str


SCHEMA = Answer.model_json_schema()


def options_of(**settings: Any) -> dict[str, Any]:
    return read_generation(settings).options.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 0.0, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_k": 10, "top_p": 0.95}, {"do_sample": True, "top_k": 10, "top_p": 0.95}),
        ({"top_k": 0, "top_p": 1.0}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"num_return_sequences": 2, "do_sample": True}, {"n": 2, "do_sample": True}),
        ({"stop": "\n\n"}, {"stop": ["\n\n"]}),
        ({"stop_sequence": "end"}, {"stop": ["end"]}),
        ({"stop_strings": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"return_full_text": False}, {"echo": False}),
        ({"skip_prompt": True}, {"echo": False}),
        ({"skip_prompt": False}, {"echo": True}),
        ({"truncation": True}, {"context_overflow": "truncate_right"}),
        ({"handle_long_generation": "hole"}, {"context_overflow": "truncate_left"}),
        ({"temperature": None, "stop": None, "seed": 3}, {"seed": 3}),
        ({"pad_token_id": 2, "return_text": True, "clean_up_tokenization_spaces": False}, {}),
    ],
)
def test_settings_keep_their_meaning(settings: dict[str, Any], options: dict[str, Any]) -> None:
    assert options_of(**settings) == options


@pytest.mark.parametrize(
    "response_format",
    [
        Answer,
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        {"type": "json", "value": SCHEMA},
        {"json_schema": SCHEMA},
    ],
)
def test_response_formats_of_openai_and_hugging_face(response_format: Any) -> None:
    read = read_generation({"response_format": response_format}).options.response_format
    assert read is not None
    assert read.json_schema == SCHEMA


def test_response_format_without_a_schema() -> None:
    read = read_generation({"response_format": {"type": "json_object"}}).options.response_format
    assert read is not None
    assert read.json_schema == {"type": "object"}
    read = read_generation({"response_format": {"type": "regex", "value": "[0-9]+"}}).options.response_format
    assert read is not None
    assert read.regex == "[0-9]+"
    assert read_generation({"response_format": {"type": "text"}}).options.response_format is None
    with pytest.raises(SettingsError, match="has no known form"):
        read_generation({"response_format": {"type": "yaml"}})


@pytest.mark.parametrize("name", ["typical", "max_tokkens"])
def test_unknown_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_generation({name: 1})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.7},
        {"temperature": -0.1},
        {"stop": [""]},
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read_generation(settings)


@pytest.mark.parametrize("settings", [{"max_length": 0}, {"max_length": "64"}, {"return_tensors": True}])
def test_senseless_values_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        read_generation(settings)


def test_a_generation_config_lies_under_the_other_settings() -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.5, eos_token_id=3)
    assert options_of(generation_config=config, max_new_tokens=4) == {
        "max_new_tokens": 4,
        "do_sample": True,
        "temperature": 0.5,
        "stop_token_ids": [3],
    }


def test_a_total_length_counts_the_prompt() -> None:
    generation = read_generation({"max_length": 64, "min_length": 30})
    options = fit_options(generation, lambda: 20)
    assert (options.max_new_tokens, options.min_new_tokens) == (44, 10)
    with pytest.raises(GenerationError, match=r"`max_length` \(64\) leaves no room .* 64 tokens") as caught:
        fit_options(generation, lambda: 64)
    assert caught.value.fields["error_code"] == "too_long"


@pytest.mark.parametrize("task", ["summarization", "translation", "text2text-generation"])
def test_a_total_length_of_a_seq2seq_model_does_not_count_the_prompt(task: str) -> None:
    generation = read_generation({"max_length": 40, "min_length": 5}, task)
    assert (generation.options.max_new_tokens, generation.options.min_new_tokens) == (40, 5)
    assert generation.max_length is None


@pytest.mark.parametrize(
    ("defaults", "call", "expected"),
    [
        ({"max_length": 64}, {}, 44),
        ({"max_length": 64}, {"max_new_tokens": 5}, 5),
        ({"max_new_tokens": 5}, {"max_length": 64}, 44),
        ({"max_new_tokens": 5, "max_length": 64}, {}, 5),
        ({"max_new_tokens": 5}, {}, 5),
        ({}, {}, 256),
    ],
)
def test_the_limit_of_the_call_counts_and_new_tokens_before_total(defaults: Any, call: Any, expected: int) -> None:
    merged = merge_generation(read_generation(defaults), read_generation(call))
    assert fit_options(merged, lambda: 20).max_new_tokens == expected


def test_a_call_may_switch_sampling_off_and_adds_stop_strings() -> None:
    defaults = read_generation({"temperature": 0.7, "top_p": 0.9, "stop": ["a"]})
    merged = merge_generation(defaults, read_generation({"temperature": 0, "stop": ["b", "a"]}))
    assert merged.options.do_sample is False
    assert merged.options.temperature is None
    assert merged.options.stop == ["a", "b"]


def test_fitted_options_leave_nothing_to_the_defaults_of_an_engine() -> None:
    from prefect_huggingface.blocks import GenerationOptions

    engine_defaults = GenerationOptions(do_sample=True, temperature=0.9, stop=["x"], max_new_tokens=3)
    mine = Generation(GenerationOptions(seed=1))
    assert engine_defaults.merged(fit_options(mine, lambda: 0)) == GenerationOptions(seed=1)
