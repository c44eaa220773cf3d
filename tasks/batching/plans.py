"""Checking a batch before anything expensive starts: the input, the template, the output, the journal."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.batching.openai_requests import OpenAIRows
from prefect_huggingface.tasks.batching.openai_responses import errors_place
from prefect_huggingface.tasks.batching.prompts import PromptRows
from prefect_huggingface.tasks.batching.publications import Output
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import SUFFIX, Journal
from prefect_huggingface.tasks.storage.places import Place, is_pattern
from prefect_huggingface.tasks.storage.tables.inputs import (
    SourceOptions,
    Table,
    TableFormat,
    find_duplicates,
    get_format,
    get_schema,
    inspect_table,
)
from prefect_huggingface.tasks.storage.tables.writers import check_types

MAX_DUPLICATES = 10_000


def plan_output(source: str, destination: str, prefix: str = "", timings: bool = False) -> Output:
    """Check where the output goes, before the input is read.

    Raises:
        BatchError: If the destination is a part of the input, or a folder.
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
    _check_apart(source, place)
    return Output(place.url, format, prefix=prefix, timings=timings)


def _check_apart(source: str, destination: Place) -> None:
    """Refuse an output that the next run would read as input, whatever links lead to it."""
    place = Place.of(source)
    given, target = _resolve(place), _resolve(destination)
    if is_pattern(source):
        inside = bool(re.fullmatch(_pattern_of(given), target))
    else:
        inside = given == target or (place.is_folder() and f"{target}/".startswith(f"{given}/"))
    if inside:
        raise BatchError(
            f"`destination` {destination.url!r} is within the input {place.url!r}, so the next run would read it. "
            "Choose another folder."
        )


def _resolve(place: Place) -> str:
    return os.path.realpath(place.url) if place.is_local else place.url


