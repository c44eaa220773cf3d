"""From a conversation to a prompt in which nothing is lost and nothing is forged.

Templates differ in what they accept: some have no role for the system, some ignore tools, some drop a message in
silence. A conversation is written in the first way in which every message and every tool stands in the prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefect_huggingface.tasks.engines.chat_templates import (
    USER,
    ChatTemplate,
    ChatTemplateError,
    LostTextError,
    Message,
)
from prefect_huggingface.tasks.engines.reasoning import FORMATS

Tool = Mapping[str, Any]
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_5d1c",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "Probe."}}},
    },
}
CALL = {"type": "function", "id": "probe5d1c", "function": {"name": "probe_5d1c", "arguments": {}}}
TOOLS_INTRODUCTION = (
    "You can call functions. Their JSON schemas:\n<tools>\n{tools}\n</tools>\n"
    'To call a function, write its name and arguments as JSON, like this:\n<tool_call>\n{{"name": "function", '
    '"arguments": {{"argument": "value"}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The final text of a prompt.

    Attributes:
        segments: Texts to be tokenized one by one, with the special tokens in them. The cuts lie within what looks
            like a special token in the text of a message, so that it is text.
        add_special_tokens: Whether the tokenizer puts its start token before it. False where the text has it already.
    """

    segments: tuple[str, ...]
    add_special_tokens: bool = False

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.segments)


def write_conversation(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    options: Mapping[str, Any] | None = None,
    trusted_text: bool = False,
    answer: bool = True,
) -> Prompt:
    """Return the prompt for a conversation.

    Args:
        template: Chat template of the model.
        messages: Messages in order.
        tools: Functions that the model may call, as JSON schemas.
        options: Variables of the template.
        trusted_text: Whether special tokens in the text of messages are special.
        answer: Whether the prompt ends where the model's answer begins.

    Raises:
        ChatTemplateError: If the template refuses the conversation or leaves something of it out, in all ways of
            writing it, or if the text of a message has marks of turns that are no tokens.
    """
    template.check_options(options or {}, tools)
    marked, marked_tools, mark = _mark_special(
        [dict(message) for message in messages], [dict(tool) for tool in tools], None if trusted_text else template
    )
    problem: ChatTemplateError | None = None
    for written, shown in _ways_to_write(marked, marked_tools):
        try:
            text = template.render(written, shown, options=options, answer=answer)
            check_complete(template, text, written, marked_tools, bool(shown))
        except ChatTemplateError as exc:
            problem = problem or exc  # the first way is that of the caller
        else:
            return Prompt(tuple(text.split(mark)) if mark else (text,))
    assert problem is not None
    raise problem


def check_shapes(
    template: ChatTemplate,
    conversations: Iterable[Any],
    *,
    options: Mapping[str, Any] | None = None,
    in_parts: bool = False,
) -> None:
    """Refuse conversations of which a template loses text, before any of them is asked.

    What a template keeps depends on the roles of the messages, so that one conversation of each shape is written, with
    texts of its own, in parts where the template gets parts. A template that refuses a shape, and what is no
    conversation, are for the request to tell.

    Raises:
        LostTextError: With the number of the first such conversation.
    """
    shapes: dict[tuple[tuple[Any, bool], ...], int] = {}
    for number, messages in enumerate(conversations):
        with suppress(AttributeError, TypeError):
            shapes.setdefault(tuple((one.get("role"), bool(one.get("tool_calls"))) for one in messages), number)
    for shape, number in shapes.items():
        probes = [
            {"role": role, "content": f"{USER}-{place}.", **({"tool_calls": [CALL]} if calls else {})}
            for place, (role, calls) in enumerate(shape)
        ]
        if in_parts:
            probes = [{**probe, "content": _parts_of(probe["content"])} for probe in probes]
        try:
            write_conversation(template, probes, options=options)
        except LostTextError as exc:
            raise LostTextError(f"Conversation {number} cannot be asked. {exc}") from None
        except (ChatTemplateError, LookupError):
            continue


