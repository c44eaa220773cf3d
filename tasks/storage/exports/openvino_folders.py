"""OpenVINO models that were not made here: what their weights are, and whether they can be used as they are."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.folders import OPENVINO_MODELS

FOUR_BITS = ("u4", "i4", "nf4", "f4e2m1")
EIGHT_BITS = ("u8", "i8", "f8e4m3", "f8e5m2")
ELEMENT_TYPE = re.compile(rb'element_type="(\w+)"')
# Codes of a codebook are of an integer type; the codebook itself is not looked for.
WANTS_FOUR_BITS = ("int4", "nf4", "mxfp4", "cb4")


def check_precision(model: LocalModel, snapshot: Snapshot) -> None:
    """Refuse to quantize an OpenVINO model a second time.

    A model that asks for 4 bits, and is an OpenVINO folder without any, cannot be given them: its weights have lost
    their precision already, or should be quantized from the checkpoint.

    Raises:
        PlanError: If the folder has no weights in 4 bits and the model asks for them.
    """
    if model.weight_format not in WANTS_FOUR_BITS:
        return
    found = weight_type(snapshot.path, snapshot.commit)
    if found != "4 bits":
        raise PlanError(
            f"{model.model_id!r} is an OpenVINO model with weights in {found}, and is not quantized to "
            f"{model.weight_format!r} again. Set `weight_format='int8'` or None to use it as it is, or give its source."
        )


@lru_cache(maxsize=64)
def weight_type(folder: Path, commit: str) -> str:
    """Return the precision of most large weights of an OpenVINO model: "4 bits", "8 bits" or "full precision".

    Args:
        folder: Folder of the model.
        commit: Commit of its content, for remembering the answer.
    """
    types: set[str] = set()
    for name in OPENVINO_MODELS:
        path = folder / name
        if path.is_file():
            types |= {found.decode() for found in ELEMENT_TYPE.findall(path.read_bytes())}
    if types & set(FOUR_BITS):
        return "4 bits"
    return "8 bits" if types & set(EIGHT_BITS) else "full precision"
