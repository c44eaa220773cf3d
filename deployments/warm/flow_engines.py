"""Prefect's flow engines for runs that share a process and may be interrupted there.

Prefect takes an interrupted run for a crash. Here the worker says what becomes of it, so that the engine leaves the
state of such a run alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.engine import _drive_run_flow_result
from prefect.exceptions import ParameterBindError, SignatureMismatchError
from prefect.flow_engine import AsyncFlowRunEngine, FlowRunEngine, run_flow
from prefect.flows import Flow
from prefect.utilities.callables import get_call_parameters, parameters_to_args_kwargs

from prefect_huggingface.tasks.errors import WorkerError


@dataclass
class _SharedEngine(FlowRunEngine[Any, Any]):
    is_interrupted: Callable[[], bool] = field(kw_only=True)

    def handle_crash(self, exc: BaseException) -> None:
        if not self.is_interrupted():
            super().handle_crash(exc)


@dataclass
class _SharedAsyncEngine(AsyncFlowRunEngine[Any, Any]):
    is_interrupted: Callable[[], bool] = field(kw_only=True)

    async def handle_crash(self, exc: BaseException) -> None:
        if not self.is_interrupted():
            await super().handle_crash(exc)


def drive_flow(flow: Flow[..., Any], flow_run: FlowRun, is_interrupted: Callable[[], bool]) -> None:
    """Run a flow in this thread to its end. Its state is in Prefect then, unless it was interrupted.

    Args:
        flow: Flow to run.
        flow_run: Run with its parameters.
        is_interrupted: Whether what ends the run is an interruption, so that its state is left as it is.
    """
    if flow.isgenerator:
        _drive_run_flow_result(flow, run_flow(flow, flow_run=flow_run))
        return
    settings: dict[str, Any] = {
        "flow": flow,
        "flow_run": flow_run,
        "parameters": _parameters_of(flow, flow_run),
        "is_interrupted": is_interrupted,
    }
    if flow.isasync:
        asyncio.run(_drive_async(_SharedAsyncEngine(**settings)))
    else:
        _drive_sync(_SharedEngine(**settings))


def _parameters_of(flow: Flow[..., Any], flow_run: FlowRun) -> dict[str, Any]:
    """Return the parameters of a run with the defaults of the flow.

    Raises:
        WorkerError: If they do not fit the flow.
    """
    try:
        arguments, named = parameters_to_args_kwargs(flow.fn, flow_run.parameters)
        return get_call_parameters(flow.fn, arguments, named)
    except (ParameterBindError, SignatureMismatchError, TypeError) as exc:
        raise WorkerError(
            f"The parameters do not fit the flow {flow.name!r}: {exc}. Start it with the parameters of its form, and "
            "deploy it again where its code is newer."
        ) from exc


def _drive_sync(engine: _SharedEngine) -> None:
    with engine.start():
        while engine.is_running():
            with engine.run_context():
                engine.call_flow_fn()


async def _drive_async(engine: _SharedAsyncEngine) -> None:
    waking = asyncio.create_task(_wake())
    try:
        async with engine.start():
            while engine.is_running():
                async with engine.run_context():
                    await engine.call_flow_fn()  # type: ignore[unused-coroutine]
    finally:
        waking.cancel()


async def _wake() -> None:
    # An event loop that only waits would not hear the interruption.
    while True:
        await asyncio.sleep(0.5)
