"""Encoder-decoder models: the same meaning of every option as for text generation, on torch and on OpenVINO."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.torch_engine import (
    OpenVINOSeq2SeqEngine,
    TorchSeq2SeqEngine,
    task_prefix,
)
from prefect_huggingface.tasks.records import Completion, Request
from support.export_models import TASK_SETTINGS, make_model
from support.tiny_models import SAMPLE_TEXTS

NEW_TOKENS = 16
WORDS = " ".join(SAMPLE_TEXTS).split()
CHOOSE = random.Random(3)
PROMPTS = [" ".join(CHOOSE.choices(WORDS, k=CHOOSE.randint(1, 12))) for _ in range(10)]


def settings(folder: Path, backend: str, task: str = "text2text-generation", **more) -> LocalModel:
    if backend == "openvino":
        more = {"weight_format": "fp32", "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}, **more}
    return LocalModel(
        model_id=str(folder), backend=backend, task=task, device="cpu", chat_template="never",
        options=GenerationOptions(max_new_tokens=NEW_TOKENS), **more,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, tiny_t5: Path) -> Iterator[TorchSeq2SeqEngine]:
    if request.param == "torch":
        loaded = TorchSeq2SeqEngine(tiny_t5, settings(tiny_t5, "torch"))
    else:
        target = request.getfixturevalue("tiny_t5_openvino")
        loaded = OpenVINOSeq2SeqEngine(target, settings(target, "openvino"))
    with loaded:
        yield loaded


class Reference:
    """Transformers by itself, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()

    def tokens(self, prompt: str, **more) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        row = self.model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **more})[0]
        return [token for token in row.tolist()[1:] if token != self.tokenizer.eos_token_id]

    def text(self, prompt: str, **more) -> str:
        return self.tokenizer.decode(self.tokens(prompt, **more), skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(tiny_t5: Path) -> Reference:
    return Reference(tiny_t5)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[str]:
    texts = [reference.text(prompt) for prompt in PROMPTS]
    assert len(set(texts)) > 3, "the answers must depend on the prompts"
    return texts


def run(engine: TorchSeq2SeqEngine, prompts: list[str], in_flight: int | None = None, **options) -> list[Completion]:
    chosen = GenerationOptions(**options) if options else None
    requests = [Request(prompt=prompt, id=index, options=chosen) for index, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests, in_flight), key=lambda completion: completion.request_id)


@pytest.mark.parametrize("in_flight", [1, 10])
def test_greedy_text_is_that_of_transformers_in_any_batch(engine, expected, in_flight):
    order = random.Random(in_flight).sample(range(len(PROMPTS)), len(PROMPTS))
    completions = run(engine, [PROMPTS[index] for index in order], in_flight)
    assert [completion.text for completion in completions] == [expected[index] for index in order]


def test_counts_and_ends_are_those_of_each_row(engine, reference):
    lengths = [1 + 3 * index % NEW_TOKENS for index in range(len(PROMPTS))]
    requests = [
        Request(prompt, id=index, options=GenerationOptions(max_new_tokens=lengths[index]))
        for index, prompt in enumerate(PROMPTS)
    ]
    for completion in engine.generate(requests):
        index = completion.request_id
        tokens = reference.tokens(PROMPTS[index])[: lengths[index]]
        assert completion.text == reference.tokenizer.decode(tokens, skip_special_tokens=True)
        assert completion.generated_tokens == len(tokens)
        assert completion.prompt_tokens == len(reference.tokenizer(PROMPTS[index]).input_ids)
        assert completion.finish_reason == ("length" if len(tokens) == lengths[index] else "stop")


def test_stop_strings_cut_the_same_in_streams_and_batches(engine, expected):
    checked = 0
    for prompt, text in zip(PROMPTS, expected, strict=True):
        if len(text) < 6 or "\ufffd" in (stop := text[3:6]):
            continue
        request = Request(prompt, options=GenerationOptions(stop=[stop, "never there"]))
        completion = engine.submit(request).result()
        assert completion.text == "".join(engine.stream(request)) == text[: text.index(stop)]
        assert completion.finish_reason == "stop"
        assert completion.generated_tokens < NEW_TOKENS
        checked += 1
    assert checked


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_options_do_what_they_do_in_transformers(engine, reference, more):
    expected = [reference.text(prompt, **more) for prompt in PROMPTS[:4]]
    assert [completion.text for completion in run(engine, PROMPTS[:4], **more)] == expected


