"""Requests with images as conversations: where in the text which image stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.prompts import check_messages, check_text
from prefect_huggingface.tasks.records import Request

IMAGE = {"type": "image"}


def read_conversation(request: Request) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of a request with parts as their content, and the sources of the images in their order.

    A part is text or the place of an image. Images of the request fill the places that name no source of their own;
    what is left over stands at the beginning of the last message of the user.

    Raises:
        RequestError: If there is no prompt, or images are missing.
    """
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("invalid_prompt", "A request must have a prompt or messages, and not both. Give one.")
    if request.messages is None:
        check_text(request.prompt)
        messages: Any = [{"role": "user", "content": request.prompt}]
    else:
        messages = request.messages
    # Roles and texts are checked without the images.
    check_messages([_without_images(message) for message in messages] if _is_list(messages) else messages)
    given = iter(request.images)
    sources: list[str] = []
    read = [_read_message(message, given, sources) for message in messages]
    return _with_rest(read, list(given), sources)


def _with_rest(
    messages: list[dict[str, Any]], rest: list[str], sources: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Put the images that have no place at the beginning of the last message of the user."""
    if not rest:
        return messages, sources
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RequestError("invalid_prompt", "Images need a message of the user to stand in. Add one.")
    before = sum(part == IMAGE for message in messages[:last] for part in message["content"])
    messages[last]["content"] = [IMAGE] * len(rest) + messages[last]["content"]
    return messages, [*sources[:before], *rest, *sources[before:]]


def _read_message(message: Mapping[str, Any], given: Iterator[str], sources: list[str]) -> dict[str, Any]:
    content = message.get("content") or ""
    parts = []
    for part in content if _is_list(content) else [content]:
        if isinstance(part, str) or not _is_image(part):
            parts.append({"type": "text", "text": part if isinstance(part, str) else part["text"]})
            continue
        source = _source_of(part) or next(given, None)
        if source is None:
            raise RequestError("invalid_prompt", "The messages have more places for images than there are. Add images.")
        sources.append(source)
        parts.append(IMAGE)
    return {**message, "content": parts}


def _source_of(part: Mapping[str, Any]) -> str | None:
    nested = part.get("image_url")
    for value in (
        nested.get("url") if isinstance(nested, Mapping) else nested,
        *map(part.get, ("url", "path", "image")),
    ):
        if value is not None:
            return str(value)
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _without_images(message: Any) -> Any:
    if not isinstance(message, Mapping) or not _is_list(message.get("content")):
        return message
    rest = [part for part in message["content"] if not _is_image(part)]
    return {**message, "content": rest or "image"}
