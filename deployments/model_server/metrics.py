"""What a server counts, in the text format of Prometheus and under the names of vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prefect_huggingface.deployments.model_server.models import ServedModel
from prefect_huggingface.tasks.records import Completion

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)


class Metrics:
    """Counters of one server."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ["model_name"]
        running = Gauge("vllm:num_requests_running", "Requests in the engine.", labels, registry=registry)
        waiting = Gauge("vllm:num_requests_waiting", "Requests that wait for their model.", labels, registry=registry)
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts.", labels, registry=registry)
        self._generated_tokens = Counter("vllm:generation_tokens", "Generated tokens.", labels, registry=registry)
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to a stream's first text.",
            labels,
            registry=registry,
            buckets=SECONDS,
        )
        self._latency = Histogram(
            "vllm:e2e_request_latency_seconds", "Time to an answer's end.", labels, registry=registry, buckets=SECONDS
        )
        self._ends = Counter(
            "vllm:request_success", "Answers by their finish reason.", [*labels, "finished_reason"], registry=registry
        )
        for model in models:
            running.labels(model.name).set_function(partial(_running, model))
            waiting.labels(model.name).set_function(partial(_waiting, model))
            self._prompt_tokens.labels(model.name)
            self._generated_tokens.labels(model.name)

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


def _running(model: ServedModel) -> float:
    return model.requests - model.loading


def _waiting(model: ServedModel) -> float:
    return model.loading
