"""Checks of an export before it starts: each returns a sentence that says why it cannot succeed, or None."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.version import Version

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.storage.exports.exporter import LIFTED_LIMITS, LIFTED_UP_TO
from prefect_huggingface.tasks.storage.exports.optimum_sources import DATASETS, read_constants
from prefect_huggingface.tasks.storage.exports.package_conflicts import find_conflict
from prefect_huggingface.tasks.storage.exports.recipes import EXPORT_TASKS, Recipe
from prefect_huggingface.tasks.storage.exports.support_table import support_table
from prefect_huggingface.tasks.storage.exports.vector_exports import MORE_ENCODERS, VECTOR_TASKS, is_causal
from prefect_huggingface.tasks.storage.exports.versions import installed_version
from prefect_huggingface.tasks.storage.gguf_files import describe_gguf

NATIVE_TYPES = "transformers/models/auto/configuration_auto.py"
CALIBRATION_EXTRA = "Install it with `pip install 'prefect-huggingface[calibration]'`"
DATASET_TABLES = {
    "text-generation": "PREDEFINED_CAUSAL_LANGUAGE_DATASETS",
    "text2text-generation": "PREDEFINED_LANGUAGE_DATASETS",
    "image-text-to-text": "PREDEFINED_VISUAL_LM_DATASETS",
    "feature-extraction": "PREDEFINED_LANGUAGE_DATASETS",
    "text-classification": "PREDEFINED_LANGUAGE_DATASETS",
}
SCORED = r"(ForSequenceClassification|ForCausalLM)$"
HEADS = {"text-generation": r"(ForCausalLM|LMHeadModel|LMHead|ForConditionalGeneration|Model)$"}
# Pre-quantized checkpoints that Optimum converts as they are, with the package that it needs for it.
QUANTIZED_SOURCES = {"gptq": "gptqmodel", "awq": "gptqmodel", "bitnet": None, "mxfp4": None}


@dataclass(frozen=True, slots=True)
class ExportCase:
    """An export to check. `config` is the content of `config.json`, empty if it is not known yet."""

    model: LocalModel
    config: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of the model, quoted."""
        return repr(self.model.model_id)

    @property
    def is_vector(self) -> bool:
        """Whether the model is for vectors or scores."""
        return self.recipe.task in VECTOR_TASKS

    @property
    def model_type(self) -> str:
        """Architecture of the model, empty if it is not known."""
        return str(self.config.get("model_type", ""))


def find_problems(case: ExportCase) -> tuple[str, ...]:
    """Return a sentence for each reason why an export cannot succeed."""
    checks: tuple[Callable[[ExportCase], str | None], ...] = (
        check_remote_code, check_architecture, check_task, check_head, check_transformers, check_source_format,
        check_packages, check_dataset,
    )  # fmt: skip
    if case.model.is_gguf and (unusable := describe_gguf(case.model).problem):
        return (unusable,)
    if not case.config:
        checks = (check_packages, check_dataset)
    problems = [problem for check in checks if (problem := check(case)) is not None]
    # It takes a second or two where such packages are installed, and no longer matters beside another problem.
    conflict = None if problems else find_conflict()
    return (*problems, *([conflict] if conflict else []))


def check_remote_code(case: ExportCase) -> str | None:
    """A model that is Python code of its own needs the permission to run it."""
    if "auto_map" not in case.config or case.model.trust_remote_code or is_native(case.model_type):
        return None
    return (
        f"{case.name} is an architecture of its own ({case.model_type!r}) and needs to run Python code that comes with "
        "it. Set `trust_remote_code=True` if you trust it, or choose another model."
    )


def check_architecture(case: ExportCase) -> str | None:
    """The architecture is one that Optimum exports."""
    table = support_table()
    if not table or case.model_type in table or (case.is_vector and case.model_type in MORE_ENCODERS):
        return None
    near = difflib.get_close_matches(case.model_type, table, n=3, cutoff=0.5)
    nearest = f" The nearest supported ones are {', '.join(map(repr, near))}." if near else ""
    return (
        f"{case.name} has the architecture {case.model_type!r}, which the installed optimum-intel "
        f"({installed_version('optimum-intel')}) does not export.{nearest} Use `backend='torch'`, or another model."
    )


def check_task(case: ExportCase) -> str | None:
    """The architecture can do the task."""
    support = support_table().get(case.model_type)
    task = "feature-extraction" if case.is_vector and is_causal(dict(case.config)) else case.recipe.task
    if support is None or task in support.tasks:
        return None
    possible = sorted({name for name, task in EXPORT_TASKS.items() if task in support.tasks})
    if not possible:
        return (
            f"{case.name} is a {case.model_type!r} model, which does not generate text "
            f"(it can do {', '.join(sorted(support.tasks))}). Choose a model that generates text."
        )
    return (
        f"{case.name} is a {case.model_type!r} model and cannot do {case.model.task!r}. "
        f"Set `task` to {' or '.join(map(repr, possible))}."
    )


