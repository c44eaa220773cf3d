"""LangChain's messages and those of chat templates: the conversation in, the answer out, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from prefect_huggingface.tasks.engines.base import Piece, Reasoning
from prefect_huggingface.tasks.engines.tool_calls import InvalidCall, Tool, ToolCall, ToolCallParser, find_calls
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.base_llm import (
    generation_info,
    llm_output,
    usage_metadata,
    usage_of,
)
from prefect_huggingface.tasks.records import Completion, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_OF: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
# Parts of an answer that stand in fields of the message as well, or that the model does not read again.
SKIPPED_BLOCKS = (
    "tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking", "redacted_thinking",
)  # fmt: skip


def read_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Return the messages in the form of chat templates.

    The content is a text, or, where there are images in it, a list of parts in which the images have their place.

    Raises:
        SettingsError: If there is no message, or one has an unknown role or content.
    """
    if not messages:
        raise SettingsError("`messages` must hold at least one message, got []. Add a human message.")
    return [_read_message(message) for message in messages]


def _read_message(message: BaseMessage) -> Message:
    read: dict[str, Any] = {"role": _role_of(message), "content": _read_content(message.content)}
    if isinstance(message, AIMessage) and message.tool_calls:
        read["tool_calls"] = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    if isinstance(message, AIMessage) and message.invalid_tool_calls and isinstance(read["content"], str):
        # What the model wrote in place of a call, which it must see to do better.
        texts = [read["content"], *(call["args"] for call in message.invalid_tool_calls)]
        read["content"] = "\n".join(filter(None, texts))
    if isinstance(message, AIMessage) and message.additional_kwargs.get("reasoning_content"):
        # Templates decide themselves which thoughts the model sees again.
        read["reasoning_content"] = message.additional_kwargs["reasoning_content"]
    if isinstance(message, ToolMessage):
        read["tool_call_id"] = message.tool_call_id
        read |= {"name": message.name} if message.name else {}
    return read


def _role_of(message: BaseMessage) -> str:
    for kind, role in ROLE_OF:
        if isinstance(message, kind):
            return role
    role = message.role if isinstance(message, ChatMessage) else message.type
    if role not in ROLES:
        raise SettingsError(f"The role of a message must be one of {list(ROLES)!r}, got {role!r}. Correct it.")
    return role


def _read_content(content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, str) or block.get("type") == "text":
            parts.append({"type": "text", "text": block if isinstance(block, str) else block["text"]})
        elif block.get("type") in ("image", "image_url"):
            parts.append({"type": "image_url", "image_url": {"url": _image_of(block)}})
        elif block.get("type") not in SKIPPED_BLOCKS:
            raise SettingsError(
                f"A block of a message must be a text or an image, got type {block.get('type')!r}. Remove it."
            )
    if any(part["type"] == "image_url" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _image_of(block: Mapping[str, Any]) -> str:
    """Return the path or URL of the image of a block, in the forms of OpenAI and LangChain."""
    place = block.get("image_url", block.get("url", block.get("path")))
    if isinstance(place, Mapping):
        place = place.get("url")
    data = block.get("base64", block.get("data"))
    if place is None and data is not None:
        place = f"data:{block.get('mime_type', 'image/png')};base64,{data}"
    if not isinstance(place, str):
        raise SettingsError(f"An image of a message must have a `url` or `base64`, got {sorted(block)!r}. Add one.")
    return place


def chat_result(completion: Completion, tools: Sequence[Tool], model_name: str, most_calls: int | None) -> ChatResult:
    """Return the result of a call: the answer and its alternatives, with their tool calls.

    Args:
        completion: What the engine gave.
        tools: Tools whose calls are looked for.
        model_name: Name of the model.
        most_calls: Greatest number of calls of one answer, None for any number.
    """
    info = {**generation_info(completion), "model_name": model_name}
    info.pop("reasoning", None)
    generations = []
    for index, text in enumerate((completion.text, *completion.alternatives)):
        found = find_calls(text, tools)
        message = AIMessage(
            content=found.text,
            additional_kwargs=_thoughts(completion.reasoning if index == 0 else None),
            tool_calls=[
                tool_call(name=call.name, args=call.arguments, id=call.id) for call in found.calls[:most_calls]
            ],
            invalid_tool_calls=[invalid_tool_call(args=_args_of(call), error=call.error) for call in found.invalid],
            usage_metadata=usage_metadata(completion),
        )
        generations.append(ChatGeneration(message=message, generation_info=info))
    return ChatResult(generations=generations, llm_output=llm_output([usage_of(completion)], model_name))


class ChunkMaker:
    """Makes the chunks of one stream. Text goes on at once, unless it may become a tool call."""

    def __init__(self, tools: Sequence[Tool], model_name: str, with_usage: bool, most_calls: int | None) -> None:
        """Take the tools, the model's name, whether token counts end the stream, and how many calls it may have."""
        self._parser = ToolCallParser(tools)
        self._model_name, self._with_usage, self._most_calls = model_name, with_usage, most_calls
        self._calls = self._valid_calls = 0

    def chunks(self, piece: Piece) -> Iterator[ChatGenerationChunk]:
        """Yield the chunks of a piece. The last one has the finish reason and the token counts."""
        if isinstance(piece, Reasoning):
            yield _chunk(additional_kwargs=_thoughts(piece.text))
        elif isinstance(piece, str):
            yield from self._take(self._parser.feed(piece))
        else:
            yield from self._take(self._parser.finish())
            info = {**generation_info(piece), "model_name": self._model_name}
            info.pop("reasoning", None)
            usage = usage_metadata(piece) if self._with_usage else None
            message = AIMessageChunk(content="", usage_metadata=usage, chunk_position="last")
            yield ChatGenerationChunk(message=message, generation_info=info)

    def _take(self, items: Sequence[str | ToolCall | InvalidCall]) -> Iterator[ChatGenerationChunk]:
        for item in items:
            if isinstance(item, str):
                yield _chunk(content=item)
            elif isinstance(item, InvalidCall) or self._most_calls is None or self._valid_calls < self._most_calls:
                yield _chunk(tool_call_chunks=[_call_chunk(item, self._calls)])
                self._calls += 1
                self._valid_calls += isinstance(item, ToolCall)


def _chunk(content: str = "", **fields: Any) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=content, **fields))


def _call_chunk(call: ToolCall | InvalidCall, index: int) -> ToolCallChunk:
    if isinstance(call, InvalidCall):
        return tool_call_chunk(args=_args_of(call), index=index)
    return tool_call_chunk(name=call.name, args=json.dumps(call.arguments), id=call.id, index=index)


def _args_of(call: InvalidCall) -> str:
    """Return the text of a call for its arguments; of the beginning of an object, LangChain would make a call."""
    return f"{call.error} {call.text}" if call.text.lstrip().startswith("{") else call.text


def _thoughts(reasoning: str | None) -> dict[str, Any]:
    return {"reasoning_content": reasoning} if reasoning else {}
