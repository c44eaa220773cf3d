"""The task that tells what an export costs: how near it is to its source, how large and how fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.blocks.quantization import WeightFormat
from prefect_huggingface.tasks.artifacts import publish_table
from prefect_huggingface.tasks.engines.memory import available_bytes
from prefect_huggingface.tasks.engines.openvino_runtime import compile_properties
from prefect_huggingface.tasks.errors import PlanError, QualityError
from prefect_huggingface.tasks.quality import ExportQuality, FormatQuality, quality_rows
from prefect_huggingface.tasks.records import Export, Snapshot
from prefect_huggingface.tasks.storage.exports import exporter
from prefect_huggingface.tasks.storage.exports.child import ChildProgram, run_child
from prefect_huggingface.tasks.storage.exports.recipes import EXPORT_TASKS
from prefect_huggingface.tasks.storage.exports.store import CARD, get_export, model_card
from prefect_huggingface.tasks.storage.files import open_staging, write_file
from prefect_huggingface.tasks.storage.folders import is_openvino_folder, measure_weights
from prefect_huggingface.tasks.storage.hub.cache import known_licence
from prefect_huggingface.tasks.storage.locks import hold_export
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from prefect_huggingface.tasks.vector_quality import compare_vectors

MAX_NEW_TOKENS = 32
STEPS = {"source": "answering with the source", "export": "comparing an export"}
RULES = 2
DEFAULT_PROMPTS: tuple[str, ...] = (
    "The capital of France is Paris, and the capital of Japan is",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain it boils",
    "Question: What is seven times eight?\nAnswer:",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Translate to German: The weather is nice today and we are going for a walk.",
    "Summarize in one sentence: The council met on Tuesday to discuss the new bridge. After three hours of debate, it "
    "decided to postpone the decision until the cost of repairs to the old bridge is known.",
    "Dear Ms Miller,\n\nthank you for your order. Unfortunately, the item that you chose",
    "The three laws of thermodynamics say that energy",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "A recipe for pancakes: mix two eggs, a cup of milk and a cup of flour. Then",
    "Classify the sentiment as positive or negative.\nReview: The battery died after two days.\nSentiment:",
    "In 1969, for the first time, people walked on",
    "The opposite of hot is cold. The opposite of early is",
    "List three animals that live in the desert:\n1.",
    "If all roses are flowers and some flowers fade quickly, then",
    "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"profession\":",
    "User: How do I reset my password?\nAssistant:",
    "Die Hauptstadt von Deutschland ist Berlin. Die Stadt liegt an",
    "La première guerre mondiale a commencé en",
    "The patient reports a dry cough and a fever for three days. The doctor",
    "To be, or not to be, that is the",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The quick brown fox jumps over the lazy dog. The sentence is known because it",
)  # fmt: skip


def compare_formats(
    model: LocalModel,
    prompts: Sequence[str] | None = None,
    formats: Sequence[WeightFormat] | None = None,
    min_agreement: float | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> ExportQuality:
    """Compare exports of a model with the model itself.

    The source answers each prompt greedily with torch. Each export is given the same tokens, and its next-token
    distributions are compared, and the probabilities and greedy answers of the continuous batch that answers with it.
    Exports that are not there are made. The result is kept, so asking again costs nothing. Models of vectors
    and scores are compared by these, anew each time.

    Args:
        model: Model with backend "openvino"; its other settings hold for all formats.
        prompts: Texts to compare on. When left out, a built-in set.
        formats: Weight formats to compare, in order. When left out, that of the model.
        min_agreement: Least share of next tokens, 0 to 1, on which each export must agree with its source.
        max_new_tokens: Upper limit of the tokens of each answer.

    Returns:
        The comparison. In a run it is also left as a table.

    Raises:
        QualityError: If an export agrees less with its source than it must. The table is left nevertheless.
        PlanError: If the model cannot be compared: it has no source here, or it is for images.
        ExportError: If an export cannot be made or the comparison fails.
    """
    _check_input(model, prompts, formats)
    texts = list(prompts if prompts is not None else DEFAULT_PROMPTS)
    models = [model.model_copy(update={"weight_format": name}) for name in formats or (model.weight_format,)]
    exports = [get_export(one) for one in models]
    snapshot = get_snapshot(model)
    if is_openvino_folder(file.path for file in snapshot.files):
        raise PlanError(f"{model.model_id!r} is an OpenVINO model, its source is not here. Compare its source instead.")
    if model.task in VECTOR_TASKS:
        quality = compare_vectors(model, models, exports, snapshot, texts)
    else:
        quality = compare_exports(model, snapshot, exports, texts, max_new_tokens)
    _publish(quality)
    if min_agreement is not None:
        check_agreement(quality, min_agreement)
    return quality


def check_agreement(quality: ExportQuality, min_agreement: float) -> None:
    """Refuse exports that agree too little with their source.

    Raises:
        QualityError: If there is one.
    """
    for entry in quality.formats:
        if entry.agreement < min_agreement:
            raise QualityError(
                f"The export of {quality.source!r} in {entry.weight_format} agrees with its source by "
                f"{entry.agreement:.1%}{_measure(entry)}, less than {min_agreement:.1%} (`min_agreement`). "
                "Choose a weight format with more bits, or quantization options with calibration data.",
                agreement=entry.agreement,
                weight_format=entry.weight_format,
            )


def _measure(entry: FormatQuality) -> str:
    return " of the next tokens" if entry.ranking is None else " (the least of cosine and rank correlation)"


def why_not_comparable(model: LocalModel) -> str | None:
    """Return why the exports of a model cannot be compared with their source, as far as the block tells, or None."""
    if model.backend != "openvino":
        return f"A comparison is for backend 'openvino', got {model.backend!r}."
    if model.task == "image-text-to-text":
        return f"A comparison is for models of text, got task {model.task!r}."
    return None


def _check_input(model: LocalModel, prompts: Sequence[str] | None, formats: Sequence[str] | None) -> None:
    if (reason := why_not_comparable(model)) is not None:
        raise PlanError(f"{reason} Leave the comparison out.")
    if prompts is not None and (isinstance(prompts, str) or not prompts or not all(prompts)):
        raise PlanError(f"`prompts` must be a list of texts that are not empty, got {prompts!r}. Correct it.")
    if model.task in VECTOR_TASKS and prompts is not None and len(prompts) < 2:
        raise PlanError(f"A comparison of vectors or scores needs two texts or more, got {prompts!r}. Add one.")
    if formats is not None and (isinstance(formats, str) or not formats):
        raise PlanError(f"`formats` must be a list of weight formats, got {formats!r}. Correct it.")


def compare_exports(
    model: LocalModel, snapshot: Snapshot, exports: Sequence[Export], texts: list[str], max_new_tokens: int
) -> ExportQuality:
    """Compare exports that are there with their source, which answers once for all of them.

    Args:
        model: Model whose task, device and settings of OpenVINO hold for all exports.
        snapshot: The source.
        exports: Exports of it, in the order of the result.
        texts: Prompts.
        max_new_tokens: Upper limit of the tokens of each answer.

    Raises:
        ExportError: If the comparison fails.
    """
    job = {
        "source": str(snapshot.path),
        "exports": {export.key: str(export.path) for export in exports},
        "task": EXPORT_TASKS[model.task],
        "prompts": texts,
        "max_new_tokens": max_new_tokens,
        "device": model.device or "CPU",
        "ov_config": compile_properties(model),
        "trust_remote_code": model.trust_remote_code,
    }
    names = [file.path for file in snapshot.files]
    kept = _result_path(model, snapshot, job)
    found = _read_result(kept)
    if found is None:
        job["dtype"] = _choose_dtype(snapshot.path, names)
        program = ChildProgram(
            path=Path(exporter.__file__).with_name("evaluator.py"),
            purpose=f"comparison of {model.model_id!r}",
            steps=STEPS,
        )
        with ExitStack() as held:
            for path in (snapshot.path, *(export.path for export in exports)):
                held.enter_context(hold_export(path))
            staging = held.enter_context(open_staging(model.store_path))
            found = run_child(program, {**job, "work": str(staging.path)}, staging.path, staging.descriptor)
        _keep_result(kept, found)
    qualities = tuple(_format_quality(export, found["exports"][export.key]) for export in exports)
    for export, one in zip(exports, qualities, strict=True):
        with suppress(OSError):
            write_file(export.path / CARD, model_card(export, known_licence(snapshot.path), asdict(one)).encode())
    return ExportQuality(
        source=model.model_id,
        commit=snapshot.commit,
        prompts=len(texts),
        source_tokens_per_second=float(found["source"]["tokens_per_second"]),
        source_size_bytes=sum(file.size for file in snapshot.files),
        formats=qualities,
    )


def _format_quality(export: Export, numbers: Mapping[str, Any]) -> FormatQuality:
    return FormatQuality(
        weight_format=str(export.recipe.get("weight_format")),
        key=export.key,
        size_bytes=export.size_bytes,
        **numbers,
    )


def _choose_dtype(folder: Path, names: Sequence[str]) -> str:
    """Return the data type for the source: single precision if the memory allows it, else that of the files."""
    return "float32" if 6 * measure_weights(folder, names).parameters < available_bytes(swap=True) else "auto"


def _result_path(model: LocalModel, snapshot: Snapshot, job: Mapping[str, Any]) -> Path:
    """Return where the result of a comparison is kept; everything that decides it is in its name."""
    places = ("source", "exports")
    content = {name: value for name, value in job.items() if name not in places}
    content.update(rules=RULES, commit=snapshot.commit, keys=sorted(job["exports"]))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return model.store_path / "quality" / f"{digest[:32]}.json"


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _keep_result(path: Path, found: Mapping[str, Any]) -> None:
    with suppress(OSError):
        write_file(path, json.dumps(found).encode())


def _publish(quality: ExportQuality) -> None:
    key = f"export-quality-{Path(quality.source).name}"
    publish_table(key, quality_rows(quality), f"Exports of {quality.source} compared with their source")


compare_export = task(name="compare-export", cache_policy=NO_CACHE)(compare_formats)
