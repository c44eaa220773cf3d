"""Recipes: every setting of an export, explicit, decided before anything is started."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
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
# Options that Optimum has under the same names.
PASSED_ON = {
    "backup_precision", "all_layers", "sensitivity_metric", "scale_estimation", "gptq", "lora_correction", "dataset",
    "num_samples",
}  # fmt: skip
# NNCF makes groups no smaller than this; it puts a layer that would need smaller ones into the backup precision.
SMALLEST_GROUP = 32
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
INTERMEDIATE = (
    "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
)  # fmt: skip
INT4_WEIGHTS = "_DEFAULT_4BIT_WQ_CONFIGS"
INT8_WEIGHTS = "_DEFAULT_8BIT_WQ_CONFIGS"
INT8_FULL = "_DEFAULT_INT8_FQ_CONFIGS"
TABLES = {("int4", None): INT4_WEIGHTS, ("int8", None): INT8_WEIGHTS, ("int8", "int8"): INT8_FULL}
"""Where the recommended options for a weight format and a mode are."""
IGNORED_SCOPES = "_DEFAULT_IGNORED_SCOPE_CONFIGS"
ALIASES = "model_id_aliases"
CONFIGURATION = "optimum/intel/openvino/configuration.py"
MODEL_CONFIGS = "optimum/exporters/openvino/model_configs.py"
DATASETS = "optimum/intel/openvino/utils.py"
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
        settings = asdict(self)
        del settings["notes"]
        return settings


def resolve_recipe(model: LocalModel, repo_id: str | None) -> Recipe:
    """Decide every setting of the export of a model. Imports nothing heavy and reads no file of the model.

    A known repository may have a recommended recipe; a local folder, without an id of a repository, has none.

    Raises:
        PlanError: If the options do not fit each other.
    """
    options = model.quantization or QuantizationOptions()
    weight_format = options.quant_mode or model.weight_format or "int8"
    recommended = chosen = None
    # Fallbacks and modes leave the choice of the rest. Saved blocks and forms set every field, also to its default.
    if not options.model_dump(exclude_defaults=True).keys() - {"quant_mode", "group_size_fallback"}:
        recommended = chosen = recommended_options(TABLES.get((weight_format, options.quant_mode)), repo_id)
        if chosen is None and (weight_format, options.quant_mode, model.task) == ("int4", None, "text-generation"):
            chosen = INT4_DEFAULT
    quantization = _quantization(options, weight_format, chosen)
    ignored = recommended_options(IGNORED_SCOPES, repo_id)
    if quantization is not None and ignored:
        quantization = {**quantization, "ignored_scopes": dict(ignored)}
    note = f"The recipe is the one that optimum-intel recommends for {repo_id!r} in {weight_format}."
    notes = () if recommended is None else (note,)
    return Recipe(EXPORT_TASKS[model.task], weight_format, quantization, model.trust_remote_code, notes)


def recipe_notes(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a recipe means for a model with a configuration, in sentences; raise as `group_size_notes` does."""
    yield from recipe.notes
    settings = dict(recipe.quantization or {})
    settings = settings.get("weight_quantization_config", settings)
    if settings.get("bits") == 4:
        yield from group_size_notes(config, int(settings.get("group_size", 128)), settings.get("group_size_fallback"))


def export_key(commit: str, recipe: Recipe, versions: Mapping[str, str] | None = None, schema: int = SCHEMA) -> str:
    """Return the key of an export: the sha256 of everything that decides what it contains."""
    versions = export_versions() if versions is None else dict(versions)
    content = {"schema": schema, "commit": commit, "recipe": recipe.as_dict(), "versions": versions}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _quantization(
    options: QuantizationOptions, weight_format: str, chosen: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the arguments for the quantization in a weight format, None for one without.

    What was chosen for the user takes the place of the options.
    """
    if options.quant_mode is not None:
        return _full_quantization(options, options.quant_mode, chosen)
    _refuse_options(options, weight_format, ("smooth_quant_alpha",))
    if weight_format in ("fp32", "fp16"):
        _refuse_options(options, weight_format, ("sym", "dataset", "num_samples", *ONLY_FOUR_BITS))
        return None
    if weight_format == "int8":
        _refuse_options(options, weight_format, ("dataset", "num_samples", *ONLY_FOUR_BITS))
        base = {"dtype": "int8", "bits": 8, "sym": bool(options.sym), "group_size": -1, "ratio": 1.0}
        return {**base, **(chosen or {})}
    return _four_bits(options, weight_format, chosen)


def _four_bits(options: QuantizationOptions, weight_format: str, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    group_size = GROUP_SIZES[weight_format] if options.group_size is None else options.group_size
    fallback = options.group_size_fallback
    if weight_format == "mxfp4":
        _refuse_options(options, weight_format, DATA_AWARE)
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
        "quant_method": "awq" if options.awq else "default",
        **options.model_dump(include=PASSED_ON),
    }
    base.update(chosen or {})
    _check_data(base)
    return base


def _full_quantization(options: QuantizationOptions, mode: str, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments for quantizing weights and activations."""
    if chosen is not None:
        return {"weight_only": False, **chosen}
    if options.dataset is None:
        raise PlanError(
            f"Mode {mode!r} quantizes activations too and needs data. Set `dataset` to texts of yours or 'auto'."
        )
    weights, _, activations = mode.rpartition("_")
    data = {"dataset": options.dataset, "num_samples": options.num_samples or 128}
    alpha = options.smooth_quant_alpha
    full = {"dtype": activations, "bits": 8, "sym": bool(options.sym), "smooth_quant_alpha": alpha, **data}
    if not weights:
        _refuse_options(options, mode, ONLY_FOUR_BITS)
        return {**full, "weight_only": False}
    four = _four_bits(options, weights, None)
    return {"weight_quantization_config": four, "full_quantization_config": full, **data}


def _refuse_options(options: QuantizationOptions, weight_format: str, names: tuple[str, ...]) -> None:
    """Refuse options that a weight format does not have, and do not drop them silently."""
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
    hidden = next((sizes[name] for name in HIDDEN if name in sizes), None)
    if hidden and not any(name in sizes for name in INTERMEDIATE):
        sizes["four times the hidden size"] = 4 * hidden
    heads, head_size = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_size, int):
        sizes["num_attention_heads * head_dim"] = heads * head_size
    return sizes


