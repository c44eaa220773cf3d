"""Reads the answers of an endpoint: text that ends at a stop string, counts of tokens, and why it ends.

An answer that was cut may be asked for again. The text that was delivered already is then not delivered a second time.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Sequence
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.endpoints.calls import refusal
from prefect_huggingface.tasks.engines.endpoints.failures import EndpointFailure
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.protocol import OnText
from prefect_huggingface.tasks.engines.stopping import TextStream
from prefect_huggingface.tasks.records import Completion, FinishReason, Request

FINISH_REASONS: dict[str, FinishReason] = {"length": "length"}


class EndpointAnswer:
    """One answer while it comes in.

    Attributes:
        finish_reason: Why it ends, or None while it goes on.
        prompt_tokens: Number of tokens of the prompt as the server counts them, 0 where it does not say.
    """

    def __init__(self, request: Request, options: GenerationOptions, on_text: OnText | None) -> None:
        self._request = request
        self._options = options
        self._on_text = on_text
        self._delivered = ""
        self._echo = (request.prompt or "") if options.echo else ""
        self.begin()

    def begin(self) -> None:
        """Start an attempt. What an earlier one delivered is expected to come again."""
        self._pieces: list[str] = []
        self._position = 0
        self._stream = TextStream(self._join, self._options.stop, self._deliver if self._on_text else None)
        self._alternatives: tuple[str, ...] = ()
        self._logprobs: list[float] = []
        self._generated_tokens: int | None = None
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = 0
        if self._on_text is not None and self._echo:
            self._deliver(self._echo)

    @property
    def is_complete(self) -> bool:
        """Whether the end of the answer was seen."""
        return self.finish_reason is not None or self._stream.stopped

    def push(self, text: str | None) -> bool:
        """Go on with a piece of text, and tell whether a stop string was found."""
        if text:
            # The stream works on tokens; here a piece of text is one.
            self._pieces.append(text)
            self._stream.push([len(self._pieces) - 1])
        return self._stream.stopped

    def push_rest(self, whole: str) -> bool:
        """Go on with what the whole text has more than its pieces: the end of an incomplete character."""
        known = "".join(self._pieces)
        return self.push(whole[len(known) :] if whole.startswith(known) else None)

    def count(self, prompt_tokens: int | None, generated_tokens: int | None) -> None:
        """Note the counts of the server, where it gives them."""
        self.prompt_tokens = prompt_tokens or self.prompt_tokens
        self._generated_tokens = self._generated_tokens if generated_tokens is None else generated_tokens

    def add_logprob(self, logprob: float | None) -> None:
        """Note the log probability of the next token."""
        if logprob is not None:
            self._logprobs.append(logprob)

    def add_alternatives(self, texts: Sequence[str]) -> None:
        """Note the further answers, each cut at its own stop string."""
        self._alternatives = tuple(self._echo + _cut(text, self._options.stop) for text in texts)

    def completion(self, reason: FinishReason | None = None) -> Completion:
        """Return what came in, with the reason given or the one of the server."""
        text = self._stream.finish()
        if reason is not None and len(self._delivered) > len(self._echo + text):
            # An attempt that was ended early has not come as far as the one before it.
            text = self._delivered[len(self._echo) :]
        reason = "stop" if self._stream.stopped else reason or self.finish_reason or "stop"
        counted = len(self._pieces) if self._generated_tokens is None else self._generated_tokens
        return Completion(
            text=self._echo + text,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=counted,
            request_id=self._request.id,
            alternatives=self._alternatives,
            logprobs=self._checked_logprobs(reason),
        )

    def _checked_logprobs(self, reason: FinishReason) -> tuple[float, ...] | None:
        if not self._options.logprobs:
            return None
        if not self._logprobs and self._pieces and reason in ("stop", "length"):
            raise refusal("logprobs", True, "returns none", "Leave it out")
        return tuple(self._logprobs)

    def _join(self, tokens: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in tokens)

    def _deliver(self, text: str) -> None:
        """Give out what was not given out by an earlier attempt."""
        begin, self._position = self._position, self._position + len(text)
        known = self._delivered[begin : self._position]
        if not text.startswith(known):
            message = "The answer was cut and came differently the second time. Set a seed, or do not stream it."
            raise EndpointFailure("unavailable", message)
        if len(text) > len(known):
            self._delivered += text[len(known) :]
            self._tell(text[len(known) :])

    def _tell(self, text: str) -> None:
        assert self._on_text is not None
        try:
            self._on_text(text)
        except Exception as exc:
            message = f"The receiver of the text failed: {type(exc).__name__}: {exc}. Correct it."
            raise RequestError("engine_error", message) from exc


def _cut(text: str, stop: Sequence[str]) -> str:
    stream = TextStream(lambda tokens: text if tokens else "", stop)
    stream.push([0])
    return stream.finish()


def read_text(output: Any, answer: EndpointAnswer, prompt_tokens: str | None) -> None:
    """Read an answer of TGI's text route."""
    details = output.details
    answer.push(output.generated_text)
    answer.finish_reason = FINISH_REASONS.get(details.finish_reason, "stop")
    answer.count(int(prompt_tokens) if prompt_tokens and prompt_tokens.isdigit() else None, details.generated_tokens)
    for token in details.tokens or ():
        answer.add_logprob(token.logprob)


