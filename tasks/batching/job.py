"""What a batch is to do: its options, its plan, and what makes two batches the same job.

A plan changes nothing: it looks at the input, the template and the output. The model is resolved after it, once, to the
content that every process of the job then uses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.batching.chains import ChainRows, ChainStep, check_chain
from prefect_huggingface.tasks.batching.requests import OPENAI_COLUMNS, OpenAIRows, PromptRows, RequestMaker
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import SUFFIX
from prefect_huggingface.tasks.storage.journals.ownership import IfRunning
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

JOURNAL_VERSION = 3
VERSIONED_PACKAGES = {"openvino": ("openvino", "openvino-genai"), "torch": ("torch", "transformers")}
ENDPOINT_FIELDS = ("url", "model_id", "provider", "protocol", "send_prompts_as", "extra_options")
DECISIVE_FIELDS = (
    "task", "backend", "chat_template", "ov_config", "dtype", "load_in", "attn_implementation", "embedding",
)  # fmt: skip
SOURCE_FIELDS = ("model_id", "revision", "weight_format", "quantization", "adapters")
OUTPUT_COLUMNS = ("completion", "status", "finish_reason", "prompt_tokens", "generated_tokens", "seconds", "error")
VECTOR_COLUMNS = ("embedding", "status", "prompt_tokens", "seconds", "error")
MAX_DUPLICATES = 10_000
BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "r2", "oss")
TEMPORARY_CHARACTERS = 32  # what a temporary file's name has besides that of the output
LEAST_FREE_BYTES = 16 * 2**20

KeepJournal = Literal["failed", "always", "never"]
Model = LocalModel | InferenceEndpoint
InputType = Literal["query", "document"]
Share = Annotated[float, Field(gt=0, le=1)]
Commits = Sequence[str | None]


class BatchOptions(BaseModel):
    """Everything about a batch that is rarely changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: list[ChainStep] | None = Field(
        default=None, title="Steps of a chain",
        description="Prompts that each row goes through one after the other, in place of the one prompt.",
    )  # fmt: skip
    messages_column: str | None = Field(
        default=None, title="Column with chat messages", description="Column with a list of chat messages, in place of "
        "the prompt.",
    )  # fmt: skip
    option_columns: list[str] = Field(
        default_factory=list, title="Columns with options",
        description="Columns that hold the generation option of the same name for each row.",
    )  # fmt: skip
    served_names: list[str] = Field(
        default_factory=list, title="Names of the model",
        description="Further names under which lines in the OpenAI format may call the model, 'gpt-4o-mini' say.",
    )  # fmt: skip
    source_format: TableFormat | None = Field(
        default=None, title="Format of the input", description="Format of the input where file names do not tell it."
    )
    source_options: SourceOptions | None = Field(
        default=None, title="Delimiter and encoding of the input",
        description="Delimiter and encoding of text files, where they are not found out.",
    )  # fmt: skip
    id_column: str | None = Field(
        default=None, title="Column with unique ids", description="Column whose values must be unique."
    )
    columns: list[str] | None = Field(
        default=None, title="Columns to keep",
        description="Columns of the input to keep in the output. All when left empty.",
    )  # fmt: skip
    output_prefix: str = Field(
        default="", title="Prefix of the added columns",
        description="Text before the names of the columns that are added.",
    )  # fmt: skip
    timings: bool = Field(
        default=False, title="Measure each row",
        description="Fill the column `seconds`. Times, and with them the bytes of the output, differ from run to run.",
    )  # fmt: skip
    sample: int | None = Field(
        default=None, ge=1, title="Rows of a random trial",
        description="Number of rows, drawn from the whole input, that a trial answers. The full run takes them over.",
    )  # fmt: skip
    sample_seed: int = Field(default=0, ge=0, title="Seed of the trial", description="Which rows are drawn.")
    shards: int = Field(
        default=1, ge=1, le=10_000, title="Number of shards",
        description="Number of parts that free workers take one by one. Several times the number of workers is good.",
    )  # fmt: skip
    max_concurrency: int | None = Field(
        default=None, ge=1, title="Rows at once",
        description="Number of rows that are in the engine at once. The engine's own number when left empty.",
    )  # fmt: skip
    deduplicate: bool = Field(
        default=True, title="Answer equal prompts once", description="Generate equal prompts once."
    )
    group_by_prefix: bool = Field(
        default=True, title="Group by shared prefix",
        description="Generate rows with a shared prefix together, so that it is computed once.",
    )  # fmt: skip
    max_failures: float | None = Field(
        default=None, gt=0, title="Failures before giving up",
        description="Give up when more rows than this have failed; below 1 it is a share, after the first 50 rows.",
    )  # fmt: skip
    min_valid: Share | None = Field(
        default=None, title="Least share of valid answers",
        description="Give up when fewer of the parsed answers than this share are valid, after the first 50 rows.",
    )  # fmt: skip
    retry_failed: bool = Field(
        default=False, title="Retry failed rows",
        description="Generate the rows that failed in an earlier run again. Needs its journal.",
    )  # fmt: skip
    keep_journal: KeepJournal = Field(
        default="failed", title="Keep the journal",
        description="Whether the rows of the journal stay at the end: always, never, or if rows failed.",
    )  # fmt: skip
    if_running: IfRunning = Field(
        default="refuse", title="If the batch runs already",
        description="What to do while another run works on the same output: refuse, or wait and take its result.",
    )  # fmt: skip
    show_progress: bool = Field(
        default=True, title="Progress bar in the terminal",
        description="Show a progress bar and a closing table in the terminal.",
    )  # fmt: skip
    time_zone: str = Field(
        default="UTC", title="Time zone of the dates",
        description="Time zone of the dates in the names of input and output, such as Europe/Berlin.",
    )  # fmt: skip


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
        reasoning: Columns for the reasoning of the model where rows have any, each with the column of the journal's
            rows that holds it: one, or one for each step of a chain that has reasoning.
        steps: Names of the steps of a chain, whose outputs take the place of the completion.
        vectors: Whether vectors take the place of the completion.
        dimensions: Their number of dimensions, known once there is one.
    """

    destination: str
    format: TableFormat
    columns: tuple[str, ...] | None = None
    prefix: str = ""
    timings: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    reasoning: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    vectors: bool = False
    dimensions: int | None = None

    @property
    def own(self) -> tuple[str, ...]:
        """Columns that every output has, without the prefix."""
        if self.vectors:
            return VECTOR_COLUMNS
        texts = self.steps or OUTPUT_COLUMNS[:1]
        return (*texts, *OUTPUT_COLUMNS[1:], *self.reasoning)

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the columns that are added."""
        return tuple(self.prefix + name for name in (*self.own, *self.fields))


