"""Templates mean what they mean in langchain_core; rows that cannot be asked say why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.prompts import PromptTemplate

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.requests import PromptRows, RowProblem, RowRequest, Template
from prefect_huggingface.tasks.errors import BatchError

TEMPLATES = [
    "What is the capital of {country}?",
    'Answer as JSON, {{"name": ...}}: {text}\n{text!r:>20}',
    "{a}{b}{{{a}}}",
    "{first name}, {first-name} é {número:>5}",
    "no field",
    "{price:.2f}|{price:08.3f}|{price!s:^20}",
    "",
]
VALUES = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans())


@pytest.mark.parametrize("text", TEMPLATES)
@given(data=st.data())
def test_rendering_equals_langchain(text: str, data: st.DataObject) -> None:
    reference = PromptTemplate.from_template(text, template_format="f-string")
    kinds = st.floats(allow_nan=False) if ".2f" in text else VALUES
    row = {name: data.draw(kinds) for name in reference.input_variables}
    template = Template(text)

    assert sorted(template.columns) == sorted(reference.input_variables)
    try:
        expected = reference.format(**row)
    except (ValueError, TypeError):  # a format that the value does not have, say
        with pytest.raises(RowProblem):
            template.render(row)
    else:
        assert template.render({**row, "further": 1}) == expected


@pytest.mark.parametrize("text", ["{", "{country", "{}", "{a:{b}}", "{0:{b}}", "{a.b:{0}}", "}"])
def test_what_langchain_refuses_is_refused(text: str) -> None:
    with pytest.raises(BatchError, match="must be a template"):
        Template(text)


@pytest.mark.parametrize(
    ("row", "what"), [({}, "not there"), ({"country": None}, "null"), ({"country": float("nan")}, "NaN")]
)
def test_missing_values_are_problems_of_the_row(row: dict[str, Any], what: str) -> None:
    with pytest.raises(RowProblem, match=f"Column 'country' is {what}") as problem:
        Template("{country}").render(row)
    assert problem.value.status == "missing_value"


def ask(row: dict[str, Any], **fields: Any) -> RowRequest:
    return PromptRows(**{"prompt": None, **fields})(5, row)


def test_a_system_prompt_makes_a_conversation() -> None:
    made = ask({"country": "Peru", "tone": "short"}, prompt="Capital of {country}?", system="Be {tone}.")
    assert made.request.id == 5
    assert made.request.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of Peru?"},
    ]


@pytest.mark.parametrize("value", ['[{"role": "user", "content": "Hi"}]', [{"role": "user", "content": "Hi"}]])
def test_messages_come_as_a_list_or_as_json(value: Any) -> None:
    made = ask({"chat": value}, messages_column="chat", system="Be kind.")
    assert [message["role"] for message in made.request.messages or ()] == ["system", "user"]


@pytest.mark.parametrize("value", [None, "Hi", [], [1], [{"content": "no role"}], "[]", {"role": "user"}])
def test_what_is_no_conversation_is_a_problem(value: Any) -> None:
    with pytest.raises(RowProblem) as problem:
        ask({"chat": value}, messages_column="chat")
    assert problem.value.status == "invalid_prompt"


def test_rows_have_options_of_their_own() -> None:
    fields: dict[str, Any] = {
        "prompt": "{country}",
        "option_columns": ("max_new_tokens", "stop"),
        "options": GenerationOptions(max_new_tokens=7, seed=1),
    }
    made = ask({"country": "Peru", "max_new_tokens": "9", "stop": None}, **fields)
    assert made.request.options is not None
    assert (made.request.options.max_new_tokens, made.request.options.seed) == (9, 1)
    same = ask({"country": "Peru", "max_new_tokens": "9"}, **fields)
    other = ask({"country": "Peru", "max_new_tokens": "8"}, **fields)
    assert made.text == same.text != other.text  # rows with other options do not share an answer

    with pytest.raises(RowProblem, match="'max_new_tokens'") as problem:
        ask({"country": "Peru", "max_new_tokens": "many"}, **fields)
    assert problem.value.status == "invalid_option"


@pytest.mark.parametrize(
    ("base", "row"),
    [
        ({"do_sample": True}, {"temperature": "0.5"}),
        ({"do_sample": True, "temperature": 0.7}, {"top_p": 0.9, "top_k": "40", "min_p": 0.1}),
        ({"max_new_tokens": 1000}, {"min_new_tokens": "500"}),
        ({"do_sample": True, "temperature": 0.7}, {"do_sample": "false"}),
        ({"num_beams": 4}, {"n": 3}),
        ({"do_sample": True}, {"num_beams": "1", "n": "2"}),
    ],
)
@pytest.mark.parametrize("place", ["options", "defaults"])
def test_options_of_a_row_need_only_go_with_those_below(base: dict[str, Any], row: dict[str, Any], place: str) -> None:
    fields: dict[str, Any] = {place: GenerationOptions(**base), "prompt": "{country}", "option_columns": tuple(row)}
    found = ask({"country": "Peru", **row}, **fields).request.options
    expected = GenerationOptions(**{**({} if "do_sample" in row else base), **row})
    assert found == expected


def test_options_of_a_row_that_go_with_nothing_below_say_why() -> None:
    fields: dict[str, Any] = {"prompt": "{country}", "option_columns": ("temperature",)}
    with pytest.raises(
        RowProblem, match="Option 'temperature': .* has no effect on greedy decoding, got 0.5"
    ) as problem:
        ask({"country": "Peru", "temperature": "0.5"}, **fields)
    assert problem.value.status == "invalid_option"
    with pytest.raises(RowProblem, match="Option 'num_beams': .* must be 1 with `do_sample=True`"):
        fields = {"prompt": "a", "option_columns": ("num_beams",), "options": GenerationOptions(do_sample=True)}
        ask({"num_beams": 4}, **fields)
