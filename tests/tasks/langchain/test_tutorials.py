"""Five tutorials on LangChain with local Hugging Face models: every call with its arguments, in the order they stand.

Each runs as a script of its own against the Hub of the tests. Only import lines differ, and what a tutorial leaves to
its reader is filled in: a token, the address of an endpoint and its prompt. The models are small ones under the names
that the tutorials use.

On a machine without a GPU, `device=0` is a `ValueError` at once, as it is in LangChain; the scripts go on with -1
there, as the tutorials say. On one with a GPU it is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import LocalHub
from support.scripted_models import make_scripted_model
from support.text_models import TextModel
from support.tgi_server import TgiServer

TOKEN = "hf_CanaryTokenOfTheTutorials"
ANSWER = "The capital of France is Paris."
GPU = "import torch\nhas_gpu = torch.cuda.is_available()\n"


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The system message is one token, so that a question has room in 64 of them, as with the real tokenizer.
    system = {"You are a helpful assistant.": ANSWER}
    return make_scripted_model(tmp_path_factory.mktemp("phi3"), ANSWER, "phi-3", after=system, generation_eos="<|end|>")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def run(hub: LocalHub, bundled_model: Path, phi3: Path, store: Path, tmp_path: Path):
    """Run a script in a folder of its own, and return the lines that it prints."""
    models = {"gpt2": bundled_model, "bigscience/bloom-1b7": bundled_model, "microsoft/Phi-3-mini-4k-instruct": phi3}
    for name, folder in models.items():
        hub.create(name, {file.name: file for file in folder.iterdir()})
    hub.users[TOKEN] = "ann"

    def run_script(code: str, **more: str) -> list[str]:
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint}
        environment |= {"PREFECT_HUGGINGFACE_HOME": str(store), **more}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout.splitlines()

    return run_script


LANGCHAIN_OPEN_TUTORIAL = """
# Environment Setup
import os
os.environ.update({
    "HUGGINGFACEHUB_API_TOKEN": "",
    "LANGCHAIN_API_KEY": "",
    "LANGCHAIN_TRACING_V2": "true",
    "LANGCHAIN_ENDPOINT": "http://127.0.0.1:9",  # no prompt of a test leaves the machine
    "LANGCHAIN_PROJECT": "Huggingface-Piplines",
})

# Hugging Face Local Pipelines
os.environ["HF_HOME"] = "./cache/"

# Model Loading
from prefect_huggingface.tasks.langchain import HuggingFacePipeline

hf = HuggingFacePipeline.from_model_id(
    model_id="microsoft/Phi-3-mini-4k-instruct",
    task="text-generation",
    pipeline_kwargs={"max_new_tokens": 64},
)

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model_id = "microsoft/Phi-3-mini-4k-instruct"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=64)
hf = HuggingFacePipeline(pipeline=pipe)

# Usage of Gated Model
model_id = "microsoft/Phi-3-mini-4k-instruct"
your_huggingface_token = "{token}"
tokenizer = AutoTokenizer.from_pretrained(model_id, token=your_huggingface_token)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    token=your_huggingface_token,
)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=64)
hf_llm = HuggingFacePipeline(pipeline=pipe)

for token in hf_llm.stream("What is the capital of France?"):
    print(token, end="", flush=True)
print()

# Create Chain
from huggingface_hub import login

login()  # the machine has a token, so that there is no dialogue

from prefect_huggingface.tasks.langchain import ChatHuggingFace

llm = ChatHuggingFace(llm=hf)

from langchain_core.prompts import PromptTemplate
from langchain_core.output_parsers import StrOutputParser

template = '''<|system|>You are a helpful assistant.<|end|>
<|user|>{question}<|end|>
<|assistant|>'''
prompt = PromptTemplate.from_template(template)
chain = prompt |llm| StrOutputParser()
question = "What is the capital of the United France?"
print(
    chain.invoke({"question": question})
)

