"""The HTTP client of one endpoint. It decides alone which request carries a secret, and how much of an answer is read.

Whatever the library above puts into a request, the token and the further headers of the block go to the origin of the
endpoint only. A redirection elsewhere is followed without them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import httpx

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoints.failures import (
    Exchange,
    explain_status,
    not_an_endpoint,
    too_large,
    words_of,
)
from prefect_huggingface.tasks.errors import EngineError

if TYPE_CHECKING:
    from huggingface_hub import AsyncInferenceClient

CURRENT_EXCHANGE: ContextVar[Exchange] = ContextVar("CURRENT_EXCHANGE")
LARGEST_REDIRECTION_COUNT = 5
REFUSAL_BYTES = 64 * 1024
# The client looks for a token of the machine where it is given none. This one is replaced before anything is sent.
PLACEHOLDER_KEY = "unused"


class EndpointHttp(httpx.AsyncClient):
    """An `httpx` client that is bound to one endpoint."""

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        self._endpoint = endpoint
        self._origin = origin_of(httpx.URL(endpoint.base_url))
        super().__init__(
            timeout=httpx.Timeout(endpoint.timeout_seconds, connect=endpoint.connect_timeout_seconds, pool=None),
            follow_redirects=True,
            max_redirects=LARGEST_REDIRECTION_COUNT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.max_concurrency),
            event_hooks={"request": [self._guard], "response": [self._inspect]},
        )

    def build_request(self, *args: Any, **kwargs: Any) -> httpx.Request:
        """Build a request with the fields of the current exchange, and with the time limits of the endpoint."""
        payload = CURRENT_EXCHANGE.get().payload
        if payload and isinstance(kwargs.get("json"), dict):
            kwargs["json"] = _merged(kwargs["json"], payload)
        kwargs["timeout"] = self.timeout
        return super().build_request(*args, **kwargs)

    async def _guard(self, request: httpx.Request) -> None:
        """Put secrets into a request to the endpoint, and take them out of one to any other host."""
        headers, extra = request.headers, self._endpoint.get_headers()
        for name in ("authorization", "proxy-authorization", *extra):
            headers.pop(name, None)
        # A small compressed answer may be a huge one, and the limit is for what comes over the wire.
        headers["accept-encoding"] = "identity"
        if origin_of(request.url) != self._origin:
            headers.pop("cookie", None)
            CURRENT_EXCHANGE.get().redirected_to = f"{request.url.scheme}://{request.url.netloc.decode()}"
            return
        headers.update(extra)
        token = self._endpoint.get_token()
        if token is not None:
            headers["authorization"] = f"Bearer {token}"

    async def _inspect(self, response: httpx.Response) -> None:
        """Note what came, read the beginning of a refusal, and stop an answer that is none or too large."""
        exchange = CURRENT_EXCHANGE.get()
        exchange.status, exchange.headers = response.status_code, response.headers
        limit = int(self._endpoint.max_answer_mb * 1e6)
        refused = response.status_code >= 400
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Bounded(response.stream, REFUSAL_BYTES if refused else limit, self._endpoint, refused)
        if refused:
            exchange.body = (await response.aread()).decode(errors="replace")
            if response.request.method == "POST":
                # The client above would leave out what some servers refuse, and ask again.
                raise explain_status(response.status_code, words_of(exchange.body), exchange, self._endpoint)
        elif response.is_success:
            if exchange.content_type == "text/html":
                raise not_an_endpoint(self._endpoint, exchange, "a web page")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise not_an_endpoint(self._endpoint, exchange, "a compressed answer that was not asked for")
            if int(response.headers.get("content-length", "0")) > limit:
                raise too_large(self._endpoint)


class _Bounded(httpx.AsyncByteStream):
    """Body of a response, up to a number of bytes. More than that is cut off or, for an answer, refused."""

    def __init__(self, stream: httpx.AsyncByteStream, limit: int, endpoint: InferenceEndpoint, cut_off: bool) -> None:
        self._stream, self._left, self._endpoint, self._cut_off = stream, limit, endpoint, cut_off

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0 and not self._cut_off:
                raise too_large(self._endpoint)
            yield chunk
            if self._left < 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


def _merged(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with others put over them; dictionaries are merged."""
    merged = {**fields, **others}
    for name, value in others.items():
        if isinstance(value, Mapping) and isinstance(fields.get(name), Mapping):
            merged[name] = {**fields[name], **value}
    return merged


def origin_of(url: httpx.URL) -> tuple[str, str, int]:
    """Return scheme, host and port of an address."""
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def warm_up() -> None:
    """Load the client of Hugging Face. It also asks the Hub, without a token, for what it puts into a header."""
    from huggingface_hub import AsyncInferenceClient
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    build_hf_headers(token=False)
    AsyncInferenceClient(base_url="http://localhost", api_key=PLACEHOLDER_KEY)


def open_client(http: EndpointHttp, endpoint: InferenceEndpoint) -> AsyncInferenceClient:
    """Return a client of Hugging Face for one request; closing it ends the request and leaves the connections open.

    Raises:
        EngineError: If this version of `huggingface_hub` cannot be bound to a connection of its own.
    """
    from huggingface_hub import AsyncInferenceClient

    client = AsyncInferenceClient(base_url=endpoint.base_url, api_key=PLACEHOLDER_KEY)
    # The public way to set the connection, a factory, is for the whole process and not for one client.
    if not hasattr(client, "_async_client"):
        raise EngineError("This version of huggingface_hub cannot be used for endpoints. Install one below 2.")
    client._async_client = http
    return client
