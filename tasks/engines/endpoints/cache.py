"""The engines of endpoints of this process: one for each endpoint, whoever asks, so that all keep to one limit."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from concurrent.futures import Future
from dataclasses import replace

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoints.engine import EndpointEngine
from prefect_huggingface.tasks.engines.failures import RequestError, refused
from prefect_huggingface.tasks.engines.prompts import resolve_options
from prefect_huggingface.tasks.engines.protocol import Engine, OnText
from prefect_huggingface.tasks.records import Completion, Request

_lock = threading.Lock()
_engines: dict[str, EndpointEngine] = {}


class SharedEndpoint(Engine):
    """One caller's face of the engine of an endpoint: with the caller's default options."""

    def __init__(self, engine: EndpointEngine, defaults: GenerationOptions) -> None:
        self._engine = engine
        self._defaults = defaults
        self.in_flight = engine.in_flight

    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Send a request with the caller's defaults and return the future of its completion."""
        try:
            options = resolve_options(self._defaults, request)
        except RequestError as exc:
            return refused(request, exc)
        return self._engine.submit(replace(request, options=options), on_text)

    def close(self) -> None:
        """Do nothing: others may use the engine."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens, as the server counts them."""
        return self._engine.count_tokens(text)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where the server does not say."""
        return self._engine.context_length


def load_endpoint(endpoint: InferenceEndpoint) -> Engine:
    """Return the engine of an endpoint. Endpoints that differ only in their generation options share one."""
    key = _key_of(endpoint)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = EndpointEngine(endpoint.model_copy(update={"options": GenerationOptions()}))
    return SharedEndpoint(engine, endpoint.options)


def unload_endpoints() -> int:
    """Close the engines of all endpoints, also those in use, and return how many there were."""
    with _lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()
    return len(engines)


def _key_of(endpoint: InferenceEndpoint) -> str:
    """Return what tells whether two endpoints are the same, without the token in clear."""
    fields = endpoint.model_dump(mode="json", exclude={"options", "credentials", "headers"})
    secrets = [endpoint.get_token(), sorted(endpoint.get_headers().items())]
    return hashlib.sha256(json.dumps([fields, secrets], sort_keys=True, default=str).encode()).hexdigest()


def _forget_after_fork() -> None:
    # The threads of the engines do not live in the child, and a lock may be held by a thread that is gone.
    global _lock
    _lock = threading.Lock()
    _engines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
