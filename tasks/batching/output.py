"""The output of a batch: where it may go, and how it is made of the journal.

Rows come in input order, are checked to be complete, and are published by a rename. What is about to be published is
noted in the journal first. A run that is killed right after finds there that it was finished, whatever it had still to
do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from prefect_huggingface.tasks.artifacts import escape_markdown, markdown_table, publish_markdown, publish_table
from prefect_huggingface.tasks.batching.job import OUTPUT_COLUMNS, BatchJob, BatchOptions, Output
from prefect_huggingface.tasks.batching.requests import ChainStep, parse_output, read_line
from prefect_huggingface.tasks.batching.run import STATUSES, Progress
from prefect_huggingface.tasks.errors import BatchError, ChainError
from prefect_huggingface.tasks.openai_protocol import BodyError, check_all
from prefect_huggingface.tasks.progress import summary_lines
from prefect_huggingface.tasks.records import BatchSummary, Completion
from prefect_huggingface.tasks.storage.files import hash_file
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner
from prefect_huggingface.tasks.storage.places import Place, is_pattern
from prefect_huggingface.tasks.storage.tables.inputs import (
    Chunk,
    Rows,
    check_unchanged,
    get_format,
    get_schema,
    read_chunks,
)
from prefect_huggingface.tasks.storage.tables.writers import check_types, open_writer, to_json

VECTOR_FORMATS = ("parquet", "arrow", "jsonl")
BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "r2", "oss")
TEMPORARY_CHARACTERS = 32  # what a temporary file's name has besides that of the output
LEAST_FREE_BYTES = 16 * 2**20
SAMPLE_ROWS = 20
LENGTH_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def plan_output(source: str, destination: str) -> Output:
    """Check where the output goes, before the input is read.

    Raises:
        BatchError: If the destination is a part of the input, is a folder, or cannot be written.
        TableError: If its format is not known.
    """
    place = Place.of(destination)
    format, compression = get_format(place.name)
    if compression:
        raise BatchError(f"`destination` must not be compressed, got {destination!r}. Use Parquet for a small output.")
    if format == "json":
        raise BatchError(f"`destination` cannot be a JSON array, got {destination!r}. Use .jsonl, .csv or .parquet.")
    if place.is_folder():
        raise BatchError(f"`destination` must be a file, got the folder {destination!r}. Add a file name.")
    check_apart(source, place)
    check_writable(place)
    return Output(place.url, format)


def check_writable(place: Place) -> None:
    """Check that a file can be written at a place, without writing it.

    Raises:
        BatchError: If it cannot.
    """
    if not place.is_local:
        protocol, _, path = place.url.partition("://")
        bucket = Place(f"{protocol}://{path.partition('/')[0]}")
        if protocol in BUCKET_PROTOCOLS and not bucket.exists():
            raise BatchError(f"`destination` {place.url!r} cannot be written: there is no {bucket.url!r}. Create it.")
        return
    folder = next(each for each in Path(place.url).parents if os.path.lexists(each))
    longest_name = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    reason = None
    if not folder.is_dir():
        reason = f"{str(folder)!r} is not a folder. Choose another one."
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"the folder {str(folder)!r} is read-only. Choose another one, or change its rights."
    elif len(os.fsencode(place.name)) + TEMPORARY_CHARACTERS > longest_name:
        reason = f"its name has {len(place.name)} characters. Choose a shorter one."
    elif (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
        reason = f"the disk has {free / 1e6:.1f} MB left. Make room, or choose another disk."
    if reason:
        raise BatchError(f"`destination` {place.url!r} cannot be written: {reason}")


def check_apart(source: str, destination: Place) -> None:
    """Refuse an output that the next run would read as input, whatever links lead to it.

    Raises:
        BatchError: If it is a part of the input.
    """
    from fsspec.utils import glob_translate

    place = Place.of(source)
    given, target = (os.path.realpath(each.url) if each.is_local else each.url for each in (place, destination))
    if is_pattern(source):
        try:
            inside = bool(re.fullmatch(glob_translate(given), target))
        except ValueError as exc:
            raise BatchError(f"`source` {source!r} is no pattern: {exc}. Correct it.") from None
    else:
        inside = given == target or (place.is_folder() and f"{target}/".startswith(f"{given}/"))
    if inside:
        raise BatchError(
            f"`destination` {destination.url!r} is within the input {place.url!r}, so the next run would read it. "
            "Choose another folder."
        )


def choose_columns(job: BatchJob, output: Output, more: BatchOptions | None = None) -> Output:
    """Return the output with its columns: those of the input that are kept, and those that are added.

    The options of the batch, and those of the model, may ask for structured answers.

    Raises:
        BatchError: If a column is not there, or would be there twice, or if the format cannot hold the output.
    """
    more = more or BatchOptions()
    columns, table = more.columns, job.table
    if table.format == "openai":
        _check_lines(output, more)
        return replace(output, timings=more.timings)
    missing = [name for name in columns or () if name not in table.columns]
    if missing:
        raise BatchError(f"`columns` names {missing!r}, but the input has {list(table.columns)!r}. Correct them.")
    if columns and len(set(columns)) < len(columns):
        repeated = sorted({name for name in columns if list(columns).count(name) > 1})
        raise BatchError(f"`columns` names {', '.join(map(repr, repeated))} twice. Name each column once.")
    if job.kind == "vectors" and output.format not in VECTOR_FORMATS:
        raise BatchError(
            f"`destination` must be a table that holds vectors, got {output.destination!r}. End it with .parquet."
        )
    kept = table.columns if columns is None else tuple(columns)
    _check_added(kept, job, more.output_prefix)
    if output.format in ("parquet", "arrow"):
        schema = get_schema(table)
        if unfit := check_types([schema.field(name) for name in kept], output.format):
            raise BatchError(
                f"The columns {unfit!r} have types that {output.format} cannot hold. Leave them out with `columns`, or "
                "write JSONL."
            )
    chosen = None if columns is None else kept
    return replace(output, columns=chosen, prefix=more.output_prefix, timings=more.timings)


def _check_lines(output: Output, more: BatchOptions) -> None:
    """Check what is asked of answers to requests in the OpenAI format, which have a form of their own."""
    if output.format != "jsonl":
        raise BatchError(
            f"The answers to requests in the OpenAI format are JSON lines, got `destination` {output.destination!r}. "
            "Give it the ending .jsonl."
        )
    if more.columns is not None or more.output_prefix:
        raise BatchError(
            f"`columns` ({more.columns!r}) and `output_prefix` ({more.output_prefix!r}) do not go with requests in the "
            "OpenAI format. Leave them out."
        )


def _check_added(kept: Sequence[str], job: BatchJob, prefix: str) -> None:
    """Check that no column would be there twice."""
    added = job.added_columns(prefix)
    twice = sorted(set(kept) & set(added) | {name for name in job.step_names if name in OUTPUT_COLUMNS[1:]})
    if twice:
        raise BatchError(
            f"The input has columns {twice!r} that the output adds. Set `output_prefix`, 'new_' for instance, "
            "or leave them out with `columns`."
        )
    if len(set(added)) < len(added):
        raise BatchError(f"The answers have fields whose columns would be there twice: {list(added)!r}. Rename one.")


def check_free(destination: str, replaceable: bool = False) -> None:
    """Check that there is nothing where the output goes, unless it may be replaced.

    Raises:
        BatchError: If there is something.
    """
    if not replaceable and Place.of(destination).exists():
        raise BatchError(
            f"`destination` {destination!r} exists already, and nothing is overwritten. "
            f"Choose another name, or move it away (and its journal, {Journal.beside(destination).place.url!r})."
        )


def find_published(journal: Journal, place: Place) -> dict[str, Any]:
    """Return what is known of the output at a place, empty if it is none of this batch.

    Records are written right before their output is published, so that the last one may be of an output that is not
    there yet, in place of the one before it.
    """
    records = journal.list_published()
    if not records or not place.exists() or place.is_folder():
        return {}
    size = place.info()["size"]
    fitting = [record for record in records if record["size"] == size]
    digest = place.digest() if fitting and place.is_local else None
    return next((record for record in fitting if digest in (None, record["sha256"])), {})


@dataclass(slots=True)
class Publication:
    """What was published: counts over all rows, the first of them, and the first that failed.

    Attributes:
        generated_tokens: Number of tokens in all answers.
        shared: Number of rows that took the answer of another row.
        lengths: Number of rows by the number of their tokens, see `LENGTH_BOUNDS`.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    generated_tokens: int = 0
    shared: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    summary: BatchSummary = BatchSummary(0, 0, 0, "")

    def count(self, chunk: Chunk, answers: Any, job: BatchJob) -> None:
        """Count the answers of a chunk, and keep its first rows as samples."""
        import pyarrow.compute as pc

        for item in pc.value_counts(answers["status"]).to_pylist():
            self.statuses[item["values"]] += item["counts"]
        self.failed += answers.num_rows - answers["error"].null_count
        self.generated_tokens += pc.sum(answers["generated_tokens"]).as_py() or 0
        self.shared += pc.sum(answers["shared"]).as_py() or 0
        for item in pc.value_counts(answers["generated_tokens"]).to_pylist():
            self.lengths[max(bound for bound in LENGTH_BOUNDS if bound <= item["values"])] += item["counts"]
        if len(self.samples) < SAMPLE_ROWS:
            self.samples += _samples(chunk, answers.slice(0, SAMPLE_ROWS - len(self.samples)), job)
        if len(self.failures) < SAMPLE_ROWS and answers["error"].null_count < answers.num_rows:
            failed = answers.filter(pc.is_valid(answers["error"])).slice(0, SAMPLE_ROWS - len(self.failures))
            self.failures += _samples(chunk, failed, job)

    def summarize(self, destination: str, errors_destination: str | None, progress: Progress) -> None:
        """Make the summary of the batch."""
        rows = self.statuses.total()
        self.summary = BatchSummary(
            rows, rows - self.failed, self.failed, destination, progress.tokens, progress.seconds,
            dict(sorted(self.statuses.items())), progress.resumed, self.shared, errors_destination,
        )  # fmt: skip


