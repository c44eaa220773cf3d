"""Batches to the last instant: killed after publication, waited for, cancelled, tried out, and secrets that stay."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import serialize_context
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled

from prefect_huggingface.blocks import (
    GenerationOptions,
    HuggingFaceCredentials,
    InferenceEndpoint,
    LocalModel,
    ModelStore,
)
from prefect_huggingface.flows import batch_inference, prompt_chain
from prefect_huggingface.tasks.batches import lent_models
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.batch_runs import read_answers, start_batch
from support.hub_server import LocalHub
from support.prefect_services import PrefectServices, stop_process, wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")

PROMPT = "What is the number {number} in French?"
CANARY = "hf_canarycanarycanarycanary"
# The server gives 200 of all the runs of the session.
NEWEST = FlowRunSort.EXPECTED_START_TIME_DESC


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> LocalModel:
    return LocalModel(model_id=str(bundled_model))


def write_numbers(path: Path, rows: int) -> str:
    path.write_text("".join(json.dumps({"number": number}) + "\n" for number in range(rows)))
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow  # test_killed_batches.py kills one at this moment as well
def test_a_batch_that_was_killed_after_its_publication_is_finished(tmp_path: Path, model: LocalModel) -> None:
    source, destination = write_numbers(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    settings = {"source": source, "destination": str(destination), "prompt": PROMPT}
    process = start_batch(tmp_path, 1, {"model_id": model.model_id}, **settings)
    while not destination.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = destination.read_bytes()

    summary = batch_inference(model, **settings)
    again = batch_inference(model, **settings)
    assert (summary.rows, summary.succeeded, summary.resumed) == (40, 40, 0)
    assert asdict(again) == asdict(summary)
    assert destination.read_bytes() == before
    assert Journal.beside(str(destination)).read_job() is None


def test_who_waits_for_a_running_batch_returns_its_result(tmp_path: Path, model: LocalModel) -> None:
    source, destination = write_numbers(tmp_path / "in.jsonl", 60), str(tmp_path / "out.jsonl")
    found: list[Any] = []

    def run() -> None:
        found.append(batch_inference(model, source, destination, PROMPT, if_running="wait", show_progress=False))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert found[0].succeeded == 60


def test_a_trial_answers_some_rows_that_the_full_run_takes_over(tmp_path: Path, model: LocalModel) -> None:
    source, destination = write_numbers(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    settings = {"source": source, "destination": str(destination), "prompt": PROMPT, "show_progress": False}
    first = batch_inference(model, **settings, rows=20)
    assert (first.rows, first.destination) == (20, str(tmp_path / "out.trial.jsonl"))
    assert [row["number"] for row in read_rows(tmp_path / "out.trial.jsonl")] == list(range(20))
    second = batch_inference(model, **settings, sample=30, sample_seed=3)
    chosen = [row["number"] for row in read_rows(tmp_path / "out.trial.jsonl")]
    assert (second.rows, len(set(chosen)), chosen) == (30, 30, sorted(chosen))
    assert not destination.exists()

    known = len({*range(20), *chosen})
    summary = batch_inference(model, **settings)
    assert (summary.rows, summary.resumed) == (200, known)
    alone = tmp_path / "alone.jsonl"
    batch_inference(model, **{**settings, "destination": str(alone)})
    assert alone.read_bytes() == destination.read_bytes()
    with pytest.raises(BatchError, match="two kinds of trial"):
        batch_inference(model, source, str(tmp_path / "no.jsonl"), PROMPT, rows=2, sample=3)


@pytest.mark.parametrize("source", ["out.trial.jsonl", "out.*.jsonl"])
def test_a_trial_does_not_replace_its_input(tmp_path: Path, model: LocalModel, source: str) -> None:
    write_numbers(tmp_path / "out.trial.jsonl", 8)
    before = (tmp_path / "out.trial.jsonl").read_text()
    with pytest.raises(BatchError, match="within the input|read it"):
        batch_inference(model, str(tmp_path / source), str(tmp_path / "out.jsonl"), PROMPT, rows=2)
    assert (tmp_path / "out.trial.jsonl").read_text() == before


def test_a_chain_over_a_table(tmp_path: Path, model: LocalModel) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "Maria is 34 years old."}\n{"text": "Peter is 7 years old."}\n')
    steps = [
        {"name": "person", "prompt": "Extract the name and the age: {text}", "parser": "json"},
        {"name": "french", "prompt": "What is the number {person_age} in french?"},
    ]
    summary = batch_inference(model, str(source), str(destination), steps=steps, show_progress=False)
    assert summary.statuses == {"ok": 2}
    assert [(row["person"], row["french"]) for row in read_rows(destination)] == [
        ({"name": "Maria", "age": 34}, "trente-quatre"), ({"name": "Peter", "age": 7}, "sept"),
    ]  # fmt: skip


def test_a_run_that_is_cancelled_outside_a_worker_stops_soon_and_keeps_its_rows(
    tmp_path: Path, model: LocalModel
) -> None:
    source, destination = write_numbers(tmp_path / "in.jsonl", 3000), str(tmp_path / "out.jsonl")
    process = start_batch(
        tmp_path, 1, {"model_id": model.model_id}, source=source, destination=destination, prompt=PROMPT,
        max_concurrency=2, options={"max_new_tokens": 60, "ignore_eos": True},
    )  # fmt: skip
    while len(read_answers(tmp_path, 1)) < 20 and process.poll() is None:
        time.sleep(0.05)
    with get_client(sync_client=True) as client:
        (run,) = [run for run in client.read_flow_runs(sort=NEWEST) if run.parameters.get("destination") == destination]
        client.set_flow_run_state(run.id, Cancelled(), force=True)
        began = time.monotonic()
        assert process.wait(60) != 0
        seconds = time.monotonic() - began
        assert client.read_flow_run(run.id).state.is_cancelled()  # type: ignore[union-attr]
    assert seconds < 15, seconds  # under load; alone it is less than 10
    assert not Path(destination).exists()
    assert Journal.beside(destination).count().rows > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_gone_for_good_does_not_keep_a_batch_from_ending(tmp_path: Path, model: LocalModel) -> None:
    services = PrefectServices(tmp_path / "home")
    services.home.mkdir()
    server = services.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(services.port))
    wait_until(services.is_healthy, 300, "the start of the Prefect server")
    source, destination = write_numbers(tmp_path / "in.jsonl", 120), tmp_path / "out.jsonl"
    settings = {"source": source, "destination": str(destination), "prompt": PROMPT, "max_concurrency": 2}
    slow = {"max_new_tokens": 60, "ignore_eos": True}
    with temporary_settings({PREFECT_API_URL: services.url}):
        process = start_batch(tmp_path, 1, {"model_id": model.model_id}, **settings, options=slow)
    while len(read_answers(tmp_path, 1)) < 20 and process.poll() is None:
        time.sleep(0.05)
    stop_process(server)
    wait_until(destination.exists, 180, "the publication")
    process.wait(600)  # Prefect tells its server of the end, several times
    summary = batch_inference(model, **settings, options=slow)
    assert (summary.succeeded, summary.resumed) == (120, 0)


def test_no_token_is_in_what_is_sent_to_another_process() -> None:
    credentials = HuggingFaceCredentials(token=CANARY)
    models = [
        LocalModel(model_id="a/b", backend="torch", credentials=credentials, options={"max_new_tokens": 5}),
        InferenceEndpoint(url="http://127.0.0.1:1", credentials=credentials, headers={"x-key": CANARY}),
    ]

    @flow
    def sends(models: list[Any]) -> tuple[bytes, list[Any]]:
        with lent_models(models) as lent:
            content = cloudpickle.dumps([lent, serialize_context()])
            return content, [each.borrow() for each in lent]

    content, borrowed = sends(models)
    assert CANARY.encode() not in content
    assert borrowed == models  # in this process they are themselves
    (lent, _) = cloudpickle.loads(content)
    there = lent[0].borrow()
    assert there.credentials.token is None
    assert there.options.model_fields_set == models[0].options.model_fields_set  # defaults stay defaults
    with pytest.raises(BatchError, match=r"are not saved, and no token travels"):
        lent[1].borrow()


def test_another_process_reads_a_token_from_its_saved_block() -> None:
    name = f"canary-{os.getpid()}"
    HuggingFaceCredentials(token=CANARY).save(name, overwrite=True)
    saved = HuggingFaceCredentials.load(name)
    with lent_models([InferenceEndpoint(url="http://127.0.0.1:1", credentials=saved)]) as lent:
        content = cloudpickle.dumps(lent)
    assert CANARY.encode() not in content
    (there,) = cloudpickle.loads(content)
    assert there.borrow().get_token() == CANARY


def test_a_flow_with_other_options_explains_as_well() -> None:
    other = batch_inference.with_options(name="other")
    with pytest.raises(ParameterTypeError, match="`source` must be a text, got a list of 3 rows. Write the rows"):
        other({"model_id": "a/b"}, [{"question": "a"}] * 3, "b.jsonl")


def test_a_parameter_that_is_not_there_is_named(model: LocalModel) -> None:
    with pytest.raises(ParameterTypeError, match="'batch-inference' has no parameter `sources`"):
        batch_inference.validate_parameters({"model": model, "sources": "in.jsonl"})


def test_values_that_are_too_large_are_named_and_not_repeated(model: LocalModel) -> None:
    with pytest.raises(ParameterTypeError, match="`inputs` has 600,0.* bytes") as found:
        prompt_chain(model, [{"name": "self", "prompt": "{text}"}], {"text": "x" * 600_000})
    assert len(str(found.value)) < 300


def test_names_that_python_uses_are_names_of_a_chain(model: LocalModel) -> None:
    steps = [{"name": "self", "prompt": "What is the capital of {cls}?"}, {"name": "end", "prompt": "{self}"}]
    assert prompt_chain(model, steps, {"cls": "France"})["self"] == "Paris"


def test_a_job_keeps_the_commit_that_it_began_with(tmp_path: Path, hub: LocalHub, tiny_llama: Path) -> None:
    files: dict[str, Any] = {path.name: path for path in tiny_llama.iterdir() if path.is_file()}
    repository = hub.create("org/tiny", files)
    first = repository.find("main")
    model = LocalModel(
        model_id="org/tiny", backend="torch", chat_template="never", store=ModelStore(path=tmp_path / "store"),
        credentials=HuggingFaceCredentials(endpoint=hub.endpoint), options=GenerationOptions(max_new_tokens=4),
    )  # fmt: skip
    source = write_numbers(tmp_path / "in.jsonl", 40)

    def run(name: str, **more: Any) -> Any:
        destination = str(tmp_path / name)
        batch_inference(model, source, destination, PROMPT, keep_journal="always", show_progress=False, **more)
        return (Journal.beside(destination).read_job() or {})["commits"]

    assert run("out.jsonl", rows=5) == [[first]]
    second = repository.commit({**files, "README.md": b"pushed meanwhile"})
    assert run("out.jsonl") == [[first]]
    assert len(read_rows(tmp_path / "out.jsonl")) == 40
    assert run("other.jsonl") == [[second]]
    assert second != first
