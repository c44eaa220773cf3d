"""Runs of a process worker that an operator cancels, ends or kills: no row is lost and no process is left."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.journals import committed_rows
from support.operated_runs import Operator, wait_for_end
from support.prefect_services import PrefectServices, wait_until

ROWS = 400
PROMPT = "What is the number {number} in {language}?"
WAYS = ["cancel", "SIGTERM of the run", "SIGKILL of the run", "SIGTERM of the worker", "SIGKILL of the worker"]
STATES = {"cancel": "CANCELLED", "SIGTERM of the run": "CRASHED", "SIGKILL of the run": "CRASHED"}


@pytest.fixture(scope="module")
def operator(services: PrefectServices, tmp_path_factory) -> Iterator[Operator]:
    """Somebody who starts runs in a process worker and ends them."""
    operator = Operator(services, "operated", tmp_path_factory.mktemp("operator"))
    yield operator
    operator.close()


def write_rows(path: Path, rows: int) -> None:
    lines = [{"number": index, "language": "French"} for index in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def end_somewhere(operator: Operator, way: str, journal: Journal, wait: float, parameters: dict[str, Any]) -> None:
    """Start a run, end it after some commits, and check that it leaves nothing behind but its rows."""
    run = operator.start("batch", **parameters)
    process = operator.process_of(run)
    before = len(journal.names()) if journal.place.exists() else 0
    wait_until(
        lambda: len(journal.names()) > before + 1 or operator.read(run)["state_type"] in ("COMPLETED", "FAILED"),
        300, "the first rows", every=0.05,
    )  # fmt: skip
    time.sleep(wait)
    kept = committed_rows(journal)
    began = time.monotonic()
    operator.disturb(way, run, process)
    wait_for_end(process, 60)
    if way in STATES:
        assert operator.wait_for(run, seconds=120) == STATES[way]
    print(f"{way}: {time.monotonic() - began:.1f} s, {len(kept)} rows kept")
    assert kept <= committed_rows(journal)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_a_batch_outlives_its_operator(operator: Operator, tmp_path, tiny_openvino, seed):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, ROWS)
    parameters = {
        "model": {"model_id": str(tiny_openvino), "chat_template": "never"},
        "source": str(source), "destination": str(destination), "prompt": PROMPT,
        "more": {"max_concurrency": 2, "deduplicate": False, "show_progress": False, "if_running": "wait"},
        "options": {"max_new_tokens": 400, "ignore_eos": True},
    }  # fmt: skip
    journal, dice = Journal.beside(str(destination)), random.Random(seed)
    for way in dice.sample(WAYS, k=len(WAYS)):
        end_somewhere(operator, way, journal, dice.uniform(0, 1), parameters)
    assert committed_rows(journal)
    assert not destination.exists()

    last = operator.start("batch", **parameters)
    assert operator.wait_for(last, seconds=900) == "COMPLETED"
    answers = [json.loads(line) for line in destination.read_text().splitlines()]
    assert [row["number"] for row in answers] == list(range(ROWS))
    assert {row["generated_tokens"] for row in answers} == {400}