def _samples(chunk: Chunk, answers: Any, job: BatchJob) -> list[dict[str, Any]]:
    import pyarrow as pa

    tokens = "generated_tokens" if job.kind == "text" else "prompt_tokens"
    # The number of the row comes last, in place of a step with that name.
    names = [*_texts_of(job).items(), *((name, name) for name in ("status", tokens, "error", "row"))]
    shown = {name: answers[source].to_pylist() for name, source in names}
    if job.kind == "scores":
        shown["score"] = _vector_column(answers, pa.float64()).to_pylist()
    samples = (dict(zip(shown, values, strict=True)) for values in zip(*shown.values(), strict=True))
    return [{**chunk.rows[sample["row"] - chunk.first], **sample} for sample in samples]


def place_beside(destination: str, word: str) -> str:
    """Return where a further file of an output goes, the errors of `out.jsonl` in `out.errors.jsonl` for instance."""
    stem, dot, suffix = destination.rpartition(".")
    return f"{stem}.{word}{dot}{suffix}"


def publish_output(
    job: BatchJob,
    owner: JournalOwner,
    output: Output,
    replaceable: bool = False,
    progress: Progress | None = None,
    chosen: Rows | None = None,
) -> Publication:
    """Write the output table from the input and the journal, which has all rows of the job, or those of a trial.

    A trial, with its `chosen` rows, is not noted as the end of the batch.

    Raises:
        BatchError: If the journal lacks a row, or another run has taken over.
        TableError: If the input has changed, or the destination was taken meanwhile.
    """
    check_unchanged(job.table)
    rows = range(job.table.rows) if chosen is None else chosen
    journal, publication, place = owner.journal, Publication(), Place.of(output.destination)
    with ExitStack() as published:
        path = published.enter_context(place.published(replaceable))
        writer: AnswerTableWriter | OpenAIBatchWriter
        errors_destination = None
        if job.table.format == "openai":
            errors_destination = place_beside(place.url, "errors")
            # An earlier attempt may have published the errors and not yet the responses.
            errors_path = published.enter_context(Place(errors_destination).published(True))
            created = (journal.read_job() or {}).get("created", 0) if output.timings else 0
            writer = OpenAIBatchWriter(path, errors_path, job, int(created))
        else:
            writer = AnswerTableWriter(path, job, journal, output, rows)
        with writer:
            for chunk, answers in _answered(job, journal, rows):
                publication.count(chunk, answers, job)
                writer.write(chunk, answers)
        publication.summarize(output.destination, errors_destination, progress or Progress(0))
        owner.check()
        if chosen is None:
            record = {"sha256": hash_file(path), "size": path.stat().st_size, "summary": asdict(publication.summary)}
            owner.write("published", {"call": job.call_key(output), "job": job.key, **record})
    return publication


