"""Flows: when it runs. They only put tasks together."""

from prefect_huggingface.flows.batches import batch_embedding, batch_inference, batch_rerank
from prefect_huggingface.flows.chains import prompt_chain
from prefect_huggingface.flows.maintenance import prune_models, report_failure
from prefect_huggingface.flows.preparation import prepare_model

__all__ = [
    "batch_embedding", "batch_inference", "batch_rerank", "prepare_model", "prompt_chain", "prune_models",
    "report_failure",
]  # fmt: skip
