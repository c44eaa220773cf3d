"""The background task of a warm worker: it answers requests with the models that its process keeps loaded.

`python -m prefect_huggingface.deployments.warm_worker` serves it. The caller is the engine of a `WarmModel`; both need
the same Prefect server and the same storage for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.context import TaskRunContext
from pydantic import ValidationError

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.batching.shards import run_requests
from prefect_huggingface.tasks.engines.cache import load_engine
from prefect_huggingface.tasks.engines.failures import failed
from prefect_huggingface.tasks.engines.warm.leftovers import remove_parameters
from prefect_huggingface.tasks.engines.warm.messages import pack_completion, run_name, unpack_request
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request

LOOK_SECONDS = 1.0
GIVEN_UP = {StateType.CANCELLING, StateType.CANCELLED, StateType.CRASHED}


def answer_with_model(
    model: str, requests: Sequence[dict[str, Any]], seconds: float, should_stop: Callable[[], bool] | None = None
) -> list[dict[str, Any]]:
    """Answer requests with a saved model, which is loaded once per process.

    Args:
        model: Name of the saved `LocalModel` block.
        requests: N requests as plain values.
        seconds: Time for all of them. What is not done then fails.
        should_stop: Asked now and then whether nobody waits for the answers any more.

    Returns:
        N completions as plain values, in the order of the requests.

    Raises:
        EngineError: If there is no such block.
        HuggingFaceTaskError: If the model cannot be loaded.
    """
    end = time.monotonic() + seconds
    found: list[Completion | None] = [None] * len(requests)
    wanted: list[Request] = []
    for place, record in enumerate(requests):
        try:
            wanted.append(unpack_request(record, place))
        except (ValidationError, TypeError) as exc:
            found[place] = failed(Request(id=place), "invalid_option", f"The warm worker refuses the request: {exc}")
    engine = load_engine(load_model(model))
    late = f"The request was not answered within {seconds:.0f} s. Raise the `timeout_seconds` of the warm model."

    def is_over() -> bool:
        return time.monotonic() > end or (should_stop is not None and should_stop())

    for completions in run_requests(engine, wanted, max(len(wanted), 1), is_over):
        for completion in completions:
            found[int(completion.request_id or 0)] = completion
    return [
        pack_completion(completion or failed(Request(id=place), "deadline", late))
        for place, completion in enumerate(found)
    ]


def measure_with_model(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of tokens of texts, and how many tokens prompt and answer may have together.

    Args:
        model: Name of the saved `LocalModel` block.
        texts: N texts.

    Raises:
        EngineError: If there is no such block, or the model cannot be loaded.
    """
    engine = load_engine(load_model(model))
    return {"tokens": [engine.count_tokens(text) for text in texts], "context_length": engine.context_length}


def load_model(name: str) -> LocalModel:
    """Return a saved model.

    Raises:
        EngineError: If there is none of this name, or it is not right.
    """
    try:
        return LocalModel.load(name, _sync=True)  # type: ignore[call-arg, return-value]
    except (ValueError, RuntimeError) as exc:
        raise EngineError(
            f"The saved local model block {name!r} cannot be loaded: {exc} Save it, or correct the name in the warm "
            "model."
        ) from None


class _Caller:
    """Who waits for the answers of this run, as far as Prefect knows."""

    def __init__(self) -> None:
        context = TaskRunContext.get()
        self._run_id = None if context is None else context.task_run.id
        self._next = 0.0
        self._is_gone = False

    def begin(self) -> bool:
        """Remove the prompts that Prefect stores, which this run has read, and tell whether to go on."""
        remove_parameters(self._look())
        return not self._is_gone

    def is_gone(self, at_once: bool = False) -> bool:
        """Tell whether nobody waits any more. Prefect is asked now and then, or at once."""
        if not self._is_gone and (at_once or time.monotonic() >= self._next):
            self._look()
        return self._is_gone

    def _look(self) -> list[State[Any]]:
        self._next = time.monotonic() + LOOK_SECONDS
        if self._run_id is None:
            return []
        # All its states: the one that the caller has set may be older than the last one of this process.
        with get_client(sync_client=True) as client:
            states = client.read_task_run_states(self._run_id)
        self._is_gone = any(state.type in GIVEN_UP for state in states)
        return states


class AnswerRequests:
    """The body of the task. As an object it has the same key in Prefect on every machine, wherever it is installed."""

    def __call__(self, model: str, requests: list[dict[str, Any]], seconds: float, batch: str) -> list[dict[str, Any]]:
        """Answer requests with a saved model. `batch` names the call, so that no answer is taken from a cache."""
        caller, end = _Caller(), time.monotonic() + seconds
        answers = answer_with_model(model, requests, seconds, caller.is_gone) if caller.begin() else []
        # Prefect stores what is returned, and only the caller would remove it.
        return [] if caller.is_gone(at_once=time.monotonic() >= end) else answers


class MeasureTexts:
    """The body of the task that counts tokens."""

    def __call__(self, model: str, texts: list[str], seconds: float, batch: str) -> dict[str, Any]:
        """Count the tokens of texts with a saved model. `batch` names the call."""
        return measure_with_model(model, texts) if _Caller().begin() else {}


def _name_run(parameters: dict[str, Any]) -> str:
    return run_name(len(parameters.get("requests", parameters.get("texts", ()))))


_SETTINGS: dict[str, Any] = {
    "task_run_name": _name_run,
    # A task worker would put a policy of its own in place of none.
    "cache_policy": CachePolicy.from_cache_key_fn(lambda context, parameters: f"warm-{parameters['batch']}"),
    "persist_result": True,
    "result_serializer": "pickle",
}
answer_requests: Any = task(
    name="answer-requests",
    description="Answer requests of other processes with a model that is loaded here.",
    **_SETTINGS,
)(AnswerRequests())
measure_texts: Any = task(
    name="measure-texts", description="Count the tokens of texts with a model that is loaded here.", **_SETTINGS
)(MeasureTexts())

SERVED_TASKS = [answer_requests, measure_texts]
"""What a warm worker serves."""
