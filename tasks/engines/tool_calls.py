"""Tool calls in the text of an answer: in the formats of all families, whole or as the text comes.

A call begins with a mark of its family, with a fence, or as bare JSON at the beginning of a line. What only looks like
a call stays text. Reasoning must be taken away before: a call that is drafted there is no call.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from prefect_huggingface.tasks.errors import SettingsError

Tool = Mapping[str, Any]

# Special tokens in calls, which decoding must keep for an answer that may have calls.
TOOL_MARKS = (
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|START_ACTION|>", "<|END_ACTION|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>",
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>",
)  # fmt: skip
# What may follow a call and belongs to it, each once.
TAGS = (
    "</tool_call>", "<|/tool_call|>", "<|tool_call_end|>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<|END_ACTION|>", "<|tool_calls_section_end|>", "<|call|>", "<|eom_id|>", "</function>",
)  # fmt: skip
SEPARATORS, FENCE = (";", ","), "```"
NAME_KEYS = ("name", "tool_name", "function")
ARGUMENT_KEYS = ("arguments", "parameters", "args")
KEYS = (*NAME_KEYS, *ARGUMENT_KEYS, "type", "id", "tool_call_id")
CUT_CALL = re.compile(r'[\[{\s]*"(?:name|tool_name)"\s*:\s*"([^"]*)"')
NAME = r"[A-Za-z_][\w.\-]*"
RECIPIENT = " to=functions."  # Harmony has it in the channel, or in the header before it
# A call without a mark: JSON with a key of a call, or Python.
BARE = rf'[\[{{\s]*"(?:{"|".join(KEYS)})"\s*:|\[\s*(?P<name>{NAME})\('
BRACKET = r"\s*(?=[\[{])"
FUNCTION = rf"<function=({NAME})>(.*?)(?:</function>|</tool_call>)"
GLM = rf"({NAME})\s*((?:<arg_key>.*?</arg_key>\s*<arg_value>.*?</arg_value>\s*)*)</tool_call>"
# Marks that stand before another one.
FOLLOWED = {
    "<｜tool▁calls▁begin｜>": r"\s*(?=<｜tool▁call▁begin｜>)",
    "<|tool_calls_section_begin|>": r"\s*(?=<\|tool_call_begin\|>)",
    "<|start|>assistant": r"\s*(?=<\|channel\|>commentary|to=functions\.)",
}
# The name of a tool, and what is between it and its arguments as JSON.
MISTRAL = rf"({NAME})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{{)"
DEEPSEEK = rf"(?:function<｜tool▁sep｜>)?({NAME})(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?\s*)?(?=\{{)"
NAMED = {
    "<|tool_call_begin|>": rf"(?:functions\.)?({NAME})(?::\d+)?\s*<\|tool_call_argument_begin\|>",
    "<|channel|>commentary": rf" to=functions\.({NAME})[^{{]*<\|message\|>",
    RECIPIENT: rf"({NAME})\s*<\|[^{{]*?<\|message\|>",
}
REFERENCE = re.compile(r"#/(?:\$defs|definitions)/(.+)")
DEFINITIONS = ("$defs", "definitions")
ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: Name of the tool.
        arguments: Values of its parameters.
        id: Nine letters and digits, which every chat template accepts.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: "".join(secrets.choice(ALPHABET) for _ in range(9)))


@dataclass(frozen=True, slots=True)
class InvalidCall:
    """Text in the place of a call that cannot be understood."""

    text: str
    error: str


Item = str | ToolCall | InvalidCall


class ToolCalls(NamedTuple):
    """The text beside the calls, the calls, and those that cannot be understood."""

    text: str
    calls: list[ToolCall]
    invalid: list[InvalidCall]


def find_calls(text: str, tools: Sequence[Tool]) -> ToolCalls:
    """Find the calls of tools in a whole answer."""
    parser = ToolCallParser(tools)
    items = [*parser.feed(text), *parser.finish()]
    return ToolCalls(
        "".join(item for item in items if isinstance(item, str)),
        [item for item in items if isinstance(item, ToolCall)],
        [item for item in items if isinstance(item, InvalidCall)],
    )


class _Found(NamedTuple):
    """A place that was read up to `end`, with the calls in it and what may follow them."""

    end: int
    items: Sequence[ToolCall | InvalidCall] = ()
    closers: Sequence[str] = TAGS


class _Wait(Exception):
    """More text decides."""


class _NoCall(Exception):
    """The place holds no call, so that it is text."""


class ToolCallParser:
    """Finds calls in a text that comes in pieces. Text goes on at once unless it may become a call."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Take the tools that may be called, in the form of OpenAI."""
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {str(function.get("name")): function.get("parameters") or {} for function in functions}
        self._buffer = ""
        self._final = False
        self._holds = False
        self._line_begins = True
        self._closers: list[str] | None = None  # after a call
        self._gap = ""
        self._has_text = self._has_calls = False
        self._readers: dict[str, Callable[[int], _Found]] = {
            **{mark: partial(self._read_followed, pattern) for mark, pattern in FOLLOWED.items()},
            **{mark: partial(self._read_named, pattern) for mark, pattern in NAMED.items()},
            "<tool_call>": self._read_tagged,
            "<function=": lambda place: self._read_function(place - len("<function=")),
            "<|tool_call|>": self._read_marked,
            "<|python_tag|>": self._read_json,
            "<|START_ACTION|>": self._read_marked,
            "<|tool_call_start|>": self._read_pythonic,
            "[TOOL_CALLS]": self._read_mistral,
            "<｜tool▁call▁begin｜>": self._read_deepseek,
            "Action:": self._read_action,
            "```": self._read_fence,
        }
        marks = "|".join(re.escape(mark) for mark in sorted(self._readers, key=len, reverse=True))
        # By whether the buffer begins a line.
        begins = (r"(?<=\n)", r"(?m:^)")
        self._openers = [_compiled(rf"(?P<mark>{marks})|{begin}[ \t]*[\[{{]") for begin in begins]

    def feed(self, text: str) -> list[Item]:
        """Return the pieces of text and the calls that are certain after another piece of the answer."""
        self._buffer += text
        # A call that has begun ends with one of these, so that long arguments are not read again and again.
        if self._holds and not any(char in "]})>`\n" for char in text):
            return []
        return list(self._scan())

    def finish(self) -> list[Item]:
        """Return what was held back, at the end of the answer."""
        self._final = True
        items = list(self._scan())
        if not self._has_calls and self._gap:
            items.append(self._gap)
        return items

    def _scan(self) -> Iterator[Item]:
        if not self._schemas:
            text, self._buffer = self._buffer, ""
            yield from [text] if text else []
            return
        self._holds = False
        begin = 0
        while self._closers is None or self._skip_closers():
            found = self._openers[self._line_begins].search(self._buffer, begin, partial=not self._final)
            if found is None or found.partial:
                yield from self._pass(len(self._buffer) if found is None else found.start())
                return
            try:
                read = self._readers[found["mark"]](found.end()) if found["mark"] else self._read_bare(found.end() - 1)
            except _Wait:
                yield from self._pass(found.start())
                self._holds = True
                return
            except _NoCall:
                begin = found.end()
                continue
            yield from self._pass(found.start())
            self._buffer, begin = self._buffer[read.end - found.start() :], 0
            if read.items:
                self._closers, self._has_calls = list(read.closers), True
                yield from read.items

    def _pass(self, end: int) -> Iterator[str]:
        """Let the text up to a place go; whitespace waits for what follows it."""
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if not text:
            return
        self._line_begins = text.endswith("\n")
        text = self._gap + text
        if self._has_calls and not self._has_text:
            text = text.lstrip()
        kept = text.rstrip()
        self._gap = text[len(kept) :]
        if kept:
            self._has_text = True
            yield kept

    def _skip_closers(self) -> bool:
        """Take away what belongs to the last call; return False where more text decides."""
        closers = self._closers or []
        rest = self._buffer.lstrip()
        while closer := next((mark for mark in closers if rest.startswith(mark)), None):
            closers.remove(closer)
            self._buffer = rest[len(closer) :]
            rest = self._buffer.lstrip()
        if not self._final and (not rest or any(mark.startswith(rest) for mark in closers)):
            return False
        self._gap = (self._gap or "\n") if self._has_text else ""
        self._buffer, self._closers, self._line_begins = rest, None, True
        return True

    def _match(self, pattern: str, place: int) -> re.Match[str]:
        """Match a pattern at a place.

        Raises:
            _Wait: If the text ends before it is decided.
            _NoCall: If it does not match.
        """
        found = _compiled(pattern).match(self._buffer, place, partial=not self._final)
        if found is None:
            raise _NoCall
        if found.partial:
            raise _Wait
        match: re.Match[str] = found
        return match

    def _read_value(self, place: int) -> tuple[int, Any]:
        """Return the end and the value of the JSON at a place, an `InvalidCall` in place of a value that is broken."""
        place = self._skip_blank(place)
        if self._buffer[place] not in "[{":
            raise _NoCall
        end = _end_of_brackets(self._buffer, place)
        if end is None:
            if not self._final:
                raise _Wait
            tags = [at for tag in TAGS if (at := self._buffer.find(tag, place)) >= 0]
            end = min(tags, default=len(self._buffer))
            return end, InvalidCall(self._buffer[place:end], "The call is cut off.")
        try:
            return end, json.loads(self._buffer[place:end], strict=False)
        except ValueError as exc:
            return end, InvalidCall(self._buffer[place:end], f"The call is not valid JSON: {exc}.")

    def _skip_blank(self, place: int) -> int:
        return self._match(r"\s*(?=\S)", place).end()

    def _read_marked(self, place: int) -> _Found:
        """Read JSON after a mark that says that it is a call."""
        end, value = self._read_value(place)
        values = value if isinstance(value, list) and value else [value]
        return _Found(end, [self._as_call(one) for one in values])

    def _read_json(self, place: int) -> _Found:
        """Read JSON that is a call only where it names a tool."""
        end, value = self._read_value(place)
        if isinstance(value, InvalidCall) and (named := CUT_CALL.match(value.text)) and named[1] in self._schemas:
            return _Found(end, [value])
        values = value if isinstance(value, list) else [value]
        calls = [call for one in values if isinstance(call := self._as_call(one), ToolCall)]
        if not calls or len(calls) < len(values) or any(call.name not in self._schemas for call in calls):
            raise _NoCall
        return _Found(end, calls)

    def _read_bare(self, place: int) -> _Found:
        name = self._match(BARE, place)["name"]
        if name is None:
            return self._read_json(place)._replace(closers=(*TAGS, *SEPARATORS))
        if name not in self._schemas:
            raise _NoCall
        return self._read_pythonic(place)

    def _read_fence(self, place: int) -> _Found:
        return self._read_bare(self._match(rf"[a-z_]*{BRACKET}", place).end())._replace(closers=(FENCE,))

    def _read_action(self, place: int) -> _Found:
        return self._read_json(self._match(rf"\s*```[a-z]*{BRACKET}", place).end())._replace(closers=(FENCE,))

    def _read_tagged(self, place: int) -> _Found:
        place = self._skip_blank(place)
        if self._buffer[place] in "[{":
            return self._read_marked(place)
        return self._read_function(place) if self._buffer[place] == "<" else self._read_glm(place)

    def _read_function(self, place: int) -> _Found:
        found = self._match(FUNCTION, place)
        pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
        return _Found(found.end(), [self._typed(found[1], pairs)])

    def _read_glm(self, place: int) -> _Found:
        found = self._match(GLM, place)
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", found[2], re.DOTALL)
        return _Found(found.end(), [self._typed(found[1], [(key.strip(), value) for key, value in pairs])])

    def _read_mistral(self, place: int) -> _Found:
        place = self._skip_blank(place)
        return self._read_marked(place) if self._buffer[place] in "[{" else self._read_named(MISTRAL, place)

    def _read_deepseek(self, place: int) -> _Found:
        return self._read_named(DEEPSEEK, place)._replace(closers=(FENCE, *TAGS))

    def _read_followed(self, pattern: str, place: int) -> _Found:
        self._match(pattern, place)
        return _Found(place)

    def _read_named(self, pattern: str, place: int) -> _Found:
        named = self._match(pattern, place)
        end, arguments = self._read_value(named.end())
        call = arguments if isinstance(arguments, InvalidCall) else {"name": named[1], "arguments": arguments}
        return _Found(end, [self._as_call(call)])

    def _read_pythonic(self, place: int) -> _Found:
        place = self._skip_blank(place)
        if self._buffer[place] != "[":
            raise _NoCall
        end = _end_of_brackets(self._buffer, place, quotes="\"'")
        if end is None:
            raise _NoCall if self._final else _Wait
        text = self._buffer[place:end]
        try:
            tree = ast.parse(text, mode="eval").body
            assert isinstance(tree, ast.List)
            return _Found(end, [_call_of_tree(node) for node in tree.elts])
        except (SyntaxError, ValueError, AssertionError) as exc:
            if text.lstrip("[ \n").startswith("{"):
                return self._read_marked(place)
            return _Found(end, [InvalidCall(text, f"The call cannot be read: {type(exc).__name__}: {exc}.")])

    def _as_call(self, value: Any) -> ToolCall | InvalidCall:
        """Return the call that a JSON value is."""
        if isinstance(value, InvalidCall):
            return value
        error = "The call has no name or no arguments."
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
            value = value["function"]
        if not isinstance(value, Mapping):
            return InvalidCall(text, error)
        name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
        key = next((key for key in ARGUMENT_KEYS if value.get(key) is not None), None)
        arguments = value[key] if key is not None else {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                return InvalidCall(text, "The arguments of the call are not valid JSON.")
        has_other = key is None and set(value) - {*KEYS}
        if name is None or has_other or not isinstance(arguments, Mapping):
            return InvalidCall(text, error)
        return ToolCall(name, dict(arguments))

    def _typed(self, name: str, pairs: Sequence[tuple[str, str]]) -> ToolCall:
        """Return a call whose arguments are texts, with the types that the tool wants."""
        properties = self._schemas.get(name, {}).get("properties") or {}
        return ToolCall(name, {key: _typed_value(text, properties.get(key)) for key, text in pairs})


@cache
def _compiled(pattern: str) -> Any:
    import regex  # tells where the end of a text is the beginning of a match

    return regex.compile(pattern, regex.DOTALL)


def _typed_value(text: str, schema: Any) -> Any:
    kinds = _kinds_of(schema)
    if "string" in kinds and kinds <= {"string", "null"}:
        return None if "null" in kinds and text.strip() in ("null", "None") else text
    try:
        return json.loads(text.strip())
    except ValueError:
        # Some models write constants of Python.
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _kinds_of(schema: Any) -> set[str]:
    """Return the types that a schema names, those of its alternatives too; "any" where one names none."""
    given = schema if isinstance(schema, Mapping) else {}
    own = given.get("type") or ()
    kinds = {own} if isinstance(own, str) else set(own)
    if kinds:
        return kinds
    parts = [_kinds_of(one) for name in ("anyOf", "oneOf") for one in given.get(name) or ()]
    return set().union(*parts) or {"any"}


def _call_of_tree(node: ast.expr) -> ToolCall:
    """Return the call that an expression of Python is, without running it."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("a call must have a name and named arguments")
    arguments = {one.arg: ast.literal_eval(one.value) for one in node.keywords if one.arg is not None}
    return ToolCall(ast.unparse(node.func), arguments)


def _end_of_brackets(text: str, place: int, quotes: str = '"') -> int | None:
    """Return the end of the brackets that open at a place, None where they are still open."""
    depth, quote, escaped = 0, "", False
    for index in range(place, len(text)):
        char = text[index]
        if quote:
            escaped, quote = (not escaped and char == "\\"), ("" if char == quote and not escaped else quote)
        elif char in quotes:
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
            if depth == 0:
                return index + 1
    return None


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
    """Return the JSON schema of a call of one of some tools.

    Their definitions, which they name from their own root, come to the root of it, each under a name of its own.
    """
    schemas, definitions = [], {}
    for number, tool in enumerate(tools):
        parameters = tool["function"].get("parameters") or {"type": "object"}
        for key in DEFINITIONS:
            for name, schema in (parameters.get(key) or {}).items():
                definitions[f"{number}.{name}"] = _moved(schema, number)
        arguments = {name: value for name, value in parameters.items() if name not in DEFINITIONS}
        schemas.append({
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool["function"]["name"]]},
                "arguments": _moved(arguments, number),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    whole = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {**whole, "$defs": definitions} if definitions else whole


def _moved(schema: Any, number: int) -> Any:
    """Return a schema whose references are to the definitions of a tool where `call_schema` has them."""
    if isinstance(schema, Mapping):
        moved = {name: _moved(value, number) for name, value in schema.items()}
        found = REFERENCE.fullmatch(str(schema.get("$ref")))
        return {**moved, "$ref": f"#/$defs/{number}.{found[1]}"} if found else moved
    return [_moved(one, number) for one in schema] if isinstance(schema, list) else schema
