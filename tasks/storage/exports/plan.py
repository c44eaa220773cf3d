"""Plans: what an export would be and would take, and why it could not succeed, before anything is started."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.version import Version

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.engines.memory import available_bytes
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.hub_errors import HubError, attempt
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.exports.child import find_conflict
from prefect_huggingface.tasks.storage.exports.exporter import LIFTED_LIMITS, LIFTED_UP_TO
from prefect_huggingface.tasks.storage.exports.recipes import (
    DATASETS,
    EXPORT_TASKS,
    Recipe,
    export_key,
    installed_version,
    read_source,
    read_table,
    recipe_notes,
    support_table,
)
from prefect_huggingface.tasks.storage.exports.vector_exports import MORE_ENCODERS, VECTOR_EXPORTS, is_causal
from prefect_huggingface.tasks.storage.files import free_disk, gigabytes
from prefect_huggingface.tasks.storage.folders import (
    OPENVINO_MODELS,
    SourceWeights,
    estimate_weights,
    is_openvino_folder,
    is_pickled_weight,
    is_safe_weight,
    measure_weights,
    parse_header,
    read_json,
)
from prefect_huggingface.tasks.storage.gguf_files import describe_gguf, gguf_commit
from prefect_huggingface.tasks.storage.hub.cache import RepositoryFolder, known_commit, read_index, works_offline
from prefect_huggingface.tasks.storage.hub.client import COMMIT, DEFAULT_REVISION, HubConnection
from prefect_huggingface.tasks.storage.hub.download import DownloadPlan, plan_snapshot
from prefect_huggingface.tasks.storage.snapshots import get_snapshot

LARGEST_INDEX_BYTES = 64_000_000
NATIVE_TYPES = "transformers/models/auto/configuration_auto.py"
DATASET_TABLES = {
    "text-generation-with-past": "PREDEFINED_CAUSAL_LANGUAGE_DATASETS",
    "image-text-to-text": "PREDEFINED_VISUAL_LM_DATASETS",
}
SCORED = r"(ForSequenceClassification|ForCausalLM)$"
GENERATING = r"(ForCausalLM|LMHeadModel|LMHead|ForConditionalGeneration|Model)$"
# The paged attention of OpenVINO 2026.4 knows nothing of their masks: local windows, positions as biases.
WRONG_ATTENTION = ("gpt_neo", "mpt", "xglm")
# The outermost list of layers: those of T5 have a list of their own, `decoder.block.0.layer.2`.
STACK = re.compile(r"((?:.+?\.)?(?:layers|layer|h|blocks|block))\.(\d+)\..+")
HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer)\.")
# Architectures whose head is not the table of embeddings unless their configuration says so.
OWN_HEADS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3", "phimoe", "olmo", "olmo2",
    "stablelm", "gptj", "gpt_neox", "granite", "granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "internlm2",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
SENTENCEPIECE_FILES = (".model", ".spm")
# Pre-quantized checkpoints that Optimum converts as they are, with the package that it needs for it.
QUANTIZED_SOURCES = {"gptq": "gptqmodel", "awq": "gptqmodel", "bitnet": None, "mxfp4": None}
# Types of weights of four bits, by the formats that they are of. Codes of a codebook are integers; the codebook itself
# is not looked for.
FOUR_BITS = {"u4": ("int4", "cb4"), "i4": ("int4", "cb4"), "nf4": ("nf4",), "f4e2m1": ("mxfp4",)}
EIGHT_BITS = ("u8", "i8", "f8e4m3", "f8e5m2")
ELEMENT_TYPE = re.compile(rb'element_type="(\w+)"')
# Python with torch, Transformers, Optimum and NNCF, before there is any model.
BASE_MEMORY_BYTES = 650 << 20
# Graph, tokenizer and temporary files.
BASE_DISK_BYTES = 64 << 20
BITS = {"checkpoint": 16.0, "fp32": 32.0, "fp16": 16.0, "int8": 8.1, "int4": 4.5, "nf4": 4.3, "mxfp4": 4.3, "cb4": 4.1}


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
        free_memory_bytes: Free memory of the machine, that on disk (swap) included.
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
    free_memory_bytes: int = 0
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is known of a source, without a download where it is on the Hub.

    Attributes:
        commit: Commit, `local-<sha256>` for a folder.
        config: Content of `config.json`, empty if it is not known yet.
        weights: Number, size and names of the weights.
        files: Names of the files, none where they are not known.
        snapshot: The files, if they are here.
        problem: Sentence that says why it cannot be had or used, or None.
    """

    commit: str
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: SourceWeights = SourceWeights(0, 0)
    files: frozenset[str] = frozenset()
    snapshot: Snapshot | None = None
    problem: str | None = None