def _answered(job: BatchJob, journal: Journal, rows: Rows) -> Iterator[tuple[Chunk, Any]]:
    """Yield the rows in parts, each with a table of its answers."""
    sweep = JournalRows(journal, job.key)
    for chunk in read_chunks(job.table, rows):
        table = sweep.take(chunk.first, chunk.first + len(chunk))
        answers = _fold(table, job) if job.steps else table.filter(table["is_last"])
        if (lacking := len(chunk) - answers.num_rows) != 0:
            raise BatchError(
                f"The journal {journal.place.url!r} lacks {lacking} rows from row {chunk.first + 1} on. Start again."
            )
        yield chunk, answers


def _fold(table: Any, job: BatchJob) -> Any:
    """Return one row for each row of a chain: its last step, with the sums and the texts of all its steps."""
    import pyarrow as pa
    import pyarrow.compute as pc

    last = table.filter(table["is_last"])
    sums = ("prompt_tokens", "generated_tokens", "seconds")
    totals = table.group_by("row").aggregate([*((name, "sum") for name in sums), ("shared", "min")])
    places = pc.index_in(last["row"], totals["row"])
    for name, column in (*((name, f"{name}_sum") for name in sums), ("shared", "shared_min")):
        kind = last.schema.field(name).type
        last = last.set_column(last.schema.get_field_index(name), name, totals[column].take(places).cast(kind))
    for number in range(len(job.steps)):
        own = table.filter(pc.and_(pc.equal(table["step"], number), pc.is_null(table["error"])))
        places = pc.index_in(last["row"], own["row"])
        for kept in ("completion", "details"):
            texts = own[kept].take(places)
            last = last.append_column(_source_of(job, number, kept), pa.chunked_array(texts.chunks, pa.string()))
    return last


