"""A pipeline object of Transformers as an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.torch_engine import engine_of_pipeline
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.records import Request

OPTIONS = GenerationOptions(max_new_tokens=12)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def pipeline(tiny_llama: Path):
    from transformers import pipeline

    return pipeline("text-generation", model=str(tiny_llama), device="cpu")


def test_text_is_that_of_the_pipeline(pipeline):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    expected = pipeline("The capital of", **settings)[0]["generated_text"]
    expected_chat = pipeline(MESSAGES, **settings)[0]["generated_text"]
    before = pipeline.model.generation_config.to_dict()
    with engine_of_pipeline(pipeline) as engine:
        assert engine.submit(Request("The capital of", options=OPTIONS)).result().text == expected
        assert engine.submit(Request(messages=MESSAGES, options=OPTIONS)).result().text == expected_chat
    # The pipeline can be used as before, also after the engine is closed.
    assert pipeline.model.generation_config.to_dict() == before
    assert pipeline("The capital of", **settings)[0]["generated_text"] == expected


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(SettingsError, match="must be a text pipeline"):
        engine_of_pipeline(object())
