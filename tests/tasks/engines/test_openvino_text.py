"""The OpenVINO engine says what Transformers says, row by row, whatever else is in its batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_huggingface.blocks import EngineOptions, GenerationOptions
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine
from prefect_huggingface.tasks.records import Request
from support.openvino_engines import NEW_TOKENS, ask, complete, load_openvino
from support.tiny_models import SAMPLE_TEXTS

WORDS = " ".join(SAMPLE_TEXTS).split()
CHOOSE = random.Random(11)
PROMPTS = [" ".join(CHOOSE.choices(WORDS, k=CHOOSE.randint(1, 40))) for _ in range(30)]
# Rows that share more than one block of the cache at their beginning.
SHARED = " ".join(CHOOSE.choices(WORDS, k=60))
PROMPTS += [f"{SHARED} {word}" for word in WORDS[:10]]


@pytest.fixture(scope="module")
def engine(tiny_openvino: Path) -> Iterator[OpenVINOTextEngine]:
    with load_openvino(tiny_openvino) as loaded:
        yield loaded


class Reference:
    """Transformers by itself, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @cache  # noqa: B019
    def tokens(self, prompt: str, **options) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return self.model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :].tolist()

    def text(self, prompt: str, **options) -> str:
        return self.tokenizer.decode(self.tokens(prompt, **options), skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[str]:
    return [reference.text(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("in_flight", [1, 3, 40])
def test_greedy_text_is_that_of_transformers_alone_and_in_any_batch(engine, expected, in_flight):
    assert [completion.text for completion in complete(engine, PROMPTS, in_flight)] == expected


def test_greedy_text_does_not_depend_on_the_order(engine, expected):
    order = random.Random(3).sample(range(len(PROMPTS)), len(PROMPTS))
    found = complete(engine, [PROMPTS[place] for place in order])
    assert [completion.text for completion in found] == [expected[place] for place in order]


@pytest.mark.parametrize(
    "options", [{"enable_prefix_caching": False}, {"max_num_seqs": 2, "max_num_batched_tokens": 16}]
)
def test_greedy_text_does_not_depend_on_the_sizes(tiny_openvino, expected, options):
    with load_openvino(tiny_openvino, engine=EngineOptions(cache_size_gb=0.25, **options)) as loaded:
        assert [completion.text for completion in complete(loaded, PROMPTS)] == expected


def test_many_threads_share_the_batch(engine, expected):
    places = [place for place in range(len(PROMPTS)) for _ in range(4)]
    random.Random(5).shuffle(places)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: ask(engine, PROMPTS[place]).text, places))
    assert found == [expected[place] for place in places]


def test_streamed_text_is_the_text(engine, expected):
    assert ["".join(engine.stream(Request(prompt))) for prompt in PROMPTS] == expected


def test_a_stream_comes_in_pieces(engine):
    pieces = list(engine.stream(Request(PROMPTS[0], options=GenerationOptions(max_new_tokens=20, ignore_eos=True))))
    assert len(pieces) > 5


def test_counts_are_those_of_the_tokenizer(engine, reference):
    for prompt, completion in zip(PROMPTS, complete(engine, PROMPTS), strict=True):
        tokens = reference.tokens(prompt)
        ended = tokens[-1] == reference.tokenizer.eos_token_id
        assert completion.prompt_tokens == len(reference.tokenizer(prompt).input_ids)
        assert completion.generated_tokens == len(tokens) - ended
        assert completion.finish_reason == ("stop" if ended else "length")
    assert engine.count_tokens(PROMPTS[0]) == len(reference.tokenizer(PROMPTS[0], add_special_tokens=False).input_ids)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stop_strings_cut_the_text_at_the_first_of_them(engine, expected, data):
    place = data.draw(st.integers(0, len(PROMPTS) - 1))
    text = expected[place]
    stops = [
        text[start : start + data.draw(st.integers(1, 9))] or "never"
        for start in data.draw(st.lists(st.integers(0, max(len(text) - 1, 0)), min_size=1, max_size=3))
    ]
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    cut = text[: min(ends)[0] + min(ends)[1]] if ends else text
    options = GenerationOptions(stop=stops, max_new_tokens=NEW_TOKENS)
    completion = engine.submit(Request(PROMPTS[place], options=options)).result(timeout=60)
    assert completion.text == cut
    assert "".join(engine.stream(Request(PROMPTS[place], options=options))) == cut
    if ends:
        assert completion.finish_reason == "stop"


def test_a_stop_string_ends_the_generation_early(engine, expected):
    place = max(range(len(expected)), key=lambda place: len(expected[place]))
    whole, stop = expected[place], expected[place][4:7]
    assert ask(engine, PROMPTS[place], stop=stop, max_new_tokens=200).generated_tokens <= len(whole[:7].encode())


def test_a_repetition_penalty_is_that_of_transformers(engine, reference):
    found = complete(engine, PROMPTS[:10], repetition_penalty=1.3, max_new_tokens=NEW_TOKENS)
    assert [one.text for one in found] == [reference.text(prompt, repetition_penalty=1.3) for prompt in PROMPTS[:10]]


def test_the_end_token_waits_for_the_least_number_of_tokens(engine, reference):
    short = [prompt for prompt in PROMPTS if len(reference.tokens(prompt)) < 15][:5]
    assert short
    for prompt, completion in zip(short, complete(engine, short, min_new_tokens=15, max_new_tokens=20), strict=True):
        assert completion.generated_tokens >= 15
        assert completion.text == reference.text(prompt, min_new_tokens=15, max_new_tokens=20)


def test_the_end_token_is_ignored_when_asked(engine, reference):
    ended = next(prompt for prompt in PROMPTS if len(reference.tokens(prompt)) < 15)
    completion = ask(engine, ended, ignore_eos=True, max_new_tokens=30)
    assert (completion.generated_tokens, completion.finish_reason) == (30, "length")


@pytest.mark.parametrize("least", [0, 5])
def test_an_end_token_that_the_model_has_not_is_that_requests_error(engine, expected, least):
    options = GenerationOptions(stop_token_ids=[10**8], min_new_tokens=least, max_new_tokens=8)
    found = engine.submit(Request(PROMPTS[0], options=options)).result(60)
    assert (found.error_code, "`stop_token_ids` must be tokens of the model" in found.error) == ("invalid_option", True)
    assert engine.submit(Request(PROMPTS[0])).result(60).error is None


def test_log_probabilities_are_those_of_the_model(engine, reference):
    import torch

    for prompt in PROMPTS[:5]:
        completion = ask(engine, prompt, logprobs=True, max_new_tokens=8)
        tokens = reference.tokens(prompt, max_new_tokens=8)[: completion.generated_tokens]
        ids = reference.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            scores = reference.model(torch.cat([ids, torch.tensor([tokens])], dim=1)).logits[0].log_softmax(-1)
        wanted = [float(scores[ids.shape[1] - 1 + place, token]) for place, token in enumerate(tokens)]
        assert completion.logprobs == pytest.approx(wanted, abs=1e-3)
    assert ask(engine, PROMPTS[0]).logprobs is None


def test_a_seed_makes_sampling_repeatable_in_any_batch(engine):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 16}
    alone = [ask(engine, prompt, seed=7, **options).text for prompt in PROMPTS]
    assert [completion.text for completion in complete(engine, PROMPTS, seed=7, **options)] == alone
    assert [completion.text for completion in complete(engine, PROMPTS, seed=8, **options)] != alone
    unseeded = {ask(engine, PROMPTS[0], **options).text for _ in range(5)}
    assert len(unseeded) > 1


