"""What the documentation of LangChain shows for Hugging Face models, call by call and with its variants.

The named models are replaced by the small one of this project: it answers questions for numbers and capitals. Where a
tutorial loads a model by its id, the id is on a local Hub. `HuggingFaceEndpoint` has its own tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.registry import unload_engines
from prefect_huggingface.tasks.errors import DownloadError, HuggingFaceTaskError, SettingsError
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline
from prefect_huggingface.tasks.storage.exports.store import get_export
from support.hub_server import LocalHub

TEMPLATE = """Question: {question}

Answer: Let's think step by step."""
PROMPT = PromptTemplate.from_template(TEMPLATE)
QUESTION = "What is electroencephalography?"
OV_CONFIG = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
FASTER_OV_CONFIG = {"KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", **OV_CONFIG}
TOKEN = "hf_CanaryTokenOfTheTutorials"


@pytest.fixture(scope="module", autouse=True)
def _engines() -> Iterator[None]:
    yield
    unload_engines()


@pytest.fixture
def hub_id(hub: LocalHub, bundled_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Id of the model on the Hub that `HF_ENDPOINT` names, in a fresh store."""
    hub.create("gpt2", {file.name: file for file in bundled_model.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("PREFECT_HUGGINGFACE_HOME", str(tmp_path / "store"))
    return "gpt2"


@pytest.fixture
def hf(bundled_model: Path) -> HuggingFacePipeline:
    return HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", pipeline_kwargs={"max_new_tokens": 10}
    )


@pytest.fixture
def ov_model_dir(bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Exported folder in the working directory, under the name that the tutorials use."""
    shutil.copytree(get_export(LocalModel(model_id=str(bundled_model))).path, tmp_path / "ov_model_dir")
    monkeypatch.chdir(tmp_path)
    return "ov_model_dir"


# Local pipelines


def test_load_by_id_from_the_hub(hub_id: str, hf: HuggingFacePipeline) -> None:
    loaded = HuggingFacePipeline.from_model_id(
        model_id=hub_id,
        task="text-generation",
        pipeline_kwargs={"max_new_tokens": 10},
    )
    assert loaded.invoke(QUESTION) == hf.invoke(QUESTION)


def test_load_from_an_existing_pipeline(bundled_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(bundled_model)
    model = AutoModelForCausalLM.from_pretrained(bundled_model)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=10)
    hf = HuggingFacePipeline(pipeline=pipe)
    assert hf.invoke("What is the capital of France?").strip() == "Paris"


def test_chain(hf: HuggingFacePipeline) -> None:
    chain = PROMPT | hf
    answer = chain.invoke({"question": QUESTION})
    assert answer
    assert "Question:" not in answer
    assert (PROMPT | hf | StrOutputParser()).invoke({"question": QUESTION}) == answer


def test_skip_prompt(hf: HuggingFacePipeline) -> None:
    chain = PROMPT | hf.bind(skip_prompt=True)
    answer = chain.invoke({"question": QUESTION})
    assert answer == (PROMPT | hf).invoke({"question": QUESTION})
    whole = (PROMPT | hf.bind(skip_prompt=False)).invoke({"question": QUESTION})
    assert whole == TEMPLATE.format(question=QUESTION) + answer


def test_stream(hf: HuggingFacePipeline) -> None:
    chain = PROMPT | hf.bind(skip_prompt=True)
    # The tutorial gives the one input of the template without its name.
    chunks = list(chain.stream(QUESTION))
    assert "".join(chunks) == chain.invoke({"question": QUESTION})


def test_device_minus_one_is_the_cpu(bundled_model: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", device=-1, pipeline_kwargs={"max_new_tokens": 10}
    )
    assert llm.invoke("What is the capital of France?").strip() == "Paris"


def test_a_device_that_is_missing_is_named(bundled_model: Path) -> None:
    with pytest.raises(HuggingFaceTaskError, match="99"):
        HuggingFacePipeline.from_model_id(
            model_id=str(bundled_model), task="text-generation", device=99, pipeline_kwargs={"max_new_tokens": 10}
        )


def test_device_map_auto(bundled_model: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", device_map="auto", pipeline_kwargs={"max_new_tokens": 10}
    )
    assert llm.invoke("What is the capital of France?").strip() == "Paris"


def test_device_and_device_map_together_are_refused(bundled_model: Path) -> None:
    with pytest.raises(SettingsError, match="exclude each other"):
        HuggingFacePipeline.from_model_id(
            model_id=str(bundled_model), task="text-generation", device=-1, device_map="auto"
        )


def check_batch(model_id: str, device: int) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=model_id,
        task="text-generation",
        device=device,
        batch_size=2,
        model_kwargs={"temperature": 0, "max_length": 64},
    )
    chain = PROMPT | llm.bind(stop=["\n\n"])
    questions = []
    for i in range(4):
        questions.append({"question": f"What is the number {i} in french?"})
    answers = chain.batch(questions)
    assert len(answers) == 4
    assert answers == [chain.invoke(question) for question in questions]
    assert not any("\n\n" in answer for answer in answers)
    # In its chat template the model knows the answer.
    asked = PromptTemplate.from_template("<|user|>{question}<|assistant|>") | llm.bind(stop=["\n\n"])
    assert asked.batch(questions)[2] == "deux"


