"""LoRA adapters: the same greedy text as PEFT itself, on every backend, or a refusal before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import Adapter, GenerationOptions, HuggingFaceCredentials, LocalModel, ModelStore
from prefect_huggingface.tasks import generate_text, load_engine, unload_engines
from prefect_huggingface.tasks.batching.job import pin_model, resolve_model
from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.hub_errors import HubError
from prefect_huggingface.tasks.storage.adapters import pin_adapters
from support.export_models import make_model

# The adapters are made with PEFT, whose import takes seconds that other processes of tests can do without.
pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="the package peft is not installed")
PROMPTS = ["The capital of France is", "One, two, three,", "Quarante-deux"]
OPTIONS = GenerationOptions(max_new_tokens=16, ignore_eos=True)
LAYERS = ["q_proj", "v_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 1, spread: float = 0.05, **settings: Any) -> Path:
    """Save a random adapter of a checkpoint and return its folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=spread)
    adapted.save_pretrained(folder)
    return folder


def texts_of_peft(base: Path, *adapters: Path, scale: float = 1.0) -> list[str]:
    """Return the greedy texts of Transformers with adapters that PEFT has put on, one prompt at a time."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in adapters:
        model = peft.PeftModel.from_pretrained(model, folder)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        model = model.merge_and_unload()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


def texts_of(model: LocalModel) -> list[str]:
    """Return the greedy texts of a model."""
    return [completion.text for completion in generate_text.fn(model, PROMPTS, options=OPTIONS)]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No engine outlives its test."""
    yield
    unload_engines()


@pytest.fixture(params=["torch", "openvino"])
def adapted_model(request: pytest.FixtureRequest) -> Any:
    """Return a model with adapters on a backend, in full precision."""

    def make(*adapters: Path | Adapter, **settings: Any) -> LocalModel:
        chosen = [one if isinstance(one, Adapter) else Adapter(repo_or_folder=str(one)) for one in adapters]
        if request.param == "torch":
            folder = request.getfixturevalue("tiny_llama")
            base: dict[str, Any] = {"backend": "torch", "dtype": "float32"}
        else:
            folder = request.getfixturevalue("tiny_openvino")
            base = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        settings = {"chat_template": "never", **base, **settings}
        return LocalModel(model_id=str(folder), adapters=chosen, **settings)

    return make


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, session_folder: Path) -> Path:
    """Folder of a plain adapter of the tiny Llama."""
    return make_adapter(tiny_llama, session_folder / "adapters" / "plain")


KINDS = {
    "plain": {},
    "stabilized": {"use_rslora": True, "r": 2},
    "patterns": {"alpha_pattern": {"v_proj": 2}, "rank_pattern": {"layers.1.mlp.down_proj": 8}},
    "all-linear": {"target_modules": "all-linear", "r": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_peft(kind: str, tiny_llama: Path, tmp_path: Path, adapted_model: Any) -> None:
    folder = make_adapter(tiny_llama, tmp_path / kind, **KINDS[kind])
    expected = texts_of_peft(tiny_llama, folder)
    assert texts_of(adapted_model(folder)) == expected
    assert expected != texts_of_peft(tiny_llama), "the adapter changes nothing, and the test shows nothing"


def test_the_scale_counts(tiny_llama: Path, adapter: Path, adapted_model: Any) -> None:
    half = Adapter(repo_or_folder=str(adapter), scale=0.5)
    assert texts_of(adapted_model(half)) == texts_of_peft(tiny_llama, adapter, scale=0.5)
    assert texts_of(adapted_model(Adapter(repo_or_folder=str(adapter), scale=0.0))) == texts_of_peft(tiny_llama)


def test_several_adapters_add_up(tiny_llama: Path, adapter: Path, tmp_path: Path, adapted_model: Any) -> None:
    other = make_adapter(tiny_llama, tmp_path / "other", seed=2, target_modules=["q_proj", "o_proj"])
    assert texts_of(adapted_model(adapter, other)) == texts_of_peft(tiny_llama, adapter, other)


def test_weights_of_half_precision(tiny_llama: Path, adapter: Path, tmp_path: Path, adapted_model: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter, tmp_path / "half"))
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights)
    assert texts_of(adapted_model(folder)) == texts_of_peft(tiny_llama, folder)


def test_with_and_without_are_two_engines(adapter: Path, adapted_model: Any) -> None:
    with_it, without = load_engine(adapted_model(adapter)), load_engine(adapted_model())
    assert with_it.unshared is not without.unshared
    assert load_engine(adapted_model(adapter)).unshared is with_it.unshared


def test_a_journal_knows_the_adapter(tiny_llama: Path, tmp_path: Path, adapter: Path, adapted_model: Any) -> None:
    other = make_adapter(tiny_llama, tmp_path / "other", seed=7)
    half = Adapter(repo_or_folder=str(adapter), scale=0.5)
    models = [adapted_model(), adapted_model(adapter), adapted_model(other), adapted_model(half)]
    assert len({json.dumps(resolve_model(model).identity, sort_keys=True) for model in models}) == len(models)


def test_an_adapter_that_is_replaced_is_loaded_anew(
    tiny_llama: Path, tmp_path: Path, adapter: Path, adapted_model: Any
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "replaced"))
    texts_of(adapted_model(folder))
    make_adapter(tiny_llama, folder, seed=5)
    assert texts_of(adapted_model(folder)) == texts_of_peft(tiny_llama, folder)


def test_layers_that_keep_their_weights_the_other_way(tmp_path: Path) -> None:
    base = make_model(tmp_path / "gpt2", "gpt2")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    settings: dict[str, Any] = {"backend": "torch", "dtype": "float32", "chat_template": "never"}
    model = LocalModel(model_id=str(base), adapters=[Adapter(repo_or_folder=str(folder))], **settings)
    assert texts_of(model) == texts_of_peft(base, folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "phi3", "gemma2"])
