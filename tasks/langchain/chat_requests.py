"""From a call of a chat model to the request of an engine: settings, tools, messages, template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage

from prefect_huggingface.blocks import ResponseFormat
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.chat_prompts import is_templated, shows_tools
from prefect_huggingface.tasks.langchain.llms import EngineLLM
from prefect_huggingface.tasks.langchain.messages import read_messages
from prefect_huggingface.tasks.langchain.tool_calls import Tool, call_schema, choose_tools
from prefect_huggingface.tasks.records import Message, Request

# Arguments of a call that are not for the engine.
STREAM_ARGUMENTS = ("stream", "stream_usage", "stream_options")


class ChatRequest(NamedTuple):
    """The request of a call, and the tools whose calls are looked for in the answer."""

    request: Request
    tools: list[Tool]


def chat_request(
    llm: EngineLLM,
    engine: Engine,
    messages: Sequence[BaseMessage],
    settings: Mapping[str, Any],
    stop: Sequence[str],
    tokenizer: Any = None,
) -> ChatRequest:
    """Return the request for a conversation.

    Args:
        llm: LLM whose settings lie under those of the call.
        engine: Engine that gets the request.
        messages: Conversation, in order.
        settings: Keyword arguments of the call, over those of the chat model.
        stop: Stop strings.
        tokenizer: Tokenizer of Transformers whose template is used in place of the engine's.

    Raises:
        SettingsError: If a setting or a message is unknown, or the template cannot show the tools.
    """
    settings = {name: value for name, value in settings.items() if name not in STREAM_ARGUMENTS}
    tools, shown = _take_tools(engine, settings)
    read = read_messages(messages)
    prompt = written_prompt(engine, read, shown, tokenizer)
    if prompt is not None:
        return ChatRequest(llm.make_request(engine, prompt, settings, stop), tools)
    return ChatRequest(llm.make_request(engine, None, settings, stop, messages=read, tools=shown), tools)


def _take_tools(engine: Engine, settings: dict[str, Any]) -> tuple[list[Tool], list[Tool]]:
    """Take the tools out of the settings; return those to look for in the answer and those that the model sees.

    A call that must be made becomes the grammar of the answer.
    """
    tools, choice = list(settings.pop("tools", None) or ()), settings.pop("tool_choice", None)
    if choice == "none":
        return [], []
    forced = choose_tools(tools, choice)
    if forced:
        settings["response_format"] = ResponseFormat(json_schema=call_schema(forced))
    shown = tools if shows_tools(engine) else []
    if tools and not shown and not forced:
        raise SettingsError(
            "The chat template of the model knows no tools. "
            "Take a model whose template does, set `tool_choice='any'`, or use `with_structured_output`."
        )
    return tools, shown


def written_prompt(
    engine: Engine, messages: Sequence[Message], tools: Sequence[Tool] = (), tokenizer: Any = None
) -> str | None:
    """Return the prompt where it is not the engine that writes it: it is written already, or by the tokenizer."""
    if is_templated(engine, messages):
        return str(messages[0]["content"])
    if tokenizer is None:
        return None
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )
    return str(text)
