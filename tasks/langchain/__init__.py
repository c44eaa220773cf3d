"""LangChain classes on top of an engine: language models, chat models, embeddings and a cross-encoder."""

from prefect_huggingface.tasks.langchain.chat_models import ChatHuggingFace
from prefect_huggingface.tasks.langchain.embeddings import (
    HuggingFaceCrossEncoder,
    HuggingFaceEmbeddings,
    HuggingFaceEndpointEmbeddings,
)
from prefect_huggingface.tasks.langchain.huggingface_endpoint import HuggingFaceEndpoint
from prefect_huggingface.tasks.langchain.huggingface_pipeline import HuggingFacePipeline

__all__ = [
    "ChatHuggingFace",
    "HuggingFaceCrossEncoder",
    "HuggingFaceEmbeddings",
    "HuggingFaceEndpoint",
    "HuggingFaceEndpointEmbeddings",
    "HuggingFacePipeline",
]