def check_untrusted(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Refuse (`ChatTemplateError`) what looks like a special token, where a prompt cannot be cut within it."""
    found = _find_special(template, "\n".join(_texts_of([message.get("content") for message in messages])))
    if found is not None:
        raise ChatTemplateError(
            f"The text of a message beside images must not contain {found!r}: it is special to this model. "
            "Remove it, or set `trusted_text`."
        )


def _mark_special(messages: Messages, tools: Tools, template: ChatTemplate | None) -> tuple[Messages, Tools, str]:
    """Return messages and tools with a mark within all that looks like a special token, and the mark, "" for none."""
    everything = "\n".join(_texts_of([*messages, *tools]))
    if template is None or (found := _find_special(template, everything)) is None:
        return messages, tools, ""
    if found in template.plain_marks:
        raise ChatTemplateError(
            f"The text of a message must not contain {found!r}: it begins or ends a turn of this model, whose "
            "tokenizer has no token for it. Remove it, or set `trusted_text`."
        )
    pattern = template.special_pattern
    mark = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in everything)

    def split(text: str) -> str:
        return pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    return [_map_texts(one, split) for one in messages], [_map_texts(one, split) for one in tools], mark


def _find_special(template: ChatTemplate, text: str) -> str | None:
    """Return the first mark of turns in a text that is no token, or else what looks like a special token."""
    plain = next((mark for mark in template.plain_marks if mark in text), None)
    found = template.special_pattern.search(text)
    return plain or (found[0] if found else None)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its texts changed, but for roles and types, which templates compare."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: one if key in ("role", "type") else _map_texts(one, change) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_map_texts(one, change) for one in value]
    return value


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts_of(one)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for one in value:
            yield from _texts_of(one)


def _ways_to_write(messages: Messages, tools: Tools) -> Iterator[tuple[Messages, Tools]]:
    """Yield the conversation as it is, and then in forms that more and more templates accept.

    Yields:
        Messages, and the tools that are given to the template as such.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        yield from _ways_to_write_texts(messages, tools)
        return
    # Templates for images want texts, or parts everywhere.
    for written, shown in _ways_to_write_texts([_with_text(message) for message in messages], tools):
        yield written, shown
        yield [{**message, "content": _parts_of(message["content"])} for message in written], shown


def _ways_to_write_texts(messages: Messages, tools: Tools) -> Iterator[tuple[Messages, Tools]]:
    plain = _with_short_ids(with_arguments(_with_known_roles(messages), as_text=False))
    as_text = with_arguments(plain, as_text=True)
    bases = [plain] if plain == messages else [messages, plain]
    bases += [as_text] if as_text != plain else []
    for base in bases:
        yield base, tools
    calls = any(message.get("tool_calls") or message.get("role") in ("tool", "function") for message in messages)
    written = _with_written_tools(plain, tools)
    if tools:
        yield _with_tools_in_message(plain, tools), []
        yield _with_tools_in_message(_with_written_tools(plain, []), tools), []
    if tools or calls:
        yield written, []
    for base in bases:
        if (merged := _with_merged_system(base)) != base:
            yield merged, tools
    if (tools or calls) and (merged := _with_merged_system(written)) != written:
        yield merged, []


def _with_known_roles(messages: Messages) -> Messages:
    roles = {"developer": "system", "function": "tool"}
    return [{**message, "role": roles.get(message["role"], message["role"])} for message in messages]


def with_arguments(messages: Messages, *, as_text: bool) -> Messages:
    """Return the messages with the arguments of calls as objects, or as JSON texts."""

    def convert(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        if not as_text and isinstance(arguments, str):
            arguments = _parse(arguments)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    return _with_calls(messages, convert)


def _with_calls(messages: Messages, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Messages:
    return [
        {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _parse(arguments: str) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_short_ids(messages: Messages) -> Messages:
    """Return the messages with ids of nine letters and digits, which every template accepts."""

    def shorten(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
        given = str(holder.get(name) or "")
        is_short = not given or re.fullmatch(r"[a-zA-Z0-9]{9}", given)
        return dict(holder) if is_short else {**holder, name: hashlib.sha256(given.encode()).hexdigest()[:9]}

    shortened = _with_calls(messages, lambda call: shorten(call, "id"))
    return [shorten(message, "tool_call_id") for message in shortened]


def _with_tools_in_message(messages: Messages, tools: Tools) -> Messages:
    """Return the messages with the tools in that of the system, where some templates look for them."""
    functions = [tool.get("function", tool) for tool in tools]
    system = {"role": "system", "content": ""}
    first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (system, messages)
    return [{**first, "tools": json.dumps(functions, ensure_ascii=False)}, *rest]


def _with_written_tools(messages: Messages, tools: Tools) -> Messages:
    """Return the messages with tools, calls and their results as plain text."""
    written: Messages = []
    for message in map(_with_written_calls, messages):
        if written and written[-1]["role"] == message["role"] == "user":
            # The results of several calls are one turn: templates want turns to alternate.
            written[-1] = {**written[-1], "content": _joined(written[-1]["content"], "\n", message["content"])}
        else:
            written.append(message)
    if not tools:
        return written
    schemas = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    introduction = TOOLS_INTRODUCTION.format(tools=schemas)
    if written[0]["role"] == "system":
        return [{**written[0], "content": f"{text_of(written[0])}\n\n{introduction}"}, *written[1:]]
    return [{"role": "system", "content": introduction}, *written]


def _with_written_calls(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text_of(message)}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    functions = [call.get("function", call) for call in message["tool_calls"]]
    calls = [{"name": one.get("name"), "arguments": one.get("arguments") or {}} for one in functions]
    texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [text_of(message), *texts]))}


def _with_merged_system(messages: Messages) -> Messages:
    """Return the messages with the text of the system before that of the first message of the user."""
    system = [text_of(message) for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    first = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
    if not any(system):
        return messages
    text = "\n\n".join(system)
    if first is None:
        return [{"role": "user", "content": text}, *rest]
    merged = {**rest[first], "content": _joined(text, "\n\n", rest[first]["content"])}
    return [*rest[:first], merged, *rest[first + 1 :]]


def _joined(first: Any, separator: str, second: Any) -> Any:
    """Return two contents as one: a text, or parts where one of them has parts."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{separator}{second}"
    return [*_parts_of(first), *_parts_of(separator), *_parts_of(second)]


def _parts_of(content: Any) -> list[Any]:
    parts = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with a text as its content where all its parts are texts."""
    is_text = all(part.get("type") == "text" for part in _parts_of(message["content"]))
    return {**message, "content": text_of(message)} if is_text else message


def text_of(message: Message) -> str:
    """Return the text of a message whose content is a text or a list of parts."""
    return "".join(str(part.get("text") or "") for part in _parts_of(message.get("content") or ""))


def check_complete(
    template: ChatTemplate, prompt: str, messages: Messages, tools: Sequence[Tool], as_variable: bool
) -> None:
    """Refuse (`LostTextError`) a prompt that lacks a message, a call or a tool."""
    for message in messages:
        if not all(_stands_in(text, prompt) for text in _essential_texts(message)):
            raise LostTextError(
                f"The chat template of the model leaves out a message of the role {message['role']!r}. "
                "Put its text into a message of the user."
            )
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        if calls and not (
            _writes_calls(template) and all(_stands_in(text, prompt) for call in calls for text in _texts_of(call))
        ):
            raise LostTextError(
                "The chat template of the model leaves out tool calls. Write them as text of the message."
            )
    names = [str(tool.get("function", tool).get("name")) for tool in tools]
    in_message = any("tools" in message for message in messages)
    # A name may also stand in the text of a message, which says nothing about the tools.
    hidden = (as_variable and not _writes_tools(template)) or (in_message and not _writes_tools(template, True))
    missing = names if hidden else [name for name in names if name not in prompt]
    if missing:
        raise LostTextError(f"The chat template of the model leaves out the tools {missing!r}. Remove them.")


@lru_cache(maxsize=64)
def _writes_tools(template: ChatTemplate, in_message: bool = False) -> bool:
    """Return whether a template writes the tools that it gets, in its variable or in the message of the system."""
    messages: Messages = [{"role": "user", "content": USER}]
    tools: Tools = [PROBE_TOOL]
    if in_message:
        messages, tools = _with_tools_in_message(messages, tools), []
    try:
        return PROBE_TOOL["function"]["name"] in template.render(messages, tools)
    except ChatTemplateError:
        # A template that wants other messages than this one is believed to write them.
        return not in_message


@lru_cache(maxsize=64)
def _writes_calls(template: ChatTemplate) -> bool:
    """Return whether a template writes the calls of the assistant; in doubt, the texts of the calls tell."""
    messages: Messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    written = []
    for base in (messages, with_arguments(messages, as_text=True)):
        with suppress(ChatTemplateError):
            written.append(PROBE_TOOL["function"]["name"] in template.render(base, answer=False))
    return any(written) or not written


def _essential_texts(message: Message) -> list[str]:
    texts = [str(part.get("text") or "") for part in _parts_of(message.get("content") or "")]
    if message["role"] != "assistant":
        return texts
    # Templates leave out earlier reasoning on purpose, and some the words beside a call.
    return [] if message.get("tool_calls") else [_without_reasoning(text) for text in texts]


def _without_reasoning(text: str) -> str:
    for known in FORMATS:
        if known.start in text or known.end.startswith("</"):
            text = text.rpartition(known.end)[2]
    return text


def _stands_in(text: str, prompt: str) -> bool:
    text = text.strip()
    if text in prompt:
        return True
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    squeezed = "".join(prompt.split())
    return any("".join(form.split()) in squeezed for form in forms)
