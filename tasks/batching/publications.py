"""From the journal to the output table: rows in input order, checked to be complete, published by a rename."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.batching.garbage import rare_collections
from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.batching.openai_responses import OpenAIBatchWriter, errors_place
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import (
    Chunk,
    TableFormat,
    check_unchanged,
    get_schema,
    read_chunks,
)
from prefect_huggingface.tasks.storage.tables.writers import open_writer

OUTPUT_COLUMNS = ("completion", "status", "finish_reason", "prompt_tokens", "generated_tokens", "seconds", "error")
SAMPLE_ROWS = 20
LENGTH_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how the output is written.

    Attributes:
        destination: File or URL.
        format: Format of the file.
        columns: Columns of the input to keep, or None for all.
        prefix: Put before the names of the columns that are added.
        timings: Whether the column `seconds` is filled. Times differ from run to run.
        fields: Columns for the values of structured answers, with their JSON types.
        reasoning: Column for the reasoning of the model, None where no row has any.
    """

    destination: str
    format: TableFormat
    columns: tuple[str, ...] | None = None
    prefix: str = ""
    timings: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    reasoning: str | None = None

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the columns that are added."""
        reasoning = () if self.reasoning is None else (self.reasoning,)
        return tuple(self.prefix + name for name in (*OUTPUT_COLUMNS, *reasoning, *self.fields))


@dataclass(slots=True)
class Publication:
    """What was published.

    Attributes:
        rows: Number of rows.
        statuses: Number of rows by status.
        failed: Number of rows with an error.
        generated_tokens: Number of tokens in all answers.
        shared: Number of rows that took the answer of another row.
        lengths: Number of rows by the number of their tokens, see `LENGTH_BOUNDS`.
        samples: First rows.
        failures: First rows that failed.
        errors_destination: Where the failed requests are, in the OpenAI batch format.
    """

    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    generated_tokens: int = 0
    shared: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    errors_destination: str | None = None

    def count(self, chunk: Chunk, answers: Any) -> None:
        """Count the answers of a chunk, and keep its first rows as samples."""
        import pyarrow.compute as pc

        self.rows += answers.num_rows
        for item in pc.value_counts(answers["status"]).to_pylist():
            self.statuses[item["values"]] += item["counts"]
        self.failed += answers.num_rows - answers["error"].null_count
        self.generated_tokens += pc.sum(answers["generated_tokens"]).as_py() or 0
        self.shared += pc.sum(answers["shared"]).as_py() or 0
        for item in pc.value_counts(answers["generated_tokens"]).to_pylist():
            self.lengths[max(bound for bound in LENGTH_BOUNDS if bound <= item["values"])] += item["counts"]
        if len(self.samples) < SAMPLE_ROWS:
            self.samples += _samples(chunk, answers.slice(0, SAMPLE_ROWS - len(self.samples)))
        if len(self.failures) < SAMPLE_ROWS and answers["error"].null_count < answers.num_rows:
            failed = answers.filter(pc.is_valid(answers["error"])).slice(0, SAMPLE_ROWS - len(self.failures))
            self.failures += _samples(chunk, failed)


def _samples(chunk: Chunk, answers: Any) -> list[dict[str, Any]]:
    names = ("row", "completion", "status", "generated_tokens", "error")
    return [
        {**chunk.rows[answer["row"] - chunk.first], **{name: answer[name] for name in names}}
        for answer in answers.select(names).to_pylist()
    ]


def publish_output(job: BatchJob, owner: JournalOwner, output: Output, replace: bool = False) -> Publication:
    """Write the output table from the input and the journal.

    Args:
        job: Job of the journal.
        owner: Owner of the journal with all rows of the job.
        output: Where and how to write it.
        replace: Whether an output that is there may be replaced.

    Raises:
        BatchError: If the journal lacks a row.
        TableError: If the input has changed, or the destination was taken meanwhile.
    """
    journal = owner.journal
    check_unchanged(job.table)
    publication = Publication()
    place = Place.of(output.destination)
    if job.table.format != "openai" and _has_reasoning(job, journal):
        kept = job.table.columns if output.columns is None else output.columns
        taken = {*kept, *output.added}
        names = ("reasoning", "completion_reasoning")
        output = replace_fields(output, reasoning=next(name for name in names if output.prefix + name not in taken))
    with ExitStack() as stack:
        stack.enter_context(rare_collections())
        path = stack.enter_context(place.published(replace))
        if job.table.format == "openai":
            errors = errors_place(place)
            publication.errors_destination = errors.url
            # An earlier attempt may have published the errors and not yet the responses.
            write = _openai_writer(stack, path, stack.enter_context(errors.published(True)), job, journal, output)
        else:
            write = _table_writer(stack, path, job, output)
        for chunk, answers in _answered(job, journal):
            publication.count(chunk, answers)
            write(chunk, answers)
        owner.check()
    owner.write_published({"sha256": place.digest()})
    return publication


def _has_reasoning(job: BatchJob, journal: Journal) -> bool:
    """Return whether any row has reasoning, looking at one segment at a time."""
    import pyarrow.compute as pc

    for name in journal.names():
        found = pc.match_substring(journal.load(name, job.key)["details"], '"reasoning": ')
        if pc.any(found).as_py():
            return True
    return False


def _answered(job: BatchJob, journal: Journal) -> Iterator[tuple[Chunk, Any]]:
    rows = JournalRows(journal, job.key)
    for chunk in read_chunks(job.table):
        answers = rows.take(chunk.first, chunk.first + len(chunk))
        if answers.num_rows != len(chunk):
            missing = len(chunk) - answers.num_rows
            raise BatchError(
                f"The journal {journal.place.url!r} lacks {missing} rows from row {chunk.first + 1} on. Start again."
            )
        yield chunk, answers


def _table_writer(stack: ExitStack, path: Path, job: BatchJob, output: Output) -> Callable[[Chunk, Any], None]:
    schema = get_schema(job.table) if output.format != "jsonl" else None
    writer = stack.enter_context(
        open_writer(path, output.format, output.columns, output.added, schema, _added_schema(output))
    )
    return lambda chunk, answers: writer.write(chunk, _added_columns(answers, output))


def _openai_writer(
    stack: ExitStack, path: Path, errors: Path, job: BatchJob, journal: Journal, output: Output
) -> Callable[[Chunk, Any], None]:
    created = (journal.read_job() or {}).get("created", 0) if output.timings else 0
    writer = OpenAIBatchWriter(path, errors, job.key, int(created))
    stack.callback(writer.close)
    return writer.write


def _added_schema(output: Output) -> Any:
    import pyarrow as pa

    kinds = {"prompt_tokens": pa.int32(), "generated_tokens": pa.int32(), "seconds": pa.float64()}
    json_kinds = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    names = (*OUTPUT_COLUMNS, *([output.reasoning] if output.reasoning else []))
    own = [(output.prefix + name, kinds.get(name, pa.string())) for name in names]
    fields = [(output.prefix + name, json_kinds.get(kind, pa.string())) for name, kind in output.fields.items()]
    return pa.schema([*own, *fields])


def _added_columns(answers: Any, output: Output) -> dict[str, Any]:
    import pyarrow as pa

    columns = {output.prefix + name: answers[name].combine_chunks() for name in OUTPUT_COLUMNS}
    if not output.timings:
        columns[f"{output.prefix}seconds"] = pa.nulls(answers.num_rows, pa.float64())
    if output.fields or output.reasoning:
        details = [json.loads(one) if one else {} for one in answers["details"].to_pylist()]
        if output.reasoning:
            thoughts = [one.get("reasoning") for one in details]
            columns[output.prefix + output.reasoning] = pa.array(thoughts, pa.string())
        values = [_parsed(one) for one in details]
        schema = _added_schema(output)
        for name in output.fields:
            kind = schema.field(output.prefix + name).type
            columns[output.prefix + name] = pa.array([_typed(value.get(name), kind) for value in values], kind)
    return columns


def _parsed(details: Mapping[str, Any]) -> Mapping[str, Any]:
    parsed = details.get("parsed")
    return parsed if isinstance(parsed, dict) else {}


def _typed(value: Any, kind: Any) -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return pa.scalar(value, kind).as_py()
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        OverflowError,
    ):  # a number that the column cannot hold; it is in the text
        return None


def get_fields(options: Sequence[Mapping[str, Any] | None]) -> dict[str, str]:
    """Return the properties of the JSON schema that the options ask for, with their types; later options win."""
    fields: dict[str, str] = {}
    for each in options:
        schema = ((each or {}).get("response_format") or {}).get("json_schema") or {}
        properties = schema.get("properties")
        if isinstance(properties, dict):
            fields = {name: _json_type(kind) for name, kind in properties.items()}
    return fields


def _json_type(schema: Any) -> str:
    """Return the type that a property has when it is not null, "string" where it may have several."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    names = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind not in (None, "null")]
    return names[0] if len(names) == 1 else "string"