def _source_of(job: BatchJob, step: int, column: str) -> str:
    """Return the column of the folded rows that holds that of a step; no step can have its name."""
    return f"{column} {step}" if job.steps else column


def _texts_of(job: BatchJob) -> dict[str, str]:
    """Return the columns of the output that hold texts of the model, each with the column of the folded rows."""
    names = job.columns[: len(job.steps) or 1] if job.kind == "text" else ()
    return {name: _source_of(job, step, "completion") for step, name in enumerate(names)}


class AnswerTableWriter(AbstractContextManager["AnswerTableWriter"]):
    """Writes the rows of the input with what is added: answers, values in them, reasoning, vectors, scores.

    What the journal has of the `rows` is looked through for reasoning, or for the first vector.
    """

    def __init__(self, path: Path, job: BatchJob, journal: Journal, output: Output, rows: Rows) -> None:
        import pyarrow as pa

        self._job, self._output = job, output
        self._parsed = {step.name: step for step in job.chain if step.parser != "text"}
        vectors = (_read_details(text)["vector"] for _, text in _details_with("vector", job, journal, rows))
        # Where no row has a vector, their size is 1: arrays of lists of none cannot be made.
        size = next((len(read_vector(each)) for each in vectors), 1) if job.kind == "vectors" else 1
        self._kind = {"text": pa.string(), "vectors": pa.list_(pa.float32(), size), "scores": pa.float64()}[job.kind]
        # Columns for the reasoning of the model, each with the column of the journal's rows that holds it.
        self._reasoning = _reasoning_columns(job, journal, output, rows) if job.kind == "text" else {}
        kinds = {
            "prompt_tokens": pa.int32(), "generated_tokens": pa.int32(), "seconds": pa.float64(),
            job.columns[0]: self._kind,
        }  # fmt: skip
        json_kinds = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
        self._fields = {column: (name, json_kinds.get(kind, pa.string())) for column, name, kind in job.field_columns}
        own = [(name, kinds.get(name, pa.string())) for name in (*job.columns, *self._reasoning)]
        fields = [(column, kind) for column, (_, kind) in self._fields.items()]
        added = pa.schema([(output.prefix + name, kind) for name, kind in (*own, *fields)])
        schema = get_schema(job.table) if output.format != "jsonl" else None
        self._writer = open_writer(path, output.format, output.columns, added.names, schema, added)

    def write(self, chunk: Chunk, answers: Any) -> None:
        """Write the rows of a chunk. `answers` is a `pyarrow.Table` of the journal's rows."""
        self._writer.write(chunk, {self._output.prefix + name: values for name, values in self._added(answers).items()})

    @override
    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def _added(self, answers: Any) -> dict[str, Any]:
        import pyarrow as pa

        same = self._job.columns[len(self._job.steps) or 1 :]
        sources = {**_texts_of(self._job), **dict(zip(same, same, strict=True))}
        columns = {name: answers[source].combine_chunks() for name, source in sources.items()}
        if self._job.kind != "text":
            columns[self._job.columns[0]] = _vector_column(answers, self._kind)
        if not self._output.timings:
            columns["seconds"] = pa.nulls(answers.num_rows, pa.float64())
        for name, step in self._parsed.items():
            values = [_parse(step, text) for text in columns[name].to_pylist()]
            if self._output.format != "jsonl":
                values = pa.array([None if value is None else to_json(value).decode() for value in values], pa.string())
            columns[name] = values
        for name, source in self._reasoning.items():
            columns[name] = pa.array(_values_of("reasoning", answers[source]), pa.string())
        if self._fields:
            found = _values_of("parsed", answers["details"])
            objects = [value if isinstance(value, dict) else {} for value in found]
            for column, (name, kind) in self._fields.items():
                columns[column] = pa.array([_typed(value.get(name), kind) for value in objects], kind)
        return columns


