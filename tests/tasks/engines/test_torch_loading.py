"""What may be loaded, where, and what the error says if it may not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks import embed_texts, load_engine
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.engines.torch_loading import available_devices, resolve_device
from prefect_huggingface.tasks.errors import EngineError, ModelSourceError
from prefect_huggingface.tasks.records import Request
from support.tiny_models import copy_with_own_code


def block(folder: Path, **settings) -> LocalModel:
    options = GenerationOptions(max_new_tokens=8)
    return LocalModel(model_id=str(folder), backend="torch", chat_template="never", options=options, **settings)


def answer(folder: Path, **settings) -> str:
    with TorchTextEngine(folder, block(folder, **settings)) as engine:
        completion = engine.submit(Request("The capital of France")).result()
    assert completion.error is None
    return completion.text


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> str:
    return answer(tiny_llama, device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "-1"}, {"device": -1}, {"device": "CPU"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}},
        {"device": "cpu", "attn_implementation": "eager"}, {"device": "cpu", "dtype": "float32"},
        {"device": "cpu", "model_kwargs": {"low_cpu_mem_usage": True}},
    ],
)  # fmt: skip
def test_placements_of_one_model_say_the_same(tiny_llama, expected, settings):
    assert answer(tiny_llama, **settings) == expected


def test_layers_that_do_not_fit_are_kept_on_disk(tiny_llama, expected, tmp_path):
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map = {**places, "model.rotary_emb": "cpu", "lm_head": "disk"}
    settings = {"device_map": device_map, "model_kwargs": {"offload_folder": str(tmp_path)}}
    assert answer(tiny_llama, **settings) == expected


def test_lower_precision_runs(tiny_llama):
    with TorchTextEngine(tiny_llama, block(tiny_llama, device="cpu", dtype="bfloat16")) as engine:
        assert str(engine._model.dtype) == "torch.bfloat16"
        assert engine.submit(Request("The capital")).result().error is None


@pytest.mark.parametrize("device", ["cuda:97", "97", "tpu", "GPU.97", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(tiny_llama, device):
    with pytest.raises(EngineError) as caught:
        TorchTextEngine(tiny_llama, block(tiny_llama, device=device))
    assert repr(device) in str(caught.value)
    assert all(there in str(caught.value) for there in available_devices())


def test_without_a_device_the_best_one_is_taken():
    there = available_devices()
    assert resolve_device(None) == (there[1] if len(there) > 1 else "cpu")
    assert resolve_device("-1") == "cpu" == there[0]


def test_weights_in_pickle_format_need_permission(tiny_llama, expected, tmp_path):
    import torch
    from safetensors.torch import load_file

    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tiny_llama / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match="allow_pickle=True"):
        load_engine(block(tmp_path, device="cpu"))
    with pytest.raises(EngineError, match="safetensors"):
        TorchTextEngine(tmp_path, block(tmp_path, device="cpu"))
    assert answer(tmp_path, device="cpu", allow_pickle=True) == expected


def test_a_folder_without_weights_or_without_a_model_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ModelSourceError, match="does not exist"):
        load_engine(block(tmp_path / "missing", device="cpu"))
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ModelSourceError, match="holds no safetensors weights"):
        load_engine(block(tmp_path, device="cpu"))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    for file in tiny_llama.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EngineError, match="could not be loaded"):
        TorchTextEngine(tmp_path, block(tmp_path, device="cpu"))


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(tiny_llama, tmp_path, missing):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=f"lacks 1 weights of the model, {missing}"):
        TorchTextEngine(folder, block(folder, device="cpu"))


def test_code_of_the_model_runs_only_with_permission(tiny_llama, expected, tmp_path):
    mark = tmp_path / "ran"
    copy_with_own_code(tiny_llama, tmp_path, f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(EngineError, match="trust_remote_code=True"):
        TorchTextEngine(tmp_path, block(tmp_path, device="cpu"))
    assert not mark.exists()
    assert answer(tmp_path, device="cpu", trust_remote_code=True) == expected
    assert mark.exists()


@pytest.mark.parametrize(
    ("settings", "module", "name"),
    [({"load_in": "4bit"}, "bitsandbytes", "load_in"), ({"device_map": "auto"}, "accelerate", "device_map")],
)
def test_a_missing_package_is_named(tiny_llama, monkeypatch, settings, module, name):
    # A module that is None cannot be found, as if it had not been installed.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=f"pip install {module}") as caught:
        TorchTextEngine(tiny_llama, block(tiny_llama, **settings))
    assert name in str(caught.value)


def test_an_encoder_needs_no_pooler(session_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from support.vector_models import TEXTS, make_embedder

    whole = make_embedder(tmp_path / "whole", "bert")
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    weights = load_file(bare / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler." not in name}
    assert len(kept) < len(weights)
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    one, other = (
        embed_texts.fn(LocalModel(model_id=str(folder), task="feature-extraction", backend="torch"), TEXTS[:3]).vectors
        for folder in (whole, bare)
    )
    assert (one == other).all()
