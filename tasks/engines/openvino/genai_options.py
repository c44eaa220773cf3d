"""Generation options in the terms of OpenVINO GenAI. What it cannot do is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_huggingface.blocks import EngineOptions, GenerationOptions
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.structured import check_format, structured_output

# The size that OpenVINO GenAI takes for speculative decoding by default.
DRAFT_TOKENS = 5
LOOKUP_NGRAM = 3


def check_options(options: GenerationOptions) -> None:
    """Refuse options that OpenVINO GenAI cannot honour.

    Raises:
        RequestError: With the option and what to do instead.
    """
    if options.no_repeat_ngram_size and options.num_beams == 1:
        raise RequestError(
            "invalid_option",
            f"`no_repeat_ngram_size` works with beam search only on OpenVINO, got {options.no_repeat_ngram_size}. "
            "Use `repetition_penalty`, `num_beams`, or the torch backend.",
        )
    if options.response_format is not None:
        if options.num_beams > 1:
            raise RequestError(
                "invalid_option",
                f"`num_beams` must be 1 with a response format, got {options.num_beams}. Choose one of the two.",
            )
        check_format(options.response_format)


def generation_config(options: GenerationOptions, end_tokens: Sequence[int], engine: EngineOptions, seed: int) -> Any:
    """Return the settings of OpenVINO GenAI for one answer, or for all answers of a beam search.

    Args:
        options: Options of the request, checked.
        end_tokens: Tokens that end an answer.
        engine: Options of the engine, for speculative decoding.
        seed: Seed of the answer.
    """
    from openvino_genai import GenerationConfig

    config = GenerationConfig()
    config.max_new_tokens = options.max_new_tokens
    config.min_new_tokens = options.min_new_tokens
    # Templates are applied before, exactly once.
    config.apply_chat_template = False
    config.ignore_eos = options.ignore_eos
    if end_tokens:
        config.eos_token_id = end_tokens[0]
        config.stop_token_ids = set() if options.ignore_eos else set(end_tokens)
    config.repetition_penalty = options.repetition_penalty
    config.logprobs = 1 if options.logprobs else 0
    if options.do_sample:
        _set_sampling(config, options, seed)
    elif options.num_beams > 1:
        _set_beams(config, options)
    if options.response_format is not None:
        config.structured_output_config = structured_output(options.response_format)
    _set_guessing(config, engine)
    return config


def _set_sampling(config: Any, options: GenerationOptions, seed: int) -> None:
    config.do_sample = True
    config.rng_seed = seed
    config.temperature = 1.0 if options.temperature is None else options.temperature
    if options.top_p is not None:
        config.top_p = options.top_p
    if options.top_k is not None:
        config.top_k = options.top_k


def _set_beams(config: Any, options: GenerationOptions) -> None:
    config.num_beams = options.num_beams
    config.num_return_sequences = options.n
    if options.no_repeat_ngram_size:
        config.no_repeat_ngram_size = options.no_repeat_ngram_size
    # Stop strings stay out: with them a beam search of OpenVINO GenAI 2026.4 fails or loses its best beams. Its answers
    # are cut afterwards.


def _set_guessing(config: Any, engine: EngineOptions) -> None:
    if engine.prompt_lookup_tokens is not None:
        config.num_assistant_tokens = engine.prompt_lookup_tokens
        config.max_ngram_size = LOOKUP_NGRAM
    elif engine.draft_model is not None:
        config.num_assistant_tokens = DRAFT_TOKENS
