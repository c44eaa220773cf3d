"""Recipes: every setting of an export, explicit, decided before anything is started."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel, QuantizationOptions
from prefect_huggingface.tasks.errors import PlanError

EXPORT_TASKS = {
    "text-generation": "text-generation-with-past",
    "text2text-generation": "text2text-generation-with-past",
    "summarization": "text2text-generation-with-past",
    "translation": "text2text-generation-with-past",
    "image-text-to-text": "image-text-to-text",
    "feature-extraction": "feature-extraction",
    "text-ranking": "text-classification",
}
SCHEMA = 1
"""Raised whenever exports are made in another way than before, so that old ones are not taken for the same."""
# Where nothing is chosen for a model that generates text: on SmolLM2-135M it halves the loss of plain 4 bits for a
# seventh more size, and takes no longer to export. tests/benchmarks/README.md has the table.
INT4_DEFAULT = {"group_size": 32, "ratio": 0.8, "backup_precision": "int8_asym", "quant_method": "awq"}
GROUP_SIZES = {"int4": 128, "nf4": 128, "mxfp4": 32, "cb4": -1}
SENSITIVITY_METRICS = (
    "weight_quantization_error", "hessian_input_activation", "mean_activation_variance", "max_activation_variance",
    "mean_activation_magnitude",
)  # fmt: skip
DATA_AWARE = ("awq", "scale_estimation", "gptq", "lora_correction")
ONLY_FOUR_BITS = ("group_size", "ratio", "backup_precision", "sensitivity_metric", "all_layers", *DATA_AWARE)
# NNCF makes groups no smaller than this; it puts a layer that would need smaller ones into the backup precision.
SMALLEST_GROUP = 32
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
INTERMEDIATE = (
    "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
)  # fmt: skip
INT4_WEIGHTS = "_DEFAULT_4BIT_WQ_CONFIGS"
INT8_WEIGHTS = "_DEFAULT_8BIT_WQ_CONFIGS"
INT8_FULL = "_DEFAULT_INT8_FQ_CONFIGS"
IGNORED_SCOPES = "_DEFAULT_IGNORED_SCOPE_CONFIGS"
ALIASES = "model_id_aliases"
CONFIGURATION = "optimum/intel/openvino/configuration.py"
MODEL_CONFIGS = "optimum/exporters/openvino/model_configs.py"
DATASETS = "optimum/intel/openvino/utils.py"
REGISTER = "register_in_tasks_manager"
LIMITS = ("MIN_TRANSFORMERS_VERSION", "MAX_TRANSFORMERS_VERSION")
EXPORT_PACKAGES = ("optimum-intel", "optimum", "nncf", "openvino", "openvino-tokenizers", "transformers", "torch")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an export is made.

    Attributes:
        task: Task of Optimum, with the cache of keys and values.
        weight_format: Format of the weights, or the mode of weights and activations.
        quantization: Arguments of Optimum's quantization configuration, or None for weights that are not quantized.
        trust_remote_code: Whether Python code of the model is run.
        notes: What was decided for this model, in sentences. They do not change the export.
    """

    task: str
    weight_format: str
    quantization: Mapping[str, Any] | None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, without the notes."""
        return {
            "task": self.task,
            "weight_format": self.weight_format,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "trust_remote_code": self.trust_remote_code,
        }


def resolve_recipe(model: LocalModel, repo_id: str | None) -> Recipe:
    """Decide every setting of the export of a model. Imports nothing heavy and reads no file of the model.

    Args:
        model: Model with its weight format and quantization options.
        repo_id: Repository of the model, None for a local folder. A known repository may have a recommended recipe.

    Raises:
        PlanError: If the options do not fit each other.
    """
    options = model.quantization or QuantizationOptions()
    weight_format = options.quant_mode or model.weight_format or "int8"
    recommended = _recommended(repo_id, options, weight_format)
    default = _default(model, options, weight_format) if recommended is None else None
    quantization = _quantization(model, options, weight_format, recommended or default)
    ignored = recommended_options(IGNORED_SCOPES, repo_id)
    if quantization is not None and ignored:
        quantization = {**quantization, "ignored_scopes": dict(ignored)}
    notes: tuple[str, ...] = ()
    if recommended is not None:
        notes = (f"The recipe is the one that optimum-intel recommends for {repo_id!r} in {weight_format}.",)
    return Recipe(EXPORT_TASKS[model.task], weight_format, quantization, model.trust_remote_code, notes)


def recipe_notes(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a recipe means for a model, in sentences.

    Args:
        recipe: Every setting.
        config: Content of `config.json` of the model.

    Raises:
        PlanError: If the group size does not divide a layer and must not be adjusted.
    """
    yield from recipe.notes
    settings = dict(recipe.quantization or {})
    settings = settings.get("weight_quantization_config", settings)
    if settings.get("bits") == 4:
        yield from group_size_notes(config, int(settings.get("group_size", 128)), settings.get("group_size_fallback"))