def known_source(model: LocalModel) -> str | None:
    """Return the commit of a source if neither the Hub nor its files need to be asked for it."""
    if model.is_local:
        return gguf_commit(model) if model.is_gguf else None
    revision = model.revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        return revision
    return known_commit(RepositoryFolder.of(model), revision) if works_offline(model) else None


def describe_source(model: LocalModel, planned: DownloadPlan | None = None) -> ExportSource:
    """Return what is known of the source of a model, perhaps with its plan. Nothing is downloaded or converted.

    Raises:
        ModelSourceError: If the model is a folder or file that is missing or holds no model.
        HubError: If the Hub cannot tell.
    """
    if model.is_gguf:
        found = describe_gguf(model)
        return ExportSource(gguf_commit(model), found.config, found.weights, problem=found.problem)
    if not model.is_local:
        planned = planned or plan_snapshot(model)
        if not planned.complete:
            return _describe_remote(model, planned)
        model = model.model_copy(update={"revision": planned.commit})  # the branch may move
    return describe_snapshot(get_snapshot(model))


def describe_snapshot(snapshot: Snapshot) -> ExportSource:
    """Return what is known of a source that is here."""
    names = [file.path for file in snapshot.files]
    config, weights = read_json(snapshot.path / "config.json"), measure_weights(snapshot.path, names)
    return ExportSource(snapshot.commit, config, weights, frozenset(names), snapshot)


def _describe_remote(model: LocalModel, planned: DownloadPlan) -> ExportSource:
    """Return what the Hub tells of a source; names of weights come from the index of shards or the one file's header.

    What would be used as it is, or cannot be had, is not looked into.
    """
    sizes = {file.path: file.size or 0 for file in planned.files}
    size = sum(size for name, size in sizes.items() if is_safe_weight(name) or is_pickled_weight(name))
    weights = estimate_weights(size or sum(sizes.values()))
    source = ExportSource(planned.commit, weights=weights, files=frozenset(sizes), problem=planned.problem)
    if planned.problem is not None or is_openvino_folder(sizes):
        return source
    config: Any = {}
    with HubConnection(model.get_credentials(), model.model_id) as hub:

        def read(path: str, largest: int = LARGEST_INDEX_BYTES) -> bytes:
            about = hub.about(planned.commit, path)
            found = attempt(lambda: hub.read_small(path, planned.commit, largest), about)
            return b"" if isinstance(found, HubError) else found

        with suppress(ValueError):
            config = json.loads(read("config.json"))
        if "model.safetensors.index.json" in sizes:
            weights = replace(weights, names=frozenset(read_index(read("model.safetensors.index.json"))))
        elif "model.safetensors" in sizes:
            length = int.from_bytes(read("model.safetensors", 8), "little")
            header = read("model.safetensors", 8 + length)[8:] if 0 < length < LARGEST_INDEX_BYTES else b""
            weights = parse_header(header, size)
    return replace(source, config=config if isinstance(config, dict) else {}, weights=weights)


def make_plan(model: LocalModel, recipe: Recipe, source: ExportSource) -> ExportPlan:
    """Return the plan of an export that is not there."""
    problems = [source.problem] if source.problem else list(find_problems(ExportCase(model, recipe, source)))
    notes: tuple[str, ...] = ()
    try:
        notes = tuple(recipe_notes(recipe, source.config))
    except PlanError as error:
        problems.append(error.message)
    room = plan_room(model, recipe, source.commit, source.weights)
    return replace(room, notes=notes, problems=(*problems, *room.problems))


