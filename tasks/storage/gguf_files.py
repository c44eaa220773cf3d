"""GGUF files as models: what one holds, why it cannot be used, and the checkpoint that is made of it.

A file is known by its sha256. Its weights are taken out of their quantization once, in a child process, and kept in
the store as a checkpoint in half precision with a tokenizer of its own. From there on it is a model like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.records import Export, Snapshot, SnapshotFile
from prefect_huggingface.tasks.storage.exports.recipes import Recipe, export_key
from prefect_huggingface.tasks.storage.folders import SourceWeights
from prefect_huggingface.tasks.storage.gguf_tokenizers import build_tokenizer
from prefect_huggingface.tasks.storage.snapshots import hash_cache_path

# Raised when the same file gives another checkpoint, so that exports of the old one are not used.
CONVERSION = 1
CHECKPOINT = Recipe(task="checkpoint", weight_format="checkpoint", quantization=None)
STEPS = {
    "weights": "reading the weights of the GGUF file",
    "tokenizer": "making its tokenizer",
}
REMEDY = "Use the checkpoint that it was made from, in safetensors"
# Architectures that were compared with their source, and the settings that they have. A file with another setting or
# tensor computes something that is not known here.
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Llama 3.1 to 3.3 hold factors of their frequencies, which follow from the largest one and from these settings.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MERGE = "Merge the parts with `llama-gguf-split --merge`"


@dataclass(frozen=True, slots=True)
class GGUFSource:
    """What a GGUF file holds, as far as a plan needs it.

    Attributes:
        config: Settings under the names of `config.json`, empty if the file cannot be used.
        weights: Number of its weights, and their size once they are in single precision.
        problem: Sentence that says why the file cannot be used and what to do, or None.
    """

    config: Mapping[str, Any]
    weights: SourceWeights
    problem: str | None = None


def gguf_commit(model: LocalModel) -> str:
    """Return what names the content of a GGUF file: the sha256 of the file, and the way it is converted.

    Raises:
        ModelSourceError: If the file is missing.
    """
    from prefect_huggingface.tasks.storage.snapshots import hash_files

    path = _existing(model)
    hashes = hash_files(path.parent, [path.name], hash_cache_path(model.store_path, path))
    return f"gguf.{CONVERSION}-{hashes[path.name][1]}"


def describe_gguf(model: LocalModel) -> GGUFSource:
    """Return what a GGUF file holds, and whether it can be used for the task of a model. Converts nothing.

    Raises:
        ModelSourceError: If the file is missing.
    """
    path = _existing(model)
    if model.task != "text-generation":
        return _unusable(path, f"GGUF files are read for task 'text-generation', got {model.task!r}", "Set that task")
    if find_spec("gguf") is None:
        return _unusable(path, "the package 'gguf' is not installed", "Install it with `pip install gguf`")
    state = path.stat()
    return _inspect(path, state.st_size, state.st_mtime_ns)


def snapshot_gguf(model: LocalModel) -> Snapshot:
    """Return the checkpoint of a GGUF file as a snapshot; make it where it is not in the store.

    Raises:
        ModelSourceError: If the file is missing or cannot be used.
        PlanError: If disk or memory do not suffice; nothing was started.
        ExportError: If the checkpoint cannot be made; nothing was published.
    """
    from prefect_huggingface.tasks.storage.exports.store import find_export, read_manifest

    commit = gguf_commit(model)
    key = export_key(commit, CHECKPOINT)
    checkpoint = find_export(model.store_path, key) or _make_checkpoint(model, commit)
    manifest = read_manifest(checkpoint.path)
    files = {} if manifest is None else manifest.files
    described = tuple(SnapshotFile(name, entry["size"], sha256=entry["sha256"]) for name, entry in files.items())
    return Snapshot(repo_id=None, commit=commit, path=checkpoint.path, files=described)


def _existing(model: LocalModel) -> Path:
    path = Path(model.model_id)
    if not path.is_file():
        raise ModelSourceError(f"GGUF file {model.model_id!r} does not exist. Correct `model_id` of the block.")
    return path


def _make_checkpoint(model: LocalModel, commit: str) -> Export:
    from prefect_huggingface.tasks.storage.exports.plan import plan_room
    from prefect_huggingface.tasks.storage.exports.store import make_once

    source = describe_gguf(model)
    if source.problem is not None:
        raise ModelSourceError(source.problem)
    plan = partial(plan_room, model, CHECKPOINT, commit, source.weights)
    file = Snapshot(repo_id=None, commit=commit, path=Path(model.model_id))
    return make_once(model, file, CHECKPOINT, plan, _run_conversion)


def _run_conversion(snapshot: Snapshot, recipe: Recipe, work: Path, descriptor: int) -> dict[str, Any]:
    from prefect_huggingface.tasks.storage.exports.child import ChildProgram, run_child

    program = ChildProgram(
        Path(__file__).with_name("gguf_conversion.py"), f"conversion of {str(snapshot.path)!r}", STEPS
    )
    job = {"source": str(snapshot.path), "output": str(work / "output")}
    return run_child(program, job, work, descriptor)


@lru_cache(maxsize=16)
def _inspect(path: Path, size: int, mtime_ns: int) -> GGUFSource:
    """Return what a file holds. Size and time are there so that a file that was replaced is read again."""
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name, re.IGNORECASE)
    if part and int(part[2]) > 1:
        return _unusable(path, f"it is part {int(part[1])} of {int(part[2])}", MERGE)
    try:
        fields, tensors = read_file(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        return _unusable(path, f"it is no GGUF file, or is cut off or damaged ({error})", "Download it again")
    if int(fields.get("split.count", 1)) > 1:
        return _unusable(path, f"it is one of {fields['split.count']} parts", MERGE)
    try:
        _check_architecture(fields, tensors)
        rope_parameters(checkpoint_config(fields), tensors)
        _check_types(tensors)
        build_tokenizer(fields)
    except ValueError as error:
        return _unusable(path, str(error), REMEDY)
    parameters = sum(int(tensor.n_elements) for tensor in tensors)
    return GGUFSource(checkpoint_config(fields), SourceWeights(parameters, 4 * parameters))


def _unusable(path: Path, reason: str, remedy: str) -> GGUFSource:
    return GGUFSource({}, SourceWeights(0, 0), f"GGUF file {str(path)!r} cannot be used: {reason}. {remedy}.")


def read_file(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return metadata and tensors of a file. The tensors are mapped, not read."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)


def _check_architecture(fields: Mapping[str, Any], tensors: list[Any]) -> None:
    """Refuse what the conversion would leave out, or take for something else."""
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"its architecture is {architecture!r}, and GGUF files are read of {known} only")
    own = {name: value for name, value in fields.items() if name.startswith(f"{architecture}.")}
    for name, value in own.items():
        short = name.removeprefix(f"{architecture}.")
        if short not in SETTINGS and (short, value) != ("rope.scaling.type", "none"):
            raise ValueError(f"its setting {name} ({value!r}) is not known here")
    for short in REQUIRED:
        if f"{architecture}.{short}" not in own:
            raise ValueError(f"its setting {architecture}.{short} is missing")
    config, tokens = checkpoint_config(fields), len(fields.get("tokenizer.ggml.tokens", ()))
    sizes = {own[name] for key in HEAD_SIZES if (name := f"{architecture}.{key}") in own}
    if len(sizes) > 1:
        raise ValueError(
            f"its heads have {' and '.join(map(str, sorted(sizes)))} dimensions, and only one size is known"
        )
    found = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}
    found.pop(ROPE_FACTORS, None)  # `rope_parameters` checks them
    rows = found.get("token_embd.weight", (0,))[0]
    if not rows == tokens == config.get("vocab_size", tokens):
        raise ValueError(f"it has {rows} embeddings for a vocabulary of {tokens} tokens")
    _check_shapes(found, expected_shapes({**config, "vocab_size": tokens}))


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    if "output.weight" not in found:
        del expected["output.weight"]
    for name in found.keys() ^ expected.keys():
        raise ValueError(f"its tensor {name!r} is {'not known here' if name in found else 'missing'}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"its tensor {name!r} has the shape {shape} and not {expected[name]}")


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a GGUF file of a configuration has, by its name in the file."""
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "attn_norm.weight": (hidden,), "attn_q.weight": (queries, hidden), "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden), "attn_output.weight": (hidden, queries), "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden), "ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    if config["model_type"] == "qwen2":
        layer |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if config["model_type"] == "qwen3":
        layer |= {"attn_q_norm.weight": (config["head_dim"],), "attn_k_norm.weight": (config["head_dim"],)}
    layers = range(config["num_hidden_layers"])
    blocks = {f"blk.{number}.{name}": shape for number in layers for name, shape in layer.items()}
    ends = {"token_embd.weight": (words, hidden), "output_norm.weight": (hidden,), "output.weight": (words, hidden)}
    return {**ends, **blocks}


