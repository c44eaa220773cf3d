"""Chains over tables: rows share the batch step by step, each finished step is kept, a failed one names itself."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.batching.job import (
    OUTPUT_COLUMNS,
    BatchJob,
    BatchOptions,
    describe_models,
    list_models,
    plan_job,
)
from prefect_huggingface.tasks.batching.output import choose_columns, plan_output, publish_output
from prefect_huggingface.tasks.batching.run import get_status, open_run
from prefect_huggingface.tasks.batching.shard import ShardResult, process_shard
from prefect_huggingface.tasks.errors import BatchError, ChainError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.journal import Journal, ResultRow
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table, read_chunks
from support.instant_engines import InstantEngine
from support.journals import claim_journal

MODEL = LocalModel(model_id="/no/such/model", backend="torch")
STEPS: list[dict[str, Any]] = [
    {"name": "person", "prompt": "Extract from {text}", "parser": "json"},
    {"name": "words", "prompt": "List {person_name} of {text}", "parser": "list"},
    {"name": "end", "prompt": "End {words} {id}"},
]


class ScriptedEngine(InstantEngine):
    """Answers the steps of the chain, and fails where the prompt says so."""

    def _answer(self, future: Future[Completion], request: Request) -> None:
        prompt = request.prompt or json.dumps(request.messages)
        assert self.prompts is not None
        self.prompts.append(prompt)
        if "broken" in prompt:
            future.set_result(Completion("", "error", 1, 0, 0.0, "It broke.", "engine_error", request.id))
            return
        text = {"Extract": json.dumps({"name": prompt[-3:]}), "List": "a, b"}.get(prompt.split()[0], prompt)
        future.set_result(Completion("no json" if "odd" in prompt else text, "stop", 5, 3, 0.5, request_id=request.id))


def engine() -> ScriptedEngine:
    made = ScriptedEngine()
    made.prompts = []
    return made


class Batch:
    """One batch of a chain in a folder."""

    def __init__(
        self, folder: Path, texts: list[str], steps: list[dict[str, Any]] = STEPS, suffix: str = "jsonl"
    ) -> None:
        source, self.destination = folder / "in.jsonl", folder / f"out.{suffix}"
        source.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
        more = BatchOptions(steps=steps)
        job = plan_job(str(source), None, None, None, more)
        self.job: BatchJob = describe_models(job, list_models(MODEL, more.steps or ()))
        self.output = choose_columns(self.job, plan_output(str(source), str(self.destination)))
        self.journal = Journal.beside(str(self.destination))

    def run(self, *engines: InstantEngine, **more: Any) -> list[ShardResult]:
        run = open_run(claim_journal(self.journal), self.job, BatchOptions(**more))
        return [process_shard(engines, shard) for shard in run.shards]

    def publish(self) -> list[dict[str, Any]]:
        publish_output(self.job, claim_journal(self.journal), self.output, replaceable=True)
        return [row for chunk in read_chunks(inspect_table(str(self.destination))) for row in chunk.rows]


def test_each_row_goes_through_the_chain_without_waiting_for_others(tmp_path: Path) -> None:
    batch, model = Batch(tmp_path, ["Ann", "Bob"]), engine()
    assert batch.run(model, max_concurrency=1)[0].complete
    assert model.prompts == [
        "Extract from Ann", "List Ann of Ann", "End ['a', 'b'] 0",
        "Extract from Bob", "List Bob of Bob", "End ['a', 'b'] 1",
    ]  # fmt: skip
    rows = batch.publish()
    assert list(rows[0]) == [
        "id", "text", "person", "words", "end", "status", "finish_reason", "prompt_tokens", "generated_tokens",
        "seconds", "error",
    ]  # fmt: skip
    assert [(row["person"], row["words"], row["end"]) for row in rows] == [
        ({"name": "Ann"}, ["a", "b"], "End ['a', 'b'] 0"), ({"name": "Bob"}, ["a", "b"], "End ['a', 'b'] 1"),
    ]  # fmt: skip
    assert (rows[0]["prompt_tokens"], rows[0]["generated_tokens"], rows[0]["status"]) == (15, 9, "ok")
    assert get_status(str(batch.destination)).finished == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_steps_may_be_named_as_what_the_journal_keeps(tmp_path: Path, suffix: str) -> None:
    names = [name for name in (*ResultRow._fields, "epoch", "completion_0") if name not in OUTPUT_COLUMNS[1:]]
    steps = [{"name": name, "prompt": f"{name} of {{text}}"} for name in names]
    batch = Batch(tmp_path, ["Ann", "broken"], steps, suffix)
    batch.run(engine())
    rows = batch.publish()
    assert [rows[0][name] for name in names] == [f"{name} of Ann" for name in names]
    assert not any(rows[1][name] for name in names)
    publication = publish_output(batch.job, claim_journal(batch.journal), batch.output, replaceable=True)
    assert [sample["row"] for sample in publication.samples] == [0, 1]
    assert publication.samples[0]["details"] == "details of Ann"
    assert [(failure["row"], failure["status"]) for failure in publication.failures] == [(1, "engine_error")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_outputs_of_parsers_are_json_where_a_format_has_no_values(tmp_path: Path, suffix: str) -> None:
    batch = Batch(tmp_path, ["Ann"], suffix=suffix)
    batch.run(engine())
    (row,) = batch.publish()
    assert (row["person"], row["words"]) == ('{"name":"Ann"}', '["a","b"]')


def test_a_failed_step_is_the_error_of_its_row_and_is_retried_alone(tmp_path: Path) -> None:
    batch, model = Batch(tmp_path, ["Ann", "broken", "odd", "Eve"]), engine()
    batch.run(model)
    rows = batch.publish()
    assert [row["status"] for row in rows] == ["ok", "engine_error", "schema_invalid", "ok"]
    assert rows[1]["error"] == "Step 'person': It broke."
    assert "output of step 'person' is not json: 'no json'" in rows[2]["error"]
    assert (rows[1]["person"], rows[2]["end"]) == (None, None)
    assert batch.journal.count().failed == 2

    class Mended(ScriptedEngine):
        def _answer(self, future: Future[Completion], request: Request) -> None:
            prompt = str(request.prompt).replace("broken", "Ben").replace("odd", "Odo")
            super()._answer(future, Request(prompt=prompt, id=request.id))

    again = Mended()
    again.prompts = []
    assert batch.run(engine()) == []  # without being asked, nothing is generated again
    batch.run(again, retry_failed=True)
    assert [prompt for prompt in again.prompts if "Ann" in prompt or "Eve" in prompt] == []
    assert [row["status"] for row in batch.publish()] == ["ok"] * 4


def test_a_chain_goes_on_at_the_step_where_it_was_cut(tmp_path: Path) -> None:
    class Failing(ScriptedEngine):
        """Is closed after some answers."""

        def _answer(self, future: Future[Completion], request: Request) -> None:
            if len(self.prompts or ()) < 250:
                super()._answer(future, request)
            else:
                future.set_result(Completion("", "cancelled", error_code="cancelled", request_id=request.id))

    texts = [f"n{number:03}" for number in range(100)]
    whole = Batch(tmp_path, texts)
    whole.run(engine())
    expected = whole.publish()
    (tmp_path / "cut").mkdir()
    batch, first, second = Batch(tmp_path / "cut", texts), Failing(), engine()
    first.prompts = []
    with pytest.raises(Exception, match="closed while the batch ran"):
        batch.run(first)
    batch.run(second)
    assert not set(first.prompts) & set(second.prompts)
    assert len(first.prompts) + len(second.prompts) == 300
    assert batch.publish() == expected


class GivenEngine(ScriptedEngine):
    """Answers the first step with a given text or completion, and tells what it was asked."""

    given: str | Completion = ""

    def _answer(self, future: Future[Completion], request: Request) -> None:
        if not str(request.prompt).startswith("Extract"):
            super()._answer(future, request)
        elif isinstance(self.given, Completion):
            future.set_result(replace(self.given, request_id=request.id))
        else:
            future.set_result(Completion(self.given, "stop", 5, 3, request_id=request.id))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann"}}',
        "[1, 2]]",
        '{"a": 1]',
        "Sure :]",
        '```json\n{"name": "Ann"}}\n```',
        "[" * 1000,
        "[" * 500 + "]" * 500,
    ],
)
def test_what_is_no_json_is_the_error_of_the_row(tmp_path: Path, text: str) -> None:
    batch, model = Batch(tmp_path, ["Ann"]), GivenEngine()
    model.prompts, model.given = [], text
    batch.run(model)
    (row,) = batch.publish()
    assert row["status"] == "schema_invalid"
    assert "output of step 'person' is not json" in row["error"]
    assert model.prompts == []


@pytest.mark.parametrize("text", ["null", "```json\nnull\n```", '{"name": null}'])
def test_null_is_json(tmp_path: Path, text: str) -> None:
    batch, model = Batch(tmp_path, ["Ann"], STEPS[:1]), GivenEngine()
    model.given = text
    batch.run(model)
    assert batch.publish()[0]["status"] == "ok"


@pytest.mark.parametrize("reason", ["skipped", "deadline"])
@pytest.mark.parametrize(("parser", "kept"), [("text", '{"a": "b'), ("json", None)])
def test_a_chain_ends_at_a_step_that_was_not_answered_whole(
    tmp_path: Path, reason: Any, parser: str, kept: str | None
) -> None:
    first = {"name": "first", "prompt": "Extract from {text}", "parser": parser}
    steps = [first, {"name": "second", "prompt": "Title of {first}"}]
    batch, model = Batch(tmp_path, ["Ann", "Ann"], steps), GivenEngine()
    model.prompts, model.given = [], Completion('{"a": "b', reason, 5, 1)
    batch.run(model, max_concurrency=1)
    rows = batch.publish()
    assert [(row["status"], row["first"], row["second"]) for row in rows] == [(reason, kept, None)] * 2
    assert model.prompts == []


def test_a_journal_with_an_output_that_is_refused_now_goes_on(tmp_path: Path) -> None:
    batch, model = Batch(tmp_path, ["Ann", "Bob"]), engine()
    open_run(claim_journal(batch.journal), batch.job, BatchOptions())
    row = {"completion": "[1, 2]]", "finish_reason": "stop", "is_last": False}
    batch.journal.append(1, "00000000", 0, batch.job.key, [ResultRow(0, 0, **row)])
    batch.run(model)
    assert model.prompts[0] == "Extract from Ann"
    assert [each["status"] for each in batch.publish()] == ["ok", "ok"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_row_with_a_step_that_was_damaged_is_generated_again(tmp_path: Path, lost: int, fails: bool) -> None:
    batch = Batch(tmp_path, ["Ann", "Bob"])
    open_run(claim_journal(batch.journal), batch.job)
    texts = ['{"name": "old"}', "old, older", "the old end"]
    names = [
        batch.journal.append(
            1, "00000000", step, batch.job.key,
            [ResultRow(row, step, text, "ok", "stop", 1, 1, is_last=step == 2) for row in range(2)],
        )
        for step, text in enumerate(texts)
    ]  # fmt: skip
    place = batch.journal.segments.child(str(names[lost]))
    place.write(place.read()[:-1] + b"x")
    model = engine()
    if fails:
        model._answer = lambda future, request: future.set_result(  # type: ignore[method-assign]
            Completion("", "error", 1, 0, error="It broke.", error_code="engine_error", request_id=request.id)
        )
    assert batch.run(model)[0].complete
    rows = batch.publish()
    assert get_status(str(batch.destination)).finished == 2
    if fails:
        assert [row["status"] for row in rows] == ["engine_error"] * 2
        assert [row[name] for row in rows for name in ("person", "words", "end")][lost::3] == [None] * 2
        batch.run(engine(), retry_failed=True)
        rows = batch.publish()
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert [row["person"]["name"] == "old" for row in rows] == [lost > 0] * 2
    assert [row["words"] == ["old", "older"] for row in rows] == [lost > 1] * 2
    assert [row["end"].split()[-1] for row in rows] == ["0", "1"]


def test_equal_steps_of_rows_are_asked_once(tmp_path: Path) -> None:
    batch, model = Batch(tmp_path, ["Ann"] * 1000, STEPS[:2]), engine()
    batch.run(model)
    assert model.prompts == ["Extract from Ann", "List Ann of Ann"]
    assert len(batch.publish()) == 1000


def test_a_field_that_the_json_lacks_is_the_error_of_the_row(tmp_path: Path) -> None:
    steps = [STEPS[0], {"name": "age", "prompt": "{person_age}"}]
    batch = Batch(tmp_path, ["Ann"], steps)
    batch.run(engine())
    (row,) = batch.publish()
    assert row["status"] == "missing_value"
    assert "Step 'age': {person_age} is not there" in row["error"]


def test_steps_name_other_models(tmp_path: Path) -> None:
    other = {"model_id": "/no/other", "backend": "torch"}
    steps = [{"name": "a", "prompt": "{text}"}, {"name": "b", "prompt": "{a}!", "model": other, "options": {"n": 1}}]
    batch, first, second = Batch(tmp_path, ["Ann"], steps), engine(), engine()
    batch.run(first, second)
    assert (first.prompts, second.prompts) == (["Ann"], ["Ann!"])
    # Once the models are resolved, it is another job if one of them is another, and still the same call.
    jobs = [replace(batch.job, models=({"export": "a"}, {"export": name})) for name in ("b", "c")]
    assert len({job.key for job in jobs}) == 2
    assert {job.call_key(batch.output) for job in jobs} == {batch.job.call_key(batch.output)}
    assert batch.publish()[0]["b"] == "Ann!"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"name": "a", "prompt": "{town}"}], r"Step 'a' uses \{town\}"),
        ([{"name": "a", "prompt": "{b}"}, {"name": "b", "prompt": "x"}], r"Step 'a' uses \{b\}"),
        ([{"name": "text", "prompt": "x"}], "'text' is used twice"),
        ([{"name": "status", "prompt": "x"}], "columns .'status'. that the output adds"),
        ([{"name": "a", "prompt": "{text"}], "not a prompt template"),
    ],
)
def test_a_chain_that_does_not_fit_the_table_is_refused(tmp_path: Path, steps: Any, message: str) -> None:
    with pytest.raises((BatchError, ChainError), match=message):
        Batch(tmp_path, ["Ann"], steps)


def test_a_chain_keeps_company_with_no_other_way_to_ask(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="Only one of .* got `prompt` and `steps`"):
        plan_job(str(tmp_path), "{text}", more=BatchOptions(steps=STEPS))
    with pytest.raises(BatchError, match="Give the steps `options`"):
        plan_job(str(tmp_path), None, options=GenerationOptions(), more=BatchOptions(steps=STEPS, option_columns=["n"]))
