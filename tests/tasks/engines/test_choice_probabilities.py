"""Probabilities of the choices of a response format, the same on both backends and those of the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel, ResponseFormat
from prefect_huggingface.tasks import generate_text, unload_engines
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.openai_protocol import BodyError, check_all
from prefect_huggingface.tasks.records import Completion, Request
from support.engine_families import PROMPTS, Family
from support.scripted_models import make_scripted_model

CHOICES = ["yes", "no", "I do not know", "no answer"]


@pytest.fixture
def models(tiny_openvino: Path, tiny_llama: Path) -> Iterator[list[LocalModel]]:
    """The tiny Llama on both backends, in full precision."""
    exact: dict[str, Any] = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}, "chat_template": "never"}
    yield [
        LocalModel(model_id=str(tiny_openvino), **exact),
        LocalModel(model_id=str(tiny_llama), backend="torch", dtype="float32", chat_template="never"),
    ]
    unload_engines()


def ask(model: LocalModel, prompts: list[str], choices: list[str] = CHOICES, **options: Any) -> list[Completion]:
    """Return completions with probabilities."""
    form = ResponseFormat(choices=choices)
    chosen = GenerationOptions(response_format=form, choice_probabilities=True, max_new_tokens=24, **options)
    return generate_text.fn(model, prompts, options=chosen)


def probabilities_of_the_model(folder: Path, prompt: str) -> dict[str, float]:
    """Return the probabilities that Transformers gives, one choice at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    context = tokenizer(prompt).input_ids
    sums = {}
    for choice in CHOICES:
        ids = tokenizer(choice, add_special_tokens=False).input_ids
        scores = model(torch.tensor([[*context, *ids]])).logits[0].log_softmax(-1)
        sums[choice] = sum(scores[len(context) + place - 1, token].item() for place, token in enumerate(ids))
    total = sum(map(math.exp, sums.values()))
    return {choice: math.exp(value) / total for choice, value in sums.items()}


def test_they_are_those_of_the_model_on_both_backends(models: list[LocalModel], tiny_llama: Path) -> None:
    for model in models:
        for prompt, completion in zip(PROMPTS[:3], ask(model, PROMPTS[:3]), strict=True):
            assert completion.error is None
            assert completion.text in CHOICES
            assert completion.choice_probabilities == pytest.approx(
                probabilities_of_the_model(tiny_llama, prompt), abs=1e-3
            )
            assert sum(completion.choice_probabilities.values()) == pytest.approx(1)


def test_they_do_not_depend_on_neighbours_drawing_or_asking_again(models: list[LocalModel]) -> None:
    for model in models:
        alone = ask(model, PROMPTS[:1])[0].choice_probabilities
        for completion in (*ask(model, [PROMPTS[0]] * 3), ask(model, PROMPTS)[0]):
            assert completion.choice_probabilities == pytest.approx(alone, abs=1e-5)
        drawn = ask(model, PROMPTS[:1], do_sample=True, temperature=2.0, seed=3, n=2)[0]
        assert drawn.choice_probabilities == pytest.approx(alone, abs=1e-5)


def test_no_more_logits_are_computed_than_the_choices_need(tiny_llama: Path) -> None:
    engine = TorchTextEngine(tiny_llama, LocalModel(model_id=str(tiny_llama), backend="torch", chat_template="never"))
    widths: list[int] = []
    engine._model.lm_head.register_forward_hook(lambda _, inputs, logits: widths.append(logits.shape[1]))
    with engine:
        for options in ({"response_format": ResponseFormat(choices=CHOICES), "choice_probabilities": True},
                        {"num_beams": 2, "logprobs": True, "max_new_tokens": 5}):  # fmt: skip
            prompt = " ".join(PROMPTS)
            completion = engine.submit(Request(prompt, options=GenerationOptions(**options))).result(60)
            assert completion.error is None
    longest = max(len(engine.inputs.tokenizer.encode(choice, add_special_tokens=False)) for choice in CHOICES)
    assert max(widths) == longest + 1 < completion.prompt_tokens


def test_memory_that_runs_out_while_choices_are_scored_ends_the_request(tmp_path: Path) -> None:
    """The scores are computed where the answer begins, which is in the middle of a step after reasoning."""
    import torch

    folder = make_scripted_model(tmp_path / "model", "<think>\nWell.\n</think>\n\nyes")
    model = LocalModel(model_id=str(folder), backend="torch", dtype="float32", chat_template="always")
    form = ResponseFormat(choices=["yes", "no"])
    options = GenerationOptions(response_format=form, choice_probabilities=True, max_new_tokens=64)
    engine = TorchTextEngine(folder, model)

    def run_out(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") is False:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with engine:
        assert engine.submit(Request("Well?", options=options)).result(60).error is None
        engine._model.register_forward_pre_hook(run_out, with_kwargs=True)
        scored = engine.submit(Request("Well?", options=options))
        assert scored.result(60).error_code == "out_of_memory"
        with pytest.raises(BodyError) as caught:  # it may pass: at an endpoint, it is no prompt that is too long
            check_all([scored.result(60)])
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert engine.submit(Request("Well?")).result(60).error is None


def test_one_choice_is_certain_and_nobody_else_pays(models: list[LocalModel]) -> None:
    for model in models:
        assert ask(model, PROMPTS[:1], choices=["maybe"])[0].choice_probabilities == {"maybe": 1.0}
        plain = generate_text.fn(model, PROMPTS[:1], options=GenerationOptions(max_new_tokens=4))[0]
        assert plain.choice_probabilities is None


def test_more_choices_than_fit_beside_each_other(models: list[LocalModel]) -> None:
    choices = [f"number {number}" for number in range(70)]
    found = [ask(model, PROMPTS[:2], choices=choices) for model in models]
    for first, second in zip(*found, strict=True):
        assert first.choice_probabilities == pytest.approx(second.choice_probabilities, abs=1e-3)


def test_options_without_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="needs choices"):
        GenerationOptions(choice_probabilities=True)
    with pytest.raises(ValueError, match="needs choices"):
        GenerationOptions(choice_probabilities=True, response_format=ResponseFormat(regex="a+"))


@pytest.mark.parametrize("kind", ["torch-seq2seq", "torch-images", "endpoint"])
def test_who_cannot_refuses(kind: str, family_of: Any) -> None:
    family: Family = family_of(kind)
    form = ResponseFormat(choices=CHOICES)
    completion = family.ask(PROMPTS[0], response_format=form, choice_probabilities=True)
    assert completion.error_code == "invalid_option"
    assert "choice_probabilities" in str(completion.error)
