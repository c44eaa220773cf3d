"""Blocks: what is to run. Typed, saved and secret-safe configuration that imports nothing heavy."""

from prefect_huggingface.blocks.credentials import HuggingFaceCredentials
from prefect_huggingface.blocks.embedding import EmbeddingOptions
from prefect_huggingface.blocks.endpoint import InferenceEndpoint
from prefect_huggingface.blocks.model import Adapter, EngineOptions, LocalModel
from prefect_huggingface.blocks.options import GenerationOptions, ResponseFormat
from prefect_huggingface.blocks.quantization import QuantizationOptions
from prefect_huggingface.blocks.store import ModelStore

__all__ = [
    "Adapter",
    "EmbeddingOptions",
    "EngineOptions",
    "GenerationOptions",
    "HuggingFaceCredentials",
    "InferenceEndpoint",
    "LocalModel",
    "ModelStore",
    "QuantizationOptions",
    "ResponseFormat",
]
