"""Translates a request and its options into the JSON of an endpoint. What an endpoint cannot honour is refused."""

from __future__ import annotations

import base64
import json
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, ResponseFormat
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.inputs import check_messages, check_prompt, is_set
from prefect_huggingface.tasks.records import Request

# Servers take four at most. The further ones still end the text, on this side.
MAX_STOP_STRINGS = 4
# A server of one model ignores the name; the clients of Hugging Face send this one.
UNNAMED_MODEL = "dummy"
# Options outside OpenAI's protocol, under the names that most servers give them.
EXTRA_NAMES = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_token_ids",
    "template_options": "chat_template_kwargs",
}
NOWHERE = (
    "num_beams", "no_repeat_ngram_size", "max_reasoning_tokens", "choice_probabilities", "src_lang", "tgt_lang",
    "forced_bos_token_id",
)  # fmt: skip
NOT_ON_TGI = ("min_new_tokens", "ignore_eos", "n", "min_p", "stop_token_ids", "template_options")


@dataclass(frozen=True, slots=True)
class Server:
    """What an endpoint is.

    Attributes:
        dialect: Protocol that it speaks.
        context_length: Number of tokens of prompt and answer together, or None where it does not say.
        model: Name of the model in a request, or None where the server names none.
    """

    dialect: Literal["openai", "tgi"]
    context_length: int | None = None
    model: str | None = None


def is_chat(request: Request, endpoint: InferenceEndpoint, server: Server) -> bool:
    """Return whether a request goes to the chat route, and not as raw text.

    Raises:
        RequestError: If it lacks a prompt or messages, has both, or must go a way that the server does not know.
    """
    check_prompt(request)
    if request.prompt is None:
        return True
    wishes = {"always": "chat", "never": "text"}
    wish = wishes.get(request.chat_template or "auto", endpoint.send_prompts_as)
    if wish == "text" and server.dialect != "tgi":
        raise refusal("send_prompts_as", "text", "speaks OpenAI's chat protocol", "Set it to 'chat'")
    return wish == "chat" or server.dialect != "tgi"


def text_body(
    request: Request, options: GenerationOptions, endpoint: InferenceEndpoint, server: Server
) -> dict[str, Any]:
    """Return the JSON for TGI's text route.

    Raises:
        RequestError: If the request has an option that the endpoint cannot honour.
    """
    for name in (*NOWHERE, *NOT_ON_TGI, "presence_penalty"):
        _refuse_set(name, options)
    if request.images or request.tools:
        raise refusal("images" if request.images else "tools", "some", "takes plain text", "Send messages")
    parameters: dict[str, Any] = {
        "details": True,
        "return_full_text": False,
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop[:MAX_STOP_STRINGS] or None,
        "truncate": _truncation(options, server),
        "grammar": _tgi_format(options.response_format, "json"),
        "repetition_penalty": options.repetition_penalty if options.repetition_penalty != 1.0 else None,
        "frequency_penalty": options.frequency_penalty or None,
    }
    if options.do_sample:
        # TGI takes no top_p of 1, which is the default.
        top_p = options.top_p if options.top_p != 1.0 else None
        parameters |= {"do_sample": True, "temperature": options.temperature, "top_p": top_p, "top_k": options.top_k}
        parameters["seed"] = options.seed
    return {"inputs": request.prompt, "parameters": {**_given(parameters), **endpoint.extra_parameters}}


def chat_body(
    request: Request, options: GenerationOptions, endpoint: InferenceEndpoint, server: Server
) -> dict[str, Any]:
    """Return the JSON for the chat route.

    Raises:
        RequestError: If the request has an option that the endpoint cannot honour.
    """
    for name in NOWHERE:
        _refuse_set(name, options)
    if options.context_overflow not in ("error", "skip"):
        raise refusal("context_overflow", options.context_overflow, "cannot truncate a chat", "Use 'error' or 'skip'")
    if options.echo and request.messages is not None:
        raise refusal("echo", True, "returns no conversation", "Leave it out")
    if server.dialect == "tgi":
        _refuse_set("n", options)
    body = {
        "messages": messages_of(request),
        "model": endpoint.model_name or server.model or UNNAMED_MODEL,
        "max_tokens": options.max_new_tokens,
        "stop": options.stop[:MAX_STOP_STRINGS] or None,
        "tools": [dict(tool) for tool in request.tools] or None,
        "logprobs": options.logprobs or None,
        "n": options.n if options.n > 1 else None,
        # A server may sample by default; only a temperature of 0 is greedy everywhere.
        "temperature": (1.0 if options.temperature is None else options.temperature) if options.do_sample else 0.0,
        "top_p": options.top_p,
        "seed": options.seed,
        "presence_penalty": options.presence_penalty or None,
        "frequency_penalty": options.frequency_penalty or None,
        "response_format": _chat_format(options.response_format, server),
        **_extra_options(options, endpoint),
    }
    return {**_given(body), **endpoint.extra_parameters}


def _extra_options(options: GenerationOptions, endpoint: InferenceEndpoint) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sent_name in EXTRA_NAMES.items():
        if not is_set(options, name):
            continue
        if name not in endpoint.extra_options:
            action = f"Leave it out, or put {name!r} into `extra_options` if the server understands it"
            raise refusal(
                name, getattr(options, name), "speaks OpenAI's chat protocol, which has no such option", action
            )
        found[sent_name] = getattr(options, name)
    return found


def _chat_format(form: ResponseFormat | None, server: Server) -> dict[str, Any] | None:
    if form is None:
        return None
    if server.dialect == "tgi":
        return _tgi_format(form, "json_object")
    if form.json_schema is None:
        kind = "regex" if form.regex is not None else "choices"
        raise refusal(
            "response_format", kind, "speaks OpenAI's chat protocol, which knows JSON schemas only", "Use `json_schema`"
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.json_schema, "strict": True}}


def _tgi_format(form: ResponseFormat | None, name: str) -> dict[str, Any] | None:
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
        RequestError: If a message is malformed, or an image cannot be read.
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
    return [_with_texts(message) for message in messages]


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as JSON, as the protocol has them and templates do not."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            function = {**function, "arguments": json.dumps(arguments or {}, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


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


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_set(name: str, options: GenerationOptions) -> None:
    if is_set(options, name):
        raise refusal(name, getattr(options, name), "has no such option", "Leave it out")
