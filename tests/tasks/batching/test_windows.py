"""Windows are bounded and keep every item; within one, shared prefixes stand together."""

from __future__ import annotations

import random
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from prefect_huggingface.tasks.batching.requests import RowRequest
from prefect_huggingface.tasks.batching.shard import PREFIX_CHARACTERS, make_windows, order_window


def asked(texts: list[str]) -> list[RowRequest]:
    return [RowRequest(number, text, text, {}) for number, text in enumerate(texts)]


def ordered(texts: list[str]) -> list[str]:
    return [each.text for each in order_window(asked(texts))]


@given(st.lists(st.text(max_size=30)), st.integers(1, 10), st.integers(1, 100))
def test_windows_are_bounded_and_lose_nothing(texts: list[str], rows: int, characters: int) -> None:
    windows = [[each.text for each in window] for window in make_windows(asked(texts), rows, characters)]
    assert [text for window in windows for text in window] == texts
    for window in windows:
        assert 0 < len(window) <= rows
        assert len(window) == 1 or sum(map(len, window[:-1])) < characters


@given(st.lists(st.text(max_size=100)))
def test_ordering_is_a_permutation(texts: list[str]) -> None:
    assert sorted(ordered(texts)) == sorted(texts)


def test_shared_prefixes_stand_together_and_long_ones_come_first() -> None:
    documents = ["".join(random.Random(seed).choices("abcdefgh ", k=400)) for seed in range(5)]
    texts = [f"Read this: {document} Question {number}?" for number in range(20) for document in documents]
    singles = [f"Read this: {number:04}{'z' * number}" for number in range(50)]
    mixed = [*texts, *singles]
    random.Random(1).shuffle(mixed)
    found = ordered(mixed)

    start = len("Read this: ")
    groups = [key for key, _ in groupby(text[start : start + PREFIX_CHARACTERS] for text in found if len(text) > 400)]
    assert len(groups) == 5
    alone = [len(text) for text in found if len(text) < 100]
    assert alone == sorted(alone, reverse=True)
