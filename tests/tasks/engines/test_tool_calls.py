"""Tool calls are found in the formats of all families, whole and streamed, and nothing else is lost."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.structured import check_format
from prefect_huggingface.tasks.engines.tool_calls import (
    InvalidCall,
    ToolCall,
    ToolCallParser,
    call_schema,
    choose_tools,
    find_calls,
)
from prefect_huggingface.tasks.errors import SettingsError

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
PARIS, NOW = ("get_weather", {"city": "Paris", "days": 2}), ("now", {})
PARIS_JSON = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
FORMATS = {
    "hermes": f"<tool_call>\n{PARIS_JSON}\n</tool_call>\n"
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "hermes without arguments": f'<tool_call>{PARIS_JSON}</tool_call><tool_call>{{"name": "now"}}</tool_call>',
    "hermes without end": f'<tool_call>{PARIS_JSON}</tool_call><tool_call>{{"name": "now"}}',
    "qwen coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "qwen coder without tags": "<function=get_weather><parameter=city>Paris</parameter><parameter=days>2</parameter>"
    "</function><function=now></function>",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "llama": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; {"name": "now", "parameters": {}}',
    "llama python tag": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}<|eom_id|>'
    '{"type": "function", "function": "now", "parameters": {}}',
    "openai": '[{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", '
    '\\"days\\": 2}"}}, {"type": "function", "function": {"name": "now", "arguments": "{}"}}]',
    "mistral": f'[TOOL_CALLS] [{PARIS_JSON}, {{"name": "now", "arguments": {{}}, "id": "abcdefghi"}}]',
    "mistral new": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[ARGS]{}',
    "phi-4-mini": f'<|tool_call|>[{PARIS_JSON}, {{"name": "now", "arguments": {{}}}}]<|/tool_call|>',
    "granite": f'<|tool_call|>[{PARIS_JSON}, {{"name": "now", "arguments": {{}}}}]',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "command-r": 'Action: ```json\n[\n{"tool_name": "get_weather", "parameters": {"city": "Paris", "days": 2}},\n'
    '{"tool_name": "now", "parameters": {}}\n]\n```',
    "command-a": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris", '
    '"days": 2}}, {"tool_call_id": "1", "tool_name": "now", "parameters": {}}]<|END_ACTION|>',
    "lfm2": '<|tool_call_start|>[get_weather(city="Paris", days=2), now()]<|tool_call_end|>',
    "pythonic": "[get_weather(city='Paris', days=2), now()]",
    "kimi": '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>'
    '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "gpt-oss": '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}'
    "<|call|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
    "gpt-oss, recipient first": ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris", '
    '"days": 2}<|call|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>',
    "fence": f"```json\n[{PARIS_JSON}, {{\"name\": \"now\", \"arguments\": {{}}}}]\n```",
    "fences": f"```json\n{PARIS_JSON}\n```\n```tool_call\n{{\"name\": \"now\"}}\n```",
}  # fmt: skip
NOT_CALLS = (
    "Just text.",
    "  leading and trailing  \n",
    '{"name": "Ada", "age": 3}',
    '{"name": "get_weather", "city": "Paris"}',
    '{"name": "unknown_tool", "arguments": {}}',
    "```python\nprint({'name': 1})\n```",
    '```json\n{"name": "unknown", "arguments": {}}\n```',
    "The <tool_call> tag begins a call, and </tool_call> ends it.",
    "A list: [1, 2] and [get_weather] and {x}.",
    "[1, 2, 3]",
    "[link](http://localhost)",
    "Action: go outside.",
    "if a < b and c <|d",
    "<tool",
    "{",
)


def calls_of(items: list[object]) -> list[tuple[str, dict[str, object]]]:
    return [(item.name, item.arguments) for item in items if isinstance(item, ToolCall)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("Let me look.\n", ""), ("One\n\ntwo:\n", "\nDone.")])
def test_calls_are_found_with_text_around_them(name: str, before: str, after: str) -> None:
    text, calls, invalid = find_calls(before + FORMATS[name] + ("" if name.endswith("without end") else after), TOOLS)
    assert [(call.name, call.arguments) for call in calls] == [PARIS, NOW]
    assert invalid == []
    rest = after if not name.endswith("without end") else ""
    assert text.split() == (before + rest).split()
    assert text == text.strip()


@pytest.mark.parametrize("text", NOT_CALLS)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert find_calls(text, TOOLS) == (text, [], [])
    assert find_calls(f"{text}\n<tool_call>{PARIS_JSON}</tool_call>", TOOLS).text == text.strip() or text.startswith(
        " "
    )


def test_a_tag_in_the_text_does_not_hide_the_call_after_it() -> None:
    text, calls, _ = find_calls(f"I use <tool_call> tags.\n<tool_call>{PARIS_JSON}</tool_call>", TOOLS)
    assert (text, calls_of(list(calls))) == ("I use <tool_call> tags.", [PARIS])


def test_a_closing_tag_in_an_argument_is_part_of_it() -> None:
    arguments = {"city": '</tool_call> } ] \\ " ```'}
    body = json.dumps({"name": "get_weather", "arguments": arguments})
    for text in (f"<tool_call>{body}</tool_call>", f"[TOOL_CALLS][{body}]", body, f"```json\n{body}\n```"):
        assert calls_of(list(find_calls(text, TOOLS).calls)) == [("get_weather", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{bad}</tool_call>",
        '<tool_call>{"name": "now", "argum',
        "[TOOL_CALLS] [{]",
        '<|tool_call|>[{"a": 1}]',
    ],
)
def test_a_broken_call_is_kept_as_invalid(text: str) -> None:
    found = find_calls("Look: " + text, TOOLS)
    assert (found.text, found.calls, len(found.invalid)) == ("Look:", [], 1)


def test_arguments_have_the_types_of_the_schema() -> None:
    body = (
        '<parameter=city>\n42\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=tags>\n["a"]\n</parameter>'
    )
    found = find_calls(f"<tool_call><function=get_weather>{body}</function></tool_call>", TOOLS)
    assert found.calls[0].arguments == {"city": "42", "days": 3, "tags": ["a"]}


def test_ids_have_nine_letters_and_digits() -> None:
    ids = [call.id for call in find_calls(FORMATS["hermes"], TOOLS).calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch(r"[a-zA-Z0-9]{9}", one) for one in ids)


@given(data=st.data())
def test_pieces_give_what_the_whole_gives(data: st.DataObject) -> None:
    parts = [*FORMATS.values(), *NOT_CALLS, "\n", " ", "text", "<tool_call>", "```json", "{", "[", "Action:"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=4)))
    parser = ToolCallParser(TOOLS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    items = [item for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for item in parser.feed(text[a:b])]
    items += parser.finish()
    whole = find_calls(text, TOOLS)
    assert "".join(item for item in items if isinstance(item, str)) == whole.text
    assert calls_of(items) == calls_of(list(whole.calls))
    assert [item for item in items if isinstance(item, InvalidCall)] == whole.invalid


@pytest.mark.parametrize("name", FORMATS)
def test_calls_behind_a_text_are_found_letter_by_letter(name: str) -> None:
    text = f"Let me look.\n{FORMATS[name]}"
    parser = ToolCallParser(TOOLS)
    items = [*(item for letter in text for item in parser.feed(letter)), *parser.finish()]
    assert "".join(item for item in items if isinstance(item, str)) == "Let me look."
    assert calls_of(items) == [PARIS, NOW]


@pytest.mark.parametrize(
    "pieces",
    [
        ["```\ntext\n```", "`", '``json\n{"name": "now", "arguments": {}}\n```'],
        ["{[TOOL_", "C", 'ALLS]now[ARGS]{"a": 1}'],
        ['Text\n```json\n{"name": "now", "arguments": {}}\n``` ', " and more"],
    ],
)
def test_a_mark_that_is_taken_apart_behind_another_one_is_found(pieces: list[str]) -> None:
    parser = ToolCallParser(TOOLS)
    items = [*(item for piece in pieces for item in parser.feed(piece)), *parser.finish()]
    assert len(calls_of(items)) == 1
    whole = find_calls("".join(pieces), TOOLS)
    assert calls_of(items) == calls_of(list(whole.calls))
    assert "".join(item for item in items if isinstance(item, str)) == whole.text


def test_free_text_streams_until_it_may_become_a_call() -> None:
    parser = ToolCallParser(TOOLS)
    pieces = [
        parser.feed(text) for text in ("Let", " me", " look", ".\n", "<tool", "_call>", PARIS_JSON, "</tool_call>")
    ]
    assert pieces[:6] == [["Let"], [" me"], [" look"], ["."], [], []]
    assert calls_of(pieces[6]) == [PARIS]
    assert parser.finish() == []


def test_json_that_is_no_call_streams_too() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed('{"answer"') == ['{"answer"']
    assert parser.feed(": 4") == [": 4"]


def test_without_tools_nothing_is_looked_for() -> None:
    assert find_calls(FORMATS["hermes"], []) == (FORMATS["hermes"], [], [])


def test_long_arguments_take_time_in_proportion() -> None:
    import time

    parser = ToolCallParser(TOOLS)
    body = json.dumps({"name": "get_weather", "arguments": {"city": "word " * 40_000}})
    begin = time.perf_counter()
    items = [item for start in range(0, len(body), 5) for item in parser.feed(body[start : start + 5])]
    assert time.perf_counter() - begin < 5
    assert calls_of([*items, *parser.finish()]) == [("get_weather", {"city": "word " * 40_000})]


@pytest.mark.parametrize("inner", ['{"name": "now", "arguments": {"a": 1', "[]"])
def test_a_broken_call_has_its_text(inner: str) -> None:
    found = find_calls(f"<tool_call>{inner}</tool_call>", TOOLS)
    assert (found.text, found.calls, found.invalid[0].text) == ("", [], inner)
    assert found.invalid[0].error


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


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


def test_definitions_of_forced_tools_stay_their_own() -> None:
    def parameters(kind: str) -> dict[str, object]:
        place = {"type": "object", "properties": {"zip": {"type": kind}, "next": {"$ref": "#/$defs/Place"}}}
        return {"type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}}, "$defs": {"Place": place}}

    tools = [tool("one", **parameters("string")), tool("two", **parameters("integer"))]
    for chosen in (tools[:1], tools):
        schema = call_schema(chosen)
        check_format(ResponseFormat(json_schema=schema))
        for number, kind in enumerate(("string", "integer")[: len(chosen)]):
            reference = (schema["anyOf"][number] if len(chosen) > 1 else schema)["properties"]["arguments"]
            name = reference["properties"]["place"]["$ref"].removeprefix("#/$defs/")
            assert schema["$defs"][name]["properties"]["zip"] == {"type": kind}
            assert schema["$defs"][name]["properties"]["next"] == {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "10115", "10115"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", 3),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "3", 3),
        ({}, "3", 3),
        ({"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]}, '{"zip": 1}', {"zip": 1}),
        ({"type": "string", "oneOf": [{"const": "1"}, {"const": "2"}]}, "1", "1"),
        ({"anyOf": [{"enum": [1, 2]}, {"type": "null"}]}, "2", 2),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Place"}]}, '{"zip": 1}', {"zip": 1}),
    ],
)
def test_arguments_without_quotes_have_the_type_that_the_tool_wants(schema: object, text: str, value: object) -> None:
    tools = [tool("get", type="object", properties={"zip": schema})]
    call = f"<tool_call><function=get><parameter=zip>{text}</parameter></function></tool_call>"
    assert find_calls(call, tools).calls[0].arguments == {"zip": value}