def test_batch_on_the_cpu(bundled_model: Path) -> None:
    check_batch(str(bundled_model), device=-1)


@pytest.mark.gpu
def test_batch_on_a_gpu(bundled_model: Path) -> None:
    check_batch(str(bundled_model), device=0)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [{"device": 0}, {"device_map": "auto"}])
def test_chain_on_a_gpu(bundled_model: Path, place: dict[str, Any], hf: HuggingFacePipeline) -> None:
    gpu_llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", pipeline_kwargs={"max_new_tokens": 10}, **place
    )
    gpu_chain = PROMPT | gpu_llm
    assert gpu_chain.invoke({"question": QUESTION})
    assert gpu_llm.invoke("What is the capital of France?") == hf.invoke("What is the capital of France?")


# A gated model


def test_a_gated_model_needs_a_token_with_access(hub_id: str, hub: LocalHub) -> None:
    repository = hub.repositories[hub_id]
    repository.gated = "auto"
    hub.users |= {TOKEN: "ann", TOKEN + "2": "bob"}
    repository.readers.add("ann")
    arguments = {"model_id": hub_id, "task": "text-generation", "pipeline_kwargs": {"max_new_tokens": 10}}
    for refused in ("", TOKEN + "2"):
        with pytest.raises(DownloadError) as caught:
            HuggingFacePipeline.from_model_id(model_kwargs={"token": refused}, **arguments)
        assert TOKEN not in str(caught.value)
    llm = HuggingFacePipeline.from_model_id(model_kwargs={"token": TOKEN}, **arguments)
    assert llm.invoke("What is the capital of France?").strip() == "Paris"
    assert TOKEN not in repr(llm)


def test_the_cache_has_the_place_that_is_given(hub_id: str, tmp_path: Path) -> None:
    arguments = {"model_id": hub_id, "task": "text-generation", "pipeline_kwargs": {"max_new_tokens": 10}}
    cache_dir = tmp_path / "cache"
    HuggingFacePipeline.from_model_id(model_kwargs={"cache_dir": str(cache_dir)}, **arguments)
    assert list(cache_dir.rglob("*.safetensors"))
    offline = {"cache_dir": str(cache_dir), "local_files_only": True}
    llm = HuggingFacePipeline.from_model_id(model_kwargs=offline, **arguments)
    assert llm.invoke("What is the capital of France?").strip() == "Paris"


def test_a_prompt_with_the_template_in_it_gets_no_second_one(bundled_model: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", pipeline_kwargs={"max_new_tokens": 10}
    )
    prompt = PromptTemplate.from_template("<|user|>{question}<|assistant|>")
    question = {"question": "What is the capital of France?"}
    answer = (prompt | llm).invoke(question)
    assert answer == "Paris"
    chat = ChatHuggingFace(llm=llm)
    message = (prompt | chat).invoke(question)
    assert message.content == answer
    assert message.usage_metadata["input_tokens"] == llm.get_num_tokens(prompt.format(**question))


# OpenVINO


def test_openvino_from_a_checkpoint(bundled_model: Path) -> None:
    ov_llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model),
        task="text-generation",
        backend="openvino",
        model_kwargs={"device": "CPU", "ov_config": OV_CONFIG},
        pipeline_kwargs={"max_new_tokens": 10},
    )
    ov_chain = PROMPT | ov_llm
    answer = ov_chain.invoke({"question": QUESTION})
    assert answer
    assert (PROMPT | ov_llm.bind(skip_prompt=True)).invoke({"question": QUESTION}) == answer
    assert ov_llm.invoke("What is the capital of France?").strip() == "Paris"


@pytest.mark.slow
def test_openvino_from_an_existing_pipeline(bundled_model: Path) -> None:
    from optimum.intel.openvino import OVModelForCausalLM
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(bundled_model)
    ov_model = OVModelForCausalLM.from_pretrained(bundled_model, export=True, device="CPU", ov_config=OV_CONFIG)
    ov_pipe = pipeline("text-generation", model=ov_model, tokenizer=tokenizer, max_new_tokens=10)
    ov_llm = HuggingFacePipeline(pipeline=ov_pipe)
    assert ov_llm.invoke("What is the capital of France?").strip() == "Paris"


