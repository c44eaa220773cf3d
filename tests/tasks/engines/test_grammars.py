"""Answers of a given form on the torch backend: even a random model keeps to it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ResponseFormat
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.records import Completion, Request

needs_llguidance = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="the extra `structured` is not installed"
)


class Place(BaseModel):
    city: str
    rank: int


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[TorchTextEngine]:
    model = LocalModel(model_id=str(tiny_llama), backend="torch", device="cpu")
    with TorchTextEngine(tiny_llama, model) as loaded:
        yield loaded


def ask(engine: TorchTextEngine, response_format, **options) -> Completion:
    settings = GenerationOptions(response_format=response_format, **{"max_new_tokens": 120, **options})
    return engine.submit(Request("Name a city.", options=settings)).result()


@needs_llguidance
@pytest.mark.parametrize("seed", range(4))
def test_answers_have_the_form_that_was_asked_for(engine, seed):
    sampled = {"do_sample": True, "seed": seed, "n": 2}
    completion = ask(engine, ResponseFormat(regex=r"[A-Z][a-z]{2,5}, [0-9]{2}"), **sampled)
    assert all(re.fullmatch(r"[A-Z][a-z]{2,5}, [0-9]{2}", text) for text in (completion.text, *completion.alternatives))
    choices = ["Paris", 'Ma"drid', "Köln\nam Rhein"]
    assert ask(engine, ResponseFormat(choices=choices), **sampled).text in choices
    schema = {
        "type": "object", "additionalProperties": False, "required": ["kind", "sizes"],
        "properties": {
            "kind": {"enum": ["small", "large"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        },
    }  # fmt: skip
    completion = ask(engine, ResponseFormat(json_schema=schema), do_sample=True, seed=seed)
    assert completion.error is None
    assert completion.finish_reason == "stop"
    assert completion.parsed["kind"] in ("small", "large")
    # Without free white space there is no endless one.
    assert not re.search(r"\s\s", completion.text)


@needs_llguidance
def test_greedy_answers_with_a_form_do_not_touch_those_beside_them(engine):
    plain = engine.submit(Request("The capital", options=GenerationOptions(max_new_tokens=20))).result().text
    form = {"choices": ["a b", "c"]}
    mixed = [
        Request(
            "The capital",
            id=index,
            options=GenerationOptions(max_new_tokens=20, response_format=None if index % 2 else form),
        )
        for index in range(8)
    ]
    for completion in engine.generate(mixed):
        assert completion.text == plain if completion.request_id % 2 else completion.text in ("a b", "c")


@needs_llguidance
def test_an_answer_that_was_cut_is_told_to_be_invalid(engine):
    completion = ask(engine, Place, max_new_tokens=3)
    assert completion.error_code == completion.status == "schema_invalid"
    assert completion.generated_tokens == 3


@needs_llguidance
@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"json_schema": {"type": "nonsense"}}, "not a JSON schema"),
        ({"regex": "(?=a)b"}, "cannot be made a grammar"),
    ],
)
def test_a_form_that_is_no_grammar_is_that_requests_error(engine, response_format, message):
    completion = ask(engine, response_format)
    assert completion.error_code == "invalid_option"
    assert message in completion.error
    assert ask(engine, {"choices": ["good"]}).text == "good"


def test_beams_do_not_go_with_a_form(engine):
    assert "num_beams" in ask(engine, {"choices": ["a", "b"]}, num_beams=2).error


def test_without_the_extra_the_error_names_it(engine, monkeypatch):
    # A module that is None cannot be found, as if it had not been installed.
    monkeypatch.setitem(sys.modules, "llguidance", None)
    completion = ask(engine, {"choices": ["a"]})
    assert completion.error_code == "invalid_option"
    assert "prefect-huggingface[structured]" in completion.error


@needs_llguidance
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 1}])
def test_a_form_that_is_complete_ends_the_answer_before_its_least_length(engine, sampled):
    completion = ask(engine, ResponseFormat(choices=["yes", "no"]), min_new_tokens=20, **sampled)
    assert completion.error is None
    assert completion.text in ("yes", "no")
