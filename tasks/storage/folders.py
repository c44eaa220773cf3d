"""What a folder with model files holds: which files matter, and which kind of model they make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.errors import ModelSourceError

SAFE_WEIGHTS = (".safetensors",)
PICKLED_WEIGHTS = (".bin", ".pt", ".pth")
OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".mlmodel", ".ckpt", ".npz")
DOCUMENTS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".pdf")
NEVER_READ = (*DOCUMENTS, "training_args.bin", ".tmp", ".lock", ".part", ".incomplete")
# The second kind has the steps after the model in repositories of Sentence Transformers.
FOLDERS_READ = re.compile(r"additional_chat_templates|\d+_[A-Za-z]+")


def list_files(folder: Path) -> list[str]:
    """Return the paths of the files that a model of this folder may be loaded from, sorted.

    Hidden files, documentation, and weights of other frameworks are left out. So are weights in pickle format when
    there are safetensors. Links to files count as files.

    Raises:
        ModelSourceError: If a file is a link to nothing.
    """
    names = sorted(name for name in _walk(folder) if not name.lower().endswith(NEVER_READ + OTHER_WEIGHTS))
    if any(is_safe_weight(name) for name in names):
        names = [name for name in names if not is_pickled_weight(name)]
    for name in names:
        if not (folder / name).exists():
            raise ModelSourceError(
                f"File {name!r} in folder {str(folder)!r} is a link to nothing. Download the model again."
            )
    return names


def is_safe_weight(name: str) -> bool:
    """Tell whether a file holds weights in safetensors format."""
    return name.endswith(SAFE_WEIGHTS)


def is_pickled_weight(name: str) -> bool:
    """Tell whether a file holds weights in pickle format; the `.bin` file of an OpenVINO model does not."""
    return name.endswith(PICKLED_WEIGHTS) and not Path(name).name.startswith("openvino_")


def is_openvino_folder(names: Iterable[str]) -> bool:
    """Tell whether files make an OpenVINO model."""
    return any(name in OPENVINO_MODELS for name in names)


OPENVINO_MODELS = ("openvino_model.xml", "openvino_decoder_model.xml", "openvino_language_model.xml")


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


def _walk(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield entry.name
            elif FOLDERS_READ.fullmatch(entry.name):
                yield from (f"{entry.name}/{name}" for name in os.listdir(entry) if not name.startswith("."))
