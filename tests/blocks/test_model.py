from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.tasks.storage.exports.recipes import resolve_recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "torch", "device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"device": "CPU", "device_map": "auto"}, "exclude each other"),
        ({"backend": "torch", "device": 0, "model_kwargs": {"device_map": "auto"}}, "`model_kwargs` must not hold"),
        ({"backend": "torch", "device_map": "auto", "model_kwargs": {"device": "cpu"}}, "`model_kwargs` must not hold"),
        ({"backend": "torch", "model_kwargs": {"token": "x"}}, "must not hold 'token'"),
        ({"device_map": "auto"}, "for the torch backend"),
        ({"backend": "torch", "weight_format": "int4"}, "for the OpenVINO backend, got 'int4'"),
        ({"backend": "torch", "ov_config": {"NUM_STREAMS": 1}}, "for the OpenVINO backend"),
        ({"dtype": "bfloat16"}, "for the torch backend, got 'bfloat16'"),
        ({"weight_format": "int3"}, "Input should be"),
        ({"weight_format": "int8", "quantization": QuantizationOptions(ratio=0.5)}, "`ratio` is for 4-bit"),
        ({"quantization": QuantizationOptions(ratio=0.5)}, "`ratio` is for 4-bit .* format 'int8'"),
        ({"backend": "torch", "quantization": QuantizationOptions(awq=True)}, "`quantization` is for the OpenVINO"),
        ({"backend": "vllm"}, "Input should be"),
        ({"task": "fill-mask"}, "Input should be"),
        ({"max_tokens": 3}, "Extra inputs are not permitted"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LocalModel(model_id="organisation/name", **fields)


@pytest.mark.parametrize("model_id", ["", "a/b/c", "a b", "a/..", "../../x/", "https://huggingface.co/a/b", "a--b"])
def test_an_id_that_no_hub_has_is_refused(model_id, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if model_id.startswith(".."):
        assert LocalModel(model_id=model_id).is_local
        return
    with pytest.raises(ValidationError, match="`model_id`"):
        LocalModel(model_id=model_id)


def test_a_folder_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    model = LocalModel(model_id="my-model")
    assert model.is_local
    assert model.model_id == str(tmp_path / "my-model")
    assert not LocalModel(model_id="organisation/name").is_local


def test_numbers_name_devices():
    assert LocalModel(model_id="a/b", backend="torch", device=-1).device == "-1"


def test_an_empty_weight_format_is_int8_for_openvino_only():
    """A form gives a field that nobody touched its default, which must not make a block of torch invalid."""
    assert resolve_recipe(LocalModel(model_id="a/b"), None).weight_format == "int8"
    form = {**LocalModel(model_id="a/b").model_dump(), "backend": "torch"}
    assert LocalModel(**form).weight_format is None


def test_a_store_has_an_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ModelStore(path="models").path == tmp_path / "models"
    monkeypatch.setenv("PREFECT_HUGGINGFACE_HOME", "/srv/models")
    assert ModelStore().folder == Path("/srv/models")
    monkeypatch.delenv("PREFECT_HUGGINGFACE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/srv/cache")
    assert ModelStore().folder == Path("/srv/cache/prefect-huggingface")


def test_snapshots_lie_in_the_cache_of_the_hub_client_unless_the_store_has_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    store = ModelStore()
    monkeypatch.setenv("XDG_CACHE_HOME", "/srv/cache")
    assert store.hub_cache == Path("/srv/cache/huggingface/hub")
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/srv/old")
    assert store.hub_cache == Path("/srv/old")
    monkeypatch.setenv("HF_HOME", "./cache/")
    assert store.hub_cache == tmp_path / "cache" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/srv/hub")
    assert store.hub_cache == Path("/srv/hub"), "the variables are read when the cache is used"
    assert ModelStore(path="models").hub_cache == tmp_path / "models" / "hub"


def test_a_block_without_credentials_asks_the_hub_of_the_machine(monkeypatch):
    assert LocalModel(model_id="a/b").get_credentials().endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert LocalModel(model_id="a/b").get_credentials().endpoint == "https://mirror.example"
    assert LocalModel(model_id="a/b").get_credentials().use_ambient_token is None
    assert HuggingFaceCredentials(token="hf_own").endpoint == "https://mirror.example"
