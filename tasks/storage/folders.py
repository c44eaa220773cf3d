"""What a folder with model files holds: which files matter, and which kind of model they make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.errors import ModelSourceError

SAFE_WEIGHTS = (".safetensors",)
PICKLED_WEIGHTS = (".bin", ".pt", ".pth")
# The second kind has the steps after the model in repositories of Sentence Transformers.
FOLDERS_READ = re.compile(r"additional_chat_templates|\d+_[A-Za-z]+")
OPENVINO_MODELS = ("openvino_model.xml", "openvino_decoder_model.xml", "openvino_language_model.xml")
LARGEST_HEADER_BYTES = 100_000_000
BYTES_PER_ELEMENT = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def list_files(folder: Path) -> list[str]:
    """Return the paths of the files that a model of this folder may be loaded from, without hidden ones."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                found.append(entry.name)
            elif FOLDERS_READ.fullmatch(entry.name):
                found += (f"{entry.name}/{name}" for name in os.listdir(entry) if not name.startswith("."))
    return found


def is_safe_weight(name: str) -> bool:
    """Tell whether a file holds weights in safetensors format."""
    return name.endswith(SAFE_WEIGHTS)


def is_pickled_weight(name: str) -> bool:
    """Tell whether a file holds weights in pickle format; the `.bin` file of an OpenVINO model does not."""
    return name.endswith(PICKLED_WEIGHTS) and not Path(name).name.startswith("openvino_")


def is_openvino_folder(names: Iterable[str]) -> bool:
    """Tell whether files make an OpenVINO model."""
    return any(name in OPENVINO_MODELS for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if the file is missing.

    Raises:
        ModelSourceError: If the file is not JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"File {str(path)!r} cannot be read as JSON: {error}. Download it again.") from None
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """Number of weights of a checkpoint, their size in bytes and their names; no names where they are not known."""

    parameters: int
    size_bytes: int
    names: frozenset[str] = frozenset()


def measure_weights(folder: Path, names: Iterable[str]) -> SourceWeights:
    """Return number and size of the weights in the files of a folder; only headers are read.

    Of weights in pickle format the number is estimated at two bytes each.
    """
    parameters = size = 0
    tensors: set[str] = set()
    for name in names:
        if is_safe_weight(name):
            of_file = _read_header(folder / name)
        elif is_pickled_weight(name):
            of_file = estimate_weights((folder / name).stat().st_size)
        else:
            continue
        parameters += of_file.parameters
        size += of_file.size_bytes
        tensors |= of_file.names
    return SourceWeights(parameters, size, frozenset(tensors))


def estimate_weights(size_bytes: int) -> SourceWeights:
    """Return the weights that files of a size hold when each takes two bytes."""
    return SourceWeights(size_bytes // 2, size_bytes)


def _read_header(path: Path) -> SourceWeights:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return parse_header(stream.read(min(length, LARGEST_HEADER_BYTES)), size)


def parse_header(header: bytes, size_bytes: int) -> SourceWeights:
    """Return what the header of a safetensors file, without its length, says about the file."""
    parameters, names = 0, set()
    try:
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                parameters += (end - begin) // BYTES_PER_ELEMENT.get(tensor["dtype"], 1)
                names.add(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return estimate_weights(size_bytes)
    return SourceWeights(parameters, size_bytes, frozenset(names))


def find_pointer(folder: Path, names: Iterable[str]) -> str | None:
    """Return the name of a file that is a pointer of Git LFS in place of its content, or None."""
    for name in names:
        place = folder / name
        if place.stat().st_size < 1024 and place.read_bytes().startswith(b"version https://git-lfs.github.com/"):
            return name
    return None


def foreign_code(config: bytes) -> list[str]:
    """Return the other repositories that hold Python code of a model, by its configuration."""
    try:
        named = json.loads(config)["auto_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError):
        return []
    references = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return sorted({str(one).partition("--")[0] for one in references if "--" in str(one)})
