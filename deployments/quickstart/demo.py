"""The quickstart: prepare the bundled model in three ways, put a file of questions through each, and compare.

Everything it makes lies in `.quickstart/` of the clone: the model store, a Prefect home, and a folder per run with the
answers. Run it with `make demo`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE.parent.parent / ".quickstart"
# The libraries read these when they are imported: no network, a Prefect home of its own, a quiet terminal.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    PREFECT_HOME=str(HOME / "prefect"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
    DO_NOT_TRACK="1",
)
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
(HOME / "prefect").mkdir(parents=True, exist_ok=True)
# The quickstart must work in a shell that is set up for another Prefect server.
os.environ.pop("PREFECT_API_URL", None)
os.environ.pop("PREFECT_PROFILE", None)

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore  # noqa: E402
from prefect_huggingface.flows import batch_inference, prepare_model, prompt_chain  # noqa: E402
from prefect_huggingface.tasks.records import BatchSummary, Export  # noqa: E402

console = Console()
QUESTIONS = HERE / "questions.jsonl"
OPTIONS = GenerationOptions(max_new_tokens=48)
STORE = ModelStore(path=HOME / "store")
MODELS = {
    "original": LocalModel(model_id=str(HERE / "model"), backend="torch", store=STORE, options=OPTIONS),
    "int8": LocalModel(model_id=str(HERE / "model"), weight_format="int8", store=STORE, options=OPTIONS),
    "int4": LocalModel(model_id=str(HERE / "model"), weight_format="int4", store=STORE, options=OPTIONS),
}
# Smallest share of the original's exact matches that an export must keep.
LEAST_SHARES = {"int8": 0.99, "int4": 0.95}
CHAIN = [
    {"name": "person", "prompt": "Extract the name and the age: {sentence}", "parser": "json"},
    {"name": "in_french", "prompt": "What is the number {person_age} in french?"},
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one format came to: how it was prepared, the batch, and the questions it answered exactly."""

    preparation: str
    size_bytes: int
    summary: BatchSummary
    exact: frozenset[str]


def main() -> int:
    """Run the quickstart and return 0, or 1 if an export lost more than it may."""
    folder = HOME / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True)
    console.print("[bold]prefect-huggingface quickstart[/]: one model, three formats, one file of questions\n")
    outcomes = {}
    for name, model in MODELS.items():
        console.print(f"[bold]{name}[/] ({model.backend})")
        outcomes[name] = ask(model, folder / f"answers-{name}.jsonl")
    show_chain()
    console.print(table_of(outcomes))
    console.print(f"The answers are in {folder}.")
    return check(outcomes)


def ask(model: LocalModel, destination: Path) -> Outcome:
    """Prepare a model and put all questions through it."""
    prepared = prepare_model(model)
    summary = batch_inference(model, str(QUESTIONS), str(destination), "{question}")
    with destination.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    exact = frozenset(row["id"] for row in rows if (row["completion"] or "").strip() == row["answer"])
    size = prepared.size_bytes if isinstance(prepared, Export) else sum(file.size for file in prepared.files)
    return Outcome(preparation_of(prepared), size, summary, exact)


def preparation_of(prepared: object) -> str:
    """Say in words how a model was prepared."""
    if not isinstance(prepared, Export):
        return "used as it is"
    return "export reused" if prepared.reused else f"exported in {prepared.seconds:.0f} s"


def show_chain() -> None:
    """Run a prompt chain of two steps and print it."""
    sentence = "Maria is 34 years old."
    outputs = prompt_chain(MODELS["int8"], CHAIN, {"sentence": sentence})
    console.print(f"[bold]prompt chain[/] {sentence!r} -> {outputs['person']} -> {outputs['in_french']!r}\n")


def table_of(outcomes: Mapping[str, Outcome]) -> Table:
    """Return the closing table: a row per format."""
    original = outcomes["original"].exact
    table = Table(title="Quickstart", caption="kept: exact answers of the original that the export gives too")
    for title in ("model", "prepared", "MB", "rows", "failed", "tokens/s", "exact", "kept"):
        table.add_column(title, justify="left" if title in ("model", "prepared") else "right")
    for name, outcome in outcomes.items():
        kept = len(outcome.exact & original) / len(original)
        table.add_row(
            name,
            outcome.preparation,
            f"{outcome.size_bytes / 1e6:.1f}",
            str(outcome.summary.rows),
            str(outcome.summary.failed),
            f"{outcome.summary.tokens_per_second:.0f}",
            f"{len(outcome.exact) / outcome.summary.rows:.1%}",
            f"{kept:.1%}",
        )
    return table


def check(outcomes: Mapping[str, Outcome]) -> int:
    """Compare the exports with what they must keep, and return the exit status."""
    original = outcomes["original"].exact
    for name, least in LEAST_SHARES.items():
        kept = len(outcomes[name].exact & original) / len(original)
        if kept < least:
            console.print(f"[red]{name} keeps {kept:.1%} of the original's exact matches, less than {least:.0%}.[/]")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
