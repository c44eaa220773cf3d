"""OpenAI's protocol in both directions: bodies to requests of an engine, and completions to bodies of answers.

Batch files and the model server share it. What a body asks for is done or refused, never left out in silence. Without
a temperature the model's own defaults hold, which are greedy unless its block says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import orjson
from pydantic import ValidationError

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.base import Piece, RequestError
from prefect_huggingface.tasks.engines.detokenizer import token_bytes
from prefect_huggingface.tasks.engines.tool_calls import (
    InvalidCall,
    Item,
    ToolCall,
    ToolCallParser,
    call_schema,
    choose_tools,
)
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.records import Completion, ErrorCode, Message, Request

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
MAX_PROMPTS = 128

# Handled by name; every other field of a body is an option, has no effect, or is refused.
CALL_FIELDS = {
    "model",
    "prompt",
    "messages",
    "tools",
    "tool_choice",
    "temperature",
    "top_p",
    "stream",
    "stream_options",
    "parallel_tool_calls",
}
OPTION_NAMES = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop": "stop", "seed": "seed",
    "n": "n", "top_k": "top_k", "repetition_penalty": "repetition_penalty", "ignore_eos": "ignore_eos",
    "min_tokens": "min_new_tokens", "echo": "echo", "min_p": "min_p", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "stop_token_ids": "stop_token_ids",
    "chat_template_kwargs": "template_options",
}  # fmt: skip
# What does not change the answer.
NO_EFFECT = {
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier",
}  # fmt: skip
# Not supported; these values ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "logit_bias": ({},), "top_logprobs": (0,),
    "suffix": ("",), "functions": ([],), "function_call": ("auto", "none"), "modalities": (["text"],),
}  # fmt: skip

# Status and code of the errors of completions and of rows. The others are faults of the request: 400.
ERROR_STATUS = {
    "unknown_model": 404, "not_found": 404, "deadline": 408, "rate_limited": 429, "engine_error": 500,
    "bad_answer": 502, "out_of_cache": 413, "out_of_memory": 503, "cancelled": 503, "unavailable": 503,
}  # fmt: skip
ERROR_NAMES = {"unknown_model": "model_not_found", "too_long": "context_length_exceeded"}


class BodyError(Exception):
    """A body that cannot be asked, or whose answer is an error.

    Attributes:
        code: Kind of the error.
        param: Field of the body that is at fault, or None.
        status: HTTP status of the answer.
        retry_after: Seconds after which the same request may work, or None for never.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, *, status: int = 400, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.status, self.retry_after = code, param, status, retry_after

    @classmethod
    def of(cls, exc: Exception) -> BodyError:
        """Return the error that an exception means to a client, to whom only the known ones are told."""
        if isinstance(exc, BodyError):
            return exc
        if isinstance(exc, RequestError):
            return cls(exc.code, str(exc), status=error_status(exc.code))
        return cls("engine_error", "The server failed. Look at its log.", status=500)

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else {**headers, "Retry-After": str(self.retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """Body of the answer."""
        return error_body(self.code, str(self), self.param, self.status)


@dataclass(frozen=True, slots=True)
class OpenAICall:
    """What a body asks for.

    Attributes:
        chat: Whether it is a conversation and not a plain prompt.
        model: Name of the model, or None.
        requests: One request for each prompt, with the options of the body.
        tools: Tools whose calls are looked for in the answers.
        most_calls: Greatest number of calls of one answer, None for any number.
        stream: Whether the answer is streamed.
        include_usage: Whether the stream ends with the token counts.
    """

    chat: bool
    model: str | None
    requests: tuple[Request, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    most_calls: int | None = None
    stream: bool = False
    include_usage: bool = False

    @property
    def url(self) -> str:
        """Route of the call."""
        return CHAT_URL if self.chat else COMPLETIONS_URL

    @property
    def n(self) -> int:
        """Number of answers to each prompt."""
        options = self.requests[0].options
        return options.n if options is not None else 1

    def writer(self, name: str, created: int, model: str | None) -> AnswerWriter:
        """Return what writes the answer to this call.

        Args:
            name: Name of the answer.
            created: Time of the answer, in seconds since 1970.
            model: Name of the model that answers.
        """
        return AnswerWriter(self, name, created, model)


def parse_body(content: bytes | bytearray) -> dict[str, Any]:
    """Return the object that the bytes of a body are.

    Raises:
        BodyError: If they are none.
    """
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as exc:
        raise BodyError("invalid_body", f"The body is no JSON: {exc}. Correct it.") from None
    if not isinstance(body, dict):
        raise BodyError("invalid_body", f"The body must be an object, got {type(body).__name__}. Correct it.")
    return body


def read_call(body: Mapping[str, Any], chat: bool, defaults: GenerationOptions | None = None) -> OpenAICall:
    """Return what a body asks for.

    Args:
        body: Body of a request to one of the two routes.
        chat: Whether it is for the route of chat completions.
        defaults: Options of the model, which hold for what the body leaves out.

    Raises:
        BodyError: If it asks for what cannot be done.
    """
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BodyError("invalid_prompt", f"`model` must be a text, got {model!r:.100}. Correct it.", "model")
    tools = _read_tools(body) if chat else []
    options = read_options(body, chat, defaults)
    stream, stream_options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(stream_options, Mapping):
        raise BodyError("invalid_option", "`stream` must be true or false. Correct it.", "stream")
    if chat:
        messages = _read_messages(body.get("messages"))
        # An answer that is cut off in the middle of its form or its call has the reason "length", as with OpenAI.
        requests = [Request(messages=messages, options=options, tools=tools, check_form=False)]
    else:
        # This route is for text that is put before the model as it is.
        prompts = _read_prompts(body.get("prompt"))
        requests = [Request(prompt=prompt, options=options, chat_template="never") for prompt in prompts]
    with_usage = stream and bool(stream_options.get("include_usage"))
    return OpenAICall(chat, model, tuple(requests), tuple(tools), _read_most_calls(body), stream, with_usage)


def read_options(body: Mapping[str, Any], chat: bool, defaults: GenerationOptions | None = None) -> GenerationOptions:
    """Return the generation options of a body, which are to be put over those of the model.

    Raises:
        BodyError: If it asks for what cannot be done.
    """
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is not None and name not in CALL_FIELDS and name not in NO_EFFECT:
            options.update(_read_option(name, value, chat))
    options.update(_read_sampling(body))
    if chat and (forced := _forced_schema(body)) is not None:
        options["response_format"] = {"json_schema": forced}
    try:
        if defaults is None or not defaults.model_fields_set:
            return GenerationOptions(**options)
        whole = defaults.merged(GenerationOptions.model_construct(set(options), **options))
        return whole.model_construct(set(options), **{name: getattr(whole, name) for name in options})
    except (ValidationError, TypeError) as exc:
        first = exc.errors(include_url=False)[0] if isinstance(exc, ValidationError) else {"msg": str(exc), "loc": ()}
        names = {**OPTION_NAMES, "temperature": "temperature", "top_p": "top_p"}
        place = next((name for name, option in names.items() if option in first["loc"] and name in body), None)
        message = f"{str(first['msg']).removeprefix('Value error, ').rstrip('.')}. Correct the body."
        raise BodyError("invalid_option", f"`{place}`: {message}" if place else message, place) from None


def _read_option(name: str, value: Any, chat: bool) -> dict[str, Any]:
    if name == "response_format":
        return _read_response_format(value)
    if name == "logprobs":
        return {"logprobs": _read_logprobs(value, chat)}
    if name in OPTION_NAMES and name != ("echo" if chat else "chat_template_kwargs"):
        return {OPTION_NAMES[name]: value}
    if name not in NEUTRAL_VALUES:
        raise BodyError("invalid_option", f"`{name}` is not known. Leave it out.", name)
    if value not in NEUTRAL_VALUES[name]:
        raise BodyError("invalid_option", f"`{name}` is not supported, got {value!r:.100}. Leave it out.", name)
    return {}


def _read_sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """A temperature above 0 samples, 0 does not; `top_p` alone samples unless it is 1, which changes nothing."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is None and top_p in (None, 1):
        return {}
    if temperature == 0:
        return {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return {name: value for name, value in sampling.items() if value is not None}


def _read_response_format(value: Any) -> dict[str, Any]:
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "text": dict,
        "json_object": lambda: {"response_format": {"json_schema": {"type": "object"}}},
        "json_schema": lambda: {"response_format": {"json_schema": value["json_schema"]["schema"]}},
    }
    try:
        return kinds[value["type"]]()
    except (KeyError, TypeError):
        raise BodyError(
            "invalid_option", f"`response_format` is not known: {value!r:.200}. Correct it.", "response_format"
        ) from None


def _read_logprobs(value: Any, chat: bool) -> bool:
    """Chat asks for them with true, and completions with 0: those of the tokens of the text and no others."""
    if isinstance(value, bool) if chat else value == 0:
        return value if chat else value is not False
    raise BodyError(
        "invalid_option",
        f"`logprobs` must be {'true or false' if chat else '0'}, got {value!r:.100}: other tokens' are not kept.",
        "logprobs",
    )


def _read_tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tools that the model sees: none where it must not call any."""
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
        raise BodyError("invalid_option", "`tools` must be a list of functions with names. Correct it.", "tools")
    return [] if body.get("tool_choice") == "none" else tools


def _read_most_calls(body: Mapping[str, Any]) -> int | None:
    parallel = body.get("parallel_tool_calls")
    if parallel not in (None, True, False):
        text = f"`parallel_tool_calls` must be true or false, got {parallel!r:.100}. Correct it."
        raise BodyError("invalid_option", text, "parallel_tool_calls")
    return 1 if parallel is False else None


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _forced_schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the schema of the call that must be made, or None where the model may choose."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    tools = _read_tools(body)
    try:
        chosen = choose_tools(tools, choice) if choice == "required" or isinstance(choice, Mapping) else []
    except (SettingsError, AttributeError):
        chosen = []
    if not chosen:
        names = [tool["function"]["name"] for tool in tools]
        message = f"`tool_choice` must be 'auto', 'none', 'required' or one of {names!r}, got {choice!r:.100}."
        raise BodyError("invalid_option", message, "tool_choice")
    return call_schema(chosen)


def _read_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise BodyError("invalid_prompt", f"`messages` must be a list of messages, got {messages!r:.100}.", "messages")
    return [_read_message(message) for message in messages]


def _read_message(message: Mapping[str, Any]) -> Message:
    """Return a message with the arguments of its tool calls as values, as chat templates write them."""
    if isinstance(content := message.get("content"), list):
        for part in content:
            _check_part(part)
    if not isinstance(message.get("tool_calls"), list):
        return {name: value for name, value in message.items() if name != "tool_calls"}
    return {**message, "tool_calls": [_read_past_call(call) for call in message["tool_calls"]]}


def _read_past_call(call: Any) -> Mapping[str, Any]:
    if not _is_tool(call):
        raise BodyError(
            "invalid_prompt", f"A tool call must have a function and its name, got {call!r:.99}.", "messages"
        )
    arguments = call["function"].get("arguments") or "{}"
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as exc:
        text = f"The arguments of a tool call must be JSON, got {arguments!r:.100}: {exc}. Correct them."
        raise BodyError("invalid_prompt", text, "messages") from None
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _check_part(part: Any) -> None:
    """Refuse a part of a message that is neither text nor an image of a known form.

    An engine would also take a path for an image, and would read that file of this machine.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if kind != "image_url" or not part.keys() <= {"type", "image_url"}:
        raise BodyError("invalid_prompt", f"A part must be a `text` or an `image_url`, got {part!r:.100}.", "messages")
    image_url(part)


def image_url(part: Mapping[str, Any]) -> str:
    """Return the URL of a part of a message that is an image.

    Raises:
        BodyError: If it is none, or one with another scheme than data, http or https.
    """
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url.lower().startswith(("data:", "http://", "https://")):
        raise BodyError(
            "invalid_prompt", f"`image_url` must be a data URL or an http address, got {url!r:.100}.", "messages"
        )
    return url


def check_images(requests: Sequence[Request], most: int, allow_remote: bool) -> None:
    """Refuse images that are too many, or that would have to be fetched.

    Raises:
        BodyError: With the remedy.
    """
    contents = [message.get("content") for request in requests for message in request.messages or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    urls = [image_url(part) for part in parts if part["type"] == "image_url"]
    if len(urls) > most:
        raise BodyError("invalid_prompt", f"A request may have {most} images, got {len(urls)}. Send fewer.", "messages")
    if not allow_remote and not all(url[:5].lower() == "data:" for url in urls):
        text = "This server fetches no images. Send a data URL, or start it with --allow-remote-images."
        raise BodyError("invalid_prompt", text, "messages")


def _read_prompts(prompt: Any) -> list[str]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise BodyError("invalid_prompt", "`prompt` must be a text or a list of texts. Tokens are not read.", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise BodyError(
            "invalid_prompt", f"`prompt` must hold at most {MAX_PROMPTS} texts, got {len(prompts)}.", "prompt"
        )
    return prompts


class AnswerWriter:
    """Writes the answer to a call, whole or as the chunks of a stream. Equal arguments give equal bytes.

    Args:
        call: What was asked for.
        name: What tells this answer from others; ids are made of it.
        created: Time of the answer, in seconds since 1970.
        model: Name of the model.
    """

    def __init__(self, call: OpenAICall, name: str, created: int, model: str | None) -> None:
        self._call, self._name = call, name
        kind = "chat.completion" if call.chat else "text_completion"
        self._head = {"id": f"{'chatcmpl' if call.chat else 'cmpl'}-{name}", "object": kind, "created": created}
        self._head["model"] = model
        self._chunk_head = {**self._head, "object": f"{kind}.chunk" if call.chat else kind}

    def write(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the body of the answer, the completions in the order of the requests.

        Raises:
            BodyError: If one of them failed.
        """
        check_all(completions)
        answers = [(text, each, place) for each in completions for place, text in enumerate(_texts(each))]
        choices = [self._choice(index, *answer) for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": usage(completions)}

    def write_role(self, index: int) -> dict[str, Any]:
        """Return the chunk that begins an answer of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def write_text(self, index: int, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk(index, {"delta": {"content": text}} if self._call.chat else {"text": text})

    def write_reasoning(self, index: int, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of reasoning, under the name that vLLM and DeepSeek give it."""
        return self._chunk(index, {"delta": {"reasoning_content": text}})

    def write_call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        """Return the chunk of a tool call."""
        return self._chunk(index, {"delta": {"tool_calls": [{"index": number, **self._call_of(index, number, call)}]}})

    def write_end(self, index: int, completion: Completion, place: int, has_calls: bool) -> dict[str, Any]:
        """Return the chunk that ends an answer.

        Args:
            index: Index of the answer.
            completion: Completion that the answer is of.
            place: Place of the answer in its completion.
            has_calls: Whether the answer has tool calls.
        """
        end = self._chunk(index, {"delta": {}} if self._call.chat else {"text": ""})
        end["choices"][0] |= {
            "logprobs": self._logprobs(completion, index, place),
            "finish_reason": _finish_reason(completion, has_calls),
        }
        return end

    def write_usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the chunk of the token counts."""
        return {**self._chunk_head, "choices": [], "usage": usage(completions)}

    def _chunk(self, index: int, content: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._chunk_head, "choices": [{"index": index, **content, "logprobs": None, "finish_reason": None}],
        }  # fmt: skip

    def _choice(self, index: int, text: str, completion: Completion, place: int) -> dict[str, Any]:
        text, calls = self._split(text, index)
        content: dict[str, Any] = {"text": text}
        if self._call.chat:
            message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if place == 0 and completion.reasoning is not None:
                message["reasoning_content"] = completion.reasoning
            content = {"message": {**message, "tool_calls": calls} if calls else message}
        reason = _finish_reason(completion, bool(calls))
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(completion, index, place),
            "finish_reason": reason,
        }

    def _split(self, text: str, index: int) -> tuple[str, list[dict[str, Any]]]:
        """Return the text beside the tool calls, and the calls. A call that cannot be read is text."""
        parser = ToolCallParser(self._call.tools)
        items = [*parser.feed(text), *parser.finish()]
        calls = [item for item in items if isinstance(item, ToolCall)][: self._call.most_calls]
        rest = "".join(text_of(item) for item in items if not isinstance(item, ToolCall))
        return rest, [self._call_of(index, number, call) for number, call in enumerate(calls)]

    def _call_of(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        # Some chat templates take exactly nine letters and digits.
        name = hashlib.sha256(f"{self._name} {index} {number}".encode()).hexdigest()[:9]
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"id": name, "type": "function", "function": function}

    def _logprobs(self, completion: Completion, index: int, place: int) -> dict[str, Any] | None:
        """Log probabilities are kept for the first answer of a completion only."""
        if completion.logprobs is None or place:
            return None
        tokens = completion.tokens or [""] * len(completion.logprobs)
        pieces = [token_bytes(token) for token in tokens]
        if self._call.chat:
            content = [
                {"token": token, "logprob": value, "bytes": [*piece], "top_logprobs": []}
                for token, value, piece in zip(tokens, completion.logprobs, pieces, strict=True)
            ]
            return {"content": content, "refusal": None}
        request = self._call.requests[index // self._call.n]
        echoed = (request.prompt or "").encode() if request.options is not None and request.options.echo else b""
        offsets = [len(text.decode(errors="ignore")) for text in accumulate(pieces[:-1], initial=echoed)]
        # In this older form, a part of a character says that it is one.
        names = [
            token if token.encode() == piece else f"bytes:{token}" for token, piece in zip(tokens, pieces, strict=True)
        ]
        offsets = offsets[: len(names)]
        return {"tokens": names, "token_logprobs": completion.logprobs, "top_logprobs": None, "text_offset": offsets}


class AnswerStream:
    """The chunks of the answers to one call, in the order of a stream.

    Only the first answer to a prompt comes piece by piece. With tools, text that may become a call waits.

    Attributes:
        completions: Completions that have come, by the number of their request.
    """

    def __init__(self, call: OpenAICall, writer: AnswerWriter) -> None:
        self._call, self._writer = call, writer
        self._parsers: dict[int, ToolCallParser] = {}
        self._calls: Counter[int] = Counter()
        self.completions: dict[int, Completion] = {}

    def write(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks of what comes of a request: text or reasoning of its first answer, or its end.

        Raises:
            BodyError: If the request failed.
        """
        index = number * self._call.n
        if isinstance(piece, Completion):
            return self._end(number, piece)
        if isinstance(piece, str):
            return [*self._begin(index), *self._write(index, self._parsers[index].feed(piece))]
        return [*self._begin(index), self._writer.write_reasoning(index, piece.text)] if self._call.chat else []

    def _end(self, number: int, completion: Completion) -> list[dict[str, Any]]:
        check_all([completion])
        self.completions[number] = completion
        chunks: list[dict[str, Any]] = []
        for place, text in enumerate(_texts(completion)):
            index = number * self._call.n + place
            chunks += self._begin(index)
            parser = self._parsers[index]
            chunks += self._write(index, [*(parser.feed(text) if place else ()), *parser.finish()])
            chunks.append(self._writer.write_end(index, completion, place, self._calls[index] > 0))
        return chunks

    def _write(self, index: int, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        for item in items:
            if isinstance(item, ToolCall) and self._calls[index] == self._call.most_calls:
                continue
            if isinstance(item, ToolCall):
                yield self._writer.write_call(index, self._calls[index], item)
                self._calls[index] += 1
            else:
                yield self._writer.write_text(index, text_of(item))

    def _begin(self, index: int) -> list[dict[str, Any]]:
        if index in self._parsers:
            return []
        self._parsers[index] = ToolCallParser(self._call.tools)
        return [self._writer.write_role(index)] if self._call.chat else []


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """Return the token counts of an answer."""
    prompt = sum(each.prompt_tokens for each in completions)
    generated = sum(each.generated_tokens for each in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def check_all(completions: Iterable[Completion]) -> None:
    """Refuse an answer of which a completion failed.

    Raises:
        BodyError: For the first one.
    """
    for completion in completions:
        if completion.finish_reason == "skipped":
            text = f"The prompt has {completion.prompt_tokens} tokens, more than the model takes. Shorten it."
            raise BodyError("too_long", text)
        if completion.error is not None:
            status = error_status(completion.error_code)
            retry_after = 1 if status in (429, 503) else None
            code = completion.error_code or "engine_error"
            raise BodyError(code, completion.error, status=status, retry_after=retry_after)


def error_status(code: ErrorCode | str | None) -> int:
    """Return the HTTP status for a kind of error."""
    return ERROR_STATUS.get(code or "engine_error", 400)


def error_body(code: str | None, message: str, param: str | None = None, status: int | None = None) -> dict[str, Any]:
    """Return the body of an error.

    Args:
        code: Kind of the error, as completions and rows name it.
        message: What is wrong and what to do.
        param: Field of the body that is at fault.
        status: HTTP status where the kind does not tell it.
    """
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    status = status or error_status(code)
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": ERROR_NAMES.get(code or "", code)}}


def _texts(completion: Completion) -> tuple[str, ...]:
    return (completion.text, *completion.alternatives)


def text_of(item: str | InvalidCall) -> str:
    """Return the text of a part of an answer that is no tool call."""
    return item.text if isinstance(item, InvalidCall) else item


def _finish_reason(completion: Completion, has_calls: bool) -> str:
    if completion.finish_reason in ("length", "deadline"):
        return "length"
    return "tool_calls" if has_calls else "stop"
