"""From the journal to the output table: rows in input order, checked to be complete, published by a rename.

What is about to be published is noted in the journal first. A run that is killed right after finds there that it was
finished, whatever it had still to do.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.artifacts import escape_markdown, markdown_table, publish_markdown, publish_table
from prefect_huggingface.tasks.batching.job import OUTPUT_COLUMNS, BatchJob, Output
from prefect_huggingface.tasks.batching.requests import NO_VECTORS, read_line
from prefect_huggingface.tasks.batching.run import STATUSES
from prefect_huggingface.tasks.batching.shard import Chosen
from prefect_huggingface.tasks.batching.vectors import dimensions_of, read_vector, vector_column, vector_type
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.openai_protocol import error_body, error_status
from prefect_huggingface.tasks.progress import summary_lines
from prefect_huggingface.tasks.records import BatchSummary, Completion
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, check_unchanged, get_schema, read_chunks
from prefect_huggingface.tasks.storage.tables.writers import open_writer, to_json
from prefect_huggingface.tasks.vector_protocol import EMBEDDINGS_URL

SAMPLE_ROWS = 20
LENGTH_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TRIAL = "trial"


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What a run knows of itself before its output is written: tokens it generated, its time, rows from before."""

    generated_tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0


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
        summary: The batch in short.
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
    summary: BatchSummary = BatchSummary(0, 0, 0, "")

    def count(self, chunk: Chunk, answers: Any, texts: Sequence[str] = ()) -> None:
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
            self.samples += _samples(chunk, answers.slice(0, SAMPLE_ROWS - len(self.samples)), texts)
        if len(self.failures) < SAMPLE_ROWS and answers["error"].null_count < answers.num_rows:
            failed = answers.filter(pc.is_valid(answers["error"])).slice(0, SAMPLE_ROWS - len(self.failures))
            self.failures += _samples(chunk, failed, texts)

    def summarize(self, destination: str, figures: RunFigures) -> BatchSummary:
        """Return the summary of the batch."""
        return BatchSummary(
            rows=self.rows,
            succeeded=self.rows - self.failed,
            failed=self.failed,
            destination=destination,
            generated_tokens=figures.generated_tokens,
            seconds=figures.seconds,
            statuses=dict(sorted(self.statuses.items())),
            resumed=figures.resumed,
            shared=self.shared,
            errors_destination=self.errors_destination,
        )


def _samples(chunk: Chunk, answers: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    names = ("row", *(texts or OUTPUT_COLUMNS[:1]), "status", "generated_tokens", "error")
    return [
        {**chunk.rows[answer["row"] - chunk.first], **{name: answer[name] for name in names}}
        for answer in answers.select(names).to_pylist()
    ]


def trial_of(output: Output) -> Output:
    """Return the output of a trial: beside that of the whole batch, and replaced by every trial."""
    place = Place.of(output.destination)
    return replace(output, destination=_beside(place, TRIAL).url)


def errors_place(destination: Place) -> Place:
    """Return where the errors of an OpenAI batch go: `out.jsonl` has them in `out.errors.jsonl`."""
    return _beside(destination, "errors")


def _beside(place: Place, word: str) -> Place:
    stem, _, suffix = place.name.rpartition(".")
    return place.parent.child(f"{stem}.{word}.{suffix}")


def publish_output(
    job: BatchJob,
    owner: JournalOwner,
    output: Output,
    replaceable: bool = False,
    figures: RunFigures | None = None,
    chosen: Chosen | None = None,
) -> Publication:
    """Write the output table from the input and the journal.

    Args:
        job: Job of the journal.
        owner: Owner of the journal, which has all rows of the job.
        output: Where and how to write it.
        replaceable: Whether an output that is there may be replaced.
        figures: What the run knows of itself.
        chosen: Rows of a trial, None for all. A trial is not noted as the end of the batch.

    Raises:
        BatchError: If the journal lacks a row, or another run has taken over.
        TableError: If the input has changed, or the destination was taken meanwhile.
    """
    check_unchanged(job.table)
    journal, publication, place = owner.journal, Publication(), Place.of(output.destination)
    if output.vectors:
        output = replace(output, dimensions=dimensions_of(job, journal))
    elif job.table.format != "openai":
        output = replace(output, reasoning=_reasoning_columns(job, journal, output))
    with ExitStack() as published:
        path = published.enter_context(place.published(replaceable))
        with ExitStack() as stack:
            if job.table.format == "openai":
                errors = errors_place(place)
                publication.errors_destination = errors.url
                # An earlier attempt may have published the errors and not yet the responses.
                errors_path = published.enter_context(errors.published(True))
                write = _openai_writer(stack, path, errors_path, job, journal, output)
            else:
                write = _table_writer(stack, path, job, output)
            for chunk, answers in _answered(job, journal, chosen):
                publication.count(chunk, answers, output.steps)
                write(chunk, answers)
        publication.summary = publication.summarize(output.destination, figures or RunFigures())
        owner.check()
        if chosen is None:
            owner.write_published(_record(path, job.call_key(output), publication.summary))
    return publication


def _record(path: Path, call: str, summary: BatchSummary) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"call": call, "sha256": digest, "size": path.stat().st_size, "summary": asdict(summary)}


