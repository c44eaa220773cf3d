from __future__ import annotations

import pytest
from pydantic import ValidationError

from prefect_huggingface.tasks.batching.requests import ChainRows, ChainStep, RowProblem, check_chain, parse_output
from prefect_huggingface.tasks.errors import ChainError


def step(prompt: str = "Say {word}", name: str = "first", parser: str = "text") -> ChainStep:
    return ChainStep(name=name, prompt=prompt, parser=parser)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least one step"),
        ([step("{nothing}")], r"\{nothing\}, which is neither an input nor an earlier step"),
        ([step("{second}"), step("x", "second")], "neither an input nor an earlier step"),
        ([step(), step()], "'first' is used twice"),
        ([step("x", "word")], "'word' is used twice"),
        ([step("{word")], "not a prompt template"),
        ([step("x"), step("{first_age}", "second")], "neither an input nor an earlier step"),
    ],
)
def test_a_chain_that_cannot_be_filled_in_is_refused(steps, message):
    with pytest.raises(ChainError, match=message):
        check_chain(steps, {"word": "hello"})


@pytest.mark.parametrize("fields", [{"name": "a b"}, {"prompt": ""}, {"parser": "xml"}, {"promt": "x"}])
def test_a_step_that_is_none_is_refused(fields):
    with pytest.raises(ValidationError):
        ChainStep(**{"name": "a", "prompt": "x", **fields})


def test_later_prompts_use_outputs_and_the_fields_of_json():
    steps = [step("{word}", "person", "json"), step("{person_age} {word} {person}", "second")]
    check_chain(steps, {"word": "hi"})
    values = {"word": "hi", "person": {"name": "Ada", "age": 36}}
    made = ChainRows(steps)(0, values, 1)
    assert made.request.prompt == "36 hi {'name': 'Ada', 'age': 36}"


def test_a_field_that_the_json_lacks_is_named():
    steps = [step("x", "person", "json"), step("{person_age}")]
    with pytest.raises(RowProblem, match=r"^Step 'first': \{person_age\} is not there, since the JSON.*person_name"):
        ChainRows(steps)(0, {"person": {"name": "Ada"}}, 1)


def test_double_braces_are_text():
    made = ChainRows([step('{{"a": {word}}}')])(0, {"word": 1})
    assert made.request.prompt == '{"a": 1}'


@pytest.mark.parametrize(
    ("parser", "text", "output"),
    [
        ("text", " a b ", " a b "),
        ("json", ' {"a": [1, 2]}\n', {"a": [1, 2]}),
        ("json", '```json\n{"a": 1}\n```', {"a": 1}),
        ("list", "red, green,  blue", ["red", "green", "blue"]),
    ],
)
def test_outputs_are_parsed(parser, text, output):
    assert parse_output(step(parser=parser), text) == output


def test_an_output_of_another_form_is_an_error_with_the_text():
    with pytest.raises(ChainError, match=r"'first' is not json: 'no json'"):
        parse_output(step(parser="json"), "no json")
