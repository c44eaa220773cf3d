from __future__ import annotations

import pytest
from prefect.variables import Variable

from prefect_huggingface.blocks import HuggingFaceCredentials, InferenceEndpoint, LocalModel, ModelStore
from prefect_huggingface.deployments.defaults import save_default_blocks

pytestmark = pytest.mark.usefixtures("prefect_server")


def save(model: object, overwrite: bool = False, answers: str = "answers-{date}.jsonl") -> dict[str, bool]:
    return save_default_blocks(str(model), "questions.jsonl", answers, overwrite=overwrite)


def test_default_blocks_are_saved_once_and_changes_stay(bundled_model, tiny_llama, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_firstToken")
    assert all(save(bundled_model, overwrite=True).values())
    model = LocalModel.load("default")
    assert model.model_id == str(bundled_model)
    assert model.credentials.token.get_secret_value() == "hf_firstToken"
    assert ModelStore.load("default").path == ModelStore().path
    assert "hf_firstToken" not in caplog.text

    # A person changes the model. Another `make blocks` leaves it so, with and without a new token.
    LocalModel(model_id=str(tiny_llama)).save("default", overwrite=True)
    monkeypatch.setenv("HF_TOKEN", "hf_secondToken")
    assert not any(save(bundled_model, answers="elsewhere.jsonl").values())
    assert LocalModel.load("default").model_id == str(tiny_llama)
    assert HuggingFaceCredentials.load("default").token.get_secret_value() == "hf_firstToken"
    assert Variable.get("hugging_face_answers") == "answers-{date}.jsonl"

    # Told so, it overwrites, but never a token by none.
    monkeypatch.delenv("HF_TOKEN")
    saved = save(bundled_model, overwrite=True)
    assert saved.pop("credentials") is False
    assert all(saved.values())
    assert LocalModel.load("default").model_id == str(bundled_model)
    assert LocalModel.load("vectors").task == "feature-extraction"
    assert HuggingFaceCredentials.load("default").token.get_secret_value() == "hf_firstToken"


def test_a_folder_that_is_gone_is_named(bundled_model, tmp_path, caplog):
    save(tmp_path / "gone", overwrite=True)
    assert f"{tmp_path / 'gone'} is not there, but the model block names it" in caplog.text
    assert "make blocks OVERWRITE=1" in caplog.text


def test_the_endpoint_follows_a_model_server_to_another_port_and_nowhere_else(bundled_model):
    def save_server(url: str) -> str | None:
        save_default_blocks(str(bundled_model), "questions.jsonl", "answers.jsonl", url)
        return InferenceEndpoint.load("default").url

    save(bundled_model, overwrite=True)
    assert InferenceEndpoint.load("default").url == "http://127.0.0.1:8000/v1"
    assert save_server("http://127.0.0.1:4301/v1") == "http://127.0.0.1:4301/v1"
    save(bundled_model)  # without an address the saved one stays
    assert InferenceEndpoint.load("default").url == "http://127.0.0.1:4301/v1"
    InferenceEndpoint(url="https://models.example/v1").save("default", overwrite=True)
    assert save_server("http://127.0.0.1:4301/v1") == "https://models.example/v1"


def test_outputs_may_be_addresses(bundled_model):
    save(bundled_model, overwrite=True, answers="s3://bucket/nightly/answers-{date}.jsonl")
    assert Variable.get("hugging_face_answers") == "s3://bucket/nightly/answers-{date}.jsonl"
    assert Variable.get("hugging_face_vectors") == "s3://bucket/nightly/vectors-{date}-{time}.parquet"
    save(bundled_model, overwrite=True)


def test_examples_of_one_model_are_saved(bundled_model, tmp_path):
    saved = save_default_blocks(
        str(bundled_model), "questions.jsonl", "a.jsonl", overwrite=True, example_model=str(tmp_path)
    )
    assert {"model example-torch", "model example-int8", "model example-int4"} <= saved.keys()
    examples = {name: LocalModel.load(f"example-{name}") for name in ("torch", "int8", "int4")}
    assert {example.model_id for example in examples.values()} == {str(tmp_path)}
    assert [example.weight_format for example in examples.values()] == [None, "int8", "int4"]
    assert examples["torch"].backend == "torch"
