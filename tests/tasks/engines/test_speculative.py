"""Speculative decoding changes no answer: what it would change is refused, and a failure never repeats for ever."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, ResponseFormat
from support.engine_families import PROMPTS, Family, texts_of

SAMPLED = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 40}
CITY = {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Madrid"]}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"], "additionalProperties": False,
}  # fmt: skip
FORMS = {
    "a regular expression": ResponseFormat(regex="[a-z]{12}-[0-9]{8}"),
    "choices": ResponseFormat(choices=["yes, it is the capital", "no, it is a model of random weights"]),
    "JSON": ResponseFormat(json_schema=CITY),
}


@pytest.fixture(params=["prefix caching", "no prefix caching"])
def drafted(family_of, tiny_openvino: Path, request: pytest.FixtureRequest) -> Family:
    """A model that is its own draft."""
    options = EngineOptions(
        cache_size_gb=0.25, draft_model=str(tiny_openvino), enable_prefix_caching=request.param == "prefix caching"
    )
    return family_of("openvino-text").with_settings(engine=options)


@pytest.fixture
def looking_up(family_of) -> Family:
    """A model that guesses from its prompt."""
    return family_of("openvino-text").with_settings(engine=EngineOptions(cache_size_gb=0.25, prompt_lookup_tokens=4))


def test_sampling_with_a_draft_model_is_refused_and_its_neighbours_go_on(family_of, drafted, caplog):
    expected = [family_of("openvino-text").text(prompt) for prompt in PROMPTS]
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sampled = [drafted.submit(prompt, seed=3, **SAMPLED) for prompt in PROMPTS[:4]]
        greedy = [drafted.submit(prompt) for prompt in PROMPTS]
        for future in sampled:
            completion = future.result(timeout=30)
            assert (completion.error_code, completion.text) == ("invalid_option", ""), completion
            assert "draft_model" in completion.error
            assert "do_sample" in completion.error
    assert texts_of(greedy) == expected
    assert time.monotonic() - started < 60
    assert len(caplog.records) < 20


def test_a_response_format_with_a_draft_model_is_kept_to_or_refused(family_of, drafted):
    plain = family_of("openvino-text")
    for form in FORMS.values():
        options = {"response_format": form, "max_new_tokens": 80}
        expected = [plain.ask(prompt, **options) for prompt in PROMPTS[:6]]
        found = [drafted.submit(prompt, **options) for prompt in PROMPTS[:6]]
        for completion, wanted in zip([future.result(60) for future in found], expected, strict=True):
            if completion.error_code == "invalid_option":
                assert "draft_model" in completion.error
            else:
                assert (completion.text, completion.error) == (wanted.text, wanted.error)


def test_prompt_lookup_changes_no_answer(family_of, looking_up):
    plain = family_of("openvino-text")
    repeated = [f"{prompt} {prompt} {prompt}" for prompt in PROMPTS[:6]]
    for options in ({}, {"response_format": FORMS["choices"]}, {"response_format": FORMS["a regular expression"]}):
        chosen = {"max_new_tokens": 40, **options}
        found = [looking_up.submit(prompt, **chosen) for prompt in repeated]
        assert texts_of(found) == texts_of(plain.submit(prompt, **chosen) for prompt in repeated)


def test_sampling_with_prompt_lookup_draws_what_the_seed_says(family_of, looking_up):
    plain = family_of("openvino-text")
    for seed, prompt in enumerate(PROMPTS[:4]):
        found = looking_up.ask(f"{prompt} {prompt}", seed=seed, **SAMPLED)
        if found.error_code == "invalid_option":
            assert "prompt_lookup_tokens" in found.error
        else:
            assert found.text == plain.text(f"{prompt} {prompt}", seed=seed, **SAMPLED)


@pytest.mark.parametrize("form", FORMS)
def test_without_speculation_every_form_is_met(family_of, form):
    for prompt in PROMPTS[:3]:
        found = family_of("openvino-text").ask(prompt, response_format=FORMS[form], max_new_tokens=80)
        if found.error_code != "schema_invalid":
            assert found.error is None
            assert form == "JSON" or found.text in (FORMS[form].choices or [found.text])
            assert form != "a regular expression" or re.fullmatch(FORMS[form].regex, found.text)
