"""A GGUF file is a model like any other, or is refused in seconds with a sentence that says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore
from prefect_huggingface.tasks.batching.job import resolve_model
from prefect_huggingface.tasks.downloads import fetch_model
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import ModelSourceError, PlanError
from prefect_huggingface.tasks.evaluation import compare_formats
from prefect_huggingface.tasks.exports import export_model, list_stored, plan_model, prune_stored
from prefect_huggingface.tasks.generation import generate_text
from prefect_huggingface.tasks.storage.gguf_conversion import save_weights
from prefect_huggingface.tasks.storage.gguf_files import CONVERSION, describe_gguf, read_file
from support.export_models import make_model
from support.gguf_models import byte_level_fields, write_gguf

GREEDY = GenerationOptions(max_new_tokens=8, ignore_eos=True)
# One export for all tests of this file.
EXACT: dict[str, Any] = {"weight_format": "fp32", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama)


@pytest.fixture(scope="module")
def gguf_store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(path=tmp_path_factory.mktemp("gguf-store"))


def problem_of(path: Path, store: Path, **settings: Any) -> str:
    """Return why the plan of an export cannot succeed; torch says the same, and nothing is made."""
    started = time.monotonic()
    model = LocalModel(model_id=str(path), store=ModelStore(path=store), **settings)
    problems = plan_model(model).problems
    assert len(problems) == 1, problems
    for ask in (export_model, fetch_model):
        with pytest.raises((PlanError, ModelSourceError)) as caught:
            ask(model)
        assert str(caught.value) == problems[0]
    assert time.monotonic() - started < 20
    assert not list((store / "exports").glob("[a-z]*"))
    assert repr(str(path)) in problems[0]
    return problems[0]


def test_the_checkpoint_of_a_file_is_its_source(gguf_file: Path, gguf_store: ModelStore, tiny_llama: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    snapshot = fetch_model(LocalModel(model_id=str(gguf_file), backend="torch", store=gguf_store))
    source, made = (load_file(folder / "model.safetensors") for folder in (tiny_llama, snapshot.path))
    assert source.keys() == made.keys()
    assert all((source[name] == made[name]).all() for name in source)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (snapshot.path, tiny_llama))
    text = "The capital of France is Paris.\n<|user|> 42  Quarante-deux! é 🙂"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token == "<|end|>"
    assert {file.path for file in snapshot.files} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_file_answers_as_its_source_on_both_backends(
    gguf_file: Path, gguf_store: ModelStore, tiny_llama: Path
) -> None:
    prompts = ["The capital of France is", "One, two, three"]
    source = LocalModel(model_id=str(tiny_llama), backend="torch", options=GREEDY, store=gguf_store)
    expected = [completion.text for completion in generate_text.fn(source, prompts)]
    for settings in ({"backend": "torch"}, EXACT):
        model = LocalModel(model_id=str(gguf_file), options=GREEDY, store=gguf_store, **settings)
        assert [completion.text for completion in generate_text.fn(model, prompts)] == expected


def test_a_file_is_known_by_its_content(gguf_file: Path, gguf_store: ModelStore, tmp_path: Path) -> None:
    import hashlib

    model = LocalModel(model_id=str(gguf_file), store=gguf_store, **EXACT)
    planned = plan_model(model)
    assert planned.commit == f"gguf.{CONVERSION}-{hashlib.sha256(gguf_file.read_bytes()).hexdigest()}"
    assert planned.parameters > 0
    made = export_model(model)
    assert made.key == planned.key
    assert made.source == str(gguf_file)
    moved = tmp_path / "another-name.gguf"
    shutil.copy(gguf_file, moved)
    copy = model.model_copy(update={"model_id": str(moved)})
    again = export_model(copy)
    assert again.reused
    assert again.path == made.path
    assert plan_model(copy).path == made.path
    assert resolve_model(copy).identity == resolve_model(model).identity
    other = model.model_copy(update={"backend": "torch", "weight_format": None})
    assert resolve_model(other).identity["commit"] == planned.commit


def test_an_export_outlives_its_checkpoint(gguf_file: Path, gguf_store: ModelStore) -> None:
    model = LocalModel(model_id=str(gguf_file), store=gguf_store, **EXACT)
    made = export_model(model)
    checkpoint = fetch_model(model)
    assert checkpoint.path in {entry.path for entry in list_stored(gguf_store)}
    evicted = checkpoint.path.rename(gguf_store.path / "evicted")
    assert export_model(model).path == made.path
    assert not checkpoint.path.exists()
    evicted.rename(checkpoint.path)


@pytest.mark.slow
def test_a_replaced_file_is_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    path, store = tmp_path / "model.gguf", ModelStore(path=tmp_path / "store")
    write_gguf(path, tiny_llama)
    model = LocalModel(model_id=str(path), backend="torch", options=GREEDY, store=store)
    first = generate_text.fn(model, ["One, two"])
    checkpoint = fetch_model(model)
    shutil.rmtree(checkpoint.path)
    assert fetch_model(model).files == checkpoint.files
    write_gguf(path, make_model(tmp_path / "other", "llama"))
    second = generate_text.fn(model, ["One, two"])
    assert first[0].text != second[0].text


def test_formats_are_compared_with_the_file(gguf_file: Path, gguf_store: ModelStore) -> None:
    model = LocalModel(model_id=str(gguf_file), store=gguf_store, **EXACT)
    quality = compare_formats(model, prompts=["The capital of France is"], max_new_tokens=4)
    assert quality.source == str(gguf_file)
    assert quality.agreement == 1.0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_are_their_sources(architecture: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", architecture)
    path = write_gguf(tmp_path / "model.gguf", source, byte_level_fields(source, "qwen2"))
    model = LocalModel(model_id=str(path), backend="torch", store=ModelStore(path=tmp_path / "store"))
    assert describe_gguf(model).problem is None
    save_weights(tmp_path / "made", *read_file(path))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        folders = (source, tmp_path / "made")
        expected, got = (AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in folders)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("factor", "is_known"), [(8.0, True), (32.0, True), (16.0, False)])
def test_positions_of_llama_3_are_those_of_the_source(
    factor: float, is_known: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    # Another length in training gives factors that no setting in the file tells.
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 if is_known else 4096,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    path = write_gguf(tmp_path / "model.gguf", source)
    if not is_known:
        assert "holds other factors than those of Llama 3.1 to 3.3" in problem_of(path, tmp_path / "store")
        return
    assert describe_gguf(LocalModel(model_id=str(path))).problem is None
    save_weights(tmp_path / "made", *read_file(path))
    ids, positions = torch.arange(3, 40)[None], torch.arange(37)[None] * 1000
    with torch.inference_mode():
        folders = (source, tmp_path / "made")
        models = [AutoModelForCausalLM.from_pretrained(each) for each in folders]
        expected, got = (model(ids, position_ids=positions).logits for model in models)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("quantization", "dtype", "largest"),
    [("F16", "float16", 1e-3), ("BF16", "bfloat16", 1e-2), ("Q8_0", "float16", 0.02), ("Q4_0", "float16", 0.3)],
)
def test_quantized_weights_are_near_their_source(
    quantization: str, dtype: str, largest: float, tiny_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    path = write_gguf(tmp_path / "model.gguf", tiny_llama, quantization=quantization)
    assert save_weights(tmp_path / "made", *read_file(path)) == dtype
    source, found = (load_file(each / "model.safetensors") for each in (tiny_llama, tmp_path / "made"))
    assert source.keys() == found.keys()
    for name, weight in source.items():
        assert (weight - found[name].float()).norm() <= largest * weight.norm()


def test_weights_too_large_for_half_precision_stay_in_single(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_model(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(weights, source / "model.safetensors")
    path = write_gguf(tmp_path / "model.gguf", source, quantization="Q8_0")
    assert save_weights(tmp_path / "made", *read_file(path)) == "float32"


def test_langchain_takes_a_file(gguf_file: Path, gguf_store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_huggingface.tasks.langchain import HuggingFacePipeline

    monkeypatch.setenv("PREFECT_HUGGINGFACE_HOME", str(gguf_store.path))
    monkeypatch.chdir(gguf_file.parent)
    llm = HuggingFacePipeline.from_model_id(gguf_file.name, "text-generation", pipeline_kwargs={"max_new_tokens": 4})
    assert isinstance(llm.invoke("One, two"), str)
    assert load_engine(LocalModel(model_id=gguf_file.name, **EXACT)).count_tokens("One, two") > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "mamba"}, "its architecture is 'mamba'"),
        ({"llama.expert_count": 8}, "its setting llama.expert_count (8) is not known here"),
        ({"llama.rope.scaling.type": "yarn"}, "its setting llama.rope.scaling.type ('yarn')"),
        ({"llama.rope.dimension_count": 8}, "attn_k.weight' has the shape (64, 128) and not (16, 128)"),
        ({"llama.attention.key_length": 8}, "its heads have 8 and 32 dimensions"),
        ({"llama.block_count": 3}, "is missing"),
        ({"llama.block_count": 1}, "is not known here"),
        ({"llama.embedding_length": None}, "its setting llama.embedding_length is missing"),
        ({"llama.vocab_size": 7}, "embeddings for a vocabulary of"),
        ({"split.count": 3}, "it is one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "its pre-tokenizer is 'unheard-of'"),
        ({"tokenizer.ggml.pre": None}, "its pre-tokenizer is None"),
        ({"tokenizer.ggml.merges": None}, "its tokenizer has no merges"),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": None}, "does not name (eos)"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], reason: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_llama, settings=changes)
    assert reason in problem_of(path, tmp_path / "store")


def test_a_tokenizer_that_loses_text_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    fields = byte_level_fields(tiny_llama)
    tokens = fields["tokenizer.ggml.tokens"]
    tokens[tokens.index("0")] = "no zero"
    path = write_gguf(tmp_path / "model.gguf", tiny_llama, fields)
    assert "does not give texts back as they were: " in problem_of(path, tmp_path / "store")


def test_a_tokenizer_of_letters_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    fields = byte_level_fields(tiny_llama)
    # One merge that no text has.
    fields["tokenizer.ggml.tokens"][-1] = "ĀĀ"
    fields["tokenizer.ggml.merges"] = ["Ā Ā"]
    path = write_gguf(tmp_path / "model.gguf", tiny_llama, fields)
    assert "cuts plain words into letters" in problem_of(path, tmp_path / "store")


def test_too_few_tokens_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    fields = byte_level_fields(tiny_llama)
    fields["tokenizer.ggml.tokens"] += ["one too many"]
    fields["tokenizer.ggml.token_type"] += [1]
    path = write_gguf(tmp_path / "model.gguf", tiny_llama, fields)
    count = len(fields["tokenizer.ggml.tokens"])
    assert f"it has {count - 1} embeddings for a vocabulary of {count} tokens" in problem_of(path, tmp_path / "store")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_a_file_that_is_cut_off_is_refused(kept: float, gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = gguf_file.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "it is no GGUF file, or is cut off or damaged" in problem_of(path, tmp_path / "store")


def test_other_files_and_tasks_are_refused(gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("This is not a model. " * 100)
    assert "it is no GGUF file" in problem_of(path, tmp_path / "store")
    part = tmp_path / "model-00001-of-00003.gguf"
    shutil.copy(gguf_file, part)
    assert "it is part 1 of 3. Merge the parts" in problem_of(part, tmp_path / "store")
    assert "got 'summarization'" in problem_of(gguf_file, tmp_path / "store", task="summarization")


def test_a_missing_file_and_a_folder_of_files_are_named(gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="does not exist. Correct `model_id`"):
        fetch_model(LocalModel(model_id="nowhere/model.gguf"))
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(gguf_file, folder)
    with pytest.raises(ModelSourceError, match="Set `model_id` to one of them: tiny.gguf"):
        fetch_model(LocalModel(model_id=str(folder)))


def test_the_missing_package_is_named(gguf_file: Path, tmp_path: Path) -> None:
    """In a process that cannot import `gguf`, the plan says so."""
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "from prefect_huggingface.blocks import LocalModel, ModelStore\n"
        "from prefect_huggingface.tasks.exports import plan_model\n"
        f"print(plan_model(LocalModel(model_id={str(gguf_file)!r}, store=ModelStore(path={str(tmp_path)!r}))).problems)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "the package 'gguf' is not installed. Install it with `pip install gguf`" in result.stdout


def test_a_plan_needs_no_torch(gguf_file: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from prefect_huggingface.blocks import LocalModel, ModelStore\n"
        "from prefect_huggingface.tasks.exports import plan_model\n"
        f"plan = plan_model(LocalModel(model_id={str(gguf_file)!r}, store=ModelStore(path={str(tmp_path)!r})))\n"
        "assert not plan.problems, plan.problems\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_checkpoints_are_evicted_as_exports_are(gguf_file: Path, gguf_store: ModelStore, tmp_path: Path) -> None:
    made = fetch_model(LocalModel(model_id=str(gguf_file), backend="torch", store=gguf_store))
    store = ModelStore(path=shutil.copytree(gguf_store.path, tmp_path / "store"))
    checkpoint = store.path / made.path.relative_to(gguf_store.path)
    report = prune_stored(store, max_size_gb=0)
    assert checkpoint in [entry.path for entry in report.removed]
    assert not checkpoint.exists()
