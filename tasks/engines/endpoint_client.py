"""One attempt at a time over HTTP: what is sent to an endpoint, and what its answers say.

The token and the further headers of the block go to the origin of the endpoint only; a redirection elsewhere is
followed without them. No more of an answer is read than the block allows. What an endpoint cannot honour is refused.
"""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, ResponseFormat
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.conversations import with_arguments
from prefect_huggingface.tasks.engines.endpoint_retry import (
    EndpointFailure,
    HttpTrace,
    explain,
    explain_status,
    not_an_endpoint,
)
from prefect_huggingface.tasks.engines.inputs import check_messages, check_prompt, is_set, refuse_options
from prefect_huggingface.tasks.engines.multimodal import image_bytes
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.records import FinishReason, Request

MAX_REDIRECTS = 5
REFUSAL_BYTES = 64 * 1024
# A server that does not know the route answers with one of these.
NO_SUCH_ROUTE = (400, 404, 405, 422)
# Errors inside a stream have no status of their own; TGI names them.
STREAM_STATUSES = {"validation": 422, "generation": 424, "overloaded": 429, "incomplete_generation": 500}
TRACE = "prefect_huggingface_trace"
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
    "forced_bos_token_id", "trusted_text",
)  # fmt: skip
NO_SUCH_OPTION = ("does not exist at this endpoint", "Leave it out.")
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