def _reasoning_columns(job: BatchJob, journal: Journal, output: Output) -> dict[str, str]:
    """Return the columns for the reasoning of those steps that have any, looking at one segment at a time."""
    import pyarrow.compute as pc

    found: set[int] = set()
    for name in journal.names():
        table = journal.load(name, job.key)
        found |= set(table.filter(pc.match_substring(table["details"], '"reasoning": '))["step"].to_pylist())
    kept = job.table.columns if output.columns is None else output.columns
    taken, columns = {*kept, *output.added}, {}
    for step in sorted(found):
        prefix, source = (
            (f"{output.steps[step]}_", _details_of(output.steps[step])) if output.steps else ("", "details")
        )
        names = (f"{prefix}reasoning", f"{prefix}completion_reasoning")
        columns[next(name for name in names if output.prefix + name not in taken)] = source
    return columns


def _details_of(step: str) -> str:
    return f"{step} details"


def _answered(job: BatchJob, journal: Journal, chosen: Chosen | None) -> Iterator[tuple[Chunk, Any]]:
    """Yield the rows in parts, each with a table of its answers."""
    sweep = JournalRows(journal, job.key)
    wanted = range(job.table.rows) if chosen is None else chosen
    if not len(wanted):
        return
    for chunk in read_chunks(job.table, wanted[0], wanted[-1] + 1):
        table = sweep.take(chunk.first, chunk.first + len(chunk))
        answers = _fold(table, job) if job.steps else table.filter(table["is_last"])
        if isinstance(wanted, range):
            yield chunk, _whole(answers, len(chunk), chunk, journal)
            continue
        for row in (row for row in wanted if chunk.first <= row < chunk.first + len(chunk)):
            yield chunk.part(row, row + 1), _whole(_row_of(answers, row), 1, chunk, journal)


def _row_of(answers: Any, row: int) -> Any:
    import pyarrow.compute as pc

    return answers.filter(pc.equal(answers["row"], row))


def _whole(answers: Any, rows: int, chunk: Chunk, journal: Journal) -> Any:
    if answers.num_rows != rows:
        raise BatchError(
            f"The journal {journal.place.url!r} lacks {rows - answers.num_rows} rows from row {chunk.first + 1} on. "
            "Start again."
        )
    return answers


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
    for number, step in enumerate(job.steps):
        own = table.filter(pc.and_(pc.equal(table["step"], number), pc.is_null(table["error"])))
        places = pc.index_in(last["row"], own["row"])
        for column, kept in ((step["name"], "completion"), (_details_of(step["name"]), "details")):
            texts = own[kept].take(places)
            last = last.append_column(column, pa.chunked_array(texts.chunks, pa.string()))
    return last


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


def _table_writer(stack: ExitStack, path: Path, job: BatchJob, output: Output) -> Callable[[Chunk, Any], None]:
    schema = get_schema(job.table) if output.format != "jsonl" else None
    parsers = {step["name"]: step.get("parser", "text") for step in job.steps}
    writer = stack.enter_context(
        open_writer(path, output.format, output.columns, output.added, schema, _added_schema(output))
    )
    return lambda chunk, answers: writer.write(chunk, _added_columns(answers, output, parsers))


def _added_schema(output: Output) -> Any:
    import pyarrow as pa

    kinds = {"prompt_tokens": pa.int32(), "generated_tokens": pa.int32(), "seconds": pa.float64()}
    kinds |= {"embedding": vector_type(output.dimensions or 0)} if output.vectors else {}
    json_kinds = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    own = [(output.prefix + name, kinds.get(name, pa.string())) for name in output.own]
    fields = [(output.prefix + name, json_kinds.get(kind, pa.string())) for name, kind in output.fields.items()]
    return pa.schema([*own, *fields])


class _Values(list[Any]):
    """Values of any kind in place of an array, for JSON."""

    def to_pylist(self) -> list[Any]:
        return self


def _added_columns(answers: Any, output: Output, parsers: Mapping[str, str]) -> dict[str, Any]:
    import pyarrow as pa

    names = [
        name for name in output.own if name not in output.reasoning and not (output.vectors and name == "embedding")
    ]
    columns = {output.prefix + name: answers[name].combine_chunks() for name in names}
    if output.vectors:
        columns[f"{output.prefix}embedding"] = vector_column(answers, output.dimensions or 0)
    for name in (name for name, parser in parsers.items() if parser != "text"):
        texts = answers[name].to_pylist()
        columns[output.prefix + name] = _parsed_column(texts, parsers[name], output.format == "jsonl")
    if not output.timings:
        columns[f"{output.prefix}seconds"] = pa.nulls(answers.num_rows, pa.float64())
    for name, source in output.reasoning.items():
        thoughts = [_read_details(one).get("reasoning") for one in answers[source].to_pylist()]
        columns[output.prefix + name] = pa.array(thoughts, pa.string())
    if output.fields:
        values = [_parsed(_read_details(one)) for one in answers["details"].to_pylist()]
        schema = _added_schema(output)
        for name in output.fields:
            kind = schema.field(output.prefix + name).type
            columns[output.prefix + name] = pa.array([_typed(value.get(name), kind) for value in values], kind)
    return columns