def fitting_group_size(size: int, group_size: int) -> int | None:
    """Return the group size that a layer with some inputs gets when the wanted one, -1 for all, may be adjusted.

    It is None if the layer has to stay in the backup precision.
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


def recommended_options(table: str | None, repo_id: str | None) -> Mapping[str, Any] | None:
    """Return the recommended options of a repository from a table of optimum-intel; a local folder has none."""
    if table is None or repo_id is None or installed_version("optimum-intel") is None:
        return None  # without the package, the plan names it
    aliases = {alias: original for original, alias in read_table(CONFIGURATION, ALIASES)}
    options = read_table(CONFIGURATION, table)
    found: Mapping[str, Any] | None = options.get(repo_id) or options.get(aliases.get(repo_id))
    # Some have several recipes in one, for parts of the model, which are not taken over.
    return None if found and any(name.startswith("quantization_config") for name in found) else found


def read_table(path: str, name: str) -> Any:
    """Return a table of optimum-intel.

    Raises:
        PlanError: If the installed version has it no more. Without it, recipes would silently become others.
    """
    constants, _ = parse_module(path)
    if name not in constants:
        raise PlanError(
            f"optimum-intel {installed_version('optimum-intel')} has no table {name!r}, from which recipes are made. "
            "Install a version that this package names in its requirements."
        )
    return constants[name]


@cache
def read_source(package: str, path: str) -> str:
    """Return the text of a file of an installed package, empty if it cannot be read."""
    try:
        return Path(str(distribution(package).locate_file(path))).read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError):
        return ""


@cache
def parse_module(path: str) -> tuple[dict[str, Any], list[ast.ClassDef]]:
    """Return the constants of a module of optimum-intel that are literals, by name, and its classes.

    To import it takes ten seconds, which a plan does not have. Both are empty if it cannot be read.
    """
    try:
        nodes = ast.parse(read_source("optimum-intel", path)).body
    except SyntaxError:
        nodes = []
    constants: dict[str, Any] = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                with suppress(ValueError, TypeError):
                    constants[name] = literal_value(value, constants)
    return constants, [node for node in nodes if isinstance(node, ast.ClassDef)]


def literal_value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return the value of a literal, in which constants may be named.

    A member of an enumeration is the name of the member in lower case.

    Raises:
        ValueError: If the expression is not a literal.
    """
    match node:
        case ast.Attribute(attr=member):
            return member.lower()
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.Dict(keys=keys, values=values):
            pairs = [(key, value) for key, value in zip(keys, values, strict=True) if key is not None]
            return {literal_value(key, constants): literal_value(value, constants) for key, value in pairs}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            found: list[Any] = []
            for element in elements:
                if isinstance(element, ast.Starred):
                    found += literal_value(element.value, constants)
                else:
                    found.append(literal_value(element, constants))
            return found
        case _:
            return ast.literal_eval(node)


@dataclass(frozen=True, slots=True)
class Support:
    """What optimum-intel says about an architecture: tasks, lowest and highest version of Transformers or None."""

    tasks: frozenset[str]
    minimum: str | None = None
    maximum: str | None = None


@cache
def support_table() -> dict[str, Support]:
    """Return what is supported, by model type. Empty if the source cannot be read."""
    constants, classes = parse_module(MODEL_CONFIGS)
    limits: dict[str, dict[str, str]] = {}
    table: dict[str, Support] = {}
    for node in classes:
        own = limits[node.name] = {}
        for base in reversed(node.bases):
            own |= limits.get(getattr(base, "id", ""), {})
        for statement in node.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)) if name in LIMITS:
                    own[name] = str(value)
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(
                    func=ast.Name(id="register_in_tasks_manager"),
                    args=[ast.Constant(value=str(model_type)), *tasks],
                    keywords=[ast.keyword(arg="library_name", value=ast.Constant(value="transformers"))] | [],
                ):
                    known = table.get(model_type, Support(frozenset())).tasks
                    with suppress(ValueError, TypeError):
                        named = frozenset(literal_value(ast.List(elts=tasks), constants))
                        table[model_type] = Support(known | named, *(own.get(name) for name in LIMITS))
    return table


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package without its local part, or None. Imports nothing."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def export_versions() -> dict[str, str]:
    """Return the versions of the packages that make exports; a package that is missing is left out."""
    return {package: number for package in EXPORT_PACKAGES if (number := installed_version(package)) is not None}