# GPU Inference
gpu_llm = HuggingFacePipeline.from_model_id(
    model_id="microsoft/Phi-3-mini-4k-instruct",
    task="text-generation",
    device=-1,
    pipeline_kwargs={"max_new_tokens": 64},
)
prompt = PromptTemplate.from_template(template)
gpu_chain = prompt | gpu_llm | StrOutputParser()
question = "What is the capital of France?"
print(gpu_chain.invoke({"question": question}))

# Batch GPU Inference
import warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    gpu_llm = HuggingFacePipeline.from_model_id(
        model_id="microsoft/Phi-3-mini-4k-instruct",
        task="text-generation",
        device=-1,
        batch_size=2,
        model_kwargs={
            "temperature": 0,
            "max_length": 64,
            "do_sample": True
        },
    )
    gpu_chain = prompt | gpu_llm.bind(stop=["\\n\\n"])
    questions = []
    for i in range(4):
        questions.append({"question": f"What is the number {i} in English?"})
    answers = gpu_chain.batch(questions)
    for answer in answers:
        print(answer)
        print("")
print(len([one for one in warned if "temperature" in str(one.message)]), "warning")
"""


def test_langchain_open_tutorial_huggingface_pipeline(run) -> None:
    lines = run(LANGCHAIN_OPEN_TUTORIAL.replace("{token}", TOKEN), HF_TOKEN=TOKEN)
    # The stream, the chat chain, the chain of the pipeline, and the batch.
    assert [line for line in lines if line] == [ANSWER] * 7 + ["1 warning"]


ENGLISH = """
# Model Loading
from prefect_huggingface.tasks.langchain import HuggingFacePipeline

hf = HuggingFacePipeline.from_model_id(
    model_id="gpt2",
    task="text-generation",
    pipeline_kwargs={"max_new_tokens": 10},
)

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model_id = "gpt2"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=10)
hf = HuggingFacePipeline(pipeline=pipe)

# Create Chain
from langchain_core.prompts import PromptTemplate

template = '''Question: {question}

Answer: Let's think step by step.'''
prompt = PromptTemplate.from_template(template)

chain = prompt | hf

question = "What is electroencephalography?"

print(chain.invoke({"question": question}))
"""
SKIP_PROMPT = """
chain = prompt | hf.bind(skip_prompt=True)
question = "What is electroencephalography?"
print(chain.invoke({"question": question}))

for chunk in chain.stream(question):
    print(chunk, end="", flush=True)
print()
"""
ON_A_GPU = (
    GPU
    + """
# GPU Inference
arguments = dict(
    model_id="gpt2",
    task="text-generation",
    device=0,
    pipeline_kwargs={"max_new_tokens": 10},
)
try:
    gpu_llm = HuggingFacePipeline.from_model_id(**arguments)
except ValueError as exc:
    assert not has_gpu and "`device` must be one of cpu" in str(exc), exc
    gpu_llm = HuggingFacePipeline.from_model_id(**{**arguments, "device": -1})

gpu_chain = prompt | gpu_llm

question = "What is electroencephalography?"

print(gpu_chain.invoke({"question": question}))

# Batch GPU Inference
gpu_llm = HuggingFacePipeline.from_model_id(
    model_id="bigscience/bloom-1b7",
    task="text-generation",
    device=0 if has_gpu else -1,
    batch_size=2,
    model_kwargs={"temperature": 0, "max_length": 64},
)

gpu_chain = prompt | gpu_llm.bind(stop=["\\n\\n"])

questions = []
for i in range(4):
    questions.append({"question": f"What is the number {i} in french?"})

answers = gpu_chain.batch(questions)
for answer in answers:
    print("answer", answer)
"""
)
OPENVINO = """
# OpenVINO backend
ov_config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}

ov_llm = HuggingFacePipeline.from_model_id(
    model_id="gpt2",
    task="text-generation",
    backend="openvino",
    model_kwargs={"device": "CPU", "ov_config": ov_config},
    pipeline_kwargs={"max_new_tokens": 10},
)