def export_key(commit: str, recipe: Recipe, versions: Mapping[str, str], schema: int) -> str:
    """Return the key of an export: the sha256 of everything that decides what it contains."""
    content = {"schema": schema, "commit": commit, "recipe": recipe.as_dict(), "versions": dict(versions)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _recommended(repo_id: str | None, options: QuantizationOptions, weight_format: str) -> Mapping[str, Any] | None:
    """Return the recommended options where the user leaves the choice; fallbacks and modes leave it."""
    if not _leaves_choice(options):
        return None
    tables = {"int4": INT4_WEIGHTS, "int8": INT8_WEIGHTS}
    if options.quant_mode is None:
        table = tables.get(weight_format)
    else:
        table = INT8_FULL if options.quant_mode == "int8" else None
    return recommended_options(table, repo_id) if table else None


def _default(model: LocalModel, options: QuantizationOptions, weight_format: str) -> Mapping[str, Any] | None:
    """Return the default options of a weight format where the user leaves the choice."""
    is_open = options.quant_mode is None and _leaves_choice(options)
    return INT4_DEFAULT if is_open and weight_format == "int4" and model.task == "text-generation" else None


def _leaves_choice(options: QuantizationOptions) -> bool:
    return not options.model_fields_set - {"quant_mode", "group_size_fallback"}


def _quantization(
    model: LocalModel, options: QuantizationOptions, weight_format: str, recommended: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the arguments for the quantization in a weight format, None for one without."""
    if options.quant_mode is not None:
        return _full_quantization(model, options, recommended)
    _refuse_options(model, weight_format, ("smooth_quant_alpha",))
    if weight_format in ("fp32", "fp16"):
        _refuse_options(model, weight_format, ("sym", "dataset", "num_samples", *ONLY_FOUR_BITS))
        return None
    if weight_format == "int8":
        _refuse_options(model, weight_format, ("dataset", "num_samples", *ONLY_FOUR_BITS))
        return _eight_bits(options, recommended)
    return _four_bits(model, weight_format, options, recommended)


def _eight_bits(options: QuantizationOptions, recommended: Mapping[str, Any] | None) -> dict[str, Any]:
    base = {"dtype": "int8", "bits": 8, "sym": bool(options.sym), "group_size": -1, "ratio": 1.0}
    return {**base, **(recommended or {})}


def _four_bits(
    model: LocalModel, weight_format: str, options: QuantizationOptions, recommended: Mapping[str, Any] | None
) -> dict[str, Any]:
    group_size = GROUP_SIZES[weight_format] if options.group_size is None else options.group_size
    fallback = options.group_size_fallback
    if weight_format == "mxfp4":
        _refuse_options(model, weight_format, DATA_AWARE)
        # The format has groups of 32 and no others, so there is nothing to adjust.
        fallback = "ignore" if fallback == "adjust" else fallback
    if group_size == 0 or (weight_format == "mxfp4" and group_size != GROUP_SIZES["mxfp4"]):
        raise PlanError(f"`group_size` {group_size!r} does not go with weight format {weight_format!r}. Leave it out.")
    base: dict[str, Any] = {
        "dtype": weight_format,
        "bits": 4,
        "sym": bool(options.sym),
        "group_size": group_size,
        "group_size_fallback": fallback,
        "ratio": 1.0 if options.ratio is None else options.ratio,
        "backup_precision": options.backup_precision,
        "all_layers": options.all_layers,
        "sensitivity_metric": options.sensitivity_metric,
        "quant_method": "awq" if options.awq else "default",
        "scale_estimation": options.scale_estimation,
        "gptq": options.gptq,
        "lora_correction": options.lora_correction,
        "dataset": options.dataset,
        "num_samples": options.num_samples,
    }
    base.update(recommended or {})
    _check_data(base)
    return base


def _full_quantization(
    model: LocalModel, options: QuantizationOptions, recommended: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the arguments for quantizing weights and activations."""
    mode = str(options.quant_mode)
    if recommended is not None:
        return dict(recommended)
    if options.dataset is None:
        raise PlanError(
            f"Mode {mode!r} quantizes activations too and needs data. Set `dataset` to texts of yours or 'auto'."
        )
    weights, _, activations = mode.rpartition("_")
    full = {
        "dtype": activations,
        "bits": 8,
        "sym": bool(options.sym),
        "smooth_quant_alpha": options.smooth_quant_alpha,
        "dataset": options.dataset,
        "num_samples": options.num_samples or 128,
    }
    if not weights:
        _refuse_options(model, mode, ONLY_FOUR_BITS)
        return {**full, "weight_only": False}
    return {
        "weight_quantization_config": _four_bits(model, weights, options, None),
        "full_quantization_config": full,
        "dataset": options.dataset,
        "num_samples": options.num_samples or 128,
    }


def _refuse_options(model: LocalModel, weight_format: str, names: tuple[str, ...]) -> None:
    """Refuse options that a weight format does not have, and do not drop them silently."""
    options = model.quantization or QuantizationOptions()
    for name in names:
        default = QuantizationOptions.model_fields[name].default
        value = getattr(options, name)
        if value != default and not (name == "ratio" and value == 1.0):
            raise PlanError(f"`{name}` does not go with weight format {weight_format!r}, got {value!r}. Leave it out.")


def _check_data(quantization: Mapping[str, Any]) -> None:
    for name in ("scale_estimation", "gptq", "lora_correction"):
        if quantization.get(name) and quantization.get("dataset") is None:
            raise PlanError(f"`{name}` needs calibration data. Set `dataset` to texts of yours or 'auto'.")
    metric = quantization.get("sensitivity_metric")
    if metric is not None and metric not in SENSITIVITY_METRICS:
        raise PlanError(
            f"`sensitivity_metric` must be one of {', '.join(SENSITIVITY_METRICS)}, got {metric!r}. Correct it."
        )
    if metric not in (None, "weight_quantization_error") and quantization.get("dataset") is None:
        raise PlanError(f"`sensitivity_metric` {metric!r} needs calibration data. Set `dataset`, or leave it out.")
    if quantization.get("gptq") and quantization.get("lora_correction"):
        raise PlanError("`gptq` and `lora_correction` exclude each other. Leave one out.")


def input_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of inputs of the linear layers, by the name of the setting that they come from."""
    config = {**config, **(config.get("text_config") or {})}
    sizes = {name: config[name] for name in (*HIDDEN, *INTERMEDIATE) if isinstance(config.get(name), int)}
    hidden = next((config[name] for name in HIDDEN if isinstance(config.get(name), int)), None)
    if hidden and not any(name in sizes for name in INTERMEDIATE):
        sizes["four times the hidden size"] = 4 * hidden
    heads, head_size = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_size, int):
        sizes["num_attention_heads * head_dim"] = heads * head_size
    return sizes


def fitting_group_size(size: int, group_size: int) -> int | None:
    """Return the group size that a layer gets when the wanted one may be adjusted.

    Args:
        size: Number of inputs of the layer.
        group_size: Wanted number of weights in a group; -1 is a whole channel.

    Returns:
        The group size, or None if the layer has to stay in the backup precision.
    """
    if group_size == -1 or size % group_size == 0:
        return group_size
    largest = size & -size  # the largest power of two that divides the size
    return largest if largest >= SMALLEST_GROUP else None


def group_size_notes(config: Mapping[str, Any], group_size: int, fallback: str | None) -> Iterator[str]:
    """Yield a sentence for each size of the model that the group size does not divide.

    Raises:
        PlanError: If there is such a size and nothing may be adjusted.
    """
    for name, size in input_sizes(config).items():
        if group_size == -1 or size % group_size == 0:
            continue
        problem = f"Group size {group_size} does not divide {size} ({name})"
        fitting = fitting_group_size(size, group_size)
        if fallback == "adjust" and fitting is not None:
            yield f"{problem}: these layers get groups of {fitting}."
        elif fallback == "adjust":
            yield f"{problem}, and no size of {SMALLEST_GROUP} or more does: these layers are in the backup precision."
        elif fallback == "ignore":
            yield f"{problem}: these layers are not in 4 bits."
        else:
            remedy = f"Set `group_size={fitting}`" if fitting else "Set `group_size=-1`"
            raise PlanError(f"{problem}. {remedy}, or `group_size_fallback='adjust'`.")


def recommended_options(table: str, repo_id: str | None) -> Mapping[str, Any] | None:
    """Return the recommended options of a repository, or None.

    Args:
        table: Which recommendation is wanted, one of the names of this module.
        repo_id: Repository id; None, for a local folder, has no recommendation.
    """
    if repo_id is None:
        return None
    if installed_version("optimum-intel") is None:
        return None  # the plan names the package
    aliases = {alias: original for original, alias in read_table(CONFIGURATION, ALIASES)}
    options = read_table(CONFIGURATION, table)
    found: Mapping[str, Any] | None = options.get(repo_id) or options.get(aliases.get(repo_id))
    return found


@cache
def parse_source(path: str) -> tuple[ast.stmt, ...]:
    """Return the statements of a module of optimum-intel; none if it cannot be read."""
    try:
        text = Path(str(distribution("optimum-intel").locate_file(path))).read_text(encoding="utf-8")
        return tuple(ast.parse(text).body)
    except (PackageNotFoundError, OSError, SyntaxError):
        return ()


def read_table(path: str, name: str) -> Any:
    """Return a table of optimum-intel.

    Raises:
        PlanError: If the installed version has it no more. Without it, recipes would silently become others.
    """
    constants = read_constants(path)
    if name not in constants:
        raise PlanError(
            f"optimum-intel {installed_version('optimum-intel')} has no table {name!r}, from which recipes are made. "
            "Install a version that this package names in its requirements."
        )
    return constants[name]


@cache
def read_constants(path: str) -> Mapping[str, Any]:
    """Return the constants of a module of optimum-intel that are literals, by name."""
    found = {}
    for node in parse_source(path):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = literal_value(node.value)
            except ValueError:
                continue
    return found


def literal_value(node: ast.expr) -> Any:
    """Return the value of a literal; a member of an enumeration is the name of the member in lower case.

    Raises:
        ValueError: If the expression is not a literal.
    """
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {literal_value(key): literal_value(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [literal_value(element) for element in node.elts]
    return ast.literal_eval(node)


@dataclass(frozen=True, slots=True)
class Support:
    """What optimum-intel says about one architecture.

    Attributes:
        tasks: Tasks that it can be exported for.
        minimum: Lowest version of Transformers, or None.
        maximum: Highest version of Transformers, or None.
    """

    tasks: frozenset[str]
    minimum: str | None = None
    maximum: str | None = None


@cache
def support_table() -> dict[str, Support]:
    """Return what is supported, by model type. Empty if the source cannot be read."""
    constants: dict[str, Any] = {}
    limits: dict[str, dict[str, str]] = {}
    table: dict[str, Support] = {}
    for node in parse_source(MODEL_CONFIGS):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        elif isinstance(node, ast.ClassDef):
            limits[node.name] = _limits(node, limits)
            for model_type, tasks in _registrations(node, constants):
                known = table.get(model_type, Support(frozenset())).tasks
                table[model_type] = Support(known | tasks, *(limits[node.name].get(name) for name in LIMITS))
    return table


def _limits(node: ast.ClassDef, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the limits that a class sets or inherits from a class of the same file."""
    found: dict[str, str] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            found.update(known.get(base.id, {}))
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in LIMITS and isinstance(statement.value, ast.Constant):
                found[name] = str(statement.value.value)
    return found


def _registrations(node: ast.ClassDef, constants: dict[str, Any]) -> Iterable[tuple[str, frozenset[str]]]:
    for decorator in node.decorator_list:
        if not isinstance(decorator, ast.Call) or getattr(decorator.func, "id", None) != REGISTER:
            continue
        first, *rest = decorator.args
        library = next((key.value for key in decorator.keywords if key.arg == "library_name"), None)
        if library is None or getattr(library, "value", None) == "transformers":
            yield str(getattr(first, "value", "")), frozenset(_strings(rest, constants))


def _strings(nodes: Iterable[ast.expr], constants: dict[str, Any]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, ast.Starred):
            yield from _strings([node.value], constants)
        elif isinstance(node, ast.List | ast.Tuple):
            yield from _strings(node.elts, constants)
        elif isinstance(node, ast.Name) and node.id in constants:
            yield from _strings([constants[node.id]], constants)
        elif isinstance(node, ast.Constant):
            yield str(node.value)


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package without its local part, or None. Imports nothing."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def export_versions() -> dict[str, str]:
    """Return the versions of the packages that make exports; a package that is missing is left out."""
    found = {package: installed_version(package) for package in EXPORT_PACKAGES}
    return {package: number for package, number in found.items() if number is not None}