def test_a_seed_repeats_an_answer_in_any_batch(engine):
    options = {"do_sample": True, "seed": 11, "n": 2, "max_new_tokens": 10}
    alone, together = run(engine, PROMPTS[:1], **options)[0], run(engine, PROMPTS, **options)[0]
    assert (alone.text, alone.alternatives) == (together.text, together.alternatives)
    assert alone.text != alone.alternatives[0]


def test_cancelled_late_and_bad_requests_leave_the_others_alone(engine, expected):
    begun = threading.Event()
    long = GenerationOptions(max_new_tokens=2000, ignore_eos=True)
    late = engine.submit(Request(PROMPTS[0], options=long.model_copy(update={"deadline_seconds": 0.2})))
    victim = engine.submit(Request(PROMPTS[0], options=long), lambda _: begun.set())
    empty = engine.submit(Request("  "))
    assert begun.wait(20)
    assert victim.cancel()
    assert [completion.text for completion in run(engine, PROMPTS)] == expected
    assert empty.result().error_code == "empty_prompt"
    assert late.result().finish_reason == "deadline"


def test_prefix_of_the_task_is_put_before_the_prompt(tiny_t5, reference):
    with TorchSeq2SeqEngine(tiny_t5, settings(tiny_t5, "torch", task="summarization")) as engine:
        completion = run(engine, [PROMPTS[0]])[0]
        assert completion.text == reference.text("summarize: " + PROMPTS[0])
        assert run(engine, ["summarize: " + PROMPTS[0]])[0].text == completion.text


def test_only_one_possible_prefix_is_taken():
    class Settings:
        task_specific_params = TASK_SETTINGS

    assert task_prefix(Settings, "summarization") == "summarize: "
    assert task_prefix(Settings, "translation") == ""
    assert task_prefix(Settings, "text2text-generation") == ""
    Settings.task_specific_params = {"translation_en_to_fr": {"prefix": "to French: "}}
    assert task_prefix(Settings, "translation") == "to French: "


def test_a_prompt_longer_than_the_encoder_is_refused_or_cut(session_folder):
    folder = make_model(session_folder / "models" / "seq2seq-bart", "bart", max_position_embeddings=64)
    alone = Reference(folder)
    with TorchSeq2SeqEngine(folder, settings(folder, "torch", task="summarization")) as engine:
        assert engine.context_length == 64
        long = "word " * 100
        refused, good = run(engine, [long, PROMPTS[0]])
        assert refused.error_code == "too_long"
        assert good.text == alone.text(PROMPTS[0])
        cut = run(engine, [long], context_overflow="truncate_right")[0]
        assert cut.prompt_tokens == 64


def test_memory_that_runs_out_only_makes_the_batch_smaller(tiny_t5, expected):
    import torch

    with TorchSeq2SeqEngine(tiny_t5, settings(tiny_t5, "torch", engine=EngineOptions(max_num_seqs=8))) as engine:

        def refuse(module, args, kwargs):
            if len(kwargs["input_ids"]) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

        engine._model.get_encoder().register_forward_pre_hook(refuse, with_kwargs=True)
        assert [completion.text for completion in run(engine, PROMPTS)] == expected


def test_a_loaded_model_is_used_and_not_changed(reference, expected):
    before = reference.model.generation_config.to_dict()
    block = LocalModel.model_construct(model_id="x", options=GenerationOptions(max_new_tokens=NEW_TOKENS))
    with TorchSeq2SeqEngine.of_loaded(reference.model, reference.tokenizer, block) as engine:
        assert run(engine, PROMPTS[:2])[1].text == expected[1]
    assert reference.model.generation_config.to_dict() == before
