"""Lines of the OpenAI batch format to requests: chat completions and completions.

What a body asks for is done or refused, never left out in silence. Without a temperature the model's own defaults hold,
which are greedy unless its block says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.batching.prompts import RowProblem, RowRequest
from prefect_huggingface.tasks.records import Request

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"

RENAMED = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop": "stop", "seed": "seed",
    "n": "n", "top_k": "top_k", "repetition_penalty": "repetition_penalty", "ignore_eos": "ignore_eos",
    "min_tokens": "min_new_tokens", "echo": "echo",
}  # fmt: skip
# What does not change the answer, and values that ask for nothing.
IGNORED = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
NOTHING: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "stream_options": (), "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,),
    "logit_bias": ({},), "logprobs": (False, 0), "top_logprobs": (0,), "suffix": ("",), "tool_choice": ("auto",),
    "functions": ([],), "function_call": ("auto", "none"), "modalities": (["text"],),
}  # fmt: skip


class BodyError(Exception):
    """A body that cannot be asked: status, and what to do."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.problem = RowProblem(status, message)


class OpenAIRows:
    """Makes requests of the lines of an OpenAI batch file.

    Args:
        job: What to do with the rows.
    """

    columns = ("custom_id", "url", "body")

    def __init__(self, job: BatchJob) -> None:
        self._names, self._greedy = job.served_names, job.greedy
        self._options = GenerationOptions(**job.options)
        self._duplicates = frozenset(job.duplicate_rows)

    def __call__(self, number: int, row: Mapping[str, Any]) -> RowRequest | RowProblem:
        """Return the request of a line."""
        try:
            return self._make(number, row)
        except BodyError as exc:
            return exc.problem

    def _make(self, number: int, row: Mapping[str, Any]) -> RowRequest:
        if not isinstance(row.get("custom_id"), str) or not row["custom_id"]:
            raise BodyError("malformed", f"`custom_id` must be a text, got {row.get('custom_id')!r}. Give one.")
        if number in self._duplicates:
            raise BodyError("duplicate_id", f"`custom_id` {row['custom_id']!r} occurred before. Rename it.")
        body = row.get("body")
        if row.get("method", "POST") != "POST" or not isinstance(body, Mapping):
            raise BodyError("malformed", "The line must have the method POST and a body. Correct it.")
        if self._names and body.get("model") not in self._names:
            raise BodyError(
                "unknown_model", f"The model {body.get('model')!r} is not here. Use {' or '.join(self._names)}."
            )
        if row.get("url") not in (CHAT_URL, COMPLETIONS_URL):
            raise BodyError("malformed", f"`url` must be {CHAT_URL!r} or {COMPLETIONS_URL!r}, got {row.get('url')!r}.")
        options = read_options(body, chat=row.get("url") == CHAT_URL)
        request = self._request(number, row.get("url"), body, self._options.merged(options))
        text = json.dumps([request.prompt, request.messages, request.tools, options.model_dump()], default=str)
        greedy = self._greedy if "do_sample" not in options.model_fields_set else not options.do_sample
        return RowRequest(request, text, shareable=greedy)

    def _request(self, number: int, url: Any, body: Mapping[str, Any], options: GenerationOptions) -> Request:
        if url == CHAT_URL:
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise BodyError("invalid_prompt", f"`messages` must be a list of messages, got {messages!r:.100}.")
            return Request(messages=messages, options=options, id=number, tools=body.get("tools") or ())
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise BodyError("invalid_prompt", "`prompt` must be one text. Write a line for each prompt.")
        return Request(prompt=prompt, options=options, id=number)


def read_options(body: Mapping[str, Any], chat: bool) -> GenerationOptions:
    """Return the generation options of a body.

    Raises:
        BodyError: If it asks for what cannot be done.
    """
    options: dict[str, Any] = {}
    for name, value in body.items():
        if name in ("model", "prompt", "messages", "tools", "temperature", "top_p") or name in IGNORED or value is None:
            continue
        if name in NOTHING:
            if value not in NOTHING[name]:
                raise BodyError("invalid_option", f"`{name}` is not supported, got {value!r:.100}. Leave it out.")
        elif name == "response_format":
            options.update(_response_format(value))
        elif name in RENAMED and not (name == "echo" and chat):
            options[RENAMED[name]] = value
        else:
            raise BodyError("invalid_option", f"`{name}` is not known. Leave it out.")
    options.update(_sampling(body))
    try:
        return GenerationOptions(**options)
    except (ValidationError, TypeError) as exc:
        first = exc.errors(include_url=False)[0]["msg"] if isinstance(exc, ValidationError) else str(exc)
        raise BodyError("invalid_option", f"{first.removeprefix('Value error, ')} Correct the body.") from None


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """A temperature above 0 samples, 0 does not; `top_p` alone samples unless it is 1, which changes nothing."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is None and top_p in (None, 1):
        return {}
    if temperature == 0:
        return {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return {name: value for name, value in sampling.items() if value is not None}


def _response_format(value: Any) -> dict[str, Any]:
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "text": dict,
        "json_object": lambda: {"response_format": {"json_schema": {"type": "object"}}},
        "json_schema": lambda: {"response_format": {"json_schema": value["json_schema"]["schema"]}},
    }
    try:
        return kinds[value["type"]]()
    except (KeyError, TypeError):
        raise BodyError("invalid_option", f"`response_format` is not known: {value!r:.200}. Correct it.") from None
