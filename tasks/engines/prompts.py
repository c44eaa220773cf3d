"""From a request to the final text of its prompt. The chat template is applied exactly once, on every engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, ChatTemplateError, read_special_tokens
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.records import Request

TemplateUse = Literal["auto", "always", "never"]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PROBE = "PROBE-5d1c"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The final text of a prompt.

    Attributes:
        text: Text to tokenize.
        add_special_tokens: Whether the tokenizer puts its start token before it. False where the text has it already.
    """

    text: str
    add_special_tokens: bool


class PromptWriter:
    """Writes the prompts of one model.

    A plain prompt is put into the chat template as a message of the user when `use` says so: "auto" does it where the
    model has a template and the prompt does not show its marks yet.
    """

    def __init__(
        self, template: ChatTemplate | None, tokens: Mapping[str, str] | None = None, use: TemplateUse = "auto"
    ) -> None:
        """Take the template of a model.

        Args:
            template: Chat template, or None where the model has none.
            tokens: Special tokens by their names, where they are not in the template.
            use: Whether plain prompts are put into the template.
        """
        self.template = template
        self._use = use
        self._start_token = (template.tokens if template else tokens or {}).get("bos_token")

    @classmethod
    def of_folder(cls, folder: Path, use: TemplateUse = "auto") -> PromptWriter:
        """Return the writer for a model folder."""
        return cls(ChatTemplate.of_folder(folder), read_special_tokens(folder), use)

    def write(self, request: Request) -> Prompt:
        """Return the prompt of a request.

        Raises:
            RequestError: If the request has no prompt, or its messages cannot be used.
        """
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("invalid_prompt", "A request must have a prompt or messages, and not both. Give one.")
        if request.messages is not None:
            return self._from_messages(check_messages(request.messages), request.tools)
        return self._from_text(request.prompt, request.tools, request.chat_template or self._use)

    def _from_messages(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Prompt:
        if self.template is None:
            raise RequestError(
                "invalid_prompt",
                "The model has no chat template, so it cannot answer messages. "
                "Give a plain prompt, or take a model that is tuned for chat.",
            )
        try:
            return Prompt(self.template.render(messages, tools), add_special_tokens=False)
        except ChatTemplateError as exc:
            raise RequestError("invalid_prompt", str(exc)) from exc

    def _from_text(self, text: Any, tools: Sequence[Mapping[str, Any]], use: TemplateUse) -> Prompt:
        check_text(text)
        if self.template is None and use == "always":
            raise RequestError(
                "invalid_prompt",
                "The model has no chat template to put the prompt into. Set `chat_template` to 'auto' or 'never'.",
            )
        shows_template = self.template is not None and self._shows_template(text)
        if self.template is not None and (use == "always" or (use == "auto" and not shows_template)):
            return self._from_messages([{"role": "user", "content": text}], tools)
        starts = bool(self._start_token) and text.startswith(self._start_token or "")
        # A templated text gets a start token only where the template itself writes one.
        return Prompt(text, add_special_tokens=not starts and (not shows_template or self._starts_itself))

    def _shows_template(self, text: str) -> bool:
        """Tell whether a text has been put into the template already."""
        marks, frame = self._marks
        return any(mark in text for mark in marks) or (bool(frame) and all(part in text for part in frame))

    @property
    def _starts_itself(self) -> bool:
        return bool(self._start_token) and self._rendered_probe.startswith(self._start_token or "")

    @cached_property
    def _rendered_probe(self) -> str:
        assert self.template is not None
        try:
            return self.template.render([{"role": "user", "content": PROBE}])
        except ChatTemplateError:
            return ""

    @cached_property
    def _marks(self) -> tuple[list[str], list[str]]:
        """Return what shows that a text was templated: marks of which one is enough, and parts that occur together."""
        before, _, after = self._rendered_probe.partition(PROBE)
        marks = re.findall(r"<[|｜][^<>|｜]+[|｜]>|<(?:start|end)_of_turn>|<\|[^<>|]+>|\[/?INST\]", before + after)
        marks = [mark for mark in marks if mark != self._start_token]
        before_lines = before.removeprefix(self._start_token or "").strip().splitlines()
        after_lines = after.strip().splitlines()
        frame = [line.strip() for line in (*before_lines[-1:], *after_lines[-1:])]
        return sorted(set(marks)), frame if len(frame) == 2 else []


def check_text(text: Any) -> None:
    """Refuse what is no prompt.

    Raises:
        RequestError: If the prompt is not a text, has nothing in it, or holds half of a character.
    """
    if not isinstance(text, str):
        raise RequestError("invalid_prompt", f"A prompt must be a text, got {type(text).__name__}. Give a string.")
    if not text.strip():
        raise RequestError("empty_prompt", f"The prompt must have some text in it, got {text!r}. Fill it in.")
    if not _is_unicode(text):
        raise RequestError("invalid_prompt", "The prompt holds half of a surrogate pair. Decode the text correctly.")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages with plain text as their content.

    Raises:
        RequestError: If there are none, or one has an unknown role or no usable content.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError("invalid_prompt", f"Messages must be a list, got {type(messages).__name__}. Give a list.")
    if not messages:
        raise RequestError("empty_prompt", "The conversation has no messages. Give one of the user at least.")
    checked = [_check_message(message) for message in messages]
    if not any(str(message.get("content") or "").strip() or message.get("tool_calls") for message in checked):
        raise RequestError("empty_prompt", "The messages have no text in them. Fill in their content.")
    return checked


def refuse_images(request: Request) -> None:
    """Refuse images for a model of text.

    Raises:
        RequestError: If the request has images.
    """
    if request.images:
        raise RequestError(
            "invalid_prompt",
            f"The model takes no images, got {len(request.images)}. Leave them out, or set task='image-text-to-text'.",
        )


def resolve_options(defaults: GenerationOptions, request: Request) -> GenerationOptions:
    """Return the options of a request over the defaults of the model.

    Raises:
        RequestError: If the two do not go together.
    """
    try:
        return defaults.merged(_as_options(request.options))
    except ValidationError as exc:
        problems = "; ".join(_problem(error) for error in exc.errors())
        raise RequestError("invalid_option", problems) from exc


def fit_context(token_ids: Sequence[int], options: GenerationOptions, context_length: int | None) -> list[int] | None:
    """Return the tokens of a prompt that fit the context together with the new tokens, or None to skip the request.

    Args:
        token_ids: Tokens of the whole prompt.
        options: Options with the number of new tokens and what to do with a prompt that is too long.
        context_length: Tokens that prompt and answer may have together, or None for no limit.

    Raises:
        RequestError: If the prompt is too long and must not be cut.
    """
    room = len(token_ids) if context_length is None else context_length - options.max_new_tokens
    if len(token_ids) <= room:
        return list(token_ids)
    if options.context_overflow == "skip":
        return None
    if options.context_overflow == "error" or room < 1:
        raise RequestError(
            "too_long",
            f"The prompt has {len(token_ids)} tokens, and with {options.max_new_tokens} new ones it does not fit the "
            f"context of {context_length} tokens. Shorten it, lower `max_new_tokens`, or set `context_overflow`.",
            prompt_tokens=len(token_ids),
        )
    return list(token_ids[-room:] if options.context_overflow == "truncate_left" else token_ids[:room])


def _as_options(options: Any) -> GenerationOptions | None:
    return GenerationOptions(**options) if isinstance(options, Mapping) else options


def _problem(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"`{place}` is no option of a generation, got {error['input']!r}. Remove it."
    return message if message.startswith("`") or not place else f"`{place}`, got {error['input']!r}: {message}."


def _check_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            "invalid_prompt",
            f"A message must have a role and content, got {type(message).__name__}. "
            "Give for example {'role': 'user', 'content': 'Hello'}.",
        )
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            "invalid_prompt", f"The role of a message must be one of {', '.join(ROLES)}, got {role!r}. Correct it."
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    text = _join_parts(content) if isinstance(content, Sequence) and not isinstance(content, str) else content
    if not isinstance(text, str) or not _is_unicode(text):
        raise RequestError(
            "invalid_prompt", f"The content of a message must be text, got {type(content).__name__}. Give a string."
        )
    return {**message, "content": text}


def _join_parts(parts: Sequence[Any]) -> str:
    """Return the text of a message whose content is a list of parts."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(
                "invalid_prompt",
                f"The content of a message must be text for this model, got a part of type {kind!r}. Leave it out.",
            )
        texts.append(text)
    return "".join(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