async def read_text_stream(stream: AsyncIterable[Any], answer: EndpointAnswer) -> None:
    """Read a streamed answer of TGI's text route, up to a stop string."""
    async for event in stream:
        answer.add_logprob(event.token.logprob)
        found = not event.token.special and answer.push(event.token.text)
        if event.generated_text is not None and not found:
            found = answer.push_rest(event.generated_text)
        if event.details is not None:
            answer.finish_reason = FINISH_REASONS.get(event.details.finish_reason, "stop")
            answer.count(event.details.input_length, event.details.generated_tokens)
        if found:
            return


def read_chat(output: Any, answer: EndpointAnswer, options: GenerationOptions) -> None:
    """Read an answer of the chat route."""
    if len(output.choices) < options.n:
        raise refusal("n", options.n, f"returns {len(output.choices)} answer(s)", "Set it to 1")
    first, *others = output.choices
    answer.push(_message_text(first.message))
    answer.finish_reason = FINISH_REASONS.get(first.finish_reason, "stop")
    answer.add_alternatives([_message_text(choice.message) for choice in others])
    if output.usage is not None:
        answer.count(output.usage.prompt_tokens, output.usage.completion_tokens)
    for token in (first.logprobs.content if first.logprobs else None) or ():
        answer.add_logprob(token.logprob)


async def read_chat_stream(stream: AsyncIterable[Any], answer: EndpointAnswer) -> None:
    """Read a streamed answer of the chat route, up to a stop string."""
    calls: dict[int, dict[str, Any]] = {}
    async for event in stream:
        if event.usage is not None:
            answer.count(event.usage.prompt_tokens, event.usage.completion_tokens)
        for choice in event.choices or ():
            _add_tool_calls(calls, choice.delta.tool_calls)
            for token in (choice.logprobs.content if choice.logprobs else None) or ():
                answer.add_logprob(token.logprob)
            if answer.push(choice.delta.content):
                return
            if choice.finish_reason is not None:
                answer.finish_reason = FINISH_REASONS.get(choice.finish_reason, "stop")
    answer.push("\n".join(_tool_call_text(call["name"], call["arguments"]) for call in calls.values()))


def _message_text(message: Any) -> str:
    """Return the text of a message. Calls of tools are written as most models write them."""
    calls = [_tool_call_text(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return "\n".join([*([message.content] if message.content else []), *calls])


def _tool_call_text(name: str, arguments: Any) -> str:
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        pass
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _add_tool_calls(calls: dict[int, dict[str, Any]], deltas: Any) -> None:
    """Put together calls of tools, whose names and arguments come in pieces."""
    for delta in deltas or ():
        call = calls.setdefault(getattr(delta, "index", None) or 0, {"name": "", "arguments": ""})
        call["name"] += delta.function.name or ""
        call["arguments"] += delta.function.arguments or ""