def _parse(step: ChainStep, text: str | None) -> Any:
    """Return the output of a step, None for one that is not there, or that a journal of another version took."""
    with suppress(ChainError):
        return None if text is None else parse_output(step, text)
    return None


def _details_with(name: str, job: BatchJob, journal: Journal, rows: Rows) -> Iterator[tuple[int, str]]:
    """Yield the steps of some rows whose details have a value of that name, or a structured answer with such a one."""
    import pyarrow.compute as pc

    for table in JournalRows(journal, job.key).sweep(rows[0], rows[-1] + 1):
        likely = table.filter(pc.match_substring(table["details"], f'"{name}": '))
        for step, details in zip(likely["step"], likely["details"], strict=True):
            yield step.as_py(), details.as_py()


def _reasoning_columns(job: BatchJob, journal: Journal, output: Output, rows: Rows) -> dict[str, str]:
    """Return the columns for the reasoning of those steps that have any."""
    found: set[int] = set()
    for step, details in _details_with("reasoning", job, journal, rows):
        if step not in found and _read_details(details).get("reasoning"):
            found.add(step)
    kept = job.table.columns if output.columns is None else output.columns
    taken, columns = {*kept, *job.added_columns(output.prefix)}, {}
    for step in sorted(found):
        prefix = f"{job.step_names[step]}_" if job.steps else ""
        names = (f"{prefix}reasoning", f"{prefix}completion_reasoning")
        column = next(name for name in names if output.prefix + name not in taken)
        columns[column] = _source_of(job, step, "details")
    return columns


def _read_details(text: str | None) -> dict[str, Any]:
    details: dict[str, Any] = json.loads(text) if text else {}
    return details


def _values_of(name: str, column: Any) -> list[Any]:
    """Return what the details in a column have under a name."""
    return [_read_details(text).get(name) for text in column.to_pylist()]


def read_vector(encoded: str | None) -> Any:
    """Return a vector of the details, an array of float32, or None where there is none."""
    import numpy as np

    return None if encoded is None else np.frombuffer(base64.b64decode(encoded), dtype="<f4")


def _vector_column(answers: Any, kind: Any) -> Any:
    """Return the vectors, or as numbers the scores, each a vector of one; those of rows that failed are null."""
    import pyarrow as pa

    vectors = list(map(read_vector, _values_of("vector", answers["details"])))
    if pa.types.is_floating(kind):
        return pa.array([None if vector is None else float(vector[0]) for vector in vectors], kind)
    return pa.array(vectors, kind)


def _typed(value: Any, kind: Any) -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # a number that the column cannot hold
        return None


