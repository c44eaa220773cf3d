"""The classes have the arguments and methods of those in langchain-huggingface 1.2.3, recorded here from its source."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel, BaseLLM

from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline

PIPELINE_FIELDS = {"pipeline", "model_id", "model_kwargs", "pipeline_kwargs", "batch_size"}
CHAT_FIELDS = {
    "llm", "tokenizer", "model_id", "temperature", "stop", "presence_penalty", "frequency_penalty", "seed", "logprobs",
    "top_logprobs", "logit_bias", "streaming", "stream_usage", "n", "top_p", "max_tokens", "model_kwargs",
}  # fmt: skip
RUNNABLE_METHODS = ("invoke", "ainvoke", "batch", "abatch", "stream", "astream", "bind", "generate", "agenerate")


def defaults_of(method: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}


def test_from_model_id_takes_the_same_arguments_in_the_same_order() -> None:
    recorded = {
        "model_id": inspect.Parameter.empty,
        "task": inspect.Parameter.empty,
        "backend": "default",
        "device": None,
        "device_map": None,
        "model_kwargs": None,
        "pipeline_kwargs": None,
        # There it is 4; here the engine fills its batches where nothing is said.
        "batch_size": None,
        "kwargs": inspect.Parameter.empty,
    }
    assert list(defaults_of(HuggingFacePipeline.from_model_id).items()) == list(recorded.items())


def test_methods_of_the_chat_model_take_the_same_arguments() -> None:
    assert list(defaults_of(ChatHuggingFace.from_model_id)) == ["model_id", "task", "backend", "kwargs"]
    assert defaults_of(ChatHuggingFace.from_model_id)["backend"] == "pipeline"
    assert list(defaults_of(ChatHuggingFace.bind_tools)) == [
        "self", "tools", "tool_choice", "parallel_tool_calls", "strict", "kwargs",
    ]  # fmt: skip
    structured = defaults_of(ChatHuggingFace.with_structured_output)
    assert list(structured) == ["self", "schema", "method", "include_raw", "strict", "kwargs"]
    assert (structured["schema"], structured["method"], structured["include_raw"]) == (None, "function_calling", False)


def test_fields() -> None:
    assert PIPELINE_FIELDS <= set(HuggingFacePipeline.model_fields)
    assert CHAT_FIELDS <= set(ChatHuggingFace.model_fields)
    assert ChatHuggingFace.model_fields["stop"].alias == "stop_sequences"


@pytest.mark.parametrize(("ours", "base"), [(HuggingFacePipeline, BaseLLM), (ChatHuggingFace, BaseChatModel)])
def test_they_are_what_langchain_expects(ours: type, base: type) -> None:
    assert issubclass(ours, base)
    assert all(callable(getattr(ours, method)) for method in RUNNABLE_METHODS)


def test_they_are_known_to_traces_under_the_same_types() -> None:
    assert HuggingFacePipeline._llm_type.fget(None) == "huggingface_pipeline"  # type: ignore[attr-defined]
    assert ChatHuggingFace._llm_type.fget(None) == "huggingface-chat-wrapper"  # type: ignore[attr-defined]
