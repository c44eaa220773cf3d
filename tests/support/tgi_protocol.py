"""The protocol of TGI over a real small model: routes, fields, limits and errors as in the router of TGI."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from support.endpoint_faults import Fault, send_events
from support.text_models import Piece, TextModel

MAX_STOP_STRINGS = 4


class Refusal(Exception):
    """A request that is answered with an error of TGI."""

    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


class TgiProtocol:
    """What the routes answer.

    Attributes:
        model: The model.
        step_seconds: Pause before each token.
        seed_offset: Added to the seed of every request, and grows with each: sampling that cannot be repeated.
    """

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self.step_seconds = 0.0
        self.seed_offset = 0

    @property
    def context_length(self) -> int:
        return self.model.context_length

    def tokens(self, text: str) -> list[dict[str, Any]]:
        encoded = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [{"id": token, "text": text[a:b], "start": a, "stop": b} for token, (a, b) in spans]

    def text(self, path: str, body: dict[str, Any], fault: Fault | None) -> Any:
        settings = {"max_new_tokens": 100, **{k: v for k, v in body.get("parameters", {}).items() if v is not None}}
        prompt = self._check(self.model.encode(body["inputs"]), settings)
        if body.get("stream") or path == "/generate_stream":
            return send_events(self._text_events(prompt, settings), fault)
        full = settings.get("return_full_text", path == "/")
        return _Later(lambda: self._whole_text(body["inputs"] if full else "", prompt, settings, path == "/"))

    def _check(self, prompt: list[int], settings: dict[str, Any]) -> list[int]:
        """Return the tokens of the prompt, or refuse what TGI refuses."""
        if settings.get("truncate"):
            prompt = prompt[-settings["truncate"] :]
        total = len(prompt) + settings["max_new_tokens"]
        if total > self.model.context_length:
            most = self.model.context_length
            words = f"`inputs` tokens + `max_new_tokens` must be <= {most}. Given: {len(prompt)} `inputs` tokens"
            raise Refusal(422, f"Input validation error: {words}", "validation")
        if "temperature" in settings and settings["temperature"] <= 0:
            raise Refusal(422, "Input validation error: `temperature` must be strictly positive", "validation")
        if "top_p" in settings and not 0 < settings["top_p"] < 1:
            raise Refusal(422, "Input validation error: `top_p` must be > 0.0 and < 1.0", "validation")
        if len(settings.get("stop", ())) > MAX_STOP_STRINGS:
            raise Refusal(422, f"Input validation error: `stop` supports up to {MAX_STOP_STRINGS}", "validation")
        if "grammar" in settings:
            settings["choices"] = _choices(settings["grammar"])
        return prompt

    async def _pieces(self, prompt: list[int], settings: Mapping[str, Any]) -> Any:
        """Yield the tokens with the finish reason, which is None but for the last."""
        settings = {**settings, "seed": (settings.get("seed") or 0) + self.seed_offset}
        self.seed_offset *= 2
        text, steps = "", self.model.generate(prompt, settings)
        for index in range(settings["max_new_tokens"]):
            await asyncio.sleep(self.step_seconds)
            piece: Piece = await asyncio.to_thread(next, steps)
            text += piece.text
            reason = None
            if piece.special:
                reason = "eos_token"
            elif any(text.endswith(stop) for stop in settings.get("stop") or ()):
                reason = "stop_sequence"
            elif index + 1 == settings["max_new_tokens"]:
                reason = "length"
            # What is held back at the end is in the whole text, and not in that of the last token.
            yield piece, text + piece.held if reason else text, reason
            if reason:
                return

    async def _whole_text(self, before: str, prompt: list[int], settings: Mapping[str, Any], as_list: bool) -> Response:
        tokens = []
        async for piece, text, reason in self._pieces(prompt, settings):  # noqa: B007
            tokens.append(_token(piece))
        answer: dict[str, Any] = {"generated_text": before + text}
        if settings.get("details"):
            answer["details"] = {
                "finish_reason": reason, "generated_tokens": len(tokens), "seed": None, "prefill": [], "tokens": tokens,
            }  # fmt: skip
        headers = {"x-prompt-tokens": str(len(prompt)), "x-generated-tokens": str(len(tokens))}
        return JSONResponse([answer] if as_list else answer, headers=headers)

    async def _text_events(self, prompt: list[int], settings: Mapping[str, Any]) -> Any:
        count = 0
        async for piece, text, reason in self._pieces(prompt, settings):
            count += 1
            details = {"finish_reason": reason, "generated_tokens": count, "seed": None, "input_length": len(prompt)}
            yield {
                "index": count, "token": _token(piece), "generated_text": text if reason else None,
                "details": details if reason else None,
            }  # fmt: skip

    def chat(self, body: dict[str, Any], fault: Fault | None) -> Any:
        if not body.get("messages"):
            raise Refusal(422, "Template error: conversation is empty", "template_error")
        temperature = body.get("temperature")
        settings = {
            "max_new_tokens": body.get("max_tokens") or 100, "stop": body.get("stop") or [], "seed": body.get("seed"),
            "do_sample": temperature != 0, "temperature": temperature or 1.0,
        }  # fmt: skip
        prompt = self._check(self.model.encode(self.model.write_chat(body["messages"]), special=False), settings)
        if body.get("stream"):
            return send_events(self._chat_events(prompt, settings, body), fault, end="[DONE]")
        return _Later(lambda: self._whole_chat(prompt, settings, body))

    async def _whole_chat(self, prompt: list[int], settings: Mapping[str, Any], body: Mapping[str, Any]) -> Response:
        logprobs = []
        async for piece, text, reason in self._pieces(prompt, settings):  # noqa: B007
            logprobs.append({"token": piece.text, "logprob": piece.logprob, "top_logprobs": []})
        choice = {
            "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": _openai_reason(reason),
            "logprobs": {"content": logprobs} if body.get("logprobs") else None,
        }  # fmt: skip
        return JSONResponse({**_head(body), "choices": [choice], "usage": _usage(prompt, len(logprobs))})

    async def _chat_events(self, prompt: list[int], settings: Mapping[str, Any], body: Mapping[str, Any]) -> Any:
        count = 0
        async for piece, _, reason in self._pieces(prompt, settings):
            count += 1
            delta = {"role": "assistant", "content": piece.text + (piece.held if reason else "")}
            choice = {"index": 0, "delta": delta, "finish_reason": _openai_reason(reason), "logprobs": None}
            yield {**_head(body), "choices": [choice], "usage": None}
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {**_head(body), "choices": [], "usage": _usage(prompt, count)}


class _Later:
    """A response that is made when it is sent."""

    def __init__(self, make: Any) -> None:
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._make()
        await response(scope, receive, send)


def _token(piece: Piece) -> dict[str, Any]:
    return {"id": piece.id, "text": piece.text, "logprob": piece.logprob, "special": piece.special}


def _choices(grammar: Mapping[str, Any]) -> list[str]:
    if grammar["type"] != "regex" or not re.fullmatch(r"\([^()]*\)(\|\([^()]*\))*", grammar["value"]):
        raise Refusal(422, "Input validation error: grammar is not supported", "validation")
    return [re.sub(r"\\(.)", r"\1", choice) for choice in grammar["value"][1:-1].split(")|(")]


def _head(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": "", "object": "chat.completion", "created": 0, "model": body.get("model"), "system_fingerprint": ""}


def _usage(prompt: list[int], count: int) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}


def _openai_reason(reason: str | None) -> str | None:
    return {"length": "length", None: None}.get(reason, "stop")
