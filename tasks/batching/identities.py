"""What identifies a model, so that a journal is never continued with another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.assets import note_export
from prefect_huggingface.tasks.storage.adapters import get_adapters

ENDPOINT_FIELDS = ("url", "model_id", "provider", "protocol", "send_prompts_as", "extra_options")
DECISIVE_FIELDS = ("task", "backend", "chat_template", "ov_config", "dtype", "load_in", "attn_implementation")


def identify_model(model: LocalModel | InferenceEndpoint) -> dict[str, Any]:
    """Prepare a model where needed, and return what decides which text it generates.

    It names the content of the model and not where it lies. Settings found by tuning are part of it where they decide
    how precisely the model computes. Sizes of the engine and the device are not. What an endpoint runs is not known, so
    that it stands for itself.
    """
    if isinstance(model, InferenceEndpoint):
        identity = model.model_dump(mode="json", include=set(ENDPOINT_FIELDS), exclude_defaults=True)
        # Whatever a server takes may stand in them, also what does not belong into a file.
        extra = json.dumps(model.extra_parameters, sort_keys=True, default=str)
        identity["extra parameters"] = hashlib.sha256(extra.encode()).hexdigest()
    else:
        identity = _identify_local(model)
    return {**identity, "options": model.options.model_dump(mode="json", exclude_unset=True)}


def _identify_local(model: LocalModel) -> dict[str, Any]:
    from prefect_huggingface.tasks.storage.exports.publication import get_export
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    fields = model.model_dump(mode="json", include=set(DECISIVE_FIELDS))
    identity: dict[str, Any] = {name: value for name, value in fields.items() if value}
    if model.adapters:
        identity["adapters"] = [adapter.digest for adapter in get_adapters(model)]
    if model.backend == "openvino":
        export = get_export(model)
        note_export(model, export)
        tuned = _tuned_properties(model, export.path)
        return {**identity, "export": export.key, **({"tuned settings": tuned} if tuned else {})}
    model_kwargs = json.loads(json.dumps(model.model_kwargs, default=str))
    return {**identity, "commit": get_snapshot(model).commit, "model_kwargs": model_kwargs}


def _tuned_properties(model: LocalModel, folder: Path) -> dict[str, Any]:
    """Return the properties of OpenVINO that only tuning has set for this machine."""
    from prefect_huggingface.tasks.engines.openvino_runtime import apply_tuning

    properties = apply_tuning(model, folder).ov_config
    return {name: value for name, value in sorted(properties.items()) if name not in model.ov_config}


def is_greedy(
    model: LocalModel | InferenceEndpoint, options: GenerationOptions | None, option_columns: tuple[str, ...]
) -> bool:
    """Tell whether equal prompts have equal answers, in every row."""
    return not model.options.merged(options).do_sample and "do_sample" not in option_columns


def name_backend(model: LocalModel | InferenceEndpoint) -> str:
    """Return what runs the model."""
    return "endpoint" if isinstance(model, InferenceEndpoint) else model.backend


def name_model(model: LocalModel | InferenceEndpoint) -> tuple[str, ...]:
    """Return the names under which a request may call the model."""
    if model.model_id is None:
        return ()
    return tuple(dict.fromkeys((model.model_id, model.model_id.rstrip("/").rpartition("/")[2])))
