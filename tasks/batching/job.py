"""What a batch is to do: its options, its plan, and what makes two batches the same job.

A plan changes nothing: it looks at the input and the template. The model is resolved after it, once, to the content
that every process of the job then uses.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.blocks.options import ResponseFormat
from prefect_huggingface.tasks.artifacts import shorten
from prefect_huggingface.tasks.batching.requests import (
    OPENAI_COLUMNS,
    ChainRows,
    ChainStep,
    OpenAIRows,
    PromptRows,
    RequestMaker,
    check_chain,
    describe_clash,
)
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.files import hash_json
from prefect_huggingface.tasks.storage.journals.ownership import IfRunning
from prefect_huggingface.tasks.storage.tables.inputs import (
    SourceOptions,
    Table,
    TableFormat,
    find_duplicates,
    find_formats,
    inspect_table,
)

JOURNAL_VERSION = 5
VERSIONED_PACKAGES = {"openvino": ("openvino", "openvino-genai"), "torch": ("torch", "transformers")}
ENDPOINT_FIELDS = ("url", "model_id", "provider", "protocol", "send_prompts_as", "extra_options")
DECISIVE_FIELDS = (
    "task", "backend", "chat_template", "ov_config", "dtype", "load_in", "attn_implementation", "embedding",
)  # fmt: skip
SOURCE_FIELDS = ("model_id", "revision", "weight_format", "quantization", "adapters")
FINGERPRINT_FIELDS = (
    "prompt", "messages_column", "system", "option_columns", "options", "steps", "input_type", "pair", "versions",
)  # fmt: skip
OUTPUT_COLUMNS = ("completion", "status", "finish_reason", "prompt_tokens", "generated_tokens", "seconds", "error")
ROW_COLUMNS = ("status", "prompt_tokens", "seconds", "error")
MAX_DUPLICATES = 10_000

KeepJournal = Literal["failed", "always", "never"]
Model = LocalModel | InferenceEndpoint
OutputKind = Literal["text", "vectors", "scores"]
InputType = Literal["query", "document"]
Share = Annotated[float, Field(gt=0, le=1)]
Commits = Sequence[str | None]


class BatchOptions(BaseModel):
    """Everything about a batch that is rarely changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: list[ChainStep] | None = Field(default=None, title="Steps of a chain")
    """Prompts that each row goes through one after the other, in place of the one prompt."""
    messages_column: str | None = Field(default=None, title="Column with chat messages")
    """Column with a list of chat messages, in place of the prompt."""
    option_columns: list[str] = Field(default_factory=list, title="Columns with options")
    """Columns that hold the generation option of the same name for each row."""
    served_names: list[str] = Field(default_factory=list, title="Names of the model")
    """Further names under which lines in the OpenAI format may call the model, 'gpt-4o-mini' say."""
    source_format: TableFormat | None = Field(default=None, title="Format of the input")
    """Format of the input where file names do not tell it."""
    source_options: SourceOptions | None = Field(default=None, title="Delimiter and encoding of the input")
    """Delimiter and encoding of text files, where they are not found out."""
    id_column: str | None = Field(default=None, title="Column with unique ids")
    """Column whose values must be unique."""
    columns: list[str] | None = Field(default=None, title="Columns to keep")
    """Columns of the input to keep in the output. All when left empty."""
    output_prefix: str = Field(default="", title="Prefix of the added columns")
    """Text before the names of the columns that are added."""
    timings: bool = Field(default=False, title="Measure each row")
    """Fill the column `seconds`. Times, and with them the bytes of the output, differ from run to run."""
    estimate: bool = Field(default=False, title="Estimate first")
    """Measure first on some rows what the whole batch takes, and show it. No row begins after a minute."""
    sample: int | None = Field(default=None, ge=1, title="Rows of a random trial")
    """Number of rows, drawn from the whole input, that a trial answers. The full run takes them over."""
    sample_seed: int = Field(default=0, ge=0, title="Seed of the trial")
    """Which rows are drawn."""
    shards: int = Field(default=1, ge=1, le=10_000, title="Number of shards")
    """Number of parts that free workers take one by one. Several times the number of workers is good."""
    max_concurrency: int | None = Field(default=None, ge=1, title="Rows at once")
    """Number of rows that are in the engine at once, in each process. The engine's own number when left empty."""
    deduplicate: bool = Field(default=True, title="Answer equal prompts once")
    """Generate equal prompts once, in each shard."""
    group_by_prefix: bool = Field(default=True, title="Group by shared prefix")
    """Generate rows with a shared prefix together, so that it is computed once."""
    max_failures: float | None = Field(default=None, gt=0, title="Failures before giving up")
    """Give up when more rows than this have failed; below 1 it is a share, after the first 50 rows."""
    min_valid: Share | None = Field(default=None, title="Least share of valid answers")
    """Give up when fewer of the parsed answers than this share are valid, after the first 50 rows."""
    retry_failed: bool = Field(default=False, title="Retry failed rows")
    """Generate the rows that failed in an earlier run again. Needs its journal."""
    keep_journal: KeepJournal = Field(default="failed", title="Keep the journal")
    """Whether the rows of the journal stay at the end: always, never, or if rows failed."""
    if_running: IfRunning = Field(default="refuse", title="If the batch runs already")
    """What to do while another run works on the same output: refuse, or wait and take its result."""
    show_progress: bool = Field(default=True, title="Progress bar in the terminal")
    """Show a progress bar and a closing table in the terminal."""
    time_zone: str = Field(default="UTC", title="Time zone of the dates")
    """Time zone of the dates in the names of input and output, such as Europe/Berlin."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how the output is written.

    Attributes:
        columns: Columns of the input to keep, or None for all.
        prefix: Put before the names of the columns that are added.
        timings: Whether the column `seconds` is filled. Times differ from run to run.
    """

    destination: str
    format: TableFormat
    columns: tuple[str, ...] | None = None
    prefix: str = ""
    timings: bool = False


