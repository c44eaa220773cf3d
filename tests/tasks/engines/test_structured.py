"""Answers have the form that was asked for, or say that they have not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from prefect_huggingface.blocks import GenerationOptions, ResponseFormat
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.structured import LONGEST_WHITE_SPACE, WhiteSpaceGuard, check_format
from prefect_huggingface.tasks.records import Request
from support.openvino_engines import ask, complete, load_openvino

PROMPTS = [f"The capital of France is number {number}" for number in range(12)]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Answer(BaseModel):
    """A form of bounded length, so that a model of random weights comes to its end."""

    colour: Colour
    sure: bool
    digit: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def engine(tiny_openvino: Path) -> Iterator[OpenVINOTextEngine]:
    with load_openvino(tiny_openvino) as loaded:
        yield loaded


def test_a_pydantic_class_gives_its_values(engine):
    sampled = {"do_sample": True, "temperature": 1.0, "seed": 4, "max_new_tokens": 400}
    completions = complete(engine, PROMPTS, response_format=Answer, **sampled)
    valid = [completion for completion in completions if completion.error is None]
    assert valid
    for completion in valid:
        Answer.model_validate(completion.parsed)
        Answer.model_validate_json(completion.text)
        assert completion.finish_reason == "stop"
    assert {completion.error_code for completion in completions} <= {None, "schema_invalid"}


@pytest.mark.parametrize("regex", ["[0-9]{3}-[a-f]{2}", "(yes|no), (sure|perhaps)"])
def test_a_regular_expression_is_matched_as_a_whole(engine, regex):
    for completion in complete(engine, PROMPTS, response_format=ResponseFormat(regex=regex), max_new_tokens=40):
        assert re.fullmatch(regex, completion.text)
        assert (completion.error, completion.finish_reason, completion.parsed) == (None, "stop", None)


def test_one_of_the_choices_is_given_whatever_is_in_them(engine):
    choices = ["yes", "no (not at all)", "a.b*c", "50 %", "\\d+", 'say "x"', "caf\u00e9 \u2713", "[1]", "a/b", "x|y"]
    sampled = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 60}
    found = complete(engine, PROMPTS * 4, response_format=ResponseFormat(choices=choices), **sampled)
    assert {completion.error for completion in found} == {None}
    assert {completion.text for completion in found} <= set(choices)
    assert len({completion.text for completion in found}) > 3


def test_a_form_that_is_complete_ends_the_answer_before_its_least_length(engine):
    options = GenerationOptions(response_format=ResponseFormat(choices=["yes", "no"]), min_new_tokens=20)
    found = engine.submit(Request("One, two,", options=options)).result(60)
    assert (found.error, found.text in ("yes", "no")) == (None, True)


def test_one_choice_is_always_the_answer(engine):
    for choice in ("a.b*c", "\\d+", "(", "{", "caf\u00e9 \u2713", "tab\there", "line\nline"):
        completion = ask(engine, PROMPTS[0], response_format=ResponseFormat(choices=[choice]), max_new_tokens=40)
        assert (completion.text, completion.error) == (choice, None)


def test_an_answer_that_was_cut_off_is_invalid(engine):
    completion = ask(engine, PROMPTS[0], response_format=Answer, max_new_tokens=4)
    assert (completion.error_code, completion.text) == ("schema_invalid", "")
    assert completion.generated_tokens == 4
    assert "max_new_tokens" in completion.error


def test_an_answer_that_was_cut_off_may_be_an_answer(engine):
    options = GenerationOptions(max_new_tokens=4, response_format=Answer)
    pieces: list[str] = []
    completion = engine.submit(Request(PROMPTS[0], options=options, check_form=False), pieces.append).result(60)
    assert (completion.error, completion.finish_reason, completion.parsed) == (None, "length", None)
    assert completion.text == "".join(pieces)
    assert completion.text.startswith("{")


def test_an_answer_that_runs_away_into_white_space_may_be_cut_off_there():
    state = RequestState(Request("x", check_form=False))
    state.begin(GenerationOptions(max_new_tokens=9999, response_format=Answer), [1], None)
    [sequence] = state.sequences
    assert sequence.append_text('{"colour":')
    while sequence.append_text(" " * 10):
        continue
    state.complete()
    completion = state.future.result(0)
    assert (completion.error, completion.finish_reason) == (None, "length")
    assert len(completion.text) < 2 * LONGEST_WHITE_SPACE


def test_rows_with_and_without_a_form_share_a_batch(engine):
    alone = [ask(engine, prompt).text for prompt in PROMPTS]
    form = GenerationOptions(max_new_tokens=20, response_format=ResponseFormat(regex="[0-9]{8}"))
    formed = [engine.submit(Request(prompt, options=form)) for prompt in PROMPTS]
    free = [engine.submit(Request(prompt)) for prompt in PROMPTS]
    assert [future.result(timeout=60).text for future in free] == alone
    assert all(re.fullmatch("[0-9]{8}", future.result(timeout=60).text) for future in formed)


def test_a_form_is_streamed(engine):
    form = GenerationOptions(max_new_tokens=20, response_format=ResponseFormat(regex="[0-9]{8}"))
    assert re.fullmatch("[0-9]{8}", "".join(engine.stream(Request(PROMPTS[0], options=form))))


def test_beams_and_forms_do_not_go_together(engine):
    completion = ask(engine, PROMPTS[0], response_format=Answer, num_beams=2)
    assert completion.error_code == "invalid_option"


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"properties": 3}, {"required": "a"}])
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(RequestError, match="json_schema") as caught:
        check_format(ResponseFormat(json_schema=schema))
    assert caught.value.code == "invalid_option"


def test_white_space_that_has_no_end_is_noticed():
    guard = WhiteSpaceGuard()
    guard.feed('{"a":\n' + " " * 40 + '"' + " " * 500 + '\\"' + "\\\\" + '",')
    for _ in range(LONGEST_WHITE_SPACE // 10):
        guard.feed("\n\t" * 5)
    with pytest.raises(RequestError, match="white space") as caught:
        guard.feed(" ")
    assert caught.value.code == "schema_invalid"
