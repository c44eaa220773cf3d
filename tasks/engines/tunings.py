"""Engine settings that were found for one model on one machine: where they are kept, and how they are applied."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import EngineOptions, LocalModel
from prefect_huggingface.tasks.engines.chat_templates import read_json
from prefect_huggingface.tasks.engines.openvino.devices import wants_full_precision

TUNINGS_FOLDER = "tunings"
ENGINE_SETTINGS = ("max_num_seqs", "max_num_batched_tokens")


def machine_name() -> str:
    """Return what tells machines apart that are fast in different ways."""
    facts = [platform.machine(), _processor(), str(os.cpu_count()), version("openvino"), version("openvino-genai")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def tuning_file(model: LocalModel, folder: Path) -> Path:
    """Return the file for the settings of a model folder on this machine."""
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.bin"))
    mark = hashlib.sha256(json.dumps([folder.name, model.device, weights]).encode()).hexdigest()[:16]
    return model.store_path / TUNINGS_FOLDER / f"{mark}-{machine_name()}.json"


def read_settings(model: LocalModel, folder: Path) -> dict[str, Any]:
    """Return the settings that were found, empty where there are none."""
    found = read_json(tuning_file(model, folder)).get("settings")
    return found if isinstance(found, dict) else {}


def write_settings(model: LocalModel, folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Keep settings for this machine, with the facts that they rest on."""
    path = tuning_file(model, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps({"settings": settings, **facts}, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def with_settings(model: LocalModel, settings: Mapping[str, Any]) -> LocalModel:
    """Return a model with settings put under what its user gives.

    Where the user asks for full precision, only the sizes are taken over.
    """
    sizes = {name: settings[name] for name in ENGINE_SETTINGS if name in settings}
    properties = {name: value for name, value in settings.items() if name not in ENGINE_SETTINGS}
    if wants_full_precision(model.ov_config):
        properties = {}
    given = {name: getattr(model.engine, name) for name in model.engine.model_fields_set}
    given = {name: value for name, value in given.items() if value is not None or name not in ENGINE_SETTINGS}
    return model.model_copy(
        update={"engine": EngineOptions(**{**sizes, **given}), "ov_config": {**properties, **model.ov_config}}
    )


def apply_tuning(model: LocalModel, folder: Path) -> LocalModel:
    """Return a model with what was found for it on this machine, unless it is told not to use it."""
    if model.backend != "openvino" or model.task != "text-generation" or not model.engine.tuned:
        return model
    settings = read_settings(model, folder)
    return with_settings(model, settings) if settings else model


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return "\n".join(facts)
