"""Flows: when it runs. They only put tasks together."""

from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.flows.chains import prompt_chain
from prefect_huggingface.flows.preparation import prepare_model
from prefect_huggingface.flows.pruning import prune_models
from prefect_huggingface.flows.reports import report_failure
from prefect_huggingface.flows.setup import save_default_blocks

__all__ = ["batch_inference", "prepare_model", "prompt_chain", "prune_models", "report_failure", "save_default_blocks"]
