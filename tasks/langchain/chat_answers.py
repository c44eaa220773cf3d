"""Makes LangChain's messages of completions, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from prefect_huggingface.tasks.langchain.results import generation_info, usage_metadata, usage_of
from prefect_huggingface.tasks.langchain.tool_calls import Tool, ToolCalls, find_calls
from prefect_huggingface.tasks.records import Completion


def chat_result(completion: Completion, tools: Sequence[Tool], model_name: str) -> ChatResult:
    """Return the result of a call: the answer and its alternatives, with their tool calls."""
    info = {**generation_info(completion), "model_name": model_name}
    generations = []
    for text in (completion.text, *completion.alternatives):
        found = _find(text, tools)
        message = AIMessage(
            content=found.text,
            tool_calls=found.calls,
            invalid_tool_calls=found.invalid,
            usage_metadata=usage_metadata(completion),
        )
        generations.append(ChatGeneration(message=message, generation_info=info))
    return ChatResult(
        generations=generations, llm_output={"token_usage": usage_of(completion), "model_name": model_name}
    )


def chat_chunks(
    piece: str | Completion, tools: Sequence[Tool], model_name: str, with_usage: bool
) -> Iterator[ChatGenerationChunk]:
    """Yield the chunks of a piece of a stream.

    Text that may be a tool call waits for its end. The last chunk has the finish reason and, with `with_usage`, the
    token counts.
    """
    if isinstance(piece, Completion):
        if tools:
            yield _call_chunk(piece.text, tools)
        usage = usage_metadata(piece) if with_usage else None
        message = AIMessageChunk(content="", usage_metadata=usage, chunk_position="last")
        info = {**generation_info(piece), "model_name": model_name}
        yield ChatGenerationChunk(message=message, generation_info=info)
    elif not tools:
        yield _text_chunk(piece)


def _text_chunk(text: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _call_chunk(text: str, tools: Sequence[Tool]) -> ChatGenerationChunk:
    """Return the chunk of a whole answer that may hold tool calls. Calls that are no JSON stay text."""
    found = _find(text, tools)
    if found.invalid:
        return _text_chunk(text)
    chunks = [
        tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=index)
        for index, call in enumerate(found.calls)
    ]
    return ChatGenerationChunk(message=AIMessageChunk(content=found.text, tool_call_chunks=chunks))


def _find(text: str, tools: Sequence[Tool]) -> ToolCalls:
    names = {_name_of(tool) for tool in tools}
    return find_calls(text, names) if names else ToolCalls(text, [], [])


def _name_of(tool: Tool) -> Any:
    return tool["function"]["name"]