@pytest.mark.parametrize("ov_config", [OV_CONFIG, FASTER_OV_CONFIG])
def test_openvino_from_an_exported_folder(ov_model_dir: str, ov_config: dict[str, str]) -> None:
    ov_llm = HuggingFacePipeline.from_model_id(
        model_id=ov_model_dir,
        task="text-generation",
        backend="openvino",
        model_kwargs={"device": "CPU", "ov_config": ov_config},
        pipeline_kwargs={"max_new_tokens": 10},
    )
    chain = PROMPT | ov_llm
    assert chain.invoke({"question": QUESTION})
    assert ov_llm.invoke("What is the capital of France?").strip() == "Paris"


def test_openvino_stream_with_settings_of_the_call(ov_model_dir: str) -> None:
    ov_llm = HuggingFacePipeline.from_model_id(
        model_id=ov_model_dir, task="text-generation", backend="openvino", pipeline_kwargs={"max_new_tokens": 10}
    )
    generation_config = {"skip_prompt": True, "pipeline_kwargs": {"max_new_tokens": 100}}
    chain = PROMPT | ov_llm.bind(**generation_config)
    chunks = list(chain.stream(QUESTION))
    assert "".join(chunks) == chain.invoke({"question": QUESTION})


def test_openvino_device_that_is_missing_is_named(bundled_model: Path) -> None:
    with pytest.raises(HuggingFaceTaskError, match="GPU"):
        HuggingFacePipeline.from_model_id(
            model_id=str(bundled_model), task="text-generation", backend="openvino", model_kwargs={"device": "GPU.7"}
        )


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", [[], ["--weight-format", "int8"], ["--weight-format", "int4"]])
def test_openvino_folder_of_the_command_line(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: list[str]
) -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(bundled_model)]
    # The command finds out the task of a model on the Hub, but not of a folder.
    command += ["--task", "text-generation-with-past", *weight_format, str(tmp_path / "ov_model_dir")]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    test_openvino_from_an_exported_folder("ov_model_dir", FASTER_OV_CONFIG)


# Chat


def test_chat_on_a_local_model(bundled_model: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model),
        task="text-generation",
        pipeline_kwargs=dict(
            max_new_tokens=512,
            do_sample=False,
            repetition_penalty=1.03,
            return_full_text=False,
        ),
    )
    chat_model = ChatHuggingFace(llm=llm)
    messages = [
        SystemMessage(content="You're a helpful assistant"),
        HumanMessage(content="What happens when an unstoppable force meets an immovable object?"),
    ]
    ai_msg = chat_model.invoke(messages)
    assert ai_msg.content
    assert "helpful assistant" not in ai_msg.content
    assert chat_model.model_id == str(bundled_model)
    assert chat_model._to_chat_prompt(messages).count("<|system|>") == 1
    assert chat_model.invoke("What is the capital of France?").content == "Paris"
    assert "".join(chunk.content for chunk in chat_model.stream("What is the capital of France?")) == "Paris"


def test_chat_with_a_stop_for_an_agent(bundled_model: Path) -> None:
    llm = HuggingFacePipeline.from_model_id(
        model_id=str(bundled_model), task="text-generation", pipeline_kwargs={"max_new_tokens": 20}
    )
    chat_model_with_stop = ChatHuggingFace(llm=llm).bind(stop=["\nObservation", "ris"])
    agent = {"input": lambda x: x["input"]} | ChatPromptTemplate.from_template("{input}") | chat_model_with_stop
    answer = agent.invoke({"input": "What is the capital of France?"})
    assert answer.content == "Pa"
    assert answer.response_metadata["finish_reason"] == "stop"


def test_chat_with_bitsandbytes(bundled_model: Path) -> None:
    from transformers import BitsAndBytesConfig

    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_use_double_quant=True,
    )
    arguments: dict[str, Any] = {
        "model_id": str(bundled_model),
        "task": "text-generation",
        "pipeline_kwargs": dict(max_new_tokens=512, do_sample=False, repetition_penalty=1.03, return_full_text=False),
        "model_kwargs": {"quantization_config": quantization_config},
    }
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(HuggingFaceTaskError, match="bitsandbytes"):
            HuggingFacePipeline.from_model_id(**arguments)
    else:
        llm = HuggingFacePipeline.from_model_id(**arguments)
        assert ChatHuggingFace(llm=llm).invoke("What is the capital of France?").content


def test_openvino_from_an_exported_folder_needs_neither_torch_nor_transformers(ov_model_dir: str) -> None:
    code = """
import sys
from prefect_huggingface.tasks.langchain import ChatHuggingFace, HuggingFacePipeline
llm = HuggingFacePipeline.from_model_id("ov_model_dir", "text-generation", backend="openvino")
print(ChatHuggingFace(llm=llm).invoke("What is the capital of France?").content)
print([name for name in ("torch", "transformers", "optimum", "nncf", "huggingface_hub") if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-2:] == ["Paris", "[]"]
