"""Tool calls as models write them."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.tool_calls import call_schema, choose_tools, find_calls

NAMES = {"add", "weather"}
ADD_TEXT = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
WEATHER_TEXT = '{"name": "weather", "parameters": {"city": "Paris"}}'
ADD = {"name": "add", "args": {"a": 1, "b": 2}}
WEATHER = {"name": "weather", "args": {"city": "Paris"}}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def called(text: str) -> list[dict[str, Any]]:
    return [{"name": call["name"], "args": call["args"]} for call in find_calls(text, NAMES).calls]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{ADD_TEXT}\n</tool_call>", [ADD]),
        (f"<tool_call>{ADD_TEXT}</tool_call>\n<tool_call>{WEATHER_TEXT}</tool_call>", [ADD, WEATHER]),
        (f"<tool_call>{ADD_TEXT}", [ADD]),
        (WEATHER_TEXT, [WEATHER]),
        (f"<|python_tag|>{WEATHER_TEXT}<|eom_id|>", [WEATHER]),
        (f"{ADD_TEXT}; {WEATHER_TEXT}", [ADD, WEATHER]),
        (f"[TOOL_CALLS] [{ADD_TEXT}]", [ADD]),
        (f"[{ADD_TEXT}, {WEATHER_TEXT}]", [ADD, WEATHER]),
        (f"```json\n{ADD_TEXT}\n```", [ADD]),
        ('{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}}', [ADD]),
        ("The capital of France is Paris.", []),
        ('{"name": "Paris", "arguments": {"is": "no tool"}}', []),
        ('{"capital": "Paris"}', []),
        ('[1, 2, {"name": "add", "arguments": {}}]', []),
        ('{"name": "add", "arguments": {"a": 1', []),
        ("", []),
    ],
)
def test_calls_are_found(text: str, calls: list[dict[str, Any]]) -> None:
    found = find_calls(text, NAMES)
    assert called(text) == calls
    assert found.invalid == []
    assert found.text == ("" if calls else text)
    assert len({call["id"] for call in found.calls}) == len(calls)


def test_text_beside_a_call_stays() -> None:
    found = find_calls('I will add.\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>', NAMES)
    assert (found.text, found.calls[0]["args"]) == ("I will add.", {"a": 1, "b": 2})


@pytest.mark.parametrize("inner", ['{"name": "add", "arguments": {"a": 1', '{"name": "add"}', "[]"])
def test_a_broken_call_is_reported_and_not_lost(inner: str) -> None:
    found = find_calls(f"<tool_call>{inner}</tool_call>", NAMES)
    assert found.calls == []
    assert found.invalid[0]["args"] == inner
    assert found.invalid[0]["error"]


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (None, []), ("auto", []), ("none", []), (False, []), (True, ["add", "weather"]), ("any", ["add", "weather"]),
        ("required", ["add", "weather"]), ("add", ["add"]),
        ({"type": "function", "function": {"name": "add"}}, ["add"]),
    ],
)  # fmt: skip
def test_choices_of_tools(choice: Any, chosen: list[str]) -> None:
    tools = [tool("add"), tool("weather")]
    assert [one["function"]["name"] for one in choose_tools(tools, choice)] == chosen


def test_a_choice_that_is_no_tool_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"\['add'\], got 'subtract'"):
        choose_tools([tool("add")], "subtract")


def test_schema_of_a_forced_call() -> None:
    numbers = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    one = call_schema([tool("add", **numbers)])
    assert one["properties"] == {"name": {"type": "string", "enum": ["add"]}, "arguments": numbers}
    assert len(call_schema([tool("add", **numbers), tool("weather")])["anyOf"]) == 2
