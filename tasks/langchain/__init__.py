"""LangChain classes on top of an engine: `HuggingFacePipeline` and `ChatHuggingFace`."""

from prefect_huggingface.tasks.langchain.chat_models import ChatHuggingFace
from prefect_huggingface.tasks.langchain.pipelines import HuggingFacePipeline

__all__ = ["ChatHuggingFace", "HuggingFacePipeline"]