def _pattern_of(pattern: str) -> str:
    """Return the regular expression of a glob pattern, in which only `**` goes over several folders."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^]]+\])", pattern)
    known = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(part) or (part.replace("[!", "[^") if index % 2 else re.escape(part))
        for index, part in enumerate(parts)
    )


def plan_job(
    source: str,
    format: TableFormat | None,
    prompt: str | None,
    messages_column: str | None = None,
    system: str | None = None,
    option_columns: Sequence[str] = (),
    options: GenerationOptions | None = None,
    source_options: SourceOptions | Mapping[str, Any] | None = None,
) -> BatchJob:
    """Look at the input and check that it has what the prompt needs. The model is added by the caller.

    Raises:
        BatchError: If the prompt does not fit the columns.
        TableError: If the input cannot be read, or is empty.
    """
    given = options.model_dump(mode="json", exclude_unset=True) if options else {}
    if prompt is None and messages_column is None:
        return _plan_openai_job(source, format, system, option_columns, given, source_options)
    if format == "openai" or (prompt is not None and messages_column is not None):
        raise BatchError(
            f"Only one of `prompt` ({prompt!r}), `messages_column` ({messages_column!r}) and the OpenAI format can say "
            "what to ask. Leave the others out."
        )
    unknown = [name for name in option_columns if name not in GenerationOptions.model_fields]
    if unknown:
        raise BatchError(f"`option_columns` must be named as generation options, got {unknown!r}. Rename the columns.")
    fields: dict[str, Any] = {
        "prompt": prompt,
        "messages_column": messages_column,
        "system": system,
        "option_columns": tuple(option_columns),
        "options": given,
    }
    needed = PromptRows(BatchJob(Table(source, "jsonl", (), ()), **fields)).columns
    table = inspect_table(source, format, source_options)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise BatchError(
            f"The input {source!r} has no column {', '.join(map(repr, missing))}. "
            f"Its columns are {', '.join(map(repr, table.columns))}. {_remedy(table.columns)}"
        )
    return BatchJob(table, **fields)


def _remedy(columns: Sequence[str]) -> str:
    odd = [name for name in columns if set(name) & set(":!{}") or not name]
    if odd:
        return f"A template cannot name {', '.join(map(repr, odd))}, because of the characters ':!{{}}': rename it."
    return "Correct the prompt or the input."


def _plan_openai_job(
    source: str,
    format: TableFormat | None,
    system: str | None,
    option_columns: Sequence[str],
    options: dict[str, Any],
    source_options: SourceOptions | Mapping[str, Any] | None,
) -> BatchJob:
    """Plan a batch whose lines are whole requests."""
    if format not in (None, "jsonl", "openai"):
        raise BatchError(f"The rows of {source!r} say nothing to ask. Give a `prompt` or a `messages_column`.")
    if system is not None or option_columns:
        raise BatchError("`system` and `option_columns` do not go with requests in the OpenAI format. Leave them out.")
    table = inspect_table(source, "openai", source_options)
    if not set(OpenAIRows.columns) <= set(table.columns):
        raise BatchError(
            f"The rows of {source!r} say nothing to ask: they have {list(table.columns)!r}. Give a `prompt` or a "
            "`messages_column`, or requests with custom_id, url and body."
        )
    duplicates = tuple(number for number, _, _ in itertools.islice(find_duplicates(table, "custom_id"), MAX_DUPLICATES))
    if len(duplicates) == MAX_DUPLICATES:
        raise BatchError(f"{source!r} has {MAX_DUPLICATES} or more repeated `custom_id`s. Make them unique.")
    return BatchJob(table, options=options, duplicate_rows=duplicates)


def check_ids(table: Table, column: str) -> None:
    """Check that a column has no value twice.

    Raises:
        BatchError: With the first rows that repeat one.
    """
    if column not in table.columns:
        raise BatchError(f"`id_column` {column!r} is not in the input. Its columns are {list(table.columns)!r}.")
    repeated = [f"{where} ({value!r})" for _, where, value in itertools.islice(find_duplicates(table, column), 5)]
    if repeated:
        raise BatchError(f"The ids in {column!r} occur twice: {', '.join(repeated)}. Make them unique.")


def choose_columns(table: Table, output: Output, columns: Sequence[str] | None, fields: Mapping[str, str]) -> Output:
    """Return the output with its columns.

    Raises:
        BatchError: If a column is not there, or would be there twice.
    """
    missing = [name for name in columns or () if name not in table.columns]
    if missing:
        raise BatchError(f"`columns` names {missing!r}, but the input has {list(table.columns)!r}. Correct them.")
    if columns and len(set(columns)) < len(columns):
        repeated = sorted({name for name in columns if list(columns).count(name) > 1})
        raise BatchError(f"`columns` names {', '.join(map(repr, repeated))} twice. Name each column once.")
    chosen = Output(
        output.destination, output.format, tuple(columns) if columns is not None else None, output.prefix,
        output.timings, dict(fields),
    )  # fmt: skip
    kept = table.columns if columns is None else columns
    twice = sorted(set(kept) & set(chosen.added))
    if twice:
        raise BatchError(
            f"The input has columns {twice!r} that the output adds. Set `output_prefix`, 'new_' for instance, "
            "or leave them out with `columns`."
        )
    if output.format in ("parquet", "arrow") and table.format != "openai":
        schema = get_schema(table)
        if unfit := check_types([schema.field(name) for name in kept], output.format):
            raise BatchError(
                f"The columns {unfit!r} have types that {output.format} cannot hold. Leave them out with `columns`, or "
                "write JSONL."
            )
    return chosen


def may_replace(journal: Journal, destination: str, retry_failed: bool) -> bool:
    """Tell whether an output is there that the journal's own batch has written, to be replaced by a better one."""
    place = Place.of(destination)
    if not retry_failed or not place.exists() or place.is_folder():
        return False
    return journal.read_published().get("sha256") == place.digest()


def check_places(job: BatchJob, output: Output, journal: Journal, replace: bool) -> None:
    """Check that all files of the output can be written, once the journal is owned.

    Raises:
        BatchError: If there is something else.
    """
    check_free(output.destination, replace)
    if job.table.format == "openai":
        # With a journal, they are from an attempt of this job that ended between the two files.
        check_free(errors_place(Place.of(output.destination)).url, replace or journal.read_job() is not None)


def check_free(destination: str, replace: bool = False) -> None:
    """Check that there is nothing where the output goes, unless it may be replaced.

    Raises:
        BatchError: If there is something.
    """
    if not replace and Place.of(destination).exists():
        raise BatchError(
            f"`destination` {destination!r} exists already, and nothing is overwritten. "
            f"Choose another name, or move it away (and {SUFFIX!r} beside it)."
        )