def test_families_on_openvino(architecture: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / architecture, architecture)
    turned = architecture == "gpt2"
    folder = make_adapter(base, tmp_path / "adapter", target_modules="all-linear", fan_in_fan_out=turned)
    exact: dict[str, Any] = {"weight_format": "fp32", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    model = LocalModel(
        model_id=str(base), adapters=[Adapter(repo_or_folder=str(folder))], chat_template="never", **exact
    )
    assert texts_of(model) == texts_of_peft(base, folder)


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_quantized_weights_stay_as_they_are(weight_format: str, tiny_llama_int8: Path, adapter: Path) -> None:
    plain = LocalModel(model_id=str(tiny_llama_int8), weight_format=weight_format, chat_template="never")
    adapted = plain.model_copy(update={"adapters": [Adapter(repo_or_folder=str(adapter))]})
    assert texts_of(adapted) != texts_of(plain)
    assert load_engine(adapted).generate is not None


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _configured(**settings: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def _narrower(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    cut = {name: tensor[:, :-8].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(cut, folder / "adapter_model.safetensors")


def _renamed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def _with_head(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("adapter_config.json"), "'adapter_config.json' is missing"),
        (_without("adapter_model.safetensors"), "'adapter_model.safetensors' is missing"),
        (_configured(peft_type="IA3"), "kind 'IA3'"),
        (_configured(use_dora=True), "`use_dora`"),
        (_configured(modules_to_save=["lm_head"]), "`modules_to_save`"),
        (_configured(bias="all"), "`bias`"),
        (_configured(init_lora_weights="pissa_niter_4"), "`init_lora_weights='pissa_niter_4'`"),
        (_configured(init_lora_weights="OLoRA"), "`init_lora_weights='OLoRA'`"),
        (_configured(alora_invocation_tokens=[1, 2]), "`alora_invocation_tokens`"),
        (_narrower, "has the shape"),
        (_renamed, "query"),
        (_with_head, "lm_head"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"none"), "not in safetensors format"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Any, said: str, tmp_path: Path, adapter: Path, adapted_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "bad"))
    change(folder)
    with pytest.raises(ModelSourceError, match=said) as caught:
        load_engine(adapted_model(folder))
    assert str(caught.value).rstrip().endswith(".")


def test_an_adapter_of_another_model_is_refused_before_an_export(tmp_path: Path, adapter: Path) -> None:
    other = make_model(tmp_path / "gpt2", "gpt2")
    model = LocalModel(model_id=str(other), adapters=[Adapter(repo_or_folder=str(adapter))])
    with pytest.raises(ModelSourceError, match="which the model in .* lacks"):
        load_engine(model)
    assert not any((model.store_path / "exports").glob("gpt2-*"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "summarization"}, "backend='torch'"),
        ({"backend": "torch", "load_in": "4bit"}, "does not work with `adapters`"),
    ],
)
def test_what_cannot_have_adapters_says_so(
    settings: dict[str, Any], said: str, adapter: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        LocalModel(model_id=str(tiny_llama), adapters=[Adapter(repo_or_folder=str(adapter))], **settings)


def test_two_adapters_of_one_name_are_refused(adapter: Path, tiny_llama: Path) -> None:
    one = Adapter(repo_or_folder=str(adapter))
    with pytest.raises(ValueError, match="different names"):
        LocalModel(model_id=str(tiny_llama), adapters=[one, one])


def test_an_adapter_of_the_hub_is_verified_pinned_and_works_offline(
    hub: Any, tmp_path: Path, tiny_llama: Path, adapter: Path
) -> None:
    files = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    repository = hub.create("org/adapter", {**files, "checkpoint.bin": b"not asked for"})
    credentials = HuggingFaceCredentials(endpoint=hub.endpoint)
    model = LocalModel(
        model_id=str(tiny_llama), backend="torch", dtype="float32", chat_template="never", credentials=credentials,
        store=ModelStore(path=tmp_path / "store"), adapters=[Adapter(repo_or_folder="org/adapter")],
    )  # fmt: skip
    pinned = pin_adapters(model)
    assert [one.revision for one in pinned.adapters] == [repository.references["main"]]
    assert texts_of(model) == texts_of_peft(tiny_llama, adapter)
    assert not any("checkpoint.bin" in str(request) for request in hub.journal.requests)
    unload_engines()
    asked = len(hub.journal.requests)
    assert texts_of(pinned) == texts_of_peft(tiny_llama, adapter)
    assert len(hub.journal.requests) == asked
    job = resolve_model(model)
    assert job.commits == (None, pinned.adapters[0].revision)
    changed = {**json.loads(files["adapter_config.json"]), "lora_alpha": 1}
    repository.commit({**files, "adapter_config.json": json.dumps(changed).encode()})
    assert resolve_model(model, job.commits) == job, "a job keeps its adapters, whatever is pushed meanwhile"
    assert pin_model(model, job.commits) == pinned
    assert resolve_model(model).identity != job.identity


def test_a_repository_without_an_adapter_is_refused(hub: Any, tmp_path: Path, tiny_llama: Path) -> None:
    hub.create("org/none", {"config.json": b"{}"})
    model = LocalModel(
        model_id=str(tiny_llama), backend="torch", credentials=HuggingFaceCredentials(endpoint=hub.endpoint),
        store=ModelStore(path=tmp_path / "store"), adapters=[Adapter(repo_or_folder="org/none")],
    )  # fmt: skip
    with pytest.raises(HubError, match="adapter_config.json"):
        load_engine(model)
