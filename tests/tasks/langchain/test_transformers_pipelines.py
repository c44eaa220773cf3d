"""A pipeline object of Transformers, or of Optimum Intel, as the model of the LLM."""

from __future__ import annotations

import gc
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline
from prefect_huggingface.tasks.langchain.kwargs import pipeline_settings
from prefect_huggingface.tasks.records import Request

PROMPTS = ["The capital of France", "One, two, three", "A small model"]


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_llama),
    }


def make_pipeline(loaded: dict[str, Any], **settings: Any) -> Any:
    from transformers import pipeline

    return pipeline("text-generation", **loaded, **settings)


def test_texts_are_those_of_the_pipeline_itself(loaded: dict[str, Any]) -> None:
    pipeline = make_pipeline(loaded, max_new_tokens=10, do_sample=False)
    llm = HuggingFacePipeline(pipeline=pipeline)
    expected = [pipeline(prompt, return_full_text=False)[0]["generated_text"] for prompt in PROMPTS]
    assert llm.batch(PROMPTS) == expected
    assert [llm.invoke(prompt) for prompt in PROMPTS] == expected
    assert "".join(llm.stream(PROMPTS[0])) == expected[0]
    assert llm.bind(skip_prompt=False).invoke(PROMPTS[0]) == pipeline(PROMPTS[0])[0]["generated_text"]


def test_names_and_places(loaded: dict[str, Any], tiny_llama: Path) -> None:
    pipeline = make_pipeline(loaded, max_new_tokens=10, batch_size=2)
    llm = HuggingFacePipeline(pipeline=pipeline)
    assert (llm.model_id, llm.task, llm.batch_size) == (str(tiny_llama), "text-generation", 2)
    assert llm.pipeline is pipeline
    assert HuggingFacePipeline(pipeline=pipeline, model_id="gpt2").model_id == "gpt2"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"max_new_tokens": 10}, {"max_new_tokens": 10}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        ({"num_beams": 2, "repetition_penalty": 1.1}, {"num_beams": 2, "repetition_penalty": 1.1}),
        ({"stop_sequence": "dog do"}, {"stop": ["dog do"]}),
        ({"return_full_text": True}, {"echo": True}),
        ({"pad_token_id": 1, "eos_token_id": 1}, {}),
    ],
)
def test_what_the_pipeline_was_made_with_counts(
    loaded: dict[str, Any], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    read = pipeline_settings(make_pipeline(loaded, **settings))
    assert read.options.model_dump(exclude_unset=True) == options


def test_a_total_length_of_the_pipeline_counts_the_prompt(loaded: dict[str, Any]) -> None:
    llm = HuggingFacePipeline(pipeline=make_pipeline(loaded, max_length=16, do_sample=False))
    info = llm.generate([PROMPTS[0]]).generations[0][0].generation_info or {}
    assert info["token_usage"]["total_tokens"] == 16


@pytest.mark.parametrize("settings", [{"typical_p": 0.9}, {"return_tensors": True}])
def test_settings_that_would_be_lost_are_refused(loaded: dict[str, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        HuggingFacePipeline(pipeline=make_pipeline(loaded, **settings))


def test_settings_of_the_llm_lie_over_those_of_the_pipeline(loaded: dict[str, Any]) -> None:
    pipeline = make_pipeline(loaded, max_new_tokens=10, do_sample=False)
    llm = HuggingFacePipeline(pipeline=pipeline, pipeline_kwargs={"max_new_tokens": 3})
    assert (llm.generate([PROMPTS[0]]).generations[0][0].generation_info or {})["token_usage"]["completion_tokens"] == 3


def test_users_of_a_pipeline_share_its_engine_which_ends_with_it(loaded: dict[str, Any]) -> None:
    pipeline = make_pipeline(loaded, max_new_tokens=5)
    llms = [HuggingFacePipeline(pipeline=pipeline) for _ in range(2)]
    engine = llms[0].get_engine().unshared
    assert llms[1].get_engine().unshared is engine
    assert llms[0].invoke(PROMPTS[0])
    del llms, pipeline
    gc.collect()
    deadline = time.monotonic() + 10
    while engine.submit(Request(PROMPTS[0])).result().error_code != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_pipeline_travels_with_its_model(loaded: dict[str, Any]) -> None:
    llm = HuggingFacePipeline(pipeline=make_pipeline(loaded, max_new_tokens=5))
    text = llm.invoke(PROMPTS[0])
    assert pickle.loads(pickle.dumps(llm)).invoke(PROMPTS[0]) == text


def test_chat_uses_the_template_of_the_pipelines_tokenizer(loaded: dict[str, Any]) -> None:
    llm = HuggingFacePipeline(pipeline=make_pipeline(loaded, max_new_tokens=5))
    answer = ChatHuggingFace(llm=llm).invoke("Hello")
    assert answer.content == llm.invoke("<|user|>Hello<|end|><|assistant|>")


def test_a_pipeline_with_an_openvino_model(loaded: dict[str, Any], tiny_openvino: Path) -> None:
    from optimum.intel.openvino import OVModelForCausalLM
    from transformers import pipeline

    model = OVModelForCausalLM.from_pretrained(
        tiny_openvino, device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    settings = {"max_new_tokens": 10, "do_sample": False}
    made = pipeline("text-generation", model=model, tokenizer=loaded["tokenizer"], **settings)
    llm = HuggingFacePipeline(pipeline=made)
    torch_llm = HuggingFacePipeline(pipeline=make_pipeline(loaded, **settings))
    assert llm.batch(PROMPTS) == torch_llm.batch(PROMPTS)
    assert repr(llm)
    with pytest.raises(SettingsError, match="cannot be pickled"):
        pickle.dumps(llm)