def test_several_answers_differ_and_are_counted_together(engine):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "seed": 1, "ignore_eos": True}
    completion = ask(engine, PROMPTS[0], n=3, **options)
    answers = {completion.text, *completion.alternatives}
    assert len(answers) == 3
    assert completion.generated_tokens == 36
    assert ask(engine, PROMPTS[0], n=3, **options).alternatives == completion.alternatives
    assert ask(engine, PROMPTS[0], **options).text == completion.text


def test_several_answers_are_each_cut_at_a_stop_string(engine):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 40, "seed": 3, "n": 8}
    whole = ask(engine, PROMPTS[0], **options)
    cut = ask(engine, PROMPTS[0], stop="e", **options)
    for before, after in zip((whole.text, *whole.alternatives), (cut.text, *cut.alternatives), strict=True):
        assert after == before.split("e")[0]


def test_beam_search_gives_the_best_answers_first(engine, reference):
    options = {"num_beams": 3, "n": 3, "max_new_tokens": 10, "logprobs": True, "ignore_eos": True}
    completion = ask(engine, PROMPTS[1], **options)
    assert len({completion.text, *completion.alternatives}) == 3
    assert completion.generated_tokens == 30
    greedy = ask(engine, PROMPTS[1], max_new_tokens=10, logprobs=True, ignore_eos=True)
    assert sum(completion.logprobs) >= sum(greedy.logprobs) - 1e-4
    assert "".join(engine.stream(Request(PROMPTS[1], options=GenerationOptions(**options)))) == completion.text


