"""What identifies a model, so that a journal is never continued with another one."""

from __future__ import annotations

import json
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, LocalModel

DECISIVE_FIELDS = ("task", "backend", "chat_template", "ov_config", "dtype", "load_in", "attn_implementation")


def identify_model(model: LocalModel) -> dict[str, Any]:
    """Prepare a model where needed, and return what decides which text it generates.

    It names the content of the model and not where it lies. Sizes of the engine and the device are not part of it.
    """
    from prefect_huggingface.tasks.storage.exports import get_export
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    fields = model.model_dump(mode="json", include=set(DECISIVE_FIELDS))
    identity: dict[str, Any] = {name: value for name, value in fields.items() if value}
    if model.backend == "openvino":
        identity["export"] = get_export(model).key
    else:
        snapshot = get_snapshot(model)
        identity.update(commit=snapshot.commit, model_kwargs=json.loads(json.dumps(model.model_kwargs, default=str)))
    identity["options"] = model.options.model_dump(mode="json", exclude_unset=True)
    return identity


def is_greedy(model: LocalModel, options: GenerationOptions | None, option_columns: tuple[str, ...]) -> bool:
    """Tell whether equal prompts have equal answers, in every row."""
    return not model.options.merged(options).do_sample and "do_sample" not in option_columns


def name_model(model: LocalModel) -> tuple[str, ...]:
    """Return the names under which a request may call the model."""
    return tuple(dict.fromkeys((model.model_id, model.model_id.rstrip("/").rpartition("/")[2])))
