"""Engines on OpenVINO for the tests: settings, and many requests at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.records import Completion, Request

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
NEW_TOKENS = 24


def openvino_model(folder: Path, **settings: Any) -> LocalModel:
    """Return the settings of a model in full precision, without a chat template."""
    defaults: dict[str, Any] = {
        "options": GenerationOptions(max_new_tokens=NEW_TOKENS),
        "ov_config": EXACT,
        "chat_template": "never",
        "engine": EngineOptions(cache_size_gb=0.25),
    }
    return LocalModel(model_id=str(folder), **{**defaults, **settings})


def load_openvino(folder: Path, **settings: Any) -> OpenVINOTextEngine:
    """Load an engine of its own."""
    return OpenVINOTextEngine(folder, openvino_model(folder, **settings))


def complete(engine: Engine, prompts: list[str], in_flight: int | None = None, **options: Any) -> list[Completion]:
    """Generate all at once and return the completions in the order of the prompts."""
    chosen = GenerationOptions(**options) if options else None
    requests = [Request(prompt=prompt, id=index, options=chosen) for index, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests, in_flight), key=lambda completion: completion.request_id)


def ask(engine: Engine, prompt: str, **options: Any) -> Completion:
    """Generate one completion."""
    return engine.submit(Request(prompt, options=GenerationOptions(**options) if options else None)).result(timeout=60)
