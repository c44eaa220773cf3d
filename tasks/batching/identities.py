"""What identifies a model, so that a journal is never continued with another one."""

from __future__ import annotations

import json
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel

ENDPOINT_FIELDS = ("protocol", "send_prompts_as", "extra_parameters")
ENDPOINT_FIELDS = ("url", "model_id", "provider", "protocol", "send_prompts_as", "extra_options")
DECISIVE_FIELDS = ("task", "backend", "chat_template", "ov_config", "dtype", "load_in", "attn_implementation")


def identify_model(model: LocalModel | InferenceEndpoint) -> dict[str, Any]:
    """Prepare a model where needed, and return what decides which text it generates.

    It names the content of the model and not where it lies. Sizes of the engine and the device are not part of it. What
    an endpoint runs is not known, so that it stands for itself.
    """
    if isinstance(model, InferenceEndpoint):
        return _identify_endpoint(model)
    from prefect_huggingface.tasks.storage.exports import get_export
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    fields = model.model_dump(mode="json", include=set(DECISIVE_FIELDS))
    identity: dict[str, Any] = {name: value for name, value in fields.items() if value}
    if model.backend == "openvino":
        identity["export"] = get_export(model).key
    else:
        snapshot = get_snapshot(model)
        identity.update(commit=snapshot.commit, model_kwargs=json.loads(json.dumps(model.model_kwargs, default=str)))
    return identity


def _identify_endpoint(endpoint: InferenceEndpoint) -> dict[str, Any]:
    identity: dict[str, Any] = {"endpoint": endpoint.base_url, "model": endpoint.model_name}
    identity.update(endpoint.model_dump(mode="json", include=set(ENDPOINT_FIELDS)))
    return {**identity, "options": endpoint.options.model_dump(mode="json", exclude_unset=True)}


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
