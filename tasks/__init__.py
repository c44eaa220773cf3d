"""Tasks: how it is done. One thin verb per Prefect task, over plain importable functions.

A name is imported when it is first used, so that a process that only generates does not pay for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_huggingface.tasks.batches import plan_batch, publish_batch, resolve_models, run_shard
    from prefect_huggingface.tasks.batching.job import BatchOptions
    from prefect_huggingface.tasks.batching.requests import ChainStep
    from prefect_huggingface.tasks.downloads import download_model, plan_download
    from prefect_huggingface.tasks.embedding import Embeddings, TextScore, embed_texts, rerank_texts
    from prefect_huggingface.tasks.endpoints import (
        get_endpoint,
        pause_endpoint,
        resume_endpoint,
        scale_endpoint_to_zero,
        wait_for_endpoint,
    )
    from prefect_huggingface.tasks.engines.registry import load_engine, set_memory_budget, unload_engines
    from prefect_huggingface.tasks.estimation import estimate_batch
    from prefect_huggingface.tasks.evaluation import compare_export
    from prefect_huggingface.tasks.exports import export_to_openvino, list_store, plan_export, prune_store
    from prefect_huggingface.tasks.generation import generate_chat, generate_text, stream_text
    from prefect_huggingface.tasks.records import BatchSummary, Completion, EndpointStatus, Export, Request, Snapshot
    from prefect_huggingface.tasks.tuning import tune_engine

__all__ = [
    "BatchOptions",
    "BatchSummary",
    "ChainStep",
    "Completion",
    "Embeddings",
    "EndpointStatus",
    "Export",
    "Request",
    "Snapshot",
    "TextScore",
    "compare_export",
    "download_model",
    "embed_texts",
    "estimate_batch",
    "export_to_openvino",
    "generate_chat",
    "generate_text",
    "get_endpoint",
    "list_store",
    "load_engine",
    "pause_endpoint",
    "plan_batch",
    "plan_download",
    "plan_export",
    "prune_store",
    "publish_batch",
    "rerank_texts",
    "resolve_models",
    "resume_endpoint",
    "run_shard",
    "scale_endpoint_to_zero",
    "set_memory_budget",
    "stream_text",
    "tune_engine",
    "unload_engines",
    "wait_for_endpoint",
]

_HOMES = {
    "batches": ("plan_batch", "publish_batch", "resolve_models", "run_shard"),
    "batching.job": ("BatchOptions",),
    "batching.requests": ("ChainStep",),
    "downloads": ("download_model", "plan_download"),
    "embedding": ("Embeddings", "TextScore", "embed_texts", "rerank_texts"),
    "endpoints": ("get_endpoint", "pause_endpoint", "resume_endpoint", "scale_endpoint_to_zero", "wait_for_endpoint"),
    "engines.registry": ("load_engine", "set_memory_budget", "unload_engines"),
    "estimation": ("estimate_batch",),
    "evaluation": ("compare_export",),
    "exports": ("export_to_openvino", "list_store", "plan_export", "prune_store"),
    "generation": ("generate_chat", "generate_text", "stream_text"),
    "records": ("BatchSummary", "Completion", "EndpointStatus", "Export", "Request", "Snapshot"),
    "tuning": ("tune_engine",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
