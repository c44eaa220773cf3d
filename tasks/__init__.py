"""Tasks: how it is done. One thin verb per Prefect task, over plain importable functions."""

from prefect_huggingface.tasks.batches import plan_batch, publish_batch, run_shard
from prefect_huggingface.tasks.chains import ChainStep
from prefect_huggingface.tasks.downloads import download_model, plan_download
from prefect_huggingface.tasks.endpoints import (
    get_endpoint,
    pause_endpoint,
    resume_endpoint,
    scale_endpoint_to_zero,
    wait_for_endpoint,
)
from prefect_huggingface.tasks.engines.cache import load_engine, unload_engines
from prefect_huggingface.tasks.evaluation import compare_export
from prefect_huggingface.tasks.exports import export_to_openvino, list_store, plan_export, prune_store
from prefect_huggingface.tasks.generation import generate_chat, generate_text, stream_text
from prefect_huggingface.tasks.records import BatchSummary, Completion, EndpointStatus, Export, Request, Snapshot
from prefect_huggingface.tasks.tuning import tune_engine

__all__ = [
    "BatchSummary",
    "ChainStep",
    "Completion",
    "EndpointStatus",
    "Export",
    "Request",
    "Snapshot",
    "compare_export",
    "download_model",
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
    "resume_endpoint",
    "run_shard",
    "scale_endpoint_to_zero",
    "stream_text",
    "tune_engine",
    "unload_engines",
    "wait_for_endpoint",
]
