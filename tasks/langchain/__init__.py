"""LangChain classes on top of an engine: `HuggingFacePipeline`, `HuggingFaceEndpoint` and `ChatHuggingFace`."""

from prefect_huggingface.tasks.langchain.chat_models import ChatHuggingFace
from prefect_huggingface.tasks.langchain.huggingface_endpoint import HuggingFaceEndpoint
from prefect_huggingface.tasks.langchain.huggingface_pipeline import HuggingFacePipeline

__all__ = ["ChatHuggingFace", "HuggingFaceEndpoint", "HuggingFacePipeline"]
