"""What a server counts, in the text format of Prometheus and under the names of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prefect_huggingface.deployments.model_server.models import ServedModel
from prefect_huggingface.tasks.records import Completion

LABEL = "model_name"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
GAUGES: dict[str, tuple[str, Callable[[ServedModel], float]]] = {
    "num_requests_running": ("Requests in the engine.", lambda model: model.requests - model.loading),
    "num_requests_waiting": ("Requests that wait for their model.", lambda model: model.loading),
    "kv_cache_usage_perc": ("Share of the KV cache that is in use, 0 to 1.", lambda model: model.cache_usage),
}


class Metrics:
    """Counters of one server."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._ends = self._counter("request_success", "Answers by their finish reason.", "finished_reason")
        self._first_token = self._histogram("time_to_first_token_seconds", "Time to a stream's first text.")
        self._latency = self._histogram("e2e_request_latency_seconds", "Time to an answer's end.")
        names = {model.name: model for model in models}
        for name, (text, read) in GAUGES.items():
            gauge = Gauge(f"vllm:{name}", text, [LABEL], registry=self._registry)
            for label, model in names.items():
                gauge.labels(label).set_function(partial(read, model))
        for counter in (self._prompt_tokens, self._generated_tokens):
            for label in names:
                counter.labels(label)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, [LABEL, *labels], registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"vllm:{name}", text, [LABEL], registry=self._registry, buckets=SECONDS)

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