@dataclass(frozen=True, slots=True)
class BatchJob:
    """Everything that decides what text a row gets; `prompt` is None where the rows hold messages or whole requests.

    Attributes:
        options: Options that were given for the batch.
        steps: Steps of a chain, each with the number of its model in `models`.
        asked: What the caller asked for, a branch for instance, for each model.
        models: What identifies the content of each model.
        commits: Commits of each model and of its adapters.
        versions: Versions of the packages that generate.
        greedy: Whether equal prompts have equal answers, for each step, once the models are known.
        served_names: Names under which requests in the OpenAI format may call the model.
        duplicate_rows: Rows of the OpenAI format whose id an earlier row has.
        input_type: Whether the texts are queries or documents, in a batch of vectors; None in others.
        pair: Template of the texts that are scored for the prompt, in a batch of scores; None in others.
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
    greedy: tuple[bool, ...] = ()
    served_names: tuple[str, ...] = ()
    duplicate_rows: tuple[int, ...] = ()
    input_type: InputType | None = None
    pair: str | None = None

    @property
    def kind(self) -> OutputKind:
        """What the rows get."""
        return "scores" if self.pair is not None else "text" if self.input_type is None else "vectors"

    @property
    def step_names(self) -> tuple[str, ...]:
        """Names of the steps of a chain, whose outputs take the place of the completion."""
        return tuple(step["name"] for step in self.steps)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every output has, without its prefix."""
        if self.kind != "text":
            return ("embedding" if self.kind == "vectors" else "score", *ROW_COLUMNS)
        return (*(self.step_names or OUTPUT_COLUMNS[:1]), *OUTPUT_COLUMNS[1:])

    @property
    def field_columns(self) -> list[tuple[str, str, str]]:
        """Columns for the values of structured answers, each with the name of the value and its JSON type."""
        fields = {} if self.steps or self.kind != "text" else get_fields(self.defaults.response_format)
        return [(f"parsed_{name}" if name in self.columns else name, name, kind) for name, kind in fields.items()]

    def added_columns(self, prefix: str) -> tuple[str, ...]:
        """Return the names of the columns that are added."""
        return tuple(prefix + name for name in (*self.columns, *(column for column, _, _ in self.field_columns)))

    @property
    def key(self) -> str:
        """Hash of the fingerprint."""
        return hash_json(self.fingerprint())

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a journal to be continued. Where the files lie does not matter."""
        files = [{"rows": file.rows, "sha256": file.digest, "layout": dict(file.layout)} for file in self.table.files]
        identities = {f"model {number}" if number > 1 else "model": each for number, each in enumerate(self.models, 1)}
        own = {name: getattr(self, name) for name in FINGERPRINT_FIELDS}
        return {"journal version": JOURNAL_VERSION, "input": files, "format": self.table.format, **own, **identities}

    def call_key(self, output: Output) -> str:
        """Return the hash of a call: of what was asked for, before a model is looked at, and of the output's form."""
        asked = {**replace(self, models=(), versions={}).fingerprint(), "model": self.asked}
        return hash_json({**asked, "served names": self.served_names, "output": asdict(output)})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "key": self.key, "fingerprint": self.fingerprint()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BatchJob:
        """Return the job of a record that `as_dict` made."""
        return TypeAdapter(cls).validate_python(record)

    @property
    def defaults(self) -> GenerationOptions:
        """Options of the model and of the batch, which hold for what a row leaves out."""
        own = self.asked[0].get("options", {}) if self.asked else {}
        return GenerationOptions(**own).merged(GenerationOptions(**self.options))

    @property
    def chain(self) -> list[ChainStep]:
        """Steps of a chain, without their models."""
        plain = ({name: value for name, value in step.items() if name != "engine"} for step in self.steps)
        return list(map(ChainStep.model_validate, plain))

    def make_requests(self) -> RequestMaker:
        """Return what makes the requests of the rows."""
        options = GenerationOptions(**self.options)
        if self.steps:
            engines = [step["engine"] for step in self.steps]
            return ChainRows(self.chain, options, self.system, self.greedy, engines)
        is_greedy = all(self.greedy)
        if self.table.format == "openai":
            task = self.asked[0].get("task") if self.asked else None
            return OpenAIRows(options, self.served_names, self.duplicate_rows, is_greedy, task, self.defaults)
        return PromptRows(
            self.prompt, self.system, self.messages_column, self.option_columns, options, is_greedy, self.input_type,
            self.pair, self.defaults,
        )  # fmt: skip


