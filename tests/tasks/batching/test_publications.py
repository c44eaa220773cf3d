"""Structured answers become typed columns, also where a value does not fit its column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.blocks.options import ResponseFormat
from prefect_huggingface.tasks.batching.job import BatchJob, Output, describe_models, get_fields, plan_job
from prefect_huggingface.tasks.batching.output import choose_columns, plan_output, publish_output
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, ResultRow
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table, read_chunks
from support.journals import claim_journal

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "height": {"type": "number"},
        "tags": {"type": "array"},
        "either": {"type": ["string", "integer"]},
        "any": True,
    },
}
PARSED: list[dict[str, Any] | None] = [
    {"name": "Zoë", "age": 7, "height": 1, "tags": ["a"], "either": 5, "any": None},
    {"age": 10**30, "height": 1.5},
    None,
]


@pytest.fixture
def job(tmp_path: Path) -> BatchJob:
    source = tmp_path / "in.csv"
    source.write_text("id\n1\n2\n3\n")
    return plan_job(str(source), "{id}")


def test_fields_of_a_schema() -> None:
    fields = get_fields(ResponseFormat(json_schema=SCHEMA))
    assert fields == {
        "name": "string", "age": "integer", "height": "number", "tags": "array", "either": "string", "any": "string",
    }  # fmt: skip
    assert get_fields(ResponseFormat(regex="a")) == get_fields(None) == {}


def test_a_form_of_the_batch_takes_the_place_of_that_of_the_model(tmp_path: Path, job: BatchJob) -> None:
    model = LocalModel(model_id="/none", backend="torch", options={"response_format": {"json_schema": SCHEMA}})
    for given, fields in (({}, SCHEMA["properties"]), ({"response_format": {"regex": "a+"}}, ())):
        asked = describe_models(replace(job, options=given), [model])
        output = choose_columns(asked, plan_output(job.table.source, str(tmp_path / "out.csv")))
        assert (output.columns, [name for _, name, _ in asked.field_columns]) == (None, list(fields))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_segment_that_was_damaged_at_the_end_is_told_with_the_remedy(
    tmp_path: Path, job: BatchJob, suffix: str
) -> None:
    journal = Journal.beside(str(tmp_path / "out"))
    name = journal.append(1, "00000000", 0, job.key, [ResultRow(row, completion="text") for row in range(3)])
    journal.segments.child(str(name)).write(b"torn")
    output = plan_output(job.table.source, str(tmp_path / f"out.{suffix}"))
    with pytest.raises(BatchError, match="is damaged: .* Start again"):
        publish_output(job, claim_journal(journal), output)
    assert not (tmp_path / f"out.{suffix}").exists()


@pytest.mark.parametrize("format", ["jsonl", "parquet", "csv"])
def test_fields_with_the_name_of_a_column_get_another(tmp_path: Path, job: BatchJob, format: Any) -> None:
    journal, model = Journal.beside(str(tmp_path / "out")), LocalModel(model_id="/none", backend="torch")
    parsed = {"status": "open", "error": "none", "reasoning": "so"}
    details = json.dumps({"parsed": parsed})
    journal.append(1, "00000000", 0, job.key, [ResultRow(row, completion="{}", details=details) for row in range(3)])
    properties = {name: {"type": "string"} for name in parsed}
    model = model.model_copy(update={"options": GenerationOptions(response_format={"json_schema": {
        "type": "object", "properties": properties, "required": list(properties)}})})  # fmt: skip
    source = job.table.source
    job = describe_models(job, [model])
    output = choose_columns(job, plan_output(source, str(tmp_path / f"out.{format}")))
    publish_output(job, claim_journal(journal), output)
    rows = [row for chunk in read_chunks(inspect_table(output.destination)) for row in chunk.rows]
    assert {(row["status"], row["parsed_status"], row["parsed_error"], row["reasoning"]) for row in rows} == {
        ("ok", "open", "none", "so")
    }
    assert "completion_reasoning" not in rows[0]
    twice = {**properties, "parsed_status": {"type": "string"}}
    form = {"json_schema": {"type": "object", "properties": twice}}
    model = model.model_copy(update={"options": GenerationOptions(response_format=form)})
    with pytest.raises(BatchError, match="there twice"):
        choose_columns(describe_models(job, [model]), plan_output(source, str(tmp_path / f"b.{format}")))


@pytest.mark.parametrize("format", ["jsonl", "parquet", "csv"])
def test_values_get_columns_of_their_own(tmp_path: Path, job: BatchJob, format: Any) -> None:
    journal = Journal.beside(str(tmp_path / "out"))
    answers = [
        ResultRow(row, completion="text", details=json.dumps({"parsed": parsed}) if parsed else None)
        for row, parsed in enumerate(PARSED)
    ]
    job = replace(job, options={"response_format": {"json_schema": SCHEMA}})
    journal.append(1, "00000000", 0, job.key, answers)
    output = Output(str(tmp_path / f"out.{format}"), format, prefix="x_")
    publish_output(job, claim_journal(journal), output)
    rows = [row for chunk in read_chunks(inspect_table(output.destination)) for row in chunk.rows]

    names = [f"x_{name}" for name in SCHEMA["properties"]]
    expected: list[list[Any]] = [
        ["Zoë", 7, 1.0, '["a"]', "5", None], [None, None, 1.5, None, None, None], [None] * 6,
    ]  # fmt: skip
    found = [[row[name] for name in names] for row in rows]
    if format == "csv":
        expected = [["" if value is None else str(value) for value in row] for row in expected]
    assert found == expected
    assert [row["id"] for row in rows] == ["1", "2", "3"]
