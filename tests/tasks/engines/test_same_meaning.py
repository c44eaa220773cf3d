"""The same request means the same on torch and on OpenVINO, streamed and in a batch: text, end, counts, errors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.records import Completion, Request
from support.tiny_models import SAMPLE_TEXTS

NEW_TOKENS = 24
WORDS = " ".join(SAMPLE_TEXTS).split()
CHOOSE = random.Random(23)
PROMPTS = [" ".join(CHOOSE.choices(WORDS, k=CHOOSE.randint(1, 20))) for _ in range(12)]


@pytest.fixture(scope="module")
def engines(tiny_llama: Path, tiny_openvino: Path) -> Iterator[list[Engine]]:
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    torch = LocalModel(model_id=str(tiny_llama), backend="torch", device="cpu", dtype="float32", options=options)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    openvino = LocalModel(model_id=str(tiny_openvino), weight_format="fp32", ov_config=exact, options=options)
    with TorchTextEngine(tiny_llama, torch) as first, OpenVINOTextEngine(tiny_openvino, openvino) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def whole_texts(engines: list[Engine]) -> list[str]:
    """Text of each prompt without any stop string."""
    return [engines[0].submit(Request(prompt)).result().text for prompt in PROMPTS]


def meaning(completion: Completion) -> tuple[object, ...]:
    """Return everything but the time and the words of an error."""
    return (
        completion.text, completion.finish_reason, completion.prompt_tokens, completion.generated_tokens,
        completion.error_code, completion.alternatives, completion.status,
    )  # fmt: skip


def cut(text: str, stops: list[str]) -> str:
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(places)[1]] if places else text


@given(data=st.data())
@settings(deadline=None)
def test_stop_strings_cut_the_same_text_on_all_engines_and_in_streams(engines, whole_texts, data):
    rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=3, unique=True))
    requests = []
    for row in rows:
        text = whole_texts[row]
        starts = data.draw(st.lists(st.integers(0, max(len(text) - 1, 0)), max_size=3))
        stops = [text[start : start + data.draw(st.integers(1, 8))] or "never" for start in starts]
        options = GenerationOptions(max_new_tokens=data.draw(st.integers(1, NEW_TOKENS)), stop=stops)
        requests.append(Request(PROMPTS[row], id=row, options=options))
    results = [{done.request_id: meaning(done) for done in engine.generate(requests)} for engine in engines]
    assert results[0] == results[1]
    for request in requests:
        texts = {"".join(engine.stream(request)) for engine in engines}
        assert texts == {results[0][request.id][0]}
        if request.options.max_new_tokens == NEW_TOKENS:
            assert texts == {cut(whole_texts[request.id], request.options.stop)}


OPTIONS = [
    {}, {"repetition_penalty": 1.4}, {"min_new_tokens": 20}, {"ignore_eos": True},
    {"echo": True}, {"max_new_tokens": 1}, {"num_beams": 3}, {"num_beams": 3, "n": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_means_the_same_on_all_engines(engines, options):
    chosen = GenerationOptions(**{"max_new_tokens": NEW_TOKENS, **options})
    for prompt in PROMPTS[:4]:
        first, second = (meaning(engine.submit(Request(prompt, options=chosen)).result()) for engine in engines)
        assert first == second


def test_log_probabilities_agree(engines):
    chosen = GenerationOptions(max_new_tokens=8, logprobs=True)
    for prompt in PROMPTS[:4]:
        first, second = (engine.submit(Request(prompt, options=chosen)).result() for engine in engines)
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-3)


BAD = [
    Request(""), Request(" \n"), Request(), Request("a", messages=[]), Request(messages=[]),
    Request(messages=[{"role": "nobody", "content": "x"}]), Request(messages=[{"role": "user", "content": 5}]),
    Request("word " * 600), Request("word " * 600, options=GenerationOptions(context_overflow="skip")),
    Request("half \ud83d of a pair"), Request("x", options=GenerationOptions(max_new_tokens=512)),
]  # fmt: skip


@pytest.mark.parametrize("request_index", range(len(BAD)))
def test_a_bad_request_is_the_same_error_on_all_engines(engines, whole_texts, request_index):
    results = [engine.submit(BAD[request_index]).result() for engine in engines]
    first, second = map(meaning, results)
    assert first == second
    assert results[0].error == results[1].error
    assert results[0].status not in ("ok", "engine_error")
    assert [engine.submit(Request(PROMPTS[0])).result().text for engine in engines] == [whole_texts[0]] * 2


def test_messages_and_cut_prompts_mean_the_same(engines):
    requests = [
        Request(messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]),
        Request("<|user|>Hello<|end|><|assistant|>"),
        Request("word " * 600, options=GenerationOptions(context_overflow="truncate_left", max_new_tokens=8)),
        Request("word " * 600, options=GenerationOptions(context_overflow="truncate_right", max_new_tokens=8)),
    ]
    for request in requests:
        first, second = (meaning(engine.submit(request).result()) for engine in engines)
        assert first == second
