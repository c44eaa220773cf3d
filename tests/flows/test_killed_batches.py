"""A batch that is killed again and again gives the bytes of an undisturbed one; no committed row is generated twice."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.batch_runs import read_answers, start_batch
from support.journals import committed_rows

pytestmark = pytest.mark.usefixtures("prefect_server")

ROWS = 500
PROMPT = "What is the number {number} in {language}?"
# Long answers and few in flight make the run long enough to be hit many times.
PARAMETERS: dict[str, Any] = {
    "prompt": PROMPT, "max_concurrency": 2, "options": {"max_new_tokens": 96, "ignore_eos": True},
}  # fmt: skip


def write_rows(path: Path, rows: int) -> None:
    languages = ("English", "French", "German", "Spanish", "french", "german")
    lines = [{"number": index // 6, "language": languages[index % 6]} for index in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def kill_after_publication(folder: Path, life: int, destination: Path, **start: Any) -> bool:
    """Start a life and kill it as soon as its output is there. Return whether it was still at work."""
    process = start_batch(folder, life, destination=str(destination), **start)
    while not destination.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_somewhere(folder: Path, life: int, dice: random.Random, **start: Any) -> bool:
    """Start a life and kill it at a random moment. Return whether it was still at work.

    Most moments are a few answers into the generation, some anywhere from the start of the process on.
    """
    process = start_batch(folder, life, **start)
    if life % 5 == 0:
        time.sleep(dice.uniform(0, 6))
    else:
        answers = dice.randint(1, 16)
        while len(read_answers(folder, life)) < answers and process.poll() is None:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_killed_batch_goes_on(tmp_path: Path, bundled_model: Path, kills: int) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = ROWS if kills > 1 else 40
    write_rows(source, rows)
    model = {"model_id": str(bundled_model)}
    batch_inference(LocalModel(**model), str(source), str(tmp_path / "whole.jsonl"), **PARAMETERS)

    dice, journal = random.Random(kills), Journal.beside(str(destination))
    start = {"model": model, "source": str(source), **PARAMETERS}
    killed, life, committed, again = 0, 0, set(), 0
    while not destination.exists():
        life += 1
        if killed < kills:
            killed += kill_somewhere(tmp_path, life, dice, destination=str(destination), **start)
        else:
            kill_after_publication(tmp_path, life, destination, **start)
        answered = read_answers(tmp_path, life)
        assert not committed & set(answered), "a committed row was generated again"
        assert len(answered) == len(set(answered))
        now = committed_rows(journal) if not destination.exists() else set(range(rows))
        again += len(set(answered) - now)
        committed = now
    print(f"killed {killed} times, {again} of {rows} rows were generated again")

    # Whatever it had still to do, the same call now succeeds, and generates nothing.
    for _ in range(2 if kills > 1 else 1):
        life += 1
        ended = start_batch(tmp_path, life, destination=str(destination), **start)
        assert ended.wait() == 0, (tmp_path / f"output-{life}.txt").read_text()
        assert read_answers(tmp_path, life) == []
    assert destination.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert killed == kills
    assert sum(len(read_answers(tmp_path, each)) for each in range(1, life + 1)) == rows + again
