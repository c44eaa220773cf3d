"""Translates a request and its options into the arguments of an endpoint. What an endpoint cannot honour is refused."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, ResponseFormat
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.prompts import check_messages, check_text
from prefect_huggingface.tasks.records import Request

Dialect = Literal["openai", "tgi"]

# Servers take four at most. The further ones still end the text, on this side.
MAX_STOP_STRINGS = 4
EXTRA_NAMES = {
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
}
NOWHERE = ("num_beams", "no_repeat_ngram_size")
NOT_ON_TGI = ("min_new_tokens", "ignore_eos", "n")


@dataclass(frozen=True, slots=True)
class Server:
    """What an endpoint is.

    Attributes:
        dialect: Protocol that it speaks.
        context_length: Number of tokens of prompt and answer together, or None where it does not say.
    """

    dialect: Dialect
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of the client.

    Attributes:
        is_chat: Whether it goes to the chat route.
        arguments: Arguments of `text_generation` or `chat_completion`.
        payload: Fields of the JSON for which the client has no argument, or one with another meaning.
    """

    is_chat: bool
    arguments: Mapping[str, Any]
    payload: Mapping[str, Any] = field(default_factory=dict)


def make_call(request: Request, options: GenerationOptions, endpoint: InferenceEndpoint, server: Server) -> Call:
    """Return what to ask of the client for a request.

    Raises:
        RequestError: If the request is none, or has an option that this endpoint cannot honour.
    """
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("invalid_prompt", "A request must have a prompt or messages, and not both. Give one.")
    if request.prompt is not None:
        check_text(request.prompt)
    for name in NOWHERE:
        _refuse_set(name, options)
    if request.messages is None and _goes_as_text(request, endpoint, server):
        return _text_call(request, options, endpoint, server)
    return _chat_call(request, options, endpoint, server)


def _goes_as_text(request: Request, endpoint: InferenceEndpoint, server: Server) -> bool:
    """Tell whether a plain prompt goes to the route for raw text, and not as a message of a chat."""
    wishes = {"always": "chat", "never": "text"}
    wish = wishes.get(request.chat_template or "auto", endpoint.send_prompts_as)
    if wish == "text" and server.dialect != "tgi":
        raise refusal("send_prompts_as", "text", "speaks OpenAI's chat protocol", "Set it to 'chat'")
    return wish != "chat" and server.dialect == "tgi"


def _text_call(request: Request, options: GenerationOptions, endpoint: InferenceEndpoint, server: Server) -> Call:
    for name in NOT_ON_TGI:
        _refuse_set(name, options)
    if request.images or request.tools:
        raise refusal("images" if request.images else "tools", "some", "takes plain text", "Send messages")
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "details": True,
        "return_full_text": False,
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop[:MAX_STOP_STRINGS] or None,
        "truncate": _truncation(options, server),
        "grammar": _tgi_form(options.response_format, "json"),
    }
    if options.repetition_penalty != 1.0:
        arguments["repetition_penalty"] = options.repetition_penalty
    if options.do_sample:
        # TGI takes no top_p of 1, which is the default.
        top_p = options.top_p if options.top_p != 1.0 else None
        arguments |= {"do_sample": True, "temperature": options.temperature, "top_p": top_p, "top_k": options.top_k}
        arguments["seed"] = options.seed
    return Call(False, arguments, {"parameters": endpoint.extra_parameters} if endpoint.extra_parameters else {})