class EndpointClient:
    """What can be asked of an endpoint. Used by the coroutines of one event loop.

    Every method raises `RequestError` (`EndpointFailure` among them), and nothing of the libraries underneath.
    """

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        self._endpoint = endpoint
        self._origin = _origin_of(httpx.URL(endpoint.base_url))
        self._root = endpoint.base_url.removesuffix("/v1")
        self._max_bytes = int(endpoint.max_answer_mb * 1e6)
        self._http: httpx.AsyncClient | None = None
        self._server: Server | None = None
        self._lock = asyncio.Lock()

    async def find_server(self) -> Server:
        """Return which protocol the server speaks, and how long its context is. It is asked once."""
        if self._server is None:
            async with self._lock:
                self._server = self._server or await self._ask_what_it_is()
        return self._server

    async def ask(self, state: RequestState, streamed: bool) -> None:
        """Send a request whose state has begun, and give its sequences the answer."""
        server, state.counted_tokens = await self.find_server(), None
        chat = is_chat(state.request, self._endpoint, server)
        body = (chat_body if chat else text_body)(state.request, state.options, self._endpoint, server)
        if streamed:
            body["stream"] = True
        if streamed and chat:
            body["stream_options"] = {"include_usage": True}
        url = f"{self._root}/v1/chat/completions" if chat else self._root
        async with self._traced() as trace:
            async with self._connect().stream("POST", url, json=body, extensions={TRACE: trace}) as response:
                if streamed and trace.content_type != "application/json":  # of a server that does not stream
                    events = _events_of(response, trace, self._endpoint)
                    await (_read_chat_stream(events, state) if chat else _read_text_stream(events, state))
                else:
                    answer = json.loads(await response.aread())
                    _read_chat(answer, state) if chat else _read_text(answer, state, trace)
            if not state.is_done:
                raise self._explain_early_end(trace)
        if state.options.logprobs and not state.sequences[0].logprobs and state.generated_tokens:
            raise refusal("logprobs", True, "returns none", "Leave it out")

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has, by the route that TGI has for it."""
        server = await self.find_server()
        if server.dialect != "tgi":
            raise EndpointFailure("not_found", f"{self._endpoint.base_url!r} does not count tokens. Use a local model.")
        body = {"inputs": text, "parameters": {"max_new_tokens": 1}, "add_special_tokens": False}
        async with self._traced() as trace:
            response = await self._connect().post(f"{self._root}/tokenize", json=body, extensions={TRACE: trace})
            return sum(token["stop"] > token["start"] for token in response.json())

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def _ask_what_it_is(self) -> Server:
        protocol, base_url = self._endpoint.protocol, self._endpoint.base_url
        if protocol == "tgi" or (protocol == "auto" and not base_url.endswith("/v1")):
            info = await self._look("/info")
            # Only TGI names its limits here.
            if protocol == "tgi" or "max_total_tokens" in info or "max_input_tokens" in info:
                return Server("tgi", info.get("max_total_tokens"))
        if self._endpoint.model_name is not None:
            return Server("openai")
        listed = (await self._look("/v1/models")).get("data")
        names = [model["id"] for model in listed or () if isinstance(model, Mapping) and "id" in model]
        return Server("openai", model=names[0] if len(names) == 1 else None)

    async def _look(self, route: str) -> Mapping[str, Any]:
        """Return the JSON of a route, or nothing where there is no such route."""
        try:
            async with self._traced() as trace:
                found = (await self._connect().get(f"{self._root}{route}", extensions={TRACE: trace})).json()
        except EndpointFailure as failure:
            if failure.code != "bad_answer" and trace.status not in NO_SUCH_ROUTE:
                raise
            return {}
        return found if isinstance(found, Mapping) else {}

    def _connect(self) -> httpx.AsyncClient:
        if self._http is None:
            seconds, connect_seconds = self._endpoint.timeout_seconds, self._endpoint.connect_timeout_seconds
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(seconds, connect=connect_seconds, pool=None),
                follow_redirects=True,
                max_redirects=MAX_REDIRECTS,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._endpoint.max_concurrency),
                event_hooks={"request": [self._guard], "response": [self._inspect]},
            )
        return self._http

    async def _guard(self, request: httpx.Request) -> None:
        """Put secrets into a request to the endpoint, and take them out of one to any other host."""
        headers, extra = request.headers, self._endpoint.get_headers()
        for name in ("authorization", "proxy-authorization", *extra):
            headers.pop(name, None)
        # A small compressed answer may be a huge one, and the limit is for what comes over the wire.
        headers["accept-encoding"] = "identity"
        if _origin_of(request.url) != self._origin:
            headers.pop("cookie", None)
            request.extensions[TRACE].redirected_to = f"{request.url.scheme}://{request.url.netloc.decode()}"
            return
        headers.update(extra)
        token = self._endpoint.get_token()
        if token is not None:
            headers["authorization"] = f"Bearer {token}"

    async def _inspect(self, response: httpx.Response) -> None:
        """Note what came; a refusal, and what is too large or of another kind, is an `EndpointFailure`."""
        trace: HttpTrace = response.request.extensions[TRACE]
        trace.status, trace.headers = response.status_code, response.headers
        refused = response.status_code >= 400
        assert isinstance(response.stream, httpx.AsyncByteStream)
        limit = REFUSAL_BYTES if refused else self._max_bytes
        response.stream = _Bounded(response.stream, limit, None if refused else self._too_large())
        if refused:
            body = (await response.aread()).decode(errors="replace")
            raise explain_status(response.status_code, body, trace, self._endpoint)
        if response.is_success:
            if trace.content_type == "text/html":
                raise not_an_endpoint(self._endpoint, trace, "a web page")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise not_an_endpoint(self._endpoint, trace, "a compressed answer that was not asked for")
            if int(response.headers.get("content-length", "0")) > self._max_bytes:
                raise self._too_large()

    @asynccontextmanager
    async def _traced(self) -> AsyncIterator[HttpTrace]:
        trace = HttpTrace()
        try:
            yield trace
        except RequestError:
            raise
        except Exception as exc:
            raise explain(exc, trace, self._endpoint) from None

    def _too_large(self) -> EndpointFailure:
        return EndpointFailure(
            "bad_answer",
            f"The answer of {self._endpoint.base_url!r} is larger than {self._endpoint.max_answer_mb:g} MB. "
            "Raise `max_answer_mb`, or lower `max_new_tokens`.",
        )

    def _explain_early_end(self, trace: HttpTrace) -> EndpointFailure:
        if trace.content_type != "text/event-stream":
            return not_an_endpoint(self._endpoint, trace, f"no stream but {trace.content_type or 'nothing'!r}")
        text = f"{self._endpoint.base_url!r} ended a stream in the middle of an answer. Try again."
        return EndpointFailure("unavailable", text, "transient")


class _Bounded(httpx.AsyncByteStream):
    """Body of a response, up to a number of bytes. More than that is cut off or, where an error is given, refused."""

    def __init__(self, stream: httpx.AsyncByteStream, limit: int, error: EndpointFailure | None) -> None:
        self._stream, self._left, self._error = stream, limit, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0 and self._error is not None:
                raise self._error
            yield chunk
            if self._left < 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


def _origin_of(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port  # None for that of the scheme


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
    refuse_options(options, (*NOWHERE, *NOT_ON_TGI, "presence_penalty"), *NO_SUCH_OPTION)
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
    refuse_options(options, NOWHERE if server.dialect == "openai" else (*NOWHERE, "n"), *NO_SUCH_OPTION)
    if options.context_overflow not in ("error", "skip"):
        raise refusal("context_overflow", options.context_overflow, "cannot truncate a chat", "Use 'error' or 'skip'")
    if request.template is not None:
        raise refusal("tokenizer", "a template", "applies the chat template of its model itself", "Leave it out")
    if options.echo and request.messages is not None:
        raise refusal("echo", True, "returns no conversation", "Leave it out")
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
    # The protocol has the arguments of calls as text, and templates do not.
    return with_arguments(messages, as_text=True)


def _has_parts(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message and isinstance(message.get("content"), list)


def _image_url(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image_bytes(image)).decode()}"


def refusal(name: str, value: Any, reason: str, action: str) -> RequestError:
    """Return the error for an option that an endpoint cannot honour."""
    return RequestError("invalid_option", f"`{name}` cannot be {value!r} here: this endpoint {reason}. {action}.")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


async def _events_of(
    response: httpx.Response, trace: HttpTrace, endpoint: InferenceEndpoint
) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of server-sent events, up to the one that says that there are no more."""
    rest = b""
    async for chunk in response.aiter_bytes():
        # Not `aiter_lines`: it also takes line separators apart that may stand within a JSON text.
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                return
            event = json.loads(content)
            if event.get("error"):
                error = event["error"] if isinstance(event["error"], dict) else {}
                nested, status = error.get("code"), 400 if error.get("type") == "invalid_request_error" else 500
                status = nested if isinstance(nested, int) and nested >= 400 else status
                status = STREAM_STATUSES.get(event.get("error_type"), status)
                raise explain_status(status, content.decode(), trace, endpoint)
            yield event


