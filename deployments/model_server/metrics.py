"""What a server counts, in the text format of Prometheus and under the names of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prefect_huggingface.deployments.model_server.models import ServedModel
from prefect_huggingface.tasks.records import Completion

LABEL = "model_name"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
GAUGES: dict[str, tuple[str, Callable[[ServedModel], float]]] = {
    "num_requests_running": ("Requests in the engine.", lambda model: model.requests - model.loading),
    "num_requests_waiting": ("Requests that wait for their model.", lambda model: model.loading),
    "kv_cache_usage_perc": ("Share of the KV cache in use.", lambda model: getattr(model.engine, "cache_usage", 0.0)),
}


class Metrics:
    """Counters of one server."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        make: dict[str, Any] = {"labelnames": [LABEL], "registry": self._registry}
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts.", **make)
        self._generated_tokens = Counter("vllm:generation_tokens", "Generated tokens.", **make)
        make |= {"buckets": SECONDS}
        self._first_token = Histogram("vllm:time_to_first_token_seconds", "Time to a stream's first text.", **make)
        self._latency = Histogram("vllm:e2e_request_latency_seconds", "Time to an answer's end.", **make)
        make = {"labelnames": [LABEL, "finished_reason"], "registry": self._registry}
        self._ends = Counter("vllm:request_success", "Answers by their finish reason.", **make)
        for name, (text, read) in GAUGES.items():
            gauge = Gauge(f"vllm:{name}", text, [LABEL], registry=self._registry)
            for model in models:
                gauge.labels(model.name).set_function(partial(read, model))

    def count_first_token(self, model: str, seconds: float) -> None:
        """Count the first text of a stream."""
        self._first_token.labels(model).observe(seconds)

    def count(self, model: str, completion: Completion, seconds: float) -> None:
        """Count an answer."""
        self._prompt_tokens.labels(model).inc(completion.prompt_tokens)
        self._generated_tokens.labels(model).inc(completion.generated_tokens)
        self._latency.labels(model).observe(seconds)
        self._ends.labels(model, "error" if completion.error is not None else completion.finish_reason).inc()

    def count_abort(self, model: str) -> None:
        """Count an answer whose client went away."""
        self._ends.labels(model, "abort").inc()

    def write(self) -> bytes:
        """Return everything as text."""
        return generate_latest(self._registry)
