"""Cancelling, stopping and killing a warm worker at random moments: nothing is lost, and the next run goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.prefect_services import FINAL_STATES, PrefectServices
from support.warm_workers import WarmServices, kill_worker, stop_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MOMENTS = int(os.environ.get("WARM_WORKER_MOMENTS", "10"))
ROWS = 4000
SETTINGS: dict[str, Any] = {
    "prompt": "Say {number}", "options": {"max_new_tokens": 48, "ignore_eos": True}, "in_flight": 4,
    "show_progress": False, "keep_journal": "always",
}  # fmt: skip


class NotedBatch:
    """One batch in a pool of its own, whose answers are noted as the engine gives them.

    Args:
        services: Server of the pool.
        pool: Name of the pool and the worker.
        model: Settings of the model.
        folder: Folder of the tables.
    """

    def __init__(self, services: PrefectServices, pool: str, model: dict[str, Any], folder: Path) -> None:
        self.warm = WarmServices(services, pool)
        self.folder = folder
        self.destination = folder / "out.jsonl"
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps({"number": number}) + "\n" for number in range(ROWS)))
        self.parameters = {"model": model, "source": str(source), "destination": str(self.destination), **SETTINGS}
        self.lives = 0
        self.deployment = ""
        self.committed: set[int] = set()
        self.looked = 0

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start the next worker, which notes its answers in a file of its own."""
        self.lives += 1
        self.looked = 0
        worker = self.warm.start_worker(self.warm.pool, ANSWER_LOG=str(self.log), OMP_NUM_THREADS="1")
        if not self.deployment:
            self.warm.wait_for_pool()
            self.deployment = self.warm.deploy("support.warm_flows.noted_batch")
            whole = {**self.parameters, "destination": str(self.folder / "whole.jsonl")}
            began = time.monotonic()
            assert self.warm.wait_for_end(self.warm.start_run(self.deployment, **whole), 300)["type"] == "COMPLETED"
            print(f"the undisturbed run took {time.monotonic() - began:.1f} s")
            self.looked = len(self.answers())
        return worker

    @property
    def log(self) -> Path:
        """File of the answers of this life."""
        return self.folder / f"answers-{self.lives}.log"

    def start_run(self) -> str:
        """Start a run of the batch."""
        return self.warm.start_run(self.deployment, **self.parameters)

    def answers(self) -> list[int]:
        """Return the rows that were answered since the last check."""
        rows = [int(line) for line in self.log.read_text().split()] if self.log.exists() else []
        return rows[self.looked :]

    def wait_for_moment(self, dice: random.Random) -> None:
        """Wait for a random moment: mostly some answers into the batch, sometimes anywhere from the start on."""
        if dice.random() < 0.25:
            time.sleep(dice.uniform(0, 3))
            return
        wanted = dice.randint(1, 150)
        self.warm.wait(lambda: len(self.answers()) >= wanted or self.destination.exists(), 120, "answers")

    def check(self) -> None:
        """Nothing committed was generated again. To be called when nobody works on the batch."""
        answered = self.answers()
        assert not self.committed & set(answered), "a committed row was generated again"
        assert len(answered) == len(set(answered))
        self.looked += len(answered)
        now = read_committed(Journal.beside(str(self.destination)))
        assert now >= self.committed, "a committed row is lost"
        self.committed = now

    def finish(self, run: str) -> None:
        """Let the batch come to its end and compare it with the undisturbed one."""
        state = self.warm.wait_for_end(run, 300)
        assert state["type"] == "COMPLETED", state
        self.check()
        assert len(self.committed) == ROWS
        assert self.destination.read_bytes() == (self.folder / "whole.jsonl").read_bytes()


def read_committed(journal: Journal) -> set[int]:
    """Rows in whole segments."""
    rows: set[int] = set()
    job = (journal.read_job() or {}).get("key", "")
    for name in journal.names():
        rows |= set(journal.load(name, job)["row"].to_pylist())
    return rows


@pytest.fixture
def batch(services: PrefectServices, bundled_model: Path, tmp_path: Path, request: Any) -> NotedBatch:
    pool = f"moments-{request.node.callspec.id if hasattr(request.node, 'callspec') else 'cancel'}".lower()
    return NotedBatch(services, pool, {"model_id": str(bundled_model)}, tmp_path)


@pytest.mark.parametrize("end", [stop_worker, kill_worker], ids=["SIGTERM", "SIGKILL"])
def test_ending_the_worker_at_random_moments(batch: NotedBatch, end: Callable[[Any], Any]) -> None:
    dice = random.Random(end.__name__)
    worker = batch.start_worker()
    run = batch.start_run()
    hits = 0
    for _ in range(MOMENTS):
        batch.wait_for_moment(dice)
        end(worker)
        state = batch.warm.state(run)
        hits += state not in FINAL_STATES
        assert state in ("RUNNING", "PENDING", "SCHEDULED") or batch.destination.exists()
        assert end is kill_worker or state != "RUNNING"
        batch.check()
        worker = batch.start_worker()
    try:
        print(f"{hits} of {MOMENTS} moments were within the run; {len(batch.committed)} of {ROWS} rows were committed")
        batch.finish(run)
    finally:
        stop_worker(worker)


def test_cancelling_at_random_moments(batch: NotedBatch) -> None:
    dice = random.Random(7)
    worker = batch.start_worker()
    hits, longest = 0, 0.0
    try:
        for _ in range(MOMENTS):
            run = batch.start_run()
            batch.wait_for_moment(dice)
            began = time.monotonic()
            batch.warm.cancel(run)
            state = batch.warm.wait_for_end(run, 60)
            longest = max(longest, time.monotonic() - began)
            hits += state["type"] == "CANCELLED"
            assert state["type"] == "CANCELLED" or batch.destination.exists(), state
            batch.check()
        print(f"{hits} of {MOMENTS} runs were cancelled, in {longest:.1f} s at most; {len(batch.committed)} rows stay")
        batch.finish(batch.start_run())
        assert worker.poll() is None
    finally:
        stop_worker(worker)