def _reason_of(given: Any) -> FinishReason:
    return "length" if given == "length" else "stop"


def _add_text(sequence: Sequence, text: str | None) -> bool:
    """Go on with a piece of text, which counts as a token until the server says how many there are."""
    if text:
        sequence.state.counted_tokens = (sequence.state.counted_tokens or 0) + 1
        sequence.append_text(text)
    return sequence.finish_reason is None


def _count(state: RequestState, prompt_tokens: Any, generated_tokens: Any) -> None:
    state.prompt_tokens = int(prompt_tokens or state.prompt_tokens)
    state.counted_tokens = state.counted_tokens if generated_tokens is None else int(generated_tokens)


def _read_text(answer: Any, state: RequestState, trace: HttpTrace) -> None:
    """Read an answer of TGI's text route."""
    output = answer[0] if isinstance(answer, list) else answer
    sequence, details = state.sequences[0], output["details"]
    _add_tokens(sequence, details.get("tokens"), "text")
    _add_text(sequence, output["generated_text"])
    given = trace.headers.get("x-prompt-tokens", "")
    _count(state, given if given.isdigit() else None, details["generated_tokens"])
    sequence.finish(_reason_of(details["finish_reason"]))


async def _read_text_stream(events: AsyncIterator[dict[str, Any]], state: RequestState) -> None:
    """Read a streamed answer of TGI's text route, up to a stop string."""
    sequence, known = state.sequences[0], ""
    async for event in events:
        token, whole, details = event["token"], event.get("generated_text"), event.get("details")
        _add_tokens(sequence, [token], "text")
        text = "" if token.get("special") else token["text"]
        goes_on = _add_text(sequence, text)
        known += text
        if whole is not None and goes_on and whole.startswith(known):
            # The end of an incomplete character stands in the whole text only, and is no token of its own.
            goes_on = sequence.append_text(whole[len(known) :])
        if details is not None:
            _count(state, details.get("input_length"), details.get("generated_tokens"))
            sequence.finish(_reason_of(details.get("finish_reason")))
        if not goes_on or sequence.finish_reason is not None:
            return


