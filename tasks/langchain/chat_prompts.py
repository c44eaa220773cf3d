"""What the chat template of an engine's model can do, and what it makes of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, ChatTemplateError
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Message

PROBE = "PROBE-c3a9"


def template_of(engine: Engine) -> ChatTemplate | None:
    """Return the chat template of the engine's model, or None where it has none or a server has it."""
    return engine.inputs.template if engine.inputs is not None else None


def shows_tools(engine: Engine) -> bool:
    """Tell whether the model gets to see the tools. A server is believed to show them."""
    if engine.inputs is None:
        return True
    template = template_of(engine)
    return template is not None and re.search(r"\btools\b", template.source) is not None


def render_messages(engine: Engine, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the prompt that messages come to.

    Raises:
        GenerationError: If the model has no chat template here, or the template refuses the messages.
    """
    template = template_of(engine)
    if template is None:
        raise GenerationError(
            "The model has no chat template, so it cannot answer messages. Use the LLM with a plain prompt instead."
        )
    try:
        return template.render(messages, tools)
    except ChatTemplateError as exc:
        raise GenerationError(str(exc), error_code="invalid_prompt") from None


def is_templated(engine: Engine, messages: Sequence[Message]) -> bool:
    """Tell whether a conversation is one message that went through the template already, up to the model's turn."""
    template = template_of(engine)
    if template is None or len(messages) != 1 or messages[0]["role"] != "user":
        return False
    try:
        before, _, after = template.render([{"role": "user", "content": PROBE}]).partition(PROBE)
    except ChatTemplateError:
        return False
    begin, end = (lines[-1].strip() if (lines := part.strip().splitlines()) else "" for part in (before, after))
    text = str(messages[0]["content"]).rstrip()
    return bool(begin and end) and begin in text and text.endswith(end)
