"""Flows for the tests of the warm worker. They note in files what they do, as they share no memory with the tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.tasks.engines.cache import list_engines, load_engine
from prefect_huggingface.tasks.generation import generate_text
from prefect_huggingface.tasks.records import Request
from support.prefect_services import wait_until


def note(path: str, **values: Any) -> None:
    """Append a line to a file."""
    with Path(path).open("a") as file:
        file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **values}) + "\n")


def notes(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of notes."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def _noted_end(path: str) -> Iterator[None]:
    try:
        yield
    finally:
        note(path, event="left")


@flow(name="first-token")
def first_token(model: LocalModel, path: str, prompt: str = "What is the capital of France?") -> None:
    """Stream an answer, and note when its first piece came."""
    engine = load_engine(model)
    seen = False
    for _ in engine.stream(Request(prompt, options=GenerationOptions(max_new_tokens=8, ignore_eos=True))):
        if not seen:
            seen = True
            note(path, event="first", loaded=[state.loaded_at for state in list_engines()])


def _note_cancellation(flow: Any, flow_run: Any, state: Any) -> None:
    note(flow_run.parameters["path"], event="hook", state=state.name)


def _note_crash(flow: Any, flow_run: Any, state: Any) -> None:
    note(flow_run.parameters["path"], event="crash hook", state=state.name)


@flow(name="long-answers", on_cancellation=[_note_cancellation], on_crashed=[_note_crash])
def long_answers(
    model: LocalModel, path: str, tokens: int = 10_000, submitted: bool = False, together_with: tuple[str, ...] = ()
) -> None:
    """Generate for a long time, in the thread of the flow or in one of its task runner.

    With others it begins when all of them are there: a busy SQLite server keeps a run waiting for 14 seconds.
    """
    options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
    prompts = ["Once upon a time"]
    note(path, event="began")
    with _noted_end(path):
        wait_until(lambda: all(notes(Path(other)) for other in together_with), 90, "the other runs")
        if submitted:
            answers = generate_text.submit(model, prompts, options).result()
        else:
            answers = generate_text(model, prompts, options)
        note(path, event="done", errors=[answer.error for answer in answers])


@flow(name="look-at-engines")
def look_at_engines(path: str) -> None:
    """Note how many requests the loaded models work on."""
    note(path, event="looked", requests=sum(state.requests for state in list_engines()))


@task(cache_policy=NO_CACHE)
def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)


@flow(name="sleeper", on_cancellation=[_note_cancellation])
def sleeper(path: str, seconds: float) -> None:
    """Sleep."""
    note(path, event="began")
    with _noted_end(path):
        _sleep(seconds)
        note(path, event="done")


@flow(name="stubborn")
def stubborn(path: str, seconds: float) -> None:
    """Sleep in one call that nothing interrupts."""
    note(path, event="began")
    time.sleep(seconds)
    note(path, event="done")


@flow(name="async-sleeper", on_cancellation=[_note_cancellation])
async def async_sleeper(path: str, seconds: float) -> None:
    """Sleep in an event loop."""
    import asyncio

    note(path, event="began")
    with _noted_end(path):
        await asyncio.sleep(seconds)
        note(path, event="done")


if _log := os.environ.get("ANSWER_LOG"):
    from support.batch_runs import note_answers

    note_answers(_log)

noted_batch = batch_inference.with_options(name="noted-batch")