def test_beams_are_cut_at_a_stop_string(engine):
    options = {"num_beams": 3, "n": 3, "max_new_tokens": 20}
    whole = ask(engine, PROMPTS[1], **options)
    for stop in set(whole.text):
        cut = ask(engine, PROMPTS[1], stop=stop, **options)
        assert cut.text == whole.text.split(stop)[0]
        assert cut.alternatives == tuple(text.split(stop)[0] for text in whole.alternatives)
        assert cut.finish_reason == "stop"
        assert cut.generated_tokens <= whole.generated_tokens


def test_echo_puts_the_prompt_before_the_answer(engine, expected):
    assert ask(engine, PROMPTS[0], echo=True, max_new_tokens=NEW_TOKENS).text == PROMPTS[0] + expected[0]
    options = GenerationOptions(echo=True, max_new_tokens=NEW_TOKENS)
    assert "".join(engine.stream(Request(PROMPTS[0], options=options))) == PROMPTS[0] + expected[0]


@pytest.mark.parametrize(
    ("policy", "kept"), [("truncate_left", slice(-480, None)), ("truncate_right", slice(None, 480))]
)
def test_a_long_prompt_is_cut_as_chosen(engine, reference, policy, kept):
    import torch

    prompt = " ".join(CHOOSE.choices(WORDS, k=600))
    completion = ask(engine, prompt, context_overflow=policy, max_new_tokens=32)
    tokens = reference.tokenizer(prompt).input_ids[kept]
    answer = reference.model.generate(torch.tensor([tokens]), max_new_tokens=32, do_sample=False)[0, len(tokens) :]
    assert completion.prompt_tokens == 480
    assert completion.text == reference.tokenizer.decode(answer, skip_special_tokens=True)


def test_a_long_prompt_is_refused_or_skipped(engine):
    prompt = " ".join(CHOOSE.choices(WORDS, k=600))
    refused = ask(engine, prompt)
    assert (refused.error_code, refused.text) == ("too_long", "")
    assert str(engine.count_tokens(prompt)) in refused.error
    assert str(engine.context_length) in refused.error
    skipped = ask(engine, prompt, context_overflow="skip")
    assert (skipped.finish_reason, skipped.error, skipped.status) == ("skipped", None, "skipped")


def test_options_of_a_request_go_over_those_of_the_model(tiny_openvino):
    defaults = GenerationOptions(max_new_tokens=5, do_sample=True, temperature=2.0, seed=1, ignore_eos=True)
    with load_openvino(tiny_openvino, options=defaults) as loaded:
        assert ask(loaded, PROMPTS[0]).generated_tokens == 5
        assert ask(loaded, PROMPTS[0], max_new_tokens=7).generated_tokens == 7
        greedy = ask(loaded, PROMPTS[0], do_sample=False, max_new_tokens=9)
        assert greedy.text == ask(loaded, PROMPTS[0], do_sample=False, max_new_tokens=9).text


def test_prompts_can_guess_their_own_continuation(tiny_openvino, expected):
    options = EngineOptions(cache_size_gb=0.25, prompt_lookup_tokens=4)
    with load_openvino(tiny_openvino, engine=options) as loaded:
        assert [completion.text for completion in complete(loaded, PROMPTS[:12])] == expected[:12]


def test_a_draft_model_does_not_change_the_text(tiny_openvino, expected):
    options = EngineOptions(cache_size_gb=0.25, draft_model=str(tiny_openvino))
    with load_openvino(tiny_openvino, engine=options) as loaded:
        assert [completion.text for completion in complete(loaded, PROMPTS[:12])] == expected[:12]
