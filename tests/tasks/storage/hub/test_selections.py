"""Which files are chosen: what the backend needs, never pickles or code unless asked for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_huggingface.tasks.hub_errors import NoWeightsError, PickleOnlyError
from prefect_huggingface.tasks.storage.hub.cache import Selection
from prefect_huggingface.tasks.storage.hub.client import RepositoryFile
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import hub_model, model_files

TOKENIZER = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"]
TEMPLATES = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
CLUTTER = [
    ".gitattributes", "README.md", "trainer_state.json", "training_args.bin", "optimizer.pt", "tf_model.h5",
    "flax_model.msgpack", "model.gguf", "onnx/model.onnx", "onnx/config.json", "consolidated.safetensors",
    "original/consolidated.00.pth", "model.fp16.safetensors", "adapter_model.safetensors", "modeling_own.py",
    "consolidated.safetensors.index.json", "requirements.txt", "rust_model.ot", "picture.png",
]  # fmt: skip
OPENVINO = [
    "openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_tokenizer.bin",
    "openvino_detokenizer.xml", "openvino_detokenizer.bin", "openvino_config.json",
]  # fmt: skip
PICKLES = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


def choose(names, backend="torch", allow_pickle=False, trust_remote_code=False):
    files = [RepositoryFile(name) for name in names]
    return [f.path for f in Selection("org/model", backend, allow_pickle, trust_remote_code).choose(files)]


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("weights", [["model.safetensors"], [*SHARDS, "model.safetensors.index.json"]])
def test_safetensors_with_tokenizer_and_templates_and_nothing_else(backend, weights):
    wanted = TOKENIZER + TEMPLATES + weights
    assert choose(wanted + CLUTTER + PICKLES, backend) == sorted(wanted)


def test_openvino_takes_the_openvino_model_where_there_is_one():
    names = TOKENIZER + OPENVINO + CLUTTER + ["model.safetensors"]
    assert choose(names, "openvino") == sorted(TOKENIZER + OPENVINO)
    assert choose(names, "torch") == sorted(TOKENIZER + ["model.safetensors", "openvino_config.json"])


@pytest.mark.parametrize("part", ["encoder_model", "decoder_model", "language_model"])
def test_openvino_models_of_several_parts_are_known(part):
    names = ["config.json", f"openvino_{part}.xml", f"openvino_{part}.bin"]
    assert choose(names, "openvino") == sorted(names)


def test_openvino_tokenizers_alone_are_no_model():
    names = ["config.json", "model.safetensors", "openvino_tokenizer.xml", "openvino_tokenizer.bin"]
    assert choose(names, "openvino") == ["config.json", "model.safetensors"]


def test_pickles_only_when_asked_for_and_only_without_safetensors():
    assert choose(["config.json", *PICKLES], allow_pickle=True) == sorted(["config.json", *PICKLES])
    assert choose(["config.json", "pytorch_model.bin"], allow_pickle=True) == ["config.json", "pytorch_model.bin"]
    assert choose(["model.safetensors", *PICKLES], allow_pickle=True) == ["model.safetensors"]


def test_code_only_when_asked_for():
    names = ["config.json", "model.safetensors", "modeling_own.py", "parts/layers.py"]
    assert choose(names, trust_remote_code=True) == sorted(names)
    assert choose(names) == ["config.json", "model.safetensors"]


def test_the_whole_model_is_preferred_to_its_shards():
    names = ["model.safetensors", *SHARDS, "model.safetensors.index.json"]
    assert choose(names) == ["model.safetensors"]


@pytest.mark.parametrize("shards", [SHARDS, PICKLES[:2]])
def test_shards_without_the_index_that_loads_them_are_refused(shards):
    with pytest.raises(NoWeightsError) as caught:
        choose(["config.json", *shards], allow_pickle=True)
    assert type(caught.value) is NoWeightsError


def choose_by_index(names, shards):
    index = json.dumps({"weight_map": {f"layer.{number}": shard for number, shard in enumerate(shards)}}).encode()
    files = [RepositoryFile(name) for name in ["config.json", "model.safetensors.index.json", *names]]
    return [f.path for f in Selection("org/model", "torch", False, False).choose(files, lambda _: index)]


@pytest.mark.parametrize(
    "more", ["model_extra_tensors.safetensors", "model-00004-of-00004.safetensors", "x.safetensors"]
)
def test_the_index_tells_the_shards_whatever_they_are_called(more):
    stale = ["model-00001-of-00009.safetensors"]
    wanted = [*SHARDS, more]
    chosen = choose_by_index([*wanted, *stale], wanted)
    assert chosen == sorted(["config.json", "model.safetensors.index.json", *wanted])
    with pytest.raises(NoWeightsError, match=more):
        choose_by_index([*SHARDS, *stale], wanted)


@pytest.mark.parametrize(
    ("names", "backend"),
    [
        (SHARDS[:2], "torch"),
        (["openvino_model.xml"], "openvino"),
        (["config.json", "model.gguf"], "torch"),
        (OPENVINO, "torch"),
        (["config.json"], "openvino"),
        (["adapter_model.safetensors", "adapter_config.json"], "torch"),
    ],
)
def test_a_repository_without_all_weights_is_refused(names, backend):
    with pytest.raises(NoWeightsError, match="'org/model'") as caught:
        choose(names, backend)
    assert not isinstance(caught.value, PickleOnlyError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_a_repository_of_pickles_is_refused_by_a_name_of_its_own(name):
    with pytest.raises(PickleOnlyError, match="allow_pickle"):
        choose(["config.json", name])


def test_a_refused_repository_costs_no_content(hub, tmp_path):
    hub.create("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"})
    with pytest.raises(PickleOnlyError):
        fetch_snapshot(hub_model(hub, tmp_path, "org/pickle"))
    assert {r.place for r in hub.journal.requests} == {"api"}
    assert not list(tmp_path.rglob("models--*"))


def test_another_selection_of_the_same_commit_adds_its_files(hub, tmp_path):
    hub.create("org/model", {**model_files(1000), "modeling_own.py": b"x = 1"})
    safe = fetch_snapshot(hub_model(hub, tmp_path))
    code = fetch_snapshot(hub_model(hub, tmp_path, trust_remote_code=True))
    assert safe.path == code.path
    assert {f.path for f in code.files} - {f.path for f in safe.files} == {"modeling_own.py"}
    assert len(hub.journal.gets(place="cdn")) == 1


NAMES = st.sampled_from([*TOKENIZER, *TEMPLATES, *SHARDS, *CLUTTER, *OPENVINO, *PICKLES, "model.safetensors"])


@given(st.sets(NAMES), st.sampled_from(["torch", "openvino"]))
def test_nothing_that_can_run_code_is_chosen_by_itself(names, backend):
    try:
        chosen = choose(sorted(names), backend)
    except NoWeightsError:
        return
    assert not [n for n in chosen if n.endswith((".py", ".pt", ".pth", ".pkl", ".h5"))]
    assert not [n for n in chosen if n.endswith(".bin") and not n.startswith("openvino_")]
    assert [n for n in chosen if n.endswith((".safetensors", ".xml"))]
