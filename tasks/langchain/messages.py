"""Translates LangChain's messages into those that chat templates understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.records import Message

ROLES = ("system", "user", "assistant", "tool")
ROLE_OF: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
# Parts of an answer that stand in fields of the message as well, or that the model does not read again.
SKIPPED_BLOCKS = ("tool_call", "tool_use", "reasoning", "thinking")


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
