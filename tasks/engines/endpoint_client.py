"""One attempt at a time over HTTP: what is sent to an endpoint, and what its answers say.

The token and the further headers of the block go to the origin of the endpoint only; a redirection elsewhere is
followed without them. No more of an answer is read than the block allows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.endpoint_requests import Server, chat_body, is_chat, refusal, text_body
from prefect_huggingface.tasks.engines.endpoint_retry import (
    EndpointFailure,
    HttpTrace,
    explain,
    explain_status,
    not_an_endpoint,
    words_of,
)
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.records import FinishReason

MAX_REDIRECTS = 5
REFUSAL_BYTES = 64 * 1024
# A server that does not know the route answers with one of these.
NO_SUCH_ROUTE = (400, 404, 405, 422)
# Errors inside a stream have no status of their own; TGI names them.
STREAM_STATUSES = {"validation": 422, "generation": 424, "overloaded": 429, "incomplete_generation": 500}
TRACE = "prefect_huggingface_trace"


class EndpointClient:
    """What can be asked of an endpoint. Used by the coroutines of one event loop.

    Every method raises `EndpointFailure` or `RequestError`, and nothing of the libraries underneath.
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
                if not streamed:
                    answer = json.loads(await response.aread())
                    _read_chat(answer, state) if chat else _read_text(answer, state, trace)
                else:
                    events = _events_of(response, trace, self._endpoint)
                    await (_read_chat_stream(events, state) if chat else _read_text_stream(events, state))
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
                response = await self._connect().get(f"{self._root}{route}", extensions={TRACE: trace})
                if response.status_code >= 400 and response.status_code not in NO_SUCH_ROUTE:
                    raise explain_status(response.status_code, words_of(trace.body), trace, self._endpoint)
                found = response.json() if response.is_success else {}
        except EndpointFailure as failure:
            if failure.code != "bad_answer":
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
        """Note what came, read the beginning of a refusal, and stop an answer that is too large or of another kind."""
        trace: HttpTrace = response.request.extensions[TRACE]
        trace.status, trace.headers = response.status_code, response.headers
        refused = response.status_code >= 400
        assert isinstance(response.stream, httpx.AsyncByteStream)
        limit = REFUSAL_BYTES if refused else self._max_bytes
        response.stream = _Bounded(response.stream, limit, None if refused else self._too_large())
        if refused:
            trace.body = (await response.aread()).decode(errors="replace")
            if response.request.method == "POST":
                raise explain_status(response.status_code, words_of(trace.body), trace, self._endpoint)
        elif response.is_success:
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


def _origin_of(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


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
                words, kind = words_of(content.decode()), event.get("error_type")
                nested = event["error"].get("code") if isinstance(event["error"], dict) else None
                status = STREAM_STATUSES.get(kind, nested if isinstance(nested, int) and nested >= 400 else 500)
                raise explain_status(status, words, trace, endpoint)
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
    sequence, calls, reason = state.sequences[0], dict[int, dict[str, str]](), None
    async for event in events:
        usage = event.get("usage") or {}
        _count(state, usage.get("prompt_tokens"), usage.get("completion_tokens"))
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            _add_tool_calls(calls, delta.get("tool_calls"))
            _add_tokens(sequence, (choice.get("logprobs") or {}).get("content"))
            sequence.append_reasoning(_reasoning_of(delta))
            reason = choice.get("finish_reason") or reason
            if not _add_text(sequence, delta.get("content")):
                return
    if reason is not None:
        _add_text(sequence, "\n".join(_tool_call_text(call["name"], call["arguments"]) for call in calls.values()))
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
