"""The index from prompts to answers gives back what was added first, whatever its size, and forgets nothing."""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest

from prefect_huggingface.tasks.storage.journals import answer_index
from prefect_huggingface.tasks.storage.journals.answer_index import AnswerIndex


def digest(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=16).digest()


def fields(number: int) -> tuple:
    return (f"Text {number} \udc80\n", "ok", "stop", number, 3, number / 7, None, '{"parsed": 1}')


@pytest.mark.parametrize("pending", [1, 7, 10_000])
def test_what_was_added_is_found(monkeypatch: pytest.MonkeyPatch, pending: int) -> None:
    monkeypatch.setattr(answer_index, "PENDING_ROWS", pending)
    dice, known = random.Random(pending), {}
    with AnswerIndex() as index:
        for _ in range(200):
            numbers = [dice.randrange(2000) for _ in range(dice.randrange(30))]
            asked = [digest(dice.randrange(2000)) for _ in range(40)]
            index.add((digest(number), *fields(number)) for number in numbers)
            known |= {digest(number): fields(number) for number in numbers}
            assert index.find(asked) == {each: known[each] for each in asked if each in known}
        assert index.find([]) == {}


def test_the_first_answer_of_a_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_index, "PENDING_ROWS", 2)
    with AnswerIndex() as index:
        for round in range(3):
            index.add([(digest(1), *fields(round)), (digest(1), *fields(9)), (digest(10 + round), *fields(round))])
        assert index.find([digest(1)]) == {digest(1): fields(0)}


def test_prompts_whose_hashes_begin_alike_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_index, "PENDING_ROWS", 1)
    one, other, third = (b"\xff" * 8 + bytes([number]) * 8 for number in range(3))
    with AnswerIndex() as index:
        index.add([(one, *fields(1))])
        index.add([(other, *fields(2))])  # its key is taken, so it is asked anew
        assert index.find([one, other, third]).get(one) == fields(1)
        assert index.find([other, third]).get(third) is None
        assert index.find([other]).get(other) is None