def _read_chat(answer: Any, state: RequestState) -> None:
    """Read an answer of the chat route."""
    choices = answer["choices"]
    if len(choices) < state.options.n:
        raise refusal("n", state.options.n, f"returns {len(choices)} answer(s)", "Set it to 1")
    for sequence, choice in zip(state.sequences, choices, strict=False):
        message = choice["message"]
        _add_tokens(sequence, (choice.get("logprobs") or {}).get("content"))
        sequence.append_reasoning(_reasoning_of(message))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        written = [_tool_call_text(call["name"], call["arguments"]) for call in calls]
        _add_text(sequence, "\n".join([*([message["content"]] if message.get("content") else []), *written]))
        sequence.finish(_reason_of(choice.get("finish_reason")))
    usage = answer.get("usage") or {}
    _count(state, usage.get("prompt_tokens"), usage.get("completion_tokens"))


async def _read_chat_stream(events: AsyncIterator[dict[str, Any]], state: RequestState) -> None:
    """Read a streamed answer of the chat route, up to a stop string."""
    sequence, calls, reason, has_text = state.sequences[0], dict[int, dict[str, str]](), None, False
    async for event in events:
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            _add_tool_calls(calls, delta.get("tool_calls"))
            _add_tokens(sequence, (choice.get("logprobs") or {}).get("content"))
            sequence.append_reasoning(_reasoning_of(delta))
            reason = choice.get("finish_reason") or reason
            _add_text(sequence, delta.get("content"))
            has_text = has_text or bool(delta.get("content"))
        usage = event.get("usage") or {}
        _count(state, usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if sequence.finish_reason is not None:
            return
    if reason is not None:
        written = [_tool_call_text(call["name"], call["arguments"]) for call in calls.values()]
        _add_text(sequence, "\n".join(["", *written] if has_text and written else written))
        sequence.finish(_reason_of(reason))


def _add_tokens(sequence: Sequence, tokens: Any, name: str = "token") -> None:
    """Take in the log probabilities and the texts of tokens; the first token of TGI has none."""
    for token in tokens or ():
        if token.get("logprob") is not None:
            sequence.logprobs.append(token["logprob"])
            sequence.given_texts.append(token.get(name) or "")


def _reasoning_of(message: Mapping[str, Any]) -> str:
    """Return the reasoning that the server keeps apart, under either of the names in use."""
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _tool_call_text(name: str, arguments: Any) -> str:
    """Return the call of a tool as most models write it."""
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        pass
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _add_tool_calls(calls: dict[int, dict[str, str]], deltas: Any) -> None:
    """Put together calls of tools, whose names and arguments come in pieces."""
    for delta in deltas or ():
        call = calls.setdefault(delta.get("index") or 0, {"name": "", "arguments": ""})
        function = delta.get("function") or {}
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""
