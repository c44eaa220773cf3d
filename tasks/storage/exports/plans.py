"""Plans: what an export would be and would take, and why it could not succeed, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.storage.exports.checks import ExportCase, find_problems
from prefect_huggingface.tasks.storage.exports.recipes import Recipe, recipe_notes
from prefect_huggingface.tasks.storage.exports.resources import (
    estimate_disk,
    estimate_memory,
    free_disk,
    free_memory,
    least_memory,
)
from prefect_huggingface.tasks.storage.exports.source_weights import SourceWeights


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export would be.

    Attributes:
        source: Repository id, or the folder.
        commit: Commit of the source, `local-<sha256>` for a folder.
        key: Key that the export has or would have.
        path: Folder of the export if it is there, and nothing has to be done.
        recipe: Every setting.
        notes: What was decided for this model, in sentences.
        parameters: Number of weights.
        disk_bytes: Disk that the export needs at its fullest.
        free_disk_bytes: Free disk of the store.
        memory_bytes: Memory that the export needs at its fullest, an estimate.
        free_memory_bytes: Free memory of the machine, or None where it is not known.
        problems: Reasons why it cannot succeed, each with a remedy.
        warnings: Reasons why it may not succeed.
    """

    source: str
    commit: str
    key: str
    path: Path | None
    recipe: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    parameters: int = 0
    disk_bytes: int = 0
    free_disk_bytes: int = 0
    memory_bytes: int = 0
    free_memory_bytes: int | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def make_plan(
    model: LocalModel, recipe: Recipe, commit: str, key: str, config: Mapping[str, Any], weights: SourceWeights
) -> ExportPlan:
    """Return the plan of an export that is not there.

    Args:
        model: Model to export.
        recipe: Every setting.
        commit: Commit of the source.
        key: Key that the export will have.
        config: Content of `config.json`, empty if it is not known yet.
        weights: Number and size of the weights of the source.
    """
    problems = list(find_problems(ExportCase(model, config, recipe)))
    notes: tuple[str, ...] = ()
    try:
        notes = tuple(recipe_notes(recipe, config))
    except PlanError as error:
        problems.append(error.message)
    room = plan_room(model, recipe, commit, key, weights)
    return replace(room, notes=notes, problems=(*problems, *room.problems))


def plan_room(model: LocalModel, recipe: Recipe, commit: str, key: str, weights: SourceWeights) -> ExportPlan:
    """Return the part of a plan that disk and memory decide.

    Args:
        model: Model to export.
        recipe: Every setting.
        commit: Commit of the source.
        key: Key that the export will have.
        weights: Number and size of the weights of the source.
    """
    problems, warnings = [], []
    disk, free = estimate_disk(weights, recipe.weight_format), free_disk(model.store_path)
    if disk > free:
        problems.append(
            f"The export needs about {gigabytes(disk)} of disk and {gigabytes(free)} are free in "
            f"{str(model.store_path)!r}. Free some space, or set another `path` of the store."
        )
    memory, available = estimate_memory(weights, recipe.weight_format), free_memory()
    if available is not None and least_memory(weights) > available:
        problems.append(
            f"The export needs at least {gigabytes(least_memory(weights))} of memory and {gigabytes(available)} are "
            "free. Use a machine with more memory, or an OpenVINO repository of the model ('OpenVINO/...' on the Hub)."
        )
    elif available is not None and memory > available:
        warnings.append(
            f"The export may need {gigabytes(memory)} of memory and {gigabytes(available)} are free. It may be killed."
        )
    return ExportPlan(
        source=model.model_id, commit=commit, key=key, path=None, recipe=recipe.as_dict(),
        parameters=weights.parameters, disk_bytes=disk, free_disk_bytes=free, memory_bytes=memory,
        free_memory_bytes=available, problems=tuple(problems), warnings=tuple(warnings),
    )  # fmt: skip


def check_plan(plan: ExportPlan) -> None:
    """Refuse a plan that cannot succeed.

    Raises:
        PlanError: With all reasons.
    """
    if plan.problems:
        raise PlanError(" ".join(plan.problems), problems=plan.problems)


def gigabytes(size: int) -> str:
    """Return a number of bytes for people, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
