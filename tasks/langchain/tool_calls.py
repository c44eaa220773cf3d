"""Tool calls: asks a model for them, and finds them in its text.

Models write calls in their own ways: between `<tool_call>` tags, after a marker, in a code fence, or as bare JSON.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call

from prefect_huggingface.tasks.errors import SettingsError

Tool = Mapping[str, Any]

TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
MARKERS = re.compile(r"^\s*(?:<\|python_tag\|>|\[TOOL_CALLS\]|```(?:json|tool_call)?)\s*|\s*(?:```|<\|eom_id\|>)\s*$")
SEPARATORS = re.compile(r"[\s;,]*")


class ToolCalls(NamedTuple):
    """The text beside the calls, the calls, and those that cannot be understood."""

    text: str
    calls: list[ToolCall]
    invalid: list[InvalidToolCall]


def choose_tools(tools: Sequence[Tool], choice: Any) -> list[Tool]:
    """Return the tools that must be called, none where the model may choose.

    Args:
        tools: Tools in the form of OpenAI.
        choice: "auto", "none", "any", "required", True, the name of a tool, or a tool in the form of OpenAI.

    Raises:
        SettingsError: If the choice is none of the tools.
    """
    if choice in (None, False, "auto", "none"):
        return []
    if choice in (True, "any", "required"):
        return list(tools)
    name = choice.get("function", choice).get("name") if isinstance(choice, Mapping) else choice
    chosen = [tool for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        names = [tool["function"]["name"] for tool in tools]
        raise SettingsError(f"`tool_choice` must be 'auto', 'none', 'any' or one of {names!r}, got {choice!r}.")
    return chosen


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of some tools."""
    schemas = [_one_schema(tool["function"]) for tool in tools]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _one_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [function["name"]]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def find_calls(text: str, names: set[str]) -> ToolCalls:
    """Find the tool calls in the text of an answer.

    Args:
        text: The whole answer.
        names: Names of the tools. Outside of tags, only JSON with such a name is a call.
    """
    tagged = TAGGED.findall(text)
    if tagged:
        return _read_tagged(TAGGED.sub("", text).strip(), tagged)
    bare = text
    while (shorter := MARKERS.sub("", bare)) != bare:
        bare = shorter
    try:
        values = list(_json_values(bare))
    except json.JSONDecodeError:
        return ToolCalls(text, [], [])
    calls = [call for value in values if (call := _read_call(value)) is not None and call["name"] in names]
    if not calls or len(calls) != len(values):
        return ToolCalls(text, [], [])
    return ToolCalls("", calls, [])


def _read_tagged(text: str, tagged: Sequence[str]) -> ToolCalls:
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for inner in tagged:
        try:
            read = [_read_call(value) for value in _json_values(inner)]
        except json.JSONDecodeError as exc:
            invalid.append(invalid_tool_call(args=inner, id=_new_id(), error=f"The call is no JSON: {exc}."))
            continue
        calls += [call for call in read if call is not None]
        if None in read or not read:
            invalid.append(invalid_tool_call(args=inner, id=_new_id(), error="The call has no name or no arguments."))
    return ToolCalls(text, calls, invalid)


def _json_values(text: str) -> Iterator[Any]:
    """Yield the JSON values that a text consists of, those of a list one by one."""
    decoder = json.JSONDecoder(strict=False)
    text = text.strip()
    place = 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        yield from value if isinstance(value, list) else [value]
        separator = SEPARATORS.match(text, place)
        place = separator.end() if separator else place


def _read_call(value: Any) -> ToolCall | None:
    """Return the call that a JSON value is, or None."""
    if not isinstance(value, Mapping):
        return None
    function = value.get("function")
    if isinstance(function, Mapping):
        value = function
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return None
    if not isinstance(value.get("name"), str) or not isinstance(arguments, Mapping):
        return None
    return tool_call(name=value["name"], args=dict(arguments), id=_new_id())


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
