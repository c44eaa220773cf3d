"""Calling a background task of a warm worker, and outliving the worker.

Prefect does not notice when the process of a background task dies: its run stays Running for ever. But it knows which
workers are connected, and the name of a run tells who works on it. When that one is gone, the call is handed over
again, to the worker that comes next.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.futures import PrefectDistributedFuture
from prefect.logging import get_logger
from prefect.states import Cancelling, Crashed, Pending

from prefect_huggingface.blocks import WarmModel
from prefect_huggingface.tasks.engines.warm.leftovers import remove_parameters, remove_result
from prefect_huggingface.tasks.engines.warm.messages import worker_of
from prefect_huggingface.tasks.engines.warm.workers import Unwanted, WarmFailure, WorkerWatch
from prefect_huggingface.tasks.waiting import WAKE_SECONDS, sleep_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

logger = get_logger(__name__)

SERVING_MODULE = "prefect_huggingface.tasks.warm_requests"
MAX_ATTEMPTS = 10


@dataclass(slots=True)
class _Lost(Exception):
    """The worker of a call is gone."""

    worker: str


@dataclass(frozen=True, slots=True)
class WarmCall:
    """A call of a background task.

    Attributes:
        warm: Model to call for.
        task: Name of the task in the module of the served tasks.
        arguments: Plain values for the task; the seconds that are left and the name of the call are added.
        end: Time of `time.monotonic` at which the answer must be there.
        is_wanted: Tells whether somebody waits for it.
    """

    warm: WarmModel
    task: str
    arguments: dict[str, Any]
    end: float
    is_wanted: Callable[[], bool]

    def run(self) -> Any:
        """Return the answer; hand the call over again when its worker is gone.

        Raises:
            WarmFailure: If there is no answer.
            Unwanted: If nobody waits for it any more.
        """
        watch = WorkerWatch(self.warm, _served(self.task).task_key)
        for _ in range(MAX_ATTEMPTS):
            try:
                self.await_worker(watch)
                return self._attempt(watch)
            except _Lost as lost:
                logger.warning("The warm worker %s is gone; its requests are handed over again.", lost.worker)
        raise WarmFailure("unavailable", f"{MAX_ATTEMPTS} warm workers have ended during the call. Look at their logs.")

    def await_worker(self, watch: WorkerWatch) -> None:
        """Return when a worker is there.

        Raises:
            WarmFailure: If there is none in time.
            Unwanted: If nobody waits for the answer any more.
        """
        while True:
            with self._patience(watch), get_client(sync_client=True) as client:
                watch.look(client)
                if watch.online:
                    return
            self._check()
            sleep_for(WAKE_SECONDS)

    def _attempt(self, watch: WorkerWatch) -> Any:
        self._check()
        hosts = frozenset(watch.online)
        left = max(self.end - time.monotonic(), 0.0)
        future = _served(self.task).delay(**self.arguments, seconds=left, batch=uuid.uuid4().hex)
        try:
            while not (state := self._state_of(future, watch)).is_final():
                self._check()
                with self._patience(watch), get_client(sync_client=True) as client:
                    self._look(client, future, watch, hosts)
        except _Lost:
            _end_run(future, Crashed(message="The warm worker of the run is gone. The call was handed over again."))
            raise
        except BaseException:
            _end_run(future, Cancelling(message="Nobody waits for the answer any more."))
            raise
        try:
            return self._answer_of(state)
        finally:
            remove_result(state)

    def _state_of(self, future: PrefectDistributedFuture[Any], watch: WorkerWatch) -> State[Any]:
        state: State[Any] = Pending()
        with self._patience(watch):
            # Right after the call the run may be without a state, which is an error to Prefect.
            with suppress(RuntimeError, ObjectNotFound):
                future.wait(WAKE_SECONDS)
            state = future.state
        return state

    def _look(
        self,
        client: SyncPrefectClient,
        future: PrefectDistributedFuture[Any],
        watch: WorkerWatch,
        hosts: frozenset[str],
    ) -> None:
        """Look whether the worker of the call is still there, or one of those that may have taken it."""
        watch.look(client)
        with suppress(ObjectNotFound):
            worker = worker_of(client.read_task_run(future.task_run_id).name)
            possible = [worker] if worker else sorted(hosts)
            # Each is asked, since the watch counts from the first time that it is told of a missing one.
            lost = [watch.is_lost(name) for name in possible]
            if lost and all(lost):
                raise _Lost(", ".join(possible))

    def _check(self) -> None:
        if not self.is_wanted():
            raise Unwanted
        if time.monotonic() > self.end:
            raise WarmFailure(
                "deadline",
                f"The warm worker did not answer within {self.warm.timeout_seconds:g} s. Raise `timeout_seconds` of "
                "the warm model, or start further workers.",
            )

    @contextmanager
    def _patience(self, watch: WorkerWatch) -> Iterator[None]:
        """Bear it when Prefect's server is away for a while."""
        try:
            yield
        except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
            away = watch.missing_for("server", False)
            if away > self.warm.worker_timeout_seconds:
                raise WarmFailure(
                    "unavailable",
                    f"Prefect's server has not answered for {away:.0f} s ({type(exc).__name__}). Start it, or correct "
                    "`PREFECT_API_URL`.",
                ) from None
            sleep_for(WAKE_SECONDS)
        else:
            watch.missing_for("server", True)

    def _answer_of(self, state: State[Any]) -> Any:
        """Return the answer of a run that has ended.

        Raises:
            WarmFailure: If it has none.
        """
        if state.is_crashed():
            raise _Lost(f"of a run that crashed ({state.message})")
        if state.is_cancelled():
            raise WarmFailure("cancelled", "The run in the warm worker was cancelled. Ask again.")
        if not state.is_completed():
            raise WarmFailure("engine_error", f"The warm worker cannot answer. {state.message}")
        try:
            return state.result()
        except Exception as exc:
            raise WarmFailure(
                "unavailable",
                f"The answer of the warm worker cannot be read here ({type(exc).__name__}). Let worker and caller have "
                "the same storage for results: set `PREFECT_LOCAL_STORAGE_PATH`, or a storage block with "
                "`PREFECT_DEFAULT_RESULT_STORAGE_BLOCK`.",
            ) from None


def await_worker(warm: WarmModel) -> None:
    """Return when a worker is there that serves warm models.

    Raises:
        WarmFailure: If there is none in time.
    """
    end = time.monotonic() + warm.timeout_seconds
    call = WarmCall(warm, "answer_requests", {}, end, lambda: True)
    call.await_worker(WorkerWatch(warm, _served(call.task).task_key))


def _served(task: str) -> Any:
    # By name: the tasks stand above the engines, and they need engines of their own where they run.
    return getattr(import_module(SERVING_MODULE), task)


def _end_run(future: PrefectDistributedFuture[Any], state: State[Any]) -> None:
    """Tell Prefect, and through it the worker, that a run is over, and remove the prompts that no worker has read."""
    with suppress(Exception), get_client(sync_client=True) as client:
        client.set_task_run_state(future.task_run_id, state, force=True)
        remove_parameters(client.read_task_run_states(future.task_run_id))