ov_chain = prompt | ov_llm

question = "What is electroencephalography?"

print("openvino", ov_chain.invoke({"question": question}))

# A local OpenVINO model: its export by the command line has a test of its own
import shutil
from prefect_huggingface.tasks.engines.registry import model_folder
shutil.copytree(model_folder(ov_llm.model), "ov_model_dir")

ov_llm = HuggingFacePipeline.from_model_id(
    model_id="ov_model_dir",
    task="text-generation",
    backend="openvino",
    model_kwargs={"device": "CPU", "ov_config": ov_config},
    pipeline_kwargs={"max_new_tokens": 10},
)

ov_chain = prompt | ov_llm

question = "What is electroencephalography?"

print("openvino", ov_chain.invoke({"question": question}))

ov_config = {
    "KV_CACHE_PRECISION": "u8",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "CACHE_DIR": "",
}
"""


# The Chinese one has every call of the other two.
@pytest.mark.slow
def test_hugging_face_local_pipelines_in_english(run) -> None:
    lines = run(ENGLISH + ON_A_GPU)
    assert lines[0]
    assert len([line for line in lines if line.startswith("answer")]) == 4


def test_hugging_face_local_pipelines_in_chinese(run) -> None:
    lines = run(ENGLISH + SKIP_PROMPT + ON_A_GPU + OPENVINO)
    assert lines[0] == lines[1] == lines[2]
    assert len([line for line in lines if line.startswith("answer")]) == 4
    assert len([line for line in lines if line.startswith("openvino")]) == 2


@pytest.mark.slow
def test_hugging_face_local_pipelines_in_japanese(run) -> None:
    lines = run(ENGLISH + ON_A_GPU + OPENVINO)
    assert len([line for line in lines if line.startswith("answer")]) == 4
    assert len([line for line in lines if line.startswith("openvino")]) == 2


HUGGINGFACE = """
import os
os.environ["HUGGINGFACEHUB_API_TOKEN"] = "{token}"

# Serverless Endpoints
from langchain_core.output_parsers import StrOutputParser
from prefect_huggingface.tasks.langchain import HuggingFaceEndpoint

repo_id = "microsoft/Phi-3-mini-4k-instruct"

llm = HuggingFaceEndpoint(
    repo_id=repo_id,
    max_new_tokens=256,
    temperature=0.1,
    task="text-generation",
    huggingfacehub_api_token=os.environ["HUGGINGFACEHUB_API_TOKEN"],
)

format = '''
  <|system|>
  You are a helpful assistant.<|end|>
  <|user|>
  {{question}}<|end|>
  <|assistant|>
'''

# Dedicated Endpoint
from langchain_core.prompts import PromptTemplate
hf_endpoint_url = "{url}"
prompt = PromptTemplate.from_template(format)

llm = HuggingFaceEndpoint(
    endpoint_url=hf_endpoint_url,
    max_new_tokens=512,
    temperature=0.01,
    task="text-generation",
)

chain = prompt | llm
print("endpoint", chain.invoke({{"question": "blablablablabla..."}}))

# HuggingFace Local Model
os.environ["TRANSFORMERS_CACHE"] = "./cache/"
os.environ["HF_HOME"] = "./cache/"

from prefect_huggingface.tasks.langchain import HuggingFacePipeline

llm = HuggingFacePipeline.from_model_id(
    model_id="microsoft/Phi-3-mini-4k-instruct",
    task="text-generation",
    pipeline_kwargs={{
        "max_new_tokens": 256,
        "top_k": 50,
        "temperature": 0.1,
    }},
)

print(llm.invoke("Hugging Face is"))
"""


def test_huggingface_endpoints_and_local_model_in_korean(run, phi3: Path) -> None:
    with TgiServer(TextModel(phi3)) as endpoint:
        lines = run(HUGGINGFACE.format(token=TOKEN, url=endpoint.url))
    assert lines == [f"endpoint {ANSWER}", ANSWER]
