"""A table of options that mean the same on OpenVINO and on torch, on a tiny model in full precision."""

from __future__ import annotations

import math

import pytest

from prefect_huggingface.tasks.records import Completion
from support.engine_families import PROMPTS, Family

KINDS = ["text", "seq2seq", pytest.param("images", marks=pytest.mark.slow)]
GREEDY = [
    {}, {"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}, {"presence_penalty": 0.3}, {"presence_penalty": -1.0},
    {"frequency_penalty": 0.2}, {"frequency_penalty": -0.5}, {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.3}, {"min_new_tokens": 12},
    {"ignore_eos": True}, {"ignore_eos": True, "min_new_tokens": 12}, {"num_beams": 4}, {"num_beams": 4, "n": 3},
    # Sampling that leaves one token is greedy.
    {"do_sample": True, "top_k": 1, "seed": 1}, {"do_sample": True, "min_p": 0.999999, "seed": 1},
    {"do_sample": True, "top_p": 1e-6, "seed": 1},
]  # fmt: skip


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, family_of) -> list[Family]:
    return [family_of(f"{backend}-{request.param}") for backend in ("openvino", "torch")]


def meaning(completion: Completion, family: Family) -> tuple[object, ...]:
    return (
        completion.text, completion.alternatives, completion.finish_reason, completion.generated_tokens,
        # OpenVINO does not tell how many tokens an image becomes.
        None if family.images else completion.prompt_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_an_option_means_the_same_on_both_backends(pair, options):
    for prompt in PROMPTS[:4]:
        found = [family.ask(prompt, max_new_tokens=16, logprobs=True, **options) for family in pair]
        refused = [completion for completion in found if completion.error_code == "invalid_option"]
        if refused:
            # What one backend cannot do it refuses, with the name of the option.
            assert all(any(name in completion.error for name in options) for completion in refused)
            continue
        assert [completion.error for completion in found] == [None, None]
        if pair[0].images and "repetition_penalty" in options:
            # OpenVINO knows no tokens of a prompt with images, so that it counts those of the answer alone.
            continue
        assert meaning(found[0], pair[0]) == meaning(found[1], pair[1])
        assert len(found[0].logprobs) > 0
        assert found[0].logprobs == pytest.approx(found[1].logprobs, abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}], ids=str)
def test_a_seed_repeats_a_text_and_several_answers_differ(pair, options):
    sampled = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 12, **options}
    for family in pair:
        first = family.ask(PROMPTS[0], n=3, seed=7, **sampled)
        again = family.ask(PROMPTS[0], n=3, seed=7, **sampled)
        assert first.error is None
        assert (first.text, first.alternatives) == (again.text, again.alternatives)
        assert len({first.text, *first.alternatives}) == 3
        assert family.ask(PROMPTS[0], seed=7, **sampled).text == first.text
        assert family.ask(PROMPTS[0], seed=8, **sampled).text != first.text
        assert len({family.ask(PROMPTS[0], **sampled).text for _ in range(4)}) > 1


@pytest.mark.parametrize("share", [0.5])
def test_min_p_leaves_the_tokens_that_are_likely_enough(pair, share):
    for family in pair:
        likeliest = family.ask(PROMPTS[0], max_new_tokens=1, logprobs=True, ignore_eos=True).logprobs[0]
        options = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 1, "logprobs": True, "ignore_eos": True}
        free = [family.submit(PROMPTS[0], seed=seed, **options) for seed in range(60)]
        kept = [family.submit(PROMPTS[0], seed=seed, min_p=share, **options) for seed in range(60)]
        least = likeliest + math.log(share) - 1e-3
        assert min(future.result(60).logprobs[0] for future in free) < least
        assert all(future.result(60).logprobs[0] >= least for future in kept)
        if not family.images:  # the random model for images is nearly sure of one
            assert len({future.result(60).text for future in kept}) > 1