def _chat_call(request: Request, options: GenerationOptions, endpoint: InferenceEndpoint, server: Server) -> Call:
    if options.context_overflow not in ("error", "skip"):
        raise refusal("context_overflow", options.context_overflow, "cannot truncate a chat", "Use 'error' or 'skip'")
    if options.echo and request.messages is not None:
        raise refusal("echo", True, "returns no conversation", "Leave it out")
    arguments: dict[str, Any] = {
        "messages": messages_of(request),
        "model": endpoint.model_name,
        "max_tokens": options.max_new_tokens,
        "stop": options.stop[:MAX_STOP_STRINGS] or None,
        "tools": [dict(tool) for tool in request.tools] or None,
        "logprobs": options.logprobs or None,
        "n": options.n if options.n > 1 else None,
        # A server may sample by default; only a temperature of 0 is greedy everywhere.
        "temperature": (1.0 if options.temperature is None else options.temperature) if options.do_sample else 0.0,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    payload = _extra_payload(options, endpoint, server)
    form = options.response_format
    if form is not None:
        payload["response_format"] = (
            _openai_form(form) if server.dialect == "openai" else _tgi_form(form, "json_object")
        )
    return Call(True, arguments, payload)


def _extra_payload(options: GenerationOptions, endpoint: InferenceEndpoint, server: Server) -> dict[str, Any]:
    """Return the options outside OpenAI's protocol, under the names that most servers give them."""
    payload: dict[str, Any] = dict(endpoint.extra_parameters)
    for name, sent_name in EXTRA_NAMES.items():
        if not _is_set(name, options):
            continue
        if name not in endpoint.extra_options:
            action = f"Leave it out, or put {name!r} into `extra_options` if the server understands it"
            raise refusal(
                name, getattr(options, name), "speaks OpenAI's chat protocol, which has no such option", action
            )
        payload[sent_name] = getattr(options, name)
    if server.dialect == "tgi":
        _refuse_set("n", options)
    return payload


def _openai_form(form: ResponseFormat) -> dict[str, Any]:
    if form.json_schema is None:
        kind = "regex" if form.regex is not None else "choices"
        raise refusal(
            "response_format", kind, "speaks OpenAI's chat protocol, which knows JSON schemas only", "Use `json_schema`"
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.json_schema, "strict": True}}


def _tgi_form(form: ResponseFormat | None, name: str) -> dict[str, Any] | None:
    if form is None:
        return None
    if form.json_schema is not None:
        return {"type": name, "value": form.json_schema}
    regex = form.regex if form.regex is not None else "|".join(f"({re.escape(text)})" for text in form.choices or ())
    return {"type": "regex", "value": regex}


def _truncation(options: GenerationOptions, server: Server) -> int | None:
    """Return how many tokens of the prompt's end TGI keeps, or None for all."""
    if options.context_overflow == "truncate_right":
        raise refusal("context_overflow", "truncate_right", "drops the beginning only", "Use 'truncate_left'")
    if options.context_overflow != "truncate_left":
        return None
    if server.context_length is None:
        raise refusal("context_overflow", "truncate_left", "does not tell its context length", "Use 'error' or 'skip'")
    return max(1, server.context_length - options.max_new_tokens)


def messages_of(request: Request) -> list[dict[str, Any]]:
    """Return the conversation of a request, with its images in the last message.

    Raises:
        RequestError: If a message is none, or an image cannot be read.
    """
    if request.messages is None:
        messages: list[dict[str, Any]] = [{"role": "user", "content": request.prompt}]
    elif any(_has_parts(message) for message in request.messages):
        # Content in parts, with images for instance, is for the server to understand.
        messages = [dict(message) for message in request.messages]
    else:
        messages = check_messages(request.messages)
    if request.images:
        content = messages[-1].get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        images = [{"type": "image_url", "image_url": {"url": _image_url(image)}} for image in request.images]
        messages[-1]["content"] = [*images, *parts]
    return messages


def _has_parts(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message and isinstance(message.get("content"), list)


def _image_url(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    try:
        content = Path(image).read_bytes()
    except OSError as exc:
        text = f"The image {image!r} cannot be read: {exc.strerror}. Correct its path."
        raise RequestError("invalid_prompt", text) from exc
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refusal(name: str, value: Any, reason: str, action: str) -> RequestError:
    """Return the error for an option that an endpoint cannot honour."""
    return RequestError("invalid_option", f"`{name}` cannot be {value!r} here: this endpoint {reason}. {action}.")


def _is_set(name: str, options: GenerationOptions) -> bool:
    value = getattr(options, name)
    return value is not None and value != type(options).model_fields[name].default


def _refuse_set(name: str, options: GenerationOptions) -> None:
    if _is_set(name, options):
        raise refusal(name, getattr(options, name), "has no such option", "Leave it out")