class OpenAIBatchWriter(AbstractContextManager["OpenAIBatchWriter"]):
    """Writes the output of the OpenAI batch format: a file of responses and, beside it, a file of errors.

    Ids and times are made of the job and the line, so that the same batch gives the same bytes however often it was
    interrupted. `created` is the time of all answers, in seconds since 1970.
    """

    def __init__(self, responses: Path, errors: Path, job: BatchJob, created: int) -> None:
        self._job, self._created, self._defaults = job.key, created, job.defaults
        self._responses, self._errors = open(responses, "wb"), open(errors, "wb")

    def write(self, chunk: Chunk, answers: Any) -> None:
        """Write the lines of a chunk. `answers` is a `pyarrow.Table` of the journal's rows."""
        for line, answer in zip(chunk.rows, answers.to_pylist(), strict=True):
            file = self._responses if answer["error"] is None else self._errors
            file.write(to_json(self._line(line, answer)) + b"\n")

    @override
    def __exit__(self, *_: object) -> None:
        self._responses.close()
        self._errors.close()

    def _line(self, line: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        name = hashlib.sha256(f"{self._job} {answer['row']}".encode()).hexdigest()[:24]
        record: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": line.get("custom_id")}
        if answer["status"] == "malformed":
            return {**record, "response": None, "error": {"code": "malformed", "message": answer["error"]}}
        try:
            code, body = 200, self._body(line, answer, name)
        except BodyError as exc:
            code, body = exc.status, exc.body
        return {**record, "response": {"status_code": code, "request_id": f"req_{name}", "body": body}, "error": None}

    def _body(self, line: Mapping[str, Any], answer: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return the body of an answer.

        Raises:
            BodyError: If the row has none.
        """
        details = _read_details(answer["details"])
        kept: dict[str, Any] = {name: details.get(name) for name in ("logprobs", "tokens", "reasoning")}
        completion = Completion(
            answer["completion"], answer["finish_reason"], answer["prompt_tokens"], answer["generated_tokens"],
            error=answer["error"], error_code=answer["status"], alternatives=tuple(details.get("alternatives", ())),
            vector=read_vector(details.get("vector")), **kept,
        )  # fmt: skip
        check_all([completion])  # a line that failed need not have a body that can be read
        call = read_line(line["url"], line["body"], self._defaults)
        body: dict[str, Any] = call.writer(name, self._created, call.model).write([completion])
        return body


def publish_artifacts(publication: Publication, samples: Sequence[tuple[float, int]], journal: Journal) -> None:
    """Leave a table of the first rows, one of failed rows, and the summary in Prefect."""
    summary = publication.summary
    publish_table("batch-samples", publication.samples, f"First rows of {summary.destination}")
    if publication.failures:
        publish_table("batch-failures", publication.failures, f"First failed rows of {summary.destination}")
    text = describe_batch(summary, publication, samples, journal)
    publish_markdown("batch-summary", text, "Summary of the batch")


def describe_batch(
    summary: BatchSummary, publication: Publication | None, samples: Sequence[tuple[float, int]], journal: Journal
) -> str:
    """Return the summary as Markdown."""
    parts = ["# Batch inference", markdown_table(("", ""), summary_lines(summary).items())]
    statuses = [(name, f"{count:,}", STATUSES.get(name, "")) for name, count in summary.statuses.items()]
    parts += ["## Statuses", markdown_table(("status", "rows", "meaning"), statuses)]
    rates = [
        (f"{then:.0f} to {now:.0f} s", f"{max(rows - before, 0) / max(now - then, 1e-6):,.1f}")
        for (then, before), (now, rows) in zip(samples[:-1], samples[1:], strict=True)
    ]
    if len(rates) > 1:  # a short run commits all at once, after its last measurement
        every = -(-len(rates) // 12)
        parts += ["## Throughput", markdown_table(("time", "rows per second"), rates[::every])]
    if publication is not None and publication.generated_tokens:
        lengths = [(f"{bound:,}", f"{count:,}") for bound in LENGTH_BOUNDS if (count := publication.lengths.get(bound))]
        parts += ["## Lengths of the answers", markdown_table(("tokens, from", "rows"), lengths)]
    if publication is not None and publication.failures:
        failures = [(row["row"] + 1, row["status"], row["error"]) for row in publication.failures]
        parts += ["## First failures", markdown_table(("row", "status", "error"), failures)]
    if summary.failed:
        parts.append(f"The journal {escape_markdown(journal.place.url)} can be used to retry the failed rows.")
    return "\n\n".join(parts)