def plan_room(model: LocalModel, recipe: Recipe, commit: str, weights: SourceWeights) -> ExportPlan:
    """Return the part of a plan that disk and memory decide."""
    problems, warnings = [], []
    disk, memory, least = estimate_room(weights, recipe.weight_format)
    free, available = free_disk(model.store_path), available_bytes(swap=True)
    if disk > free:
        problems.append(
            f"The export needs about {gigabytes(disk)} of disk and {gigabytes(free)} are free in "
            f"{str(model.store_path)!r}. Free some space, or set another `path` of the store."
        )
    if least > available:
        problems.append(
            f"The export needs at least {gigabytes(least)} of memory and {gigabytes(available)} are "
            "free. Use a machine with more memory, or an OpenVINO repository of the model ('OpenVINO/...' on the Hub)."
        )
    elif memory > available:
        warnings.append(
            f"The export may need {gigabytes(memory)} of memory and {gigabytes(available)} are free. It may be killed."
        )
    return ExportPlan(
        source=model.model_id, commit=commit, key=export_key(commit, recipe), path=None, recipe=recipe.as_dict(),
        parameters=weights.parameters, disk_bytes=disk, free_disk_bytes=free, memory_bytes=memory,
        free_memory_bytes=available, problems=tuple(problems), warnings=tuple(warnings),
    )  # fmt: skip


def check_plan(plan: ExportPlan) -> None:
    """Refuse a plan that cannot succeed, with a `PlanError` that has all reasons."""
    if plan.problems:
        raise PlanError(" ".join(plan.problems), problems=plan.problems)