def rope_parameters(config: Mapping[str, Any], tensors: list[Any]) -> dict[str, Any]:
    """Return how the positions of a file are computed, under the names of `config.json`.

    Raises:
        ValueError: If it holds other factors of its frequencies than those of Llama 3.
    """
    import numpy as np

    theta = float(config.get("rope_theta", 10_000.0))
    held = next((tensor.data for tensor in tensors if tensor.name == ROPE_FACTORS), None)
    if held is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor = round(float(held.max()), 3)
    low, high, length = LLAMA3.values()
    turns = length / (2 * np.pi) * theta ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    share = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (share + (1 - share) / factor)
    if held.shape != expected.shape or not np.allclose(held, expected, rtol=1e-3):
        raise ValueError(f"its tensor {ROPE_FACTORS!r} holds other factors than those of Llama 3.1 to 3.3")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}


def _check_types(tensors: list[Any]) -> None:
    """Refuse quantizations that the package cannot undo, on the first row of a tensor of each."""
    from gguf import dequantize

    for tensor in {tensor.tensor_type: tensor for tensor in tensors}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            name = tensor.tensor_type.name
            raise ValueError(f"its weights are in {name}, which the package 'gguf' does not read") from None


def checkpoint_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file under the names of `config.json`."""
    architecture = fields["general.architecture"]
    found = {
        name: fields[f"{architecture}.{key}"] for key, name in SETTINGS.items() if f"{architecture}.{key}" in fields
    }
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    return {"model_type": architecture, **found}
