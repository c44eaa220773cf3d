"""The choice of a token follows the probabilities of the model and the options of its own row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.torch_sampling import Sampler, log_probabilities, sample_tokens

SCORES = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 20_000


def draws(count: int = DRAWS, **options) -> Counter:
    rows = [Sampler(GenerationOptions(do_sample=True, **options), [], [], seed) for seed in range(count)]
    return Counter(sample_tokens(rows, SCORES.expand(count, -1)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probability(temperature):
    counts = draws(temperature=temperature)
    for token, probability in enumerate(torch.softmax(SCORES / temperature, -1).tolist()):
        # Four standard deviations.
        spread = 4 * (DRAWS * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - DRAWS * probability) <= spread + 1


def test_top_k_and_top_p_leave_the_tokens_that_they_leave_in_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    for top_k in (1, 2, 5, 50):
        kept = torch.isfinite(TopKLogitsWarper(min(top_k, 6))(None, SCORES[None]))[0].nonzero()[:, 0].tolist()
        assert sorted(draws(4000, top_k=top_k, temperature=3.0)) == kept
    for top_p in (0.05, 0.6, 0.85, 0.97, 1.0):
        warped = SCORES[None] / 1.5
        kept = torch.isfinite(TopPLogitsWarper(top_p)(None, warped))[0].nonzero()[:, 0].tolist()
        assert sorted(draws(4000, top_p=top_p, temperature=1.5)) == kept


@given(data=st.data())
@settings(deadline=None)
def test_a_row_chooses_the_same_beside_any_other_rows(data):
    options = st.builds(
        GenerationOptions,
        do_sample=st.just(True),
        seed=st.integers(0, 99),
        temperature=st.floats(0.1, 3),
        top_k=st.none() | st.integers(1, 8),
        top_p=st.none() | st.floats(0.05, 1),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
    )
    chosen = data.draw(st.lists(options, min_size=1, max_size=6))
    scores = torch.randn(len(chosen), 12, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 50))))
    alone = [
        sample_tokens([Sampler(row, [1, 2], [0], row.seed)], scores[[place]])[0] for place, row in enumerate(chosen)
    ]
    assert sample_tokens([Sampler(row, [1, 2], [0], row.seed) for row in chosen], scores) == alone


def test_extreme_settings_are_stable():
    assert set(draws(50, temperature=1e-6)) == {0}
    assert len(draws(2000, temperature=100.0)) == len(SCORES)
    flat = torch.full((1, 5), -1e30)
    flat[0, 3] = 1e30
    assert sample_tokens([Sampler(GenerationOptions(do_sample=True, seed=0), [], [])], flat) == [3]


def test_scores_of_the_caller_are_not_changed():
    scores = SCORES[None].clone()
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), [0], [1], least_tokens=3)
    sample_tokens([sampler], scores)
    assert torch.equal(scores[0], SCORES)


def test_log_probabilities_are_of_the_rows_that_are_asked_for():
    scores = torch.stack([SCORES, SCORES.flip(0)])
    expected = torch.log_softmax(SCORES, -1)
    assert log_probabilities(scores, [1], [4, 5]) == pytest.approx([expected[0].item()])
    assert log_probabilities(scores, [], [0, 0]) == []
