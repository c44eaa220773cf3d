"""The adapters of a served model are models of their own, as other servers list them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from starlette.testclient import TestClient

from prefect_huggingface.blocks import Adapter, GenerationOptions, LocalModel
from prefect_huggingface.deployments.model_server.app import create_app
from prefect_huggingface.deployments.model_server.models import ServedModel, ServedModels
from prefect_huggingface.deployments.model_server.settings import ServerSettings
from prefect_huggingface.tasks import generate_text, unload_engines


@pytest.fixture
def block(tiny_llama: Path, tmp_path: Path) -> LocalModel:
    peft = pytest.importorskip("peft", reason="the adapters are made with PEFT")
    import torch
    from transformers import AutoModelForCausalLM

    adapters = []
    for name, layer in (("first", "q_proj"), ("second", "down_proj")):
        config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=[layer], init_lora_weights=False)
        torch.manual_seed(len(name))
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / name)
        adapters.append(Adapter(repo_or_folder=str(tmp_path / name)))
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    return LocalModel(
        model_id=str(tiny_llama), backend="torch", chat_template="never", adapters=adapters, options=options
    )


@pytest.fixture
def client(block: LocalModel) -> Iterator[openai.OpenAI]:
    app = create_app(ServedModels([ServedModel("base", block)]), ServerSettings(), ())
    with TestClient(app, base_url="http://localhost/v1") as http:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
    unload_engines()


def test_each_adapter_answers_under_its_name(client: openai.OpenAI, block: LocalModel) -> None:
    listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert listed == {"base": None, "base:first": "base", "base:second": "base"}
    variants = {
        "base": block.adapters, "base:first": block.adapters[:1], "base:second": block.adapters[1:],
    }  # fmt: skip
    texts = {}
    for name, adapters in variants.items():
        alone = block.model_copy(update={"adapters": adapters})
        answer = client.completions.create(model=name, prompt="The capital of France is", max_tokens=12)
        texts[name] = answer.choices[0].text
        assert texts[name] == generate_text.fn(alone, ["The capital of France is"])[0].text
    assert len(set(texts.values())) == 3