@dataclass(frozen=True, slots=True)
class ExportCase:
    """An export to check. What is not known of its source yet is empty."""

    model: LocalModel
    recipe: Recipe
    source: ExportSource

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.json`."""
        return self.source.config

    @property
    def name(self) -> str:
        """Name of the model, quoted."""
        return repr(self.model.model_id)

    @property
    def is_vector(self) -> bool:
        """Whether the model is for vectors or scores."""
        return self.recipe.task in VECTOR_EXPORTS

    @property
    def model_type(self) -> str:
        """Architecture of the model, empty if it is not known."""
        return str(self.config.get("model_type", ""))


def find_problems(case: ExportCase) -> tuple[str, ...]:
    """Return a sentence for each reason why an export cannot succeed."""
    checks: tuple[Callable[[ExportCase], str | None], ...] = (
        check_remote_code, check_architecture, check_attention, check_task, check_head, check_weights,
        check_transformers, check_source_format, check_tokenizer, check_packages, check_dataset,
    )  # fmt: skip
    if not case.config:
        if case.source.files and "config.json" not in case.source.files:
            return (f"{case.name} holds no 'config.json', which names its architecture. Choose another model.",)
        checks = (check_packages, check_dataset)
    problems = [problem for check in checks if (problem := check(case)) is not None]
    # It takes a second or two where such packages are installed, and no longer matters beside another problem.
    conflict = None if problems else find_conflict()
    return (*problems, *([conflict] if conflict else []))


def check_remote_code(case: ExportCase) -> str | None:
    """A model that is Python code of its own needs the permission to run it."""
    is_native = f'("{case.model_type}", ' in read_source("transformers", NATIVE_TYPES)
    if "auto_map" not in case.config or case.model.trust_remote_code or is_native:
        return None
    return (
        f"{case.name} is an architecture of its own ({case.model_type!r}) and needs to run Python code that comes with "
        "it. Set `trust_remote_code=True` if you trust it, or choose another model."
    )


def check_architecture(case: ExportCase) -> str | None:
    """The architecture is one that Optimum exports."""
    table = support_table()
    if installed_version("optimum-intel") is None or case.model_type in table:
        return None
    if case.is_vector and case.model_type in MORE_ENCODERS:
        return None
    if not table:
        return (
            f"The architectures of optimum-intel {installed_version('optimum-intel')} cannot be read. Install a "
            "version that this package names in its requirements."
        )
    near = difflib.get_close_matches(case.model_type, table, n=3, cutoff=0.5)
    nearest = f" The nearest supported ones are {', '.join(map(repr, near))}." if near else ""
    return (
        f"{case.name} has the architecture {case.model_type!r}, which the installed optimum-intel "
        f"({installed_version('optimum-intel')}) does not export.{nearest} Use `backend='torch'`, or another model."
    )


def check_task(case: ExportCase) -> str | None:
    """The architecture can do the task."""
    support = support_table().get(case.model_type)
    task = "feature-extraction" if case.is_vector and is_causal(case.config) else case.recipe.task
    if support is None or task in support.tasks:
        return None
    names = [name for name in EXPORT_TASKS if case.is_vector or name not in VECTOR_TASKS]
    possible = sorted(name for name in names if EXPORT_TASKS[name] in support.tasks)
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
    if any(re.search(GENERATING, name) or "Generation" in name or "MT" in name for name in heads):
        return None
    if not any(re.search(r"For[A-Z]\w+$", name) for name in heads):
        return None
    return (
        f"{case.name} was trained as {heads[0]!r} and has no weights for {case.model.task!r}. "
        "Choose a model that generates text."
    )


def check_attention(case: ExportCase) -> str | None:
    """The continuous batch of OpenVINO computes the attention of the architecture rightly."""
    config = {**case.config, **(case.config.get("text_config") or {})}
    by_bias = config.get("model_type") == "falcon" and config.get("alibi")
    if case.is_vector or (config.get("model_type") not in WRONG_ATTENTION and not by_bias):
        return None
    return (
        f"{case.name} is a {config['model_type']!r} model, whose attention mask the continuous batch of OpenVINO does "
        "not compute: its answers would be wrong. Use `backend='torch'`, or another model."
    )


def check_weights(case: ExportCase) -> str | None:
    """The checkpoint has its head and all its layers, so that nothing is made up of random numbers."""
    config = {**case.config, **(case.config.get("text_config") or {})}
    stacks: dict[str, Counter[int]] = {}
    for name in case.source.weights.names:
        if found := STACK.fullmatch(name):
            stacks.setdefault(found[1], Counter())[int(found[2])] += 1
    # A weight and a bias at most are those of a projector, whose activations have a number too.
    stacks = {prefix: numbers for prefix, numbers in stacks.items() if max(numbers.values()) > 2}
    if not stacks:
        return None
    for prefix, numbers in sorted(stacks.items()):
        wanted = max(*numbers, (_layer_count(config, prefix, len(stacks)) or 0) - 1) + 1
        missing = sorted(set(range(wanted)) - set(numbers))
        if missing:
            text = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            return f"{case.name} lacks the weights of layer {text} of {wanted} ({prefix!r}). Download it again."
    tied = config.get("tie_word_embeddings", config.get("model_type") not in OWN_HEADS)
    has_head = tied or any(HEAD_NAME.search(name) for name in case.source.weights.names)
    if has_head or not case.recipe.task.startswith("text-generation"):
        return None
    return (
        f"{case.name} has no weights for its head ('lm_head.weight'), it is a model without one. "
        "Choose a model that generates text."
    )


def _layer_count(config: Mapping[str, Any], prefix: str, stacks: int) -> int | None:
    """Return the number of layers that the configuration names for a stack of layers, if it surely does."""
    part = next((part for part in ("encoder", "decoder") if part in prefix), None)
    if part is not None:
        names: tuple[str, ...] = (f"{part}_layers", f"num_{part}_layers", "num_layers")
    else:
        names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if stacks == 1 else ()
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def check_tokenizer(case: ExportCase) -> str | None:
    """The tokenizer is there, and the packages that read it are installed."""
    if not case.source.files:
        return None
    if not any(name in TOKENIZER_FILES or name.endswith(SENTENCEPIECE_FILES) for name in case.source.files):
        return f"{case.name} holds no tokenizer ('tokenizer.json'). Copy the files of its tokenizer there."
    pieces = sorted(name for name in case.source.files if name.endswith(SENTENCEPIECE_FILES))
    if not pieces or ("tokenizer.json" in case.source.files and case.model_type != "marian"):
        return None
    lacking = [package for package in ("sentencepiece", "protobuf") if installed_version(package) is None]
    if not lacking:
        return None
    return (
        f"{case.name} has its tokenizer as SentencePiece only ({pieces[0]!r}), which needs the package {lacking[0]!r}. "
        "Install it with `pip install 'prefect-huggingface[sentencepiece]'`."
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
    is_named = isinstance(dataset, str) and dataset != "auto"
    texts_suffice = case.recipe.task.startswith("text-generation") and not is_named
    if dataset is None or texts_suffice or installed_version("datasets"):
        return None
    what = f"the data set {dataset!r}" if isinstance(dataset, str) else "calibration texts for this kind of model"
    return (
        f"The recipe in {case.recipe.weight_format} for {case.name} uses {what}, which needs the package 'datasets'. "
        "Install it with `pip install 'prefect-huggingface[calibration]'`, or give options that need no data, "
        "`quantization=QuantizationOptions(group_size=128)` for instance."
    )


def check_dataset(case: ExportCase) -> str | None:
    """The name of the data set is one that Optimum knows for the task."""
    dataset = dataset_of(case.recipe)
    if not isinstance(dataset, str) or installed_version("optimum-intel") is None:
        return None
    known = read_table(DATASETS, DATASET_TABLES.get(case.recipe.task, "PREDEFINED_LANGUAGE_DATASETS"))
    if dataset.partition(":")[0] not in known:
        return f"`dataset` must be texts or one of {', '.join(sorted(known))}, got {dataset!r}. Correct it."
    if dataset != "auto" and works_offline(case.model):
        return (
            f"The recipe in {case.recipe.weight_format} for {case.name} uses the data set {dataset!r} of the Hub, "
            "which must not be asked (`offline`, HF_HUB_OFFLINE). Give texts as `dataset`, or options without data."
        )
    return None


def dataset_of(recipe: Recipe) -> Any:
    """Return the calibration data of a recipe: a name, texts, or None."""
    return (recipe.quantization or {}).get("dataset")


def check_openvino_folder(model: LocalModel, snapshot: Snapshot) -> None:
    """Refuse an OpenVINO model that was not made here and cannot answer, or not as the block says.

    Raises:
        PlanError: If it has no tokenizer, or attention that the engine computes wrongly, or weights in another format.
    """
    names = {file.path for file in snapshot.files}
    wanted = "openvino_tokenizer.xml" if "openvino_model.xml" in names else "tokenizer_config.json"
    wanted = "tokenizer.json" if model.task in VECTOR_TASKS else wanted
    if wanted not in names:
        raise PlanError(
            f"{model.model_id!r} is an OpenVINO model without a tokenizer ({wanted!r} is missing). Export it with its "
            "tokenizer, or set `model_id` to its source."
        )
    recipe = Recipe(EXPORT_TASKS[model.task], "fp16", None)
    wrong = check_attention(ExportCase(model, recipe, describe_snapshot(snapshot)))
    if wrong is not None:
        raise PlanError(wrong)
    if model.quantization is not None and (given := model.quantization.model_dump(exclude_defaults=True)):
        raise PlanError(
            f"{model.model_id!r} is an OpenVINO model and is not quantized again, got `quantization` with "
            f"{', '.join(given)}. Leave it out, or give its source."
        )
    # Defaults say nothing of a model that is there: that of the block, and that of LangChain's classes for vectors.
    if model.weight_format in (None, "int8", *(["fp32"] if model.task in VECTOR_TASKS else [])):
        return
    found, formats = weight_type(snapshot.path, snapshot.commit)
    if model.weight_format not in formats:
        raise PlanError(
            f"{model.model_id!r} is an OpenVINO model with weights in {found}, and is not converted to "
            f"{model.weight_format!r}. Set `weight_format='int8'` or None to use it as it is, or give its source."
        )


@lru_cache(maxsize=64)
def weight_type(folder: Path, commit: str) -> tuple[str, tuple[str, ...]]:
    """Return the precision of most large weights of an OpenVINO model, in words, and the formats that it may be of.

    The commit of its content is there to remember the answer.
    """
    types: set[str] = set()
    for name in OPENVINO_MODELS:
        path = folder / name
        if path.is_file():
            types |= {found.decode() for found in ELEMENT_TYPE.findall(path.read_bytes())}
    for four, formats in FOUR_BITS.items():
        if four in types:
            return f"4 bits ({four})", formats
    return ("8 bits", ()) if types & set(EIGHT_BITS) else ("full precision", ("fp32", "fp16"))


def estimate_room(weights: SourceWeights, weight_format: str) -> tuple[int, int, int]:
    """Return what an export needs, in bytes: disk and memory at its fullest, and the memory that it cannot do without.

    On disk are the converted and the quantized model together; in memory is every weight at least once. The rest was
    measured with plain exports.
    """
    bits = BITS.get(weight_format, 4.5 if weight_format.startswith(("cb4", "int4")) else 8.1)
    final, converted = weights.parameters * bits / 8, weights.size_bytes if bits < 16 else 0
    disk = int(converted + final) + BASE_DISK_BYTES
    memory = int(2.0 * weights.size_bytes + final) + BASE_MEMORY_BYTES
    return disk, memory, weights.size_bytes + BASE_MEMORY_BYTES // 2
