"""A batch of every night: each writes a file of its own, and one that is started again goes on with its own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.tasks.batching.dates import find_start
from prefect_huggingface.tasks.storage.journals.journal import Journal

pytestmark = pytest.mark.usefixtures("prefect_server")


def schedule(some_flow, moment: datetime, **parameters) -> FlowRun:
    with get_client(sync_client=True) as client:
        state = Scheduled(scheduled_time=moment)
        return client.create_flow_run(some_flow, parameters=parameters, state=state)


def test_a_run_that_is_started_again_keeps_its_date(tmp_path: Path, bundled_model: Path, caplog) -> None:
    model = LocalModel(model_id=str(bundled_model))
    last_night = (datetime.now(UTC) - timedelta(days=1)).replace(hour=23, minute=59)
    tonight = last_night + timedelta(minutes=2)
    for night in (last_night, tonight):
        lines = [json.dumps({"country": name}) + "\n" for name in ("France", "Spain")]
        (tmp_path / f"in-{night:%Y-%m-%d}.jsonl").write_text("".join(lines))
    parameters = {
        "model": model, "source": f"{tmp_path}/in-{{date}}.jsonl", "destination": f"{tmp_path}/out-{{date}}.jsonl",
        "prompt": "What is the capital of {country}?", "more": {"show_progress": False},
    }  # fmt: skip
    first, second = tmp_path / f"out-{last_night:%Y-%m-%d}.jsonl", tmp_path / f"out-{tonight:%Y-%m-%d}.jsonl"

    # The run of last night is stopped after a failed row; nothing is published, its journal stays.
    broken = tmp_path / f"in-{last_night:%Y-%m-%d}.jsonl"
    whole = broken.read_text()
    run = schedule(batch_inference, last_night, source="")
    failing = {**parameters, "more": {"max_failures": 0.1}, "prompt": "{country}{nothing}"}
    broken.write_text('{"country": "France", "nothing": null}\n' + whole)
    with pytest.raises(Exception, match="max_failures"):
        run_flow(batch_inference, flow_run=run, parameters=failing)
    assert not first.exists()
    assert Journal.beside(str(first)).read_job()

    caplog.clear()
    run_flow(batch_inference, flow_run=schedule(batch_inference, tonight, source=""), parameters=parameters)
    assert [json.loads(line)["completion"].strip() for line in second.read_text().splitlines()] == ["Paris", "Madrid"]
    assert f"The batch of '{first}' was left unfinished" in caplog.text

    # Started again, it is another day; the run still has the date that it was scheduled for.
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Scheduled(), force=True)
        again = client.read_flow_run(run.id)
    summary = run_flow(batch_inference, flow_run=again, parameters={**failing, "more": {"max_failures": None}})
    assert summary.destination == str(first)
    assert summary.resumed == 3


def test_a_subflow_has_the_date_of_the_outermost_run() -> None:
    @flow
    def inner() -> datetime:
        return find_start()

    @flow
    def outer() -> datetime:
        return inner()

    moment = datetime(2026, 2, 28, 23, 59, tzinfo=UTC)
    assert run_flow(outer, flow_run=schedule(outer, moment)) == moment