def get_fields(form: ResponseFormat | None) -> dict[str, str]:
    """Return the properties of the JSON schema of a form, if it is one, with their types."""
    properties = ((form and form.json_schema) or {}).get("properties")
    return {name: _json_type(kind) for name, kind in properties.items()} if isinstance(properties, dict) else {}


def _json_type(schema: Any) -> str:
    """Return the type that a property has when it is not null, "string" where it may have several."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    names = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind not in (None, "null")]
    return names[0] if len(names) == 1 else "string"


def check_same_job(job: BatchJob, record: Mapping[str, Any], journal: str) -> None:
    """Check that a journal belongs to a job.

    Raises:
        BatchError: With what differs.
    """
    if record.get("key") == job.key:
        return
    theirs, ours = record.get("fingerprint", {}), json.loads(json.dumps(job.fingerprint()))
    different = list(_differences(theirs, ours))
    if theirs.get("journal version") != JOURNAL_VERSION:  # what follows may have had other names
        different = different[:1]
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
            old, new = (shorten(json.dumps(value, ensure_ascii=False)) for value in (there, now))
            yield f"{within}{name}: {old} there, {new} now"


def _check_vectors(prompt: str | None, system: str | None, input_type: InputType | None, pair: str | None) -> None:
    if prompt is None and (input_type is not None or pair is not None):
        raise BatchError("Vectors and scores need a template over the columns as `prompt`, '{text}' for instance.")
    if pair is not None and (system is not None or input_type is not None):
        raise BatchError("`pair` goes with `prompt` alone. Leave `system` and `input_type` out.")


def plan_job(
    source: str,
    prompt: str | None,
    system: str | None = None,
    options: GenerationOptions | None = None,
    more: BatchOptions | None = None,
    input_type: InputType | None = None,
    pair: str | None = None,
) -> BatchJob:
    """Look at the input and check that it has what the prompt needs. The models are added by `describe_models`.

    Raises:
        BatchError: If the prompt does not fit the columns.
        ChainError: If the steps do not fit each other.
        TableError: If the input cannot be read, or is empty.
    """
    more = more or BatchOptions()
    given = options.model_dump(mode="json", exclude_unset=True) if options else {}
    ways = {"`prompt`": prompt, "`messages_column`": more.messages_column, "`steps`": more.steps or None}
    asked = [name for name, value in ways.items() if value is not None]
    _check_vectors(prompt, system, input_type, pair)
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
    ChainRows(more.steps or ())  # so that a broken template is found before the input is read
    needed = PromptRows(prompt, system, more.messages_column, tuple(more.option_columns), pair=pair).columns
    table = inspect_table(source, more.source_format, more.source_options)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise BatchError(
            f"The input {source!r} has no column {', '.join(map(repr, missing))}. "
            f"Its columns are {', '.join(map(repr, table.columns))}. {_remedy(table.columns)}"
        )
    if more.steps:
        check_chain(more.steps, table.columns)
    steps = tuple(
        {**step.model_dump(mode="json", exclude_unset=True, exclude={"model"}), "engine": number}
        for step, number in zip(more.steps or (), number_models(more.steps or ()), strict=True)
    )
    columns = tuple(more.option_columns)
    return BatchJob(
        table, prompt, more.messages_column, system, columns, given, steps, input_type=input_type, pair=pair
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
    formats = {more.source_format} if more.source_format else find_formats(source) - {"json"}
    if formats - {"jsonl", "openai"}:
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


def describe_model(model: Model) -> dict[str, Any]:
    """Return what the caller asks for, before the model is looked at."""
    if isinstance(model, InferenceEndpoint):
        asked = model.model_dump(mode="json", include=set(ENDPOINT_FIELDS), exclude_defaults=True)
        # Whatever a server takes may stand in them, also what does not belong into a file.
        asked["extra parameters"] = hash_json(model.extra_parameters)
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
    not known, so that it stands for itself. `commits` are those that an earlier run of the job has found.
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
        from prefect_huggingface.tasks.engines.openvino_runtime import apply_tuning
        from prefect_huggingface.tasks.storage.exports.store import get_export

        export = get_export(model)
        note_export(model, export)
        found = export.commit
        properties = apply_tuning(model, export.path).ov_config
        tuned = {name: value for name, value in sorted(properties.items()) if name not in model.ov_config}
        identity |= {"export": export.key, **({"tuned settings": tuned} if tuned else {})}
    else:
        from prefect_huggingface.tasks.storage.snapshots import get_snapshot

        found = get_snapshot(model).commit
        identity |= {"commit": found, "model_kwargs": json.loads(json.dumps(model.model_kwargs, default=str))}
    commit = None if model.is_local else found
    return ResolvedModel(identity, (commit, *(None if one.is_local else one.revision for one in model.adapters)))


def add_models(job: BatchJob, models: Sequence[Model], resolved: Sequence[ResolvedModel]) -> BatchJob:
    """Return a job with what its models are, and with the versions of the packages that generate."""
    versions = {}
    for package in (name for each in models for name in VERSIONED_PACKAGES.get(getattr(each, "backend", ""), ())):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    identities, commits = tuple(each.identity for each in resolved), tuple(each.commits for each in resolved)
    return replace(job, models=identities, commits=commits, versions=versions)


def describe_models(job: BatchJob, models: Sequence[Model], served_names: Sequence[str] = ()) -> BatchJob:
    """Return a job with what is known of its models before they are looked at.

    Raises:
        BatchError: If a model is not for what is asked for, or its options do not go with those of the batch.
    """
    for model in models:
        task = getattr(model, "task", None)
        if job.kind == "text" and task in VECTOR_TASKS and job.table.format != "openai":
            flow = "batch_embedding" if task == "feature-extraction" else "batch_rerank"
            raise BatchError(f"{model.model_id!r} is for {task!r} and generates no text. Use `{flow}`.")
        wanted = {"vectors": "feature-extraction", "scores": "text-ranking"}.get(job.kind, task)
        if task != wanted:
            raise BatchError(f"The `task` of {model.model_id!r} must be {wanted!r}, got {task!r}. Set it.")
    given = GenerationOptions(**job.options)

    def is_greedy(number: int, own: Mapping[str, Any] | None) -> bool:
        try:
            merged = models[number].options.merged(given).merged(GenerationOptions(**own) if own else None)
        except ValidationError as exc:
            raise BatchError(
                f"The options of the batch do not go with those of the model {models[number].model_id!r}, over which "
                f"they are put. {describe_clash(exc)} Correct one of them."
            ) from None
        return not merged.do_sample and "do_sample" not in job.option_columns

    steps = [(step["engine"], step.get("options")) for step in job.steps]
    greedy = tuple(is_greedy(*each) for each in steps or [(0, None)])
    name = models[0].model_id
    own = dict.fromkeys((name, name.rstrip("/").rpartition("/")[2])) if name else ()
    asked = tuple(map(describe_model, models))
    return replace(job, asked=asked, greedy=greedy, served_names=(*own, *served_names))
