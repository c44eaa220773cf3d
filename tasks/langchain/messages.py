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


def read_messages(messages: Sequence[BaseMessage]) -> tuple[list[Message], tuple[str, ...]]:
    """Return the messages in the form of chat templates, and the images in them as paths or URLs.

    Raises:
        SettingsError: If there is no message, or one has an unknown role or content.
    """
    if not messages:
        raise SettingsError("`messages` must hold at least one message, got []. Add a human message.")
    images: list[str] = []
    return [_read_message(message, images) for message in messages], tuple(images)


def _read_message(message: BaseMessage, images: list[str]) -> Message:
    read: dict[str, Any] = {"role": _role_of(message), "content": _text_of(message.content, images)}
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


def _text_of(content: str | list[Any], images: list[str]) -> str:
    """Return the text of a content, and put its images to the others."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(block["text"])
        elif block.get("type") in ("image", "image_url"):
            images.append(_image_of(block))
        elif block.get("type") not in SKIPPED_BLOCKS:
            raise SettingsError(
                f"A block of a message must be a text or an image, got type {block.get('type')!r}. Remove it."
            )
    return "".join(texts)


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