@dataclass(frozen=True, slots=True)
class BatchJob:
    """Everything that decides what text a row gets.

    Attributes:
        table: Input.
        prompt: f-string template over the columns, or None where the rows hold messages or request bodies.
        messages_column: Column with chat messages.
        system: Template of the system message.
        option_columns: Columns that hold a generation option of the same name.
        options: Options that were given for the batch.
        steps: Steps of a chain, each with the number of its model in `models`.
        asked: What the caller asked for, a branch for instance, for each model.
        models: What identifies the content of each model.
        commits: Commits of each model and of its adapters.
        versions: Versions of the packages that generate.
        greedy: Whether equal prompts have equal answers, for each step.
        served_names: Names under which requests in the OpenAI format may call the model.
        duplicate_rows: Rows of the OpenAI format whose id an earlier row has.
        input_type: Whether the texts are queries or documents, in a batch of vectors; None in others.
    """

    table: Table
    prompt: str | None = None
    messages_column: str | None = None
    system: str | None = None
    option_columns: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    asked: tuple[Mapping[str, Any], ...] = ()
    models: tuple[Mapping[str, Any], ...] = ()
    commits: tuple[Commits, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    greedy: tuple[bool, ...] = (True,)
    served_names: tuple[str, ...] = ()
    duplicate_rows: tuple[int, ...] = ()
    input_type: InputType | None = None

    @property
    def key(self) -> str:
        """Hash of the fingerprint."""
        return _hash(self.fingerprint())

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a journal to be continued. Where the files lie does not matter."""
        further = {f"model {number}": dict(model) for number, model in enumerate(self.models[1:], 2)}
        return {
            "journal version": JOURNAL_VERSION,
            "input": [
                {"rows": file.rows, "sha256": file.digest, "layout": dict(file.layout)} for file in self.table.files
            ],
            "input format": self.table.format,
            "prompt": self.prompt,
            "messages column": self.messages_column,
            "system prompt": self.system,
            "option columns": list(self.option_columns),
            "options": dict(self.options),
            "steps": [dict(step) for step in self.steps],
            **({"input type": self.input_type} if self.input_type else {}),
            "model": dict(self.models[0]) if self.models else {},
            **further,
            "versions": dict(self.versions),
        }

    def call_key(self, output: Output) -> str:
        """Return the hash of a call: of what was asked for, before a model is looked at, and of the output's form."""
        asked = {**replace(self, models=(), versions={}).fingerprint(), "model": list(map(dict, self.asked))}
        return _hash({**asked, "output": asdict(replace(output, reasoning={}, dimensions=None))})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "key": self.key, "fingerprint": self.fingerprint()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BatchJob:
        """Return the job of a record that `as_dict` made."""
        fields = {name: record[name] for name in cls.__slots__}
        table = Table.from_dict(fields.pop("table"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(table=table, **{**fields, **lists})

    def make_chain(self) -> ChainRows | None:
        """Return what makes the requests of a chain, None where the batch is none."""
        if not self.steps:
            return None
        plain = [{name: value for name, value in step.items() if name != "engine"} for step in self.steps]
        steps = [ChainStep.model_validate(step) for step in plain]
        options = GenerationOptions(**self.options) if self.options else None
        return ChainRows(steps, options, self.system, self.greedy, [step["engine"] for step in self.steps])

    def make_requests(self) -> RequestMaker:
        """Return what makes the requests of rows that have one prompt each."""
        if self.table.format == "openai":
            task = self.asked[0].get("task") if self.asked else None
            return OpenAIRows(self.options, self.served_names, self.duplicate_rows, self.greedy[0], task)
        return PromptRows(
            self.prompt, self.system, self.messages_column, self.option_columns, self.options, self.greedy[0],
            self.input_type,
        )  # fmt: skip


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def check_same_job(job: BatchJob, record: Mapping[str, Any], journal: str) -> None:
    """Check that a journal belongs to a job.

    Raises:
        BatchError: With what differs.
    """
    if record.get("key") == job.key:
        return
    theirs, ours = record.get("fingerprint", {}), json.loads(json.dumps(job.fingerprint()))
    different = list(_differences(theirs, ours))
    remedy = "Start again with the same settings, choose another destination, or delete the journal."
    if any(each.startswith("model, tuned settings") for each in different):
        remedy += " Settings that were found by tuning are left out with `engine.tuned` off."
    raise BatchError(f"The journal {journal!r} belongs to another job ({'; '.join(different)}). {remedy}")


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Yield what differs, each field of the model or the options by itself."""
    for name in dict.fromkeys((*theirs, *ours)):
        there, now = theirs.get(name), ours.get(name)
        if there == now:
            continue
        if isinstance(there, dict) and isinstance(now, dict) and not within:
            yield from _differences(there, now, f"{name}, ")
        else:
            yield f"{within}{name}: {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"


def plan_output(source: str, destination: str, prefix: str = "", timings: bool = False) -> Output:
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
    _check_apart(source, place)
    check_writable(place)
    return Output(place.url, format, prefix=prefix, timings=timings)


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
    reason = None
    if not folder.is_dir():
        reason = f"{str(folder)!r} is not a folder. Choose another one."
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"the folder {str(folder)!r} is read-only. Choose another one, or change its rights."
    elif len(os.fsencode(place.name)) + TEMPORARY_CHARACTERS > _longest_name(folder):
        reason = f"its name has {len(place.name)} characters. Choose a shorter one."
    elif (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
        reason = f"the disk has {free / 1e6:.1f} MB left. Make room, or choose another disk."
    if reason:
        raise BatchError(f"`destination` {place.url!r} cannot be written: {reason}")


def _longest_name(folder: Path) -> int:
    return os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255


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
    prompt: str | None,
    system: str | None = None,
    options: GenerationOptions | None = None,
    more: BatchOptions | None = None,
) -> BatchJob:
    """Look at the input and check that it has what the prompt needs. The model is added by the caller.

    Raises:
        BatchError: If the prompt does not fit the columns.
        ChainError: If the steps do not fit each other.
        TableError: If the input cannot be read, or is empty.
    """
    more = more or BatchOptions()
    given = options.model_dump(mode="json", exclude_unset=True) if options else {}
    ways = {"`prompt`": prompt, "`messages_column`": more.messages_column, "`steps`": more.steps or None}
    asked = [name for name, value in ways.items() if value is not None]
    if not asked:
        return _plan_openai_job(source, system, given, more)
    if len(asked) > 1 or more.source_format == "openai":
        raise BatchError(
            f"Only one of `prompt`, `messages_column`, `steps` and the OpenAI format can say what to ask, got "
            f"{' and '.join([*asked, *(['the format openai'] if more.source_format == 'openai' else [])])}. "
            "Leave the others out."
        )
    unknown = [name for name in more.option_columns if name not in GenerationOptions.model_fields]
    if unknown:
        raise BatchError(f"`option_columns` must be named as generation options, got {unknown!r}. Rename the columns.")
    if more.steps and more.option_columns:
        raise BatchError("`option_columns` does not go with `steps`. Give the steps `options`.")
    if more.steps:
        needed = ChainRows(more.steps, system=system).columns
    else:
        needed = PromptRows(prompt, system, more.messages_column, tuple(more.option_columns)).columns
    table = inspect_table(source, more.source_format, more.source_options)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise BatchError(
            f"The input {source!r} has no column {', '.join(map(repr, missing))}. "
            f"Its columns are {', '.join(map(repr, table.columns))}. {_remedy(table.columns)}"
        )
    if more.steps:
        check_chain(more.steps, table.columns)
    steps = _describe_steps(more.steps or ())
    return BatchJob(table, prompt, more.messages_column, system, tuple(more.option_columns), given, steps)


def _describe_steps(steps: Sequence[ChainStep]) -> tuple[Mapping[str, Any], ...]:
    numbers = number_models(steps)
    return tuple(
        {**step.model_dump(mode="json", exclude_unset=True, exclude={"model"}), "engine": number}
        for step, number in zip(steps, numbers, strict=True)
    )


def number_models(steps: Sequence[ChainStep]) -> list[int]:
    """Return for each step the number of its model: 0 is that of the batch, others come in their order."""
    others = list_models(None, steps)
    return [0 if step.model is None else 1 + others.index(step.model) for step in steps]


def list_models(model: Model | None, steps: Sequence[ChainStep]) -> list[Any]:
    """Return the model of a batch, if one is given, and those that its steps name, each once."""
    models: list[Any] = [] if model is None else [model]
    own: list[Model] = []
    for step in steps:
        if step.model is not None and step.model not in own:
            own.append(step.model)
    return models + own


def _remedy(columns: Sequence[str]) -> str:
    odd = [name for name in columns if set(name) & set(":!{}") or not name]
    if odd:
        return f"A template cannot name {', '.join(map(repr, odd))}, because of the characters ':!{{}}': rename it."
    return "Correct the prompt or the input."


def _plan_openai_job(source: str, system: str | None, options: dict[str, Any], more: BatchOptions) -> BatchJob:
    """Plan a batch whose lines are whole requests."""
    if more.source_format not in (None, "jsonl", "openai"):
        raise BatchError(f"The rows of {source!r} say nothing to ask. Give a `prompt`, `steps` or a `messages_column`.")
    if system is not None or more.option_columns:
        raise BatchError("`system` and `option_columns` do not go with requests in the OpenAI format. Leave them out.")
    table = inspect_table(source, "openai", more.source_options)
    if not set(OPENAI_COLUMNS) <= set(table.columns):
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


def choose_columns(job: BatchJob, output: Output, columns: Sequence[str] | None, fields: Mapping[str, str]) -> Output:
    """Return the output with its columns.

    Raises:
        BatchError: If a column is not there, or would be there twice, or if the format cannot hold the output.
    """
    table = job.table
    if table.format == "openai" and output.format != "jsonl":
        raise BatchError(
            f"The answers to requests in the OpenAI format are JSON lines, got `destination` {output.destination!r}. "
            "Give it the ending .jsonl."
        )
    missing = [name for name in columns or () if name not in table.columns]
    if missing:
        raise BatchError(f"`columns` names {missing!r}, but the input has {list(table.columns)!r}. Correct them.")
    if columns and len(set(columns)) < len(columns):
        repeated = sorted({name for name in columns if list(columns).count(name) > 1})
        raise BatchError(f"`columns` names {', '.join(map(repr, repeated))} twice. Name each column once.")
    steps = tuple(step["name"] for step in job.steps)
    kept_columns = tuple(columns) if columns is not None else None
    chosen = replace(output, columns=kept_columns, fields={} if steps else dict(fields), steps=steps)
    kept = table.columns if columns is None else columns
    twice = sorted(set(kept) & set(chosen.added) | {name for name in steps if name in OUTPUT_COLUMNS[1:]})
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


def check_free(destination: str, replaceable: bool = False) -> None:
    """Check that there is nothing where the output goes, unless it may be replaced.

    Raises:
        BatchError: If there is something.
    """
    if not replaceable and Place.of(destination).exists():
        raise BatchError(
            f"`destination` {destination!r} exists already, and nothing is overwritten. "
            f"Choose another name, or move it away (and {SUFFIX!r} beside it)."
        )


def describe_model(model: Model) -> dict[str, Any]:
    """Return what the caller asks for, before the model is looked at."""
    if isinstance(model, InferenceEndpoint):
        asked = model.model_dump(mode="json", include=set(ENDPOINT_FIELDS), exclude_defaults=True)
        # Whatever a server takes may stand in them, also what does not belong into a file.
        asked["extra parameters"] = _hash(json.loads(json.dumps(model.extra_parameters, default=str)))
    else:
        asked = model.model_dump(mode="json", include={*SOURCE_FIELDS, *DECISIVE_FIELDS})
        asked["model_kwargs"] = json.loads(json.dumps(model.model_kwargs, default=str))
    return {**asked, "options": model.options.model_dump(mode="json", exclude_unset=True)}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a model is, for the whole job.

    Attributes:
        identity: What decides which text it generates.
        commits: Commit of the model and of each of its adapters, None for what is not on the Hub; none for an endpoint.
    """

    identity: Mapping[str, Any]
    commits: Commits = ()


def pin_model(model: Model, commits: Commits) -> Model:
    """Return a model and its adapters at their commits, whatever is pushed to their branches meanwhile."""
    if not commits:
        return model
    parts: list[Any] = [model, *getattr(model, "adapters", ())]
    pinned, *adapters = (
        part.model_copy(update={"revision": commit} if commit else {})
        for part, commit in zip(parts, commits, strict=True)
    )
    return cast("Model", pinned.model_copy(update={"adapters": adapters}) if adapters else pinned)


def resolve_model(model: Model, commits: Commits = ()) -> ResolvedModel:
    """Prepare a model, that is download and export it where needed, and return what it then is.

    The identity names the content of the model and not where it lies. Settings found by tuning are part of it where
    they decide how precisely the model computes. Sizes of the engine and the device are not. What an endpoint runs is
    not known, so that it stands for itself.

    Args:
        model: Model as the caller names it.
        commits: Commits that an earlier run of the job has found.
    """
    if isinstance(model, InferenceEndpoint):
        return ResolvedModel(describe_model(model))
    model = cast("LocalModel", pin_model(model, commits))
    fields = model.model_dump(mode="json", include=set(DECISIVE_FIELDS))
    identity: dict[str, Any] = {name: value for name, value in fields.items() if value}
    identity["options"] = model.options.model_dump(mode="json", exclude_unset=True)
    if model.adapters:
        from prefect_huggingface.tasks.storage.adapters import get_adapters, pin_adapters

        model = pin_adapters(model)
        identity["adapters"] = [adapter.digest for adapter in get_adapters(model)]
    if model.backend == "openvino":
        from prefect_huggingface.tasks.assets import note_export
        from prefect_huggingface.tasks.storage.exports.store import get_export

        export = get_export(model)
        note_export(model, export)
        found = export.commit
        tuned = _tuned_properties(model, export.path)
        identity |= {"export": export.key, **({"tuned settings": tuned} if tuned else {})}
    else:
        from prefect_huggingface.tasks.storage.snapshots import get_snapshot

        found = get_snapshot(model).commit
        identity |= {"commit": found, "model_kwargs": json.loads(json.dumps(model.model_kwargs, default=str))}
    commit = None if model.is_local else found
    return ResolvedModel(identity, (commit, *(None if one.is_local else one.revision for one in model.adapters)))


def _tuned_properties(model: LocalModel, folder: Path) -> dict[str, Any]:
    """Return the properties of OpenVINO that only tuning has set for this machine."""
    from prefect_huggingface.tasks.engines.openvino_runtime import apply_tuning

    properties = apply_tuning(model, folder).ov_config
    return {name: value for name, value in sorted(properties.items()) if name not in model.ov_config}


def add_models(job: BatchJob, models: Sequence[Model], resolved: Sequence[ResolvedModel]) -> BatchJob:
    """Return a job with what its models are."""
    backends = dict.fromkeys("endpoint" if isinstance(each, InferenceEndpoint) else each.backend for each in models)
    identities, commits = tuple(each.identity for each in resolved), tuple(each.commits for each in resolved)
    return replace(job, models=identities, commits=commits, versions=get_versions(backends))


def describe_models(
    job: BatchJob, models: Sequence[Model], options: GenerationOptions | None, served_names: Sequence[str] = ()
) -> BatchJob:
    """Return a job with what is known of its models before they are looked at."""

    def is_greedy(number: int, own: GenerationOptions | None) -> bool:
        merged = models[number].options.merged(options).merged(own)
        return not merged.do_sample and "do_sample" not in job.option_columns

    steps = job.make_chain()
    greedy = tuple(
        is_greedy(described["engine"], step.options)
        for step, described in zip(steps.steps if steps else (), job.steps, strict=True)
    )
    asked, names = tuple(map(describe_model, models)), (*name_model(models[0]), *served_names)
    return replace(job, asked=asked, greedy=greedy or (is_greedy(0, None),), served_names=names)


def get_versions(backends: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that generate with some backends."""
    found = {}
    for package in (package for backend in backends for package in VERSIONED_PACKAGES.get(backend, ())):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def name_model(model: Model) -> tuple[str, ...]:
    """Return the names under which a request may call the model."""
    if model.model_id is None:
        return ()
    return tuple(dict.fromkeys((model.model_id, model.model_id.rstrip("/").rpartition("/")[2])))
