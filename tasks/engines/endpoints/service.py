"""One attempt at a time: asks an endpoint through the client of Hugging Face, and explains what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoints.answers import (
    EndpointAnswer,
    read_chat,
    read_chat_stream,
    read_text,
    read_text_stream,
)
from prefect_huggingface.tasks.engines.endpoints.calls import Call, Server
from prefect_huggingface.tasks.engines.endpoints.failures import (
    EndpointFailure,
    Exchange,
    explain,
    explain_status,
    not_an_endpoint,
    words_of,
)
from prefect_huggingface.tasks.engines.endpoints.http import CURRENT_EXCHANGE, EndpointHttp, open_client, warm_up
from prefect_huggingface.tasks.engines.failures import RequestError

# A server that does not know the route answers with one of these.
NO_SUCH_ROUTE = (400, 404, 405, 422)


class EndpointService:
    """What can be asked of an endpoint. Used by the coroutines of one event loop.

    Every method raises `EndpointFailure` and nothing of the libraries underneath.
    """

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        self._endpoint = endpoint
        self._http: EndpointHttp | None = None
        self._server: Server | None = None
        self._lock = asyncio.Lock()

    async def look_up(self) -> Server:
        """Return which protocol the server speaks, and how long its context is. It is asked once."""
        if self._server is None:
            async with self._lock:
                # This takes a second or more, and other requests must go on.
                await asyncio.to_thread(warm_up)
                self._server = self._server or await self._find_out()
        return self._server

    async def ask(self, call: Call, answer: EndpointAnswer, options: GenerationOptions, streamed: bool) -> None:
        """Send a request and read its answer.

        Raises:
            EndpointFailure: If the attempt fails.
            RequestError: If the answer is not what the options ask for.
        """
        async with self._exchange(call.payload) as exchange:
            async with open_client(self._connect(), self._endpoint) as client:
                if call.is_chat:
                    await _ask_chat(client, call.arguments, answer, options, streamed)
                else:
                    await _ask_text(client, call.arguments, answer, exchange, streamed)
            if streamed and not answer.is_complete:
                raise self._explain_early_end(exchange)

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has, by the route that TGI has for it."""
        server = await self.look_up()
        if server.dialect != "tgi":
            raise EndpointFailure("not_found", f"{self._endpoint.base_url!r} does not count tokens. Use a local model.")
        payload = {"inputs": text, "parameters": {"max_new_tokens": 1}, "add_special_tokens": False}
        async with self._exchange():
            response = await self._connect().post(f"{self._root}/tokenize", json=payload)
            return sum(token["stop"] > token["start"] for token in response.json())

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    @property
    def _root(self) -> str:
        return self._endpoint.base_url.removesuffix("/v1")

    def _connect(self) -> EndpointHttp:
        if self._http is None:
            self._http = EndpointHttp(self._endpoint)
        return self._http

    async def _find_out(self) -> Server:
        protocol, base_url = self._endpoint.protocol, self._endpoint.base_url
        if protocol == "openai" or (protocol == "auto" and base_url.endswith("/v1")):
            return Server("openai")
        info = await self._ask_for_info()
        # Only TGI names its limits here.
        if protocol == "tgi" or "max_total_tokens" in info or "max_input_tokens" in info:
            return Server("tgi", info.get("max_total_tokens"))
        return Server("openai")

    async def _ask_for_info(self) -> Mapping[str, Any]:
        """Return what TGI's route for it says, or nothing where there is no such route."""
        try:
            async with self._exchange() as exchange:
                response = await self._connect().get(f"{self._root}/info")
                if response.status_code >= 400 and response.status_code not in NO_SUCH_ROUTE:
                    raise explain_status(response.status_code, words_of(exchange.body), exchange, self._endpoint)
                info = response.json() if response.is_success else {}
        except EndpointFailure as failure:
            if failure.code != "bad_answer":
                raise
            return {}
        return info if isinstance(info, Mapping) else {}

    @asynccontextmanager
    async def _exchange(self, payload: Mapping[str, Any] | None = None) -> AsyncIterator[Exchange]:
        exchange = Exchange(payload or {})
        token = CURRENT_EXCHANGE.set(exchange)
        try:
            yield exchange
        except RequestError:
            raise
        except Exception as exc:
            raise explain(exc, exchange, self._endpoint) from None
        finally:
            CURRENT_EXCHANGE.reset(token)

    def _explain_early_end(self, exchange: Exchange) -> EndpointFailure:
        if exchange.content_type != "text/event-stream":
            return not_an_endpoint(self._endpoint, exchange, f"no stream but {exchange.content_type or 'nothing'!r}")
        return EndpointFailure(
            "unavailable", f"{self._endpoint.base_url!r} ended a stream in the middle of an answer. Try again.", "retry"
        )


async def _ask_text(
    client: Any, arguments: Mapping[str, Any], answer: EndpointAnswer, exchange: Exchange, streamed: bool
) -> None:
    output = await client.text_generation(**arguments, stream=streamed)
    if streamed:
        await read_text_stream(output, answer)
    else:
        read_text(output, answer, exchange.headers.get("x-prompt-tokens"))


async def _ask_chat(
    client: Any, arguments: Mapping[str, Any], answer: EndpointAnswer, options: GenerationOptions, streamed: bool
) -> None:
    if streamed:
        output = await client.chat_completion(**arguments, stream=True, stream_options={"include_usage": True})
        await read_chat_stream(output, answer)
    else:
        read_chat(await client.chat_completion(**arguments), answer, options)
