"""What makes two batches the same job: the input's content, the model, the prompt, the options and the versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.tables.inputs import Table

JOURNAL_VERSION = 1
VERSIONED_PACKAGES = {"openvino": ("openvino", "openvino-genai"), "torch": ("torch", "transformers")}


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
        model: What identifies the model.
        versions: Versions of the packages that generate.
        greedy: Whether equal prompts have equal answers.
        served_names: Names under which requests in the OpenAI format may call the model.
        duplicate_rows: Rows of the OpenAI format whose id an earlier row has.
    """

    table: Table
    prompt: str | None = None
    messages_column: str | None = None
    system: str | None = None
    option_columns: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    greedy: bool = True
    served_names: tuple[str, ...] = ()
    duplicate_rows: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Hash of the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()[:32]

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a journal to be continued. Where the files lie does not matter."""
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
            "model": dict(self.model),
            "versions": dict(self.versions),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "key": self.key, "fingerprint": self.fingerprint()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BatchJob:
        """Return the job of a record that `as_dict` made."""
        fields = {name: record[name] for name in cls.__slots__}
        table = Table.from_dict(fields.pop("table"))
        for name in ("option_columns", "served_names", "duplicate_rows"):
            fields[name] = tuple(fields[name])
        return cls(table=table, **fields)


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


def get_versions(backend: str) -> dict[str, str]:
    """Return the versions of the packages that generate with a backend."""
    found = {}
    for package in VERSIONED_PACKAGES.get(backend, ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
