from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from prefect_huggingface.blocks import GenerationOptions, ResponseFormat


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1, "do_sample": True}, "greater than or equal to 0"),
        ({"temperature": 0, "do_sample": True}, "must be above 0"),
        ({"temperature": 0.5}, "Set `do_sample=True`"),
        ({"top_p": 2, "do_sample": True}, "less than or equal to 1"),
        ({"top_p": 0.5}, "Set `do_sample=True`"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "at most `max_new_tokens`"),
        ({"n": 2}, "`n` must be 1"),
        ({"n": 2, "do_sample": True, "num_beams": 2}, "Choose one"),
        ({"stop": ""}, "no empty text"),
        ({"max_tokens": 5}, "Extra inputs"),
        ({"response_format": {}}, "exactly one"),
        ({"response_format": {"regex": "a", "choices": ["b"]}}, "exactly one"),
        ({"response_format": {"regex": "("}}, "regular expression"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        GenerationOptions(**options)


def test_one_stop_string_may_stand_alone():
    assert GenerationOptions(stop="\n").stop == ["\n"]
    assert GenerationOptions(stop=None).stop == []
    assert GenerationOptions(stop=("a", "b")).stop == ["a", "b"]


def test_temperature_zero_is_greedy():
    assert GenerationOptions(temperature=0).do_sample is False


def test_a_pydantic_class_is_a_response_format():
    schema = GenerationOptions(response_format=Person).response_format.json_schema
    assert schema == Person.model_json_schema()
    assert ResponseFormat(choices=["a"]).choices == ["a"]


def test_merging_puts_only_what_was_set_over_the_defaults():
    base = GenerationOptions(max_new_tokens=9, do_sample=True, temperature=0.5, stop=["x"])
    assert base.merged(None) is base
    merged = base.merged(GenerationOptions(max_new_tokens=3))
    assert (merged.max_new_tokens, merged.temperature, merged.stop) == (3, 0.5, ["x"])
    greedy = base.merged(GenerationOptions(do_sample=False))
    assert (greedy.do_sample, greedy.temperature, greedy.max_new_tokens) == (False, None, 9)
    with pytest.raises(ValidationError, match="`n` must be 1"):
        GenerationOptions(do_sample=True, n=2).merged(GenerationOptions(do_sample=False))
