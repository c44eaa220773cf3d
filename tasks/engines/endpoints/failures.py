"""What can go wrong with an endpoint, in words that name the remedy and never hold a secret.

Every failure says what it means for the next attempt: nothing can be done (`final`), the same request may work later
(`retry`), or the endpoint itself is not there (`down`, `asleep`), which concerns all requests alike.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.records import ErrorCode
from prefect_huggingface.tasks.storage.hub.explanations import announced_wait
from prefect_huggingface.tasks.storage.hub.redaction import redact

Outlook = Literal["final", "retry", "down", "asleep"]
MAX_WORDS = 300
TOO_LONG = re.compile(
    r"max_(?:new_)?tokens|max_total_tokens|max_input|context[ _](?:length|window)|too long|too many (?:input )?tokens"
    r"|tokens? .*must (?:be|have)|longer than",
    re.IGNORECASE,
)
TRANSIENT_STATUSES = (408, 424, 425, 429, 500)
# Errors inside a stream have no status of their own; the client knows them by these classes.
STREAM_STATUSES = {
    "ValidationError": 422, "GenerationError": 424, "OverloadedError": 429, "IncompleteGenerationError": 500,
    "TextGenerationError": 500,
}  # fmt: skip


class EndpointFailure(Exception):
    """One attempt that failed.

    Attributes:
        code: Kind of the error.
        outlook: What it means for the next attempt.
        wait_seconds: How long the server asks to wait, or None.
    """

    def __init__(
        self, code: ErrorCode, message: str, outlook: Outlook = "final", wait_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.outlook = outlook
        self.wait_seconds = wait_seconds

    @property
    def is_outage(self) -> bool:
        """Whether the endpoint itself is not there, so that other requests would fail as well."""
        return self.outlook in ("down", "asleep")


@dataclass(slots=True)
class Exchange:
    """One attempt as it was seen on the wire.

    Attributes:
        payload: Fields of the request's JSON that are sent as they are.
        status: Status of the last response, or None where there was none.
        headers: Headers of the last response.
        body: Beginning of the body of a refusal.
        redirected_to: Origin that the request was redirected to, where that is another one.
    """

    payload: Mapping[str, Any] = field(default_factory=dict)
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    redirected_to: str | None = None

    @property
    def content_type(self) -> str:
        """Content type of the response, without its parameters."""
        return self.headers.get("content-type", "").split(";")[0].strip().lower()


def explain(exc: Exception, exchange: Exchange, endpoint: InferenceEndpoint) -> EndpointFailure:
    """Return the failure that an exception of the client means. It keeps no reference to the exception."""
    if isinstance(exc, EndpointFailure):
        return exc
    # By name: the classes come from `httpx` or, with newer clients, from `httpx2`.
    names = [kind.__name__ for kind in type(exc).__mro__]
    for name in names:
        if name in STREAM_STATUSES:
            return explain_status(STREAM_STATUSES[name], str(exc), exchange, endpoint)
    if "TransportError" in names or "TooManyRedirects" in names:
        return _explain_transport(exc, names, exchange, endpoint)
    return not_an_endpoint(endpoint, exchange, f"an answer that cannot be read ({type(exc).__name__})")


def explain_status(status: int, words: str, exchange: Exchange, endpoint: InferenceEndpoint) -> EndpointFailure:
    """Return the failure that a status and the words of the server mean."""
    said = f" ({clean(words, endpoint)})" if words else ""
    place = repr(endpoint.base_url)
    wait = announced_wait(exchange.headers)
    if status in (401, 403):
        return EndpointFailure("unauthorized", _explain_refusal(status, said, exchange, endpoint))
    if status == 404:
        model = f" or no model {endpoint.model_name!r}" if endpoint.model_name else ""
        text = f"{place} has no such route{model}{said}. Check `url`, `model_id` and `protocol` of the endpoint."
        return EndpointFailure("not_found", text)
    if status in (429, 408, 425):
        text = f"{place} limits the rate of requests{said}. Lower `max_concurrency`, or try again later."
        return EndpointFailure("rate_limited", text, "retry", wait)
    if status in TRANSIENT_STATUSES:
        text = f"{place} failed with status {status}{said}. Try again; look at the server's log if it goes on."
        return EndpointFailure("engine_error", text, "retry", wait)
    if status >= 500 and status != 501:
        text = f"{place} is not ready, status {status}{said}. Start it, or raise `wake_timeout_seconds`."
        return EndpointFailure("unavailable", text, "asleep" if status == 503 else "down", wait)
    return _explain_bad_request(status, words, said, place)


def _explain_bad_request(status: int, words: str, said: str, place: str) -> EndpointFailure:
    if status == 413 or TOO_LONG.search(words):
        text = f"The prompt with its new tokens is too long for {place}{said}. Shorten it, or lower `max_new_tokens`."
        return EndpointFailure("too_long", text)
    if status in (400, 422):
        return EndpointFailure("invalid_option", f"{place} refuses the request{said}. Correct its options.")
    text = f"{place} does not answer as an inference server does, status {status}{said}. Check `url` and `protocol`."
    return EndpointFailure("bad_answer", text)


def _explain_refusal(status: int, said: str, exchange: Exchange, endpoint: InferenceEndpoint) -> str:
    place = repr(endpoint.base_url)
    if exchange.redirected_to is not None:
        return (
            f"{place} redirects to {exchange.redirected_to!r}, which is another host and gets no token{said}. "
            "Put the final address into `url`."
        )
    if endpoint.get_token() is None:
        return f"{place} asks for a token and none is configured{said}. Put one into the endpoint's `credentials`."
    what = "does not accept the token" if status == 401 else "gives this token no access"
    return f"{place} {what}{said}. Put a token with access into the endpoint's `credentials`."


def _explain_transport(
    exc: Exception, names: list[str], exchange: Exchange, endpoint: InferenceEndpoint
) -> EndpointFailure:
    place = repr(endpoint.base_url)
    chain = list(_chain(exc))
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in chain):
        return EndpointFailure("unavailable", f"The host of {place} does not exist. Correct `url`.")
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        text = f"The certificate of {place} cannot be verified. Correct `url`, or trust its authority (SSL_CERT_FILE)."
        return EndpointFailure("unavailable", text)
    if any(getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER" for cause in chain):
        return EndpointFailure("unavailable", f"{place} does not speak https. Correct the scheme of `url`.")
    if "TooManyRedirects" in names:
        return EndpointFailure("bad_answer", f"{place} redirects in circles. Check `url`.")
    if exchange.status is None and "RemoteProtocolError" in names and "disconnected" not in str(exc):
        return not_an_endpoint(endpoint, exchange, "an answer that is no HTTP")
    if "TimeoutException" in names and "ConnectTimeout" not in names:
        text = f"{place} was silent for {endpoint.timeout_seconds:g} s. Raise `timeout_seconds`, or look at the server."
        return EndpointFailure("unavailable", text, "down" if exchange.status is None else "retry")
    if exchange.status is not None:
        text = f"{place} ended the connection in the middle of an answer. Try again."
        return EndpointFailure("unavailable", text, "retry")
    text = f"{place} cannot be reached ({type(exc).__name__}). Start the server, or correct `url`."
    return EndpointFailure("unavailable", text, "down")


def not_an_endpoint(endpoint: InferenceEndpoint, exchange: Exchange, what: str) -> EndpointFailure:
    """Return the failure for an answer that an inference server does not give."""
    via = f", after a redirection to {exchange.redirected_to!r}" if exchange.redirected_to else ""
    text = f"{endpoint.base_url!r} gives {what}{via}, not that of an inference server. Check `url` and `protocol`."
    return EndpointFailure("bad_answer", text)


def too_large(endpoint: InferenceEndpoint) -> EndpointFailure:
    """Return the failure for an answer that is larger than the endpoint allows."""
    text = (
        f"The answer of {endpoint.base_url!r} is larger than {endpoint.max_answer_mb:g} MB. "
        "Raise `max_answer_mb`, or lower `max_new_tokens`."
    )
    return EndpointFailure("bad_answer", text)


def words_of(body: str) -> str:
    """Return what a server says in the body of a refusal, as JSON or as a short plain text."""
    try:
        value = json.loads(body)
    except ValueError:
        return "" if body.lstrip().startswith("<") else body.strip()
    while isinstance(value, dict):
        value = next((value[name] for name in ("error", "message", "detail") if value.get(name)), "")
    return value if isinstance(value, str) else json.dumps(value)


def clean(words: str, endpoint: InferenceEndpoint) -> str:
    """Return words of a server on one line, short, and without anything secret that it may have repeated."""
    for secret in (endpoint.get_token(), *endpoint.get_headers().values()):
        if secret:
            words = words.replace(secret, "...")
    words = " ".join(redact(words).split())
    return words if len(words) <= MAX_WORDS else words[:MAX_WORDS] + "..."


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__