def _read_details(text: str | None) -> dict[str, Any]:
    details: dict[str, Any] = json.loads(text) if text else {}
    return details


def _parsed_column(texts: Sequence[str | None], parser: str, native: bool) -> Any:
    """Return the outputs of a step that parses: values where the format holds any, else their JSON."""
    import pyarrow as pa

    from prefect_huggingface.tasks.batching.chains import ChainStep, parse_output

    step = ChainStep(name="output", prompt="-", parser=parser)  # type: ignore[arg-type]
    values = [None if text is None else parse_output(step, text) for text in texts]
    if native:
        return _Values(values)
    return pa.array([None if value is None else to_json(value).decode() for value in values], pa.string())


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
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # a number that the column cannot hold
        return None


def _openai_writer(
    stack: ExitStack, path: Path, errors: Path, job: BatchJob, journal: Journal, output: Output
) -> Callable[[Chunk, Any], None]:
    created = (journal.read_job() or {}).get("created", 0) if output.timings else 0
    writer = OpenAIBatchWriter(path, errors, job.key, int(created))
    stack.callback(writer.close)
    return writer.write


class OpenAIBatchWriter:
    """Writes the output of the OpenAI batch format: a file of responses and, beside it, a file of errors.

    Ids and times are made of the job and the line, so that the same batch gives the same bytes however often it was
    interrupted.

    Args:
        responses: Local file for the lines with an answer.
        errors: Local file for the others.
        job: Key of the job.
        created: Time of all answers, in seconds since 1970.
    """

    def __init__(self, responses: Path, errors: Path, job: str, created: int) -> None:
        self._job, self._created = job, created
        self._responses: IO[bytes] = open(responses, "wb")
        self._errors: IO[bytes] = open(errors, "wb")

    def write(self, chunk: Chunk, answers: Any) -> None:
        """Write the lines of a chunk. `answers` is a `pyarrow.Table` of the journal's rows."""
        for line, answer in zip(chunk.rows, answers.to_pylist(), strict=True):
            file = self._responses if answer["error"] is None else self._errors
            file.write(to_json(self._line(line, answer)) + b"\n")

    def close(self) -> None:
        """Finish both files."""
        self._responses.close()
        self._errors.close()

    def _line(self, line: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        name = hashlib.sha256(f"{self._job} {answer['row']}".encode()).hexdigest()[:24]
        record: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": line.get("custom_id")}
        if answer["status"] == "malformed":
            return {**record, "response": None, "error": {"code": "malformed", "message": answer["error"]}}
        if answer["error"] is not None:
            code, body = error_status(answer["status"]), error_body(answer["status"], answer["error"])
        elif line["url"] == EMBEDDINGS_URL and read_vector(answer["details"]) is None:  # of an endpoint
            code, body = error_status("bad_answer"), error_body("bad_answer", NO_VECTORS)
        else:
            code, body = 200, self._body(line, answer, name)
        return {**record, "response": {"status_code": code, "request_id": f"req_{name}", "body": body}, "error": None}

    def _body(self, line: Mapping[str, Any], answer: Mapping[str, Any], name: str) -> dict[str, Any]:
        call = read_line(line["url"], line["body"])
        details = _read_details(answer["details"])
        completion = Completion(
            answer["completion"],
            answer["finish_reason"],
            answer["prompt_tokens"],
            answer["generated_tokens"],
            alternatives=tuple(details.get("alternatives", ())),
            logprobs=details.get("logprobs"),
            tokens=details.get("tokens"),
            reasoning=details.get("reasoning"),
            vector=read_vector(answer["details"]),
        )
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
    summary: BatchSummary,
    publication: Publication | None,
    samples: Sequence[tuple[float, int]],
    journal: Journal,
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
    if publication is not None:
        lengths = [(f"{bound:,}", f"{count:,}") for bound in LENGTH_BOUNDS if (count := publication.lengths.get(bound))]
        parts += ["## Lengths of the answers", markdown_table(("tokens, from", "rows"), lengths)]
        if publication.failures:
            failures = [(row["row"] + 1, row["status"], row["error"]) for row in publication.failures]
            parts += ["## First failures", markdown_table(("row", "status", "error"), failures)]
    if summary.failed:
        parts.append(f"The journal {escape_markdown(journal.place.url)} can be used to retry the failed rows.")
    return "\n\n".join(parts)
