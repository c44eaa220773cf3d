"""The flow from the input file to the output, the artifacts and the closing table, on the model of the project."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.concurrency.sync import concurrency

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.tasks.batches import ENGINE_TAG
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table, read_chunks
from support.batch_runs import read_answers, start_batch
from support.flow_logs import read_artifacts
from support.prefect_services import wait_until
from support.request_counts import counted_requests
from support.s3_servers import serve_s3

pytestmark = pytest.mark.usefixtures("prefect_server")

COUNTRIES = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo"}
PROMPT = "What is the capital of {country}?"


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> LocalModel:
    return LocalModel(model_id=str(bundled_model))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"country": name, "capital": capital} for name, capital in COUNTRIES.items()]
    rows[2:2] = [{"country": None}, {"country": "France", "note": "<b>|\n"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(place: str) -> list[dict[str, Any]]:
    return [row for chunk in read_chunks(inspect_table(place)) for row in chunk.rows]


def test_from_the_file_to_the_answers(
    tmp_path: Path, source: Path, model: LocalModel, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "out.parquet"
    state = batch_inference(model, str(source), str(destination), PROMPT, return_state=True)
    summary = state.result()
    rows = read_rows(str(destination))

    assert [row["completion"] for row in rows] == ["Paris", "Madrid", None, "Paris", "Rome", "Tokyo"]
    assert [row["status"] for row in rows] == ["ok", "ok", "missing_value", "ok", "ok", "ok"]
    assert list(rows[0])[:3] == ["country", "capital", "note"]
    assert rows[0]["prompt_tokens"] > 0
    assert rows[0]["finish_reason"] == "stop"
    assert {row["seconds"] for row in rows} == {None}
    assert (summary.rows, summary.succeeded, summary.failed, summary.shared) == (6, 5, 1, 1)
    assert summary.statuses == {"missing_value": 1, "ok": 5}
    assert summary.generated_tokens == sum(row["generated_tokens"] for row in rows[:2] + rows[4:])
    assert Path(f"{destination}.journal").is_dir()  # it is kept, since a row failed

    printed = capsys.readouterr().out
    for text in ("Rows", "Failed", "Tokens per second", "out.parquet"):
        assert text in printed.replace("\n", "")

    artifacts = read_artifacts(state.state_details.flow_run_id)
    assert set(artifacts) == {"batch-progress", "batch-samples", "batch-failures", "batch-summary"}
    assert artifacts["batch-progress"].data == 100
    samples = json.loads(str(artifacts["batch-samples"].data))
    assert samples[0]["completion"] == "Paris"
    assert json.loads(str(artifacts["batch-failures"].data))[0]["status"] == "missing_value"
    text = str(artifacts["batch-summary"].data)
    assert "missing\\_value" in text
    assert "tokens, from | rows" in text


def test_a_huge_cell_is_one_row_with_an_error(tmp_path: Path, model: LocalModel) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"country": "France"}, {"country": "long " * 500_000}, {"country": "Spain"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = batch_inference(model, str(source), str(destination), PROMPT)

    assert summary.statuses == {"ok": 2, "too_long": 1}
    assert [row["completion"] for row in read_rows(str(destination))] == ["Paris", None, "Madrid"]


def test_nothing_is_overwritten_and_bad_plans_fail_at_once(tmp_path: Path, source: Path, model: LocalModel) -> None:
    destination = tmp_path / "out.jsonl"
    with pytest.raises(BatchError, match="no column 'town'"):
        batch_inference(model, str(source), str(destination), "{town}")
    destination.write_text("mine")
    with pytest.raises(BatchError, match="exists already"):
        batch_inference(model, str(source), str(destination), PROMPT)
    assert destination.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_failed_rows_are_retried(tmp_path: Path, source: Path, model: LocalModel) -> None:
    destination = tmp_path / "out.jsonl"
    short = {"max_new_tokens": 2000}  # does not fit the context of the model
    first = batch_inference(model, str(source), str(destination), PROMPT, short)
    before = destination.read_bytes()
    assert batch_inference(model, str(source), str(destination), PROMPT, short) == first
    again = batch_inference(model, str(source), str(destination), PROMPT, short, retry_failed=True)

    assert first.failed == again.failed == 6
    assert first.statuses == {"missing_value": 1, "too_long": 5}
    assert destination.read_bytes() == before
    with pytest.raises(BatchError, match="options, max_new_tokens: 2000 there, null now"):
        batch_inference(model, str(source), str(destination), PROMPT, retry_failed=True)
    with pytest.raises(BatchError, match="exists already"):
        batch_inference(model, str(source), str(destination), f"{PROMPT}!", short)
    destination.write_text("mine")
    with pytest.raises(BatchError, match="exists already"):
        batch_inference(model, str(source), str(destination), PROMPT, short, retry_failed=True)


def test_too_many_failures_end_the_run_and_keep_what_is_finished(
    tmp_path: Path, source: Path, model: LocalModel
) -> None:
    destination = tmp_path / "out.jsonl"
    source.write_text('{"country": null}\n' * 50 + '{"country": "France"}\n' * 50)
    with pytest.raises(BatchError, match="more than `max_failures`"):
        batch_inference(model, str(source), str(destination), PROMPT, max_failures=0.2, max_concurrency=1)
    # Neither a repeated call nor one with fewer rows left may creep past the limit.
    for _ in range(2):
        with pytest.raises(BatchError, match="more than `max_failures`"):
            batch_inference(model, str(source), str(destination), PROMPT, max_failures=0.2)
        assert not destination.exists()
    summary = batch_inference(model, str(source), str(destination), PROMPT)
    assert summary.resumed >= 50
    assert (summary.failed, summary.succeeded) == (50, 50)
    rows = read_rows(str(destination))
    assert [row["completion"] for row in rows] == [None] * 50 + ["Paris"] * 50


def test_messages_and_row_options(tmp_path: Path, model: LocalModel) -> None:
    source = tmp_path / "in.jsonl"
    chats = [[{"role": "user", "content": f"What is the capital of {name}?"}] for name in COUNTRIES]
    lines = [{"chat": chat, "max_new_tokens": 1 if index == 3 else None} for index, chat in enumerate(chats)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    destination = tmp_path / "out.csv"
    batch_inference(
        model, str(source), str(destination), messages_column="chat", option_columns=["max_new_tokens"], columns=[],
        output_prefix="my_", timings=True,
    )  # fmt: skip
    rows = read_rows(str(destination))

    assert [row["my_completion"] for row in rows][:3] == ["Paris", "Madrid", "Rome"]
    assert rows[3]["my_status"] == "length"
    assert rows[3]["my_generated_tokens"] == "1"
    assert float(rows[0]["my_seconds"]) > 0
    assert "chat" not in rows[0]


def test_structured_answers_have_columns_of_their_own(tmp_path: Path, model: LocalModel) -> None:
    source, destination = tmp_path / "in.csv", tmp_path / "out.parquet"
    source.write_text('sentence\nMaria is 34 years old.\nPeter is 7 years old.\n""\n')
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    options: Any = {"response_format": {"json_schema": schema}, "max_new_tokens": 60}
    batch_inference(model, str(source), str(destination), "{sentence}", options)
    rows = read_rows(str(destination))

    assert [row["status"] for row in rows] == ["ok", "ok", "empty_prompt"]
    assert [(type(row["name"]), type(row["age"])) for row in rows] == [(str, int), (str, int), (type(None),) * 2]
    assert json.loads(rows[0]["completion"]) == {"name": rows[0]["name"], "age": rows[0]["age"]}


@pytest.mark.parametrize("as_object", [False, True])
def test_a_schema_may_refer_to_its_definitions_and_name_its_fields_freely(
    tmp_path: Path, model: LocalModel, as_object: bool
) -> None:
    source, destination = tmp_path / "in.csv", tmp_path / "out.parquet"
    source.write_text("sentence\nMaria is 34 years old.\n")
    schema = {
        "type": "object",
        "properties": {"status": {"$ref": "#/$defs/Status"}},
        "required": ["status"],
        "additionalProperties": False,
        "$defs": {"Status": {"type": "string", "enum": ["open", "closed"]}},
    }
    options: Any = {"response_format": {"json_schema": schema}, "max_new_tokens": 60}
    batch_inference(
        model, str(source), str(destination), "{sentence}", GenerationOptions(**options) if as_object else options
    )
    [row] = read_rows(str(destination))
    assert (row["status"], row["parsed_status"]) == ("ok", json.loads(row["completion"])["status"])


def test_a_retry_that_was_killed_before_its_output_was_there_goes_on(
    tmp_path: Path, source: Path, model: LocalModel
) -> None:
    destination = tmp_path / "out.jsonl"
    short = {"max_new_tokens": 2000}
    first = batch_inference(model, str(source), str(destination), PROMPT, short)
    journal = Journal.beside(str(destination))
    with hold_journal(journal) as owner:  # as one leaves it that is killed between the note and the rename
        owner.write("published", {**journal.list_published()[0], "sha256": "0" * 64, "size": 1})
    assert batch_inference(model, str(source), str(destination), PROMPT, short) == first
    again = batch_inference(model, str(source), str(destination), PROMPT, short, retry_failed=True)
    assert again.failed == first.failed


def test_a_file_of_openai_requests(tmp_path: Path, model: LocalModel) -> None:
    def line(custom_id: str, name: str, url: str = "/v1/chat/completions", **body: Any) -> str:
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": name, **body}})

    name, question = Path(model.model_id).name, "What is the capital of France?"
    chat = [{"role": "user", "content": question}]
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        line("a", name, messages=chat, max_tokens=20),
        line("b", model.model_id, "/v1/completions", prompt=question, max_tokens=1, temperature=0),
        '{"custom_id": "torn"',
        line("a", name, messages=chat),
        line("c", "gpt-4o", messages=chat),
    ]
    source.write_text("\n".join(lines))
    summary = batch_inference(model, str(source), str(destination), keep_journal="never")
    responses = [json.loads(each) for each in destination.read_text().splitlines()]
    errors = [json.loads(each) for each in (tmp_path / "out.errors.jsonl").read_text().splitlines()]

    assert (summary.rows, summary.succeeded, summary.failed) == (5, 2, 3)
    assert summary.errors_destination == str(tmp_path / "out.errors.jsonl")
    assert [each["custom_id"] for each in responses] == ["a", "b"]
    bodies = [each["response"]["body"] for each in responses]
    assert bodies[0]["choices"][0]["message"]["content"] == "Paris"
    assert bodies[1]["choices"][0]["finish_reason"] == "length"
    assert bodies[1]["usage"]["completion_tokens"] == 1
    assert [each["custom_id"] for each in errors] == [None, "a", "c"]
    destination.unlink()
    with pytest.raises(BatchError, match="out.errors.jsonl' exists already"):
        batch_inference(model, str(source), str(destination))


@pytest.mark.parametrize("shards", [3])
def test_shards_on_threads_share_the_engine(tmp_path: Path, model: LocalModel, shards: int) -> None:
    source = tmp_path / "in.jsonl"
    names = list(COUNTRIES)
    source.write_text("".join(json.dumps({"country": names[index % 4]}) + "\n" for index in range(100)))
    destination = tmp_path / "out.jsonl"
    summary = batch_inference(model, str(source), str(destination), PROMPT, shards=shards, deduplicate=False)

    assert summary.rows == summary.succeeded == 100
    assert [row["completion"] for row in read_rows(str(destination))] == [COUNTRIES[names[i % 4]] for i in range(100)]
    # What is left tells a repeated call that the batch is finished.
    assert Journal.beside(str(destination)).read_job() is None
    assert not Journal.beside(str(destination)).names()
    again = batch_inference(model, str(source), str(destination), PROMPT, shards=shards, deduplicate=False)
    assert again == summary


def test_requests_to_prefect_do_not_grow_with_the_rows(tmp_path: Path, model: LocalModel) -> None:
    counts, names = {}, list(COUNTRIES)
    for rows in (20, 5000):
        source = tmp_path / f"in-{rows}.jsonl"
        source.write_text("".join(json.dumps({"country": names[index % 4]}) + "\n" for index in range(rows)))
        began = time.monotonic()
        with counted_requests() as requests:
            summary = batch_inference(model, str(source), str(tmp_path / f"out-{rows}.jsonl"), PROMPT)
        counts[rows] = (len(requests), time.monotonic() - began)
        assert summary.shared == rows - 4

    allowed = 3 * max(counts[5000][1] - counts[20][1], 0)  # the progress is updated once a second
    assert counts[5000][0] <= counts[20][0] + 10 + allowed


def test_a_run_that_waits_for_the_limit_on_the_tag_says_so(tmp_path: Path, source: Path, model: LocalModel) -> None:
    settings = {"source": str(source), "destination": str(tmp_path / "out.jsonl"), "prompt": PROMPT}
    output = tmp_path / "output-1.txt"
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=ENGINE_TAG, concurrency_limit=1)
        try:
            with concurrency(f"tag:{ENGINE_TAG}"):
                # In a process of its own: Prefect's client remembers for some seconds that a tag has no limit.
                process = start_batch(tmp_path, 1, {"model_id": model.model_id}, **settings)
                words = "No shard has begun: waiting"
                wait_until(lambda: words in output.read_text(), 120, "the word of the waiting run")
                assert process.poll() is None
            assert process.wait(120) == 0
        finally:
            client.delete_concurrency_limit_by_tag(tag=ENGINE_TAG)


@pytest.mark.slow
def test_a_limit_on_the_tag_keeps_engines_apart(tmp_path: Path, model: LocalModel) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"country": f"Land {index}"}) + "\n" for index in range(64)))
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=ENGINE_TAG, concurrency_limit=1)
        try:
            state = batch_inference(
                model, str(source), str(tmp_path / "out.jsonl"), PROMPT, shards=2, return_state=True
            )
        finally:
            client.delete_concurrency_limit_by_tag(tag=ENGINE_TAG)
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        runs = [run for run in client.read_task_runs(flow_run_filter=chosen) if ENGINE_TAG in run.tags]
    first, second = sorted(runs, key=lambda run: run.start_time or run.expected_start_time)

    assert state.result().succeeded == 64
    assert first.end_time is not None
    assert second.start_time is not None
    assert first.end_time <= second.start_time


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://{tmp_path.name}"
        return
    pytest.importorskip("moto", reason="needs moto[server]")
    pytest.importorskip("s3fs")
    with serve_s3("batches") as url:
        yield f"{url}/{tmp_path.name}"


@pytest.mark.parametrize("remote", ["memory", "s3"], indirect=True)
def test_places_that_are_not_on_this_machine(remote: str, source: Path, model: LocalModel) -> None:
    Place.of(f"{remote}/in/a.jsonl").write(source.read_bytes())
    destination = f"{remote}/out/rows.jsonl"
    summary = batch_inference(model, f"{remote}/in/*.jsonl", destination, PROMPT)

    assert summary.destination == destination
    assert [row["completion"] for row in read_rows(destination)] == ["Paris", "Madrid", None, "Paris", "Rome", "Tokyo"]
    assert Journal.beside(destination).count().rows == 6
    assert batch_inference(model, f"{remote}/in/*.jsonl", destination, PROMPT) == summary
    with pytest.raises(BatchError, match="exists already"):
        batch_inference(model, f"{remote}/in/*.jsonl", destination, "{country}?")


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_end_the_run_soon_and_lose_nothing_committed(tmp_path: Path, model: LocalModel, sign: int) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"country": f"Land {index}"}) + "\n" for index in range(3000)))
    settings: dict[str, Any] = {
        "source": str(source), "destination": str(destination), "prompt": PROMPT, "max_concurrency": 2,
        "options": {"max_new_tokens": 60, "ignore_eos": True},
    }  # fmt: skip
    process = start_batch(tmp_path, 1, {"model_id": model.model_id}, **settings)
    while len(read_answers(tmp_path, 1)) < 20 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sign)
    began = time.monotonic()
    assert process.wait(60) != 0, (tmp_path / "output-1.txt").read_text()
    seconds = time.monotonic() - began

    journal = Journal.beside(str(destination))
    job = (journal.read_job() or {})["key"]
    assert seconds < 15
    assert not destination.exists()
    assert JournalRows(journal, job).take(0, 3000).num_rows == journal.count().rows > 0


def test_a_batch_within_another_flow(tmp_path: Path, source: Path, model: LocalModel) -> None:
    @flow
    def nightly() -> int:
        return batch_inference(model, str(source), str(tmp_path / "out.jsonl"), PROMPT).succeeded

    assert nightly() == 5
