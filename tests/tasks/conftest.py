"""One store with two exports, made once for all tests: by eight processes at once, and by a task in a flow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.context import FlowRunContext

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.exports import export_to_openvino, plan_export
from prefect_huggingface.tasks.records import Export
from support.export_requests import LoggedExport, finish_request, start_request


@pytest.fixture(scope="session")
def crowd(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A store, and the answers of eight processes that asked it at once for the same export."""
    store = tmp_path_factory.mktemp("crowd")
    processes = [start_request(store, tiny_llama) for _ in range(8)]
    return store, [finish_request(process) for process in processes]


@pytest.fixture
def exported(crowd: tuple[Path, list[dict[str, Any]]], tiny_llama: Path) -> LocalModel:
    """A model whose int8 export is in the store."""
    return LocalModel(model_id=str(tiny_llama), store=ModelStore(path=crowd[0]))


@pytest.fixture(scope="session")
def logged_export(crowd: tuple[Path, list[dict[str, Any]]], tiny_llama: Path, prefect_server: None) -> LoggedExport:
    """The int4 export of the tiny Llama, made in the store of the crowd by a task in a flow."""
    model = LocalModel(model_id=str(tiny_llama), weight_format="int4", store=ModelStore(path=crowd[0]))
    run_ids: list[UUID] = []

    @flow
    def export_in_a_flow() -> Export:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        run_ids.append(context.flow_run.id)
        assert plan_export(model).problems == ()
        return export_to_openvino(model)

    export = export_in_a_flow()
    end = time.monotonic() + 30
    messages: list[str] = []
    while time.monotonic() < end and not any(message.startswith("Exported") for message in messages):
        time.sleep(0.3)  # the log is sent in batches
        messages = asyncio.run(_read_messages(run_ids[0]))
    return LoggedExport(model, export, messages)


async def _read_messages(run_id: UUID) -> list[str]:
    async with get_client() as client:
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200)
        return [log.message for log in logs]
