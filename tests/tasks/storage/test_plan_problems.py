"""What a plan finds before the first byte: each thing with a sentence of its own, in a folder and on the Hub."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore, QuantizationOptions
from prefect_huggingface.tasks import download_model
from prefect_huggingface.tasks.errors import HuggingFaceTaskError
from prefect_huggingface.tasks.exports import export_model, plan_model
from prefect_huggingface.tasks.storage.exports.plan import ExportCase, ExportSource, check_tokenizer
from prefect_huggingface.tasks.storage.exports.recipes import installed_version, resolve_recipe

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"
Files = dict[str, bytes]


def weights(*names: str) -> bytes:
    """Return a safetensors file with small weights of these names."""
    import numpy as np
    from safetensors.numpy import save

    return save({name: np.zeros((4, 4), dtype=np.float32) for name in names})


def layers(count: int, head: bool = True) -> tuple[str, ...]:
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    inner = [f"model.layers.{number}.{part}.weight" for number in range(count) for part in parts]
    return ("model.embed_tokens.weight", *inner, *(("lm_head.weight",) if head else ()))


def checkpoint(config: dict[str, Any], *names: str, **more: bytes) -> Files:
    return {
        "config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "tokenizer_config.json": b"{}",
        "model.safetensors": weights(*names), **more,
    }  # fmt: skip


def t5_layers(count: int) -> list[str]:
    """Return names as in a T5, whose layers have a list of their own."""
    encoder = ("0.SelfAttention.q", "0.SelfAttention.o", "0.layer_norm", "1.DenseReluDense.wi")
    decoder = (*encoder, "1.EncDecAttention.q", "2.DenseReluDense.wo")
    inner = [f"encoder.block.{number}.layer.{part}.weight" for number in range(8) for part in encoder]
    return ["shared.weight", *inner, *(f"decoder.block.{n}.layer.{p}.weight" for n in range(count) for p in decoder)]


def without(files: Files, *names: str) -> Files:
    return {name: content for name, content in files.items() if name not in names}


WHOLE = checkpoint(LLAMA, *layers(2))
INDEX = json.dumps({"weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(layers(2))}}).encode()
SHARDED = {**without(WHOLE, "model.safetensors"), "model.safetensors.index.json": INDEX}
IR = {"openvino_model.xml": b"<net/>", "openvino_model.bin": b"weights", "config.json": b'{"model_type": "llama"}'}
TOKENIZER_IR = {"openvino_tokenizer.xml": b"<net/>", "openvino_tokenizer.bin": b"", "tokenizer_config.json": b"{}"}
PROBLEMS: dict[str, tuple[Files, str]] = {
    "no head": (checkpoint(LLAMA, *layers(2, head=False)), r"no weights for its head \('lm_head.weight'\)"),
    "no head, base class": (
        checkpoint({**LLAMA, "model_type": "mistral", "architectures": ["MistralModel"]}, *layers(2, head=False)),
        "no weights for its head",
    ),
    "a last layer is missing": (checkpoint(LLAMA, *layers(1)), "lacks the weights of layer 1 of 2"),
    "a first layer is missing": (
        checkpoint(LLAMA, *(name for name in layers(2) if ".0." not in name)), "lacks the weights of layer 0 of 2",
    ),
    "a shard is missing": ({**SHARDED, "part-0.safetensors": weights("a")}, r"lacks \['part-1.safetensors'\]"),
    "an adapter": (
        {"adapter_config.json": b"{}", "adapter_model.safetensors": weights("a")}, "is an adapter and holds no model",
    ),
    "Mistral's own format": (
        {**without(WHOLE, "model.safetensors"), "consolidated.safetensors": weights("a")}, "Mistral's own format",
    ),
    "a variant": (
        {**without(WHOLE, "model.safetensors"), "model.fp16.safetensors": weights("a")}, "without a variant",
    ),
    "no configuration": (without(WHOLE, "config.json"), "config.json"),
    "GGUF files": ({"config.json": b"{}", "model-Q4_K_M.gguf": b"GGUF"}, "holds GGUF files"),
    "no tokenizer": (without(WHOLE, "tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    "an IR without tokenizer": (IR, "OpenVINO model without a tokenizer"),
    "an IR without weights": ({**without(IR, "openvino_model.bin"), **TOKENIZER_IR}, "lacks .*openvino_model.bin"),
    "GPT-Neo": (checkpoint({"model_type": "gpt_neo"}, "a"), "does not compute: its answers would be wrong"),
    "MPT": (checkpoint({"model_type": "mpt"}, "a"), "does not compute"),
    "XGLM": (checkpoint({"model_type": "xglm"}, "a"), "does not compute"),
    "Falcon with alibi": (checkpoint({"model_type": "falcon", "alibi": True}, "a"), "does not compute"),
    "an IR of GPT-Neo": ({**IR, **TOKENIZER_IR, "config.json": b'{"model_type": "gpt_neo"}'}, "does not compute"),
}  # fmt: skip


@pytest.fixture(params=["folder", "hub"])
def publish(request, hub, tmp_path: Path) -> Callable[[Files], LocalModel]:
    """Function that makes files a model, in a folder or on the Hub."""

    def in_folder(files: Files) -> LocalModel:
        for name, content in files.items():
            place = tmp_path / "model" / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
        return LocalModel(model_id=str(tmp_path / "model"), store=ModelStore(path=tmp_path / "store"))

    def on_hub(files: Files) -> LocalModel:
        hub.create("org/model", files)
        credentials = HuggingFaceCredentials(endpoint=hub.endpoint)
        return LocalModel(model_id="org/model", store=ModelStore(path=tmp_path / "store"), credentials=credentials)

    return in_folder if request.param == "folder" else on_hub


def find_problem(model: LocalModel) -> str:
    """Return what a plan says, as a problem or as an error."""
    try:
        return " ".join(plan_model(model).problems)
    except HuggingFaceTaskError as error:
        return error.message


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plan_finds_it(publish: Any, name: str) -> None:
    files, words = PROBLEMS[name]
    model = publish(files)
    with pytest.raises(HuggingFaceTaskError, match=words):
        export_model(model)
    assert not (model.store_path / "exports").exists(), "something was started"
    if not model.is_local and "openvino_model.xml" not in files:
        assert not list(model.store_path.rglob("blobs/*")), "something was downloaded"
    if "an IR" not in name:
        assert all(part in find_problem(model) for part in words.replace("\\", "").split(".*") if "(" not in part)


def test_a_plan_takes_less_than_five_seconds(publish: Any) -> None:
    model = publish(checkpoint(LLAMA, *layers(1)))
    plan_model(model)  # packages are looked at once per process
    started = time.process_time()
    assert find_problem(model)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "files",
    [
        WHOLE,
        {**SHARDED, "part-0.safetensors": weights("a"), "part-1.safetensors": weights("b")},
        checkpoint({**LLAMA, "tie_word_embeddings": True}, *layers(2, head=False)),
        checkpoint({"model_type": "gpt2", "n_layer": 1}, "h.0.attn.weight", "wte.weight"),
        checkpoint({"model_type": "falcon", "alibi": False, "tie_word_embeddings": True}, "a"),
        checkpoint(LLAMA, "weight"),
        checkpoint(LLAMA, *layers(2), *(f"projector.layers.{number}.{part}" for number in (0, 2) for part in "wb")),
    ],
)
def test_what_is_whole_plans_clean(publish: Any, files: Files) -> None:
    assert plan_model(publish(files)).problems == ()


@pytest.mark.parametrize(("count", "problems"), [(8, ()), (7, ("lacks the weights of layer 7 of 8",))])
def test_layers_within_layers_are_not_counted(publish: Any, count: int, problems: tuple[str, ...]) -> None:
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 8, "num_decoder_layers": 8}
    model = publish(checkpoint({**t5, "is_encoder_decoder": True}, *t5_layers(count)))
    found = plan_model(model.model_copy(update={"task": "translation"})).problems
    assert len(found) == len(problems)
    assert all(words in problem for words, problem in zip(problems, found, strict=True))


@pytest.mark.parametrize("offline", [False, True])
def test_a_data_set_of_the_hub_is_not_asked_for_offline(publish: Any, offline: bool) -> None:
    options = {"weight_format": "int4", "quantization": QuantizationOptions(dataset="wikitext2"), "offline": offline}
    model = publish(WHOLE)
    if not model.is_local:
        export = {"revision": download_model.fn(model).commit}
        options |= export if offline else {}
    said = " ".join(plan_model(model.model_copy(update=options)).problems)
    assert ("data set 'wikitext2' of the Hub, which must not be asked" in said) is offline


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_no_file_of_a_model(tmp_path: Path, name: str) -> None:
    for file, content in {**WHOLE, name: POINTER}.items():
        (tmp_path / file).write_bytes(content)
    for backend in ("openvino", "torch"):
        from prefect_huggingface.tasks.downloads import fetch_model

        with pytest.raises(HuggingFaceTaskError, match=f"'{name}'.*pointer of Git LFS.*git lfs pull"):
            fetch_model(LocalModel(model_id=str(tmp_path), backend=backend, store=ModelStore(path=tmp_path / "store")))


@pytest.mark.parametrize(
    ("config", "file"), [("t5", "spiece.model"), ("marian", "source.spm"), ("llama", "tokenizer.model")]
)
@pytest.mark.parametrize("lacking", ["sentencepiece", "protobuf"])
def test_a_tokenizer_of_sentencepiece_needs_its_packages(monkeypatch, config: str, file: str, lacking: str) -> None:
    from prefect_huggingface.tasks.storage.exports import plan

    model = LocalModel(model_id="org/model")
    files = frozenset({file, "tokenizer_config.json"})
    case = ExportCase(model, resolve_recipe(model, None), ExportSource("c", {"model_type": config}, files=files))
    assert check_tokenizer(case) is None
    monkeypatch.setattr(plan, "installed_version", lambda name: None if name == lacking else installed_version(name))
    assert f"{lacking!r}" in str(check_tokenizer(case))
    assert "prefect-huggingface[sentencepiece]" in str(check_tokenizer(case))