def check_head(case: ExportCase) -> str | None:
    """The weights are those of a model that generates, so that no head is made up of random numbers."""
    heads = [str(name) for name in case.config.get("architectures") or []]
    if case.model.task == "text-ranking" and not any(re.search(SCORED, name) for name in heads):
        return (
            f"{case.name} was trained as {', '.join(map(repr, heads)) or 'nothing that is known'} and gives no scores. "
            "Choose a reranker, or set `task='feature-extraction'` for vectors."
        )
    if case.is_vector:
        return None
    causal = case.recipe.task.startswith("text-generation")
    if causal and case.config.get("is_encoder_decoder"):
        return (
            f"{case.name} is an encoder-decoder model and does not do {case.model.task!r}. "
            "Set `task` to 'text2text-generation', 'summarization' or 'translation'."
        )
    if not heads or any(re.search(HEADS["text-generation"], name) or "Generation" in name for name in heads):
        return None
    if not any(re.search(r"For[A-Z]\w+$", name) for name in heads) or any("MT" in name for name in heads):
        return None
    return (
        f"{case.name} was trained as {heads[0]!r} and has no weights for {case.model.task!r}. "
        "Choose a model that generates text."
    )


def check_transformers(case: ExportCase) -> str | None:
    """The installed version of Transformers is one that the architecture is exported with."""
    support, installed = support_table().get(case.model_type), installed_version("transformers")
    if support is None or installed is None:
        return None
    maximum = LIFTED_UP_TO if case.model_type in LIFTED_LIMITS else support.maximum
    if maximum is not None and Version(installed) > Version(maximum):
        return (
            f"{case.name}: optimum-intel {installed_version('optimum-intel')} exports {case.model_type!r} only with "
            f"Transformers up to {maximum}, and {installed} is installed. Use `backend='torch'`, or an OpenVINO "
            "repository of the model."
        )
    if support.minimum is not None and Version(installed) < Version(support.minimum):
        return f"{case.name} needs Transformers {support.minimum} or newer, and {installed} is installed. Update it."
    return None


def check_source_format(case: ExportCase) -> str | None:
    """The checkpoint is one whose weights can be taken, and they are not quantized twice."""
    source = case.config.get("quantization_config")
    method = source.get("quant_method") if isinstance(source, dict) else None
    if method is None:
        return None
    if method not in QUANTIZED_SOURCES:
        return (
            f"{case.name} is quantized already ({method!r}) in a way that cannot be exported. "
            "Use the repository with its original weights."
        )
    package = QUANTIZED_SOURCES[method]
    if package is not None and installed_version(package) is None:
        return f"{case.name} is quantized with {method!r} and needs the package {package!r}. Install it with pip."
    if case.recipe.quantization is not None and method in ("gptq", "awq", "bitnet"):
        return f"{case.name} is quantized already ({method!r}). Set `weight_format='fp16'` to export it as it is."
    return None


def check_packages(case: ExportCase) -> str | None:
    """The packages that the recipe needs are installed."""
    needed = ["optimum-intel", "openvino", "openvino-tokenizers"]
    needed += ["nncf"] if case.recipe.quantization is not None else []
    needed += ["pillow"] if case.recipe.task == "image-text-to-text" else []
    for package in needed:
        if installed_version(package) is None:
            return f"The export needs the package {package!r}. Install it with `pip install {package}`."
    dataset = dataset_of(case.recipe)
    texts_suffice = case.recipe.task.startswith("text-generation")
    if dataset in (None, "auto") and texts_suffice or dataset is None or installed_version("datasets"):
        return None
    if not isinstance(dataset, str) and texts_suffice:
        return None
    what = f"the data set {dataset!r}" if isinstance(dataset, str) else "calibration texts for this kind of model"
    return (
        f"The recipe in {case.recipe.weight_format} for {case.name} uses {what}, which needs the package 'datasets'. "
        f"{CALIBRATION_EXTRA}, or give options that need no data, "
        "`quantization=QuantizationOptions(group_size=128)` for instance."
    )


def check_dataset(case: ExportCase) -> str | None:
    """The name of the data set is one that Optimum knows for the task."""
    dataset = dataset_of(case.recipe)
    known = read_constants(DATASETS).get(DATASET_TABLES[case.recipe.task.removesuffix("-with-past")])
    if not isinstance(dataset, str) or not known or dataset.partition(":")[0] in known:
        return None
    return f"`dataset` must be texts or one of {', '.join(sorted(known))}, got {dataset!r}. Correct it."


def dataset_of(recipe: Recipe) -> Any:
    """Return the calibration data of a recipe: a name, texts, or None."""
    return (recipe.quantization or {}).get("dataset")


def is_native(model_type: str) -> bool:
    """Tell whether Transformers has an architecture of its own accord."""
    return f'("{model_type}", ' in _native_source()


@cache
def _native_source() -> str:
    try:
        return Path(str(distribution("transformers").locate_file(NATIVE_TYPES))).read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError):
        return ""
