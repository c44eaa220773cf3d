"""The index from prompts to answers gives back what was added first, whatever its size, and forgets nothing."""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest

from prefect_huggingface.tasks.storage.journals import duplicates
from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
from prefect_huggingface.tasks.storage.journals.journal import ResultRow


def digest(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=16).digest()


def result(number: int, hash: bytes | None = None) -> ResultRow:
    text = f"Text {number} \udc80\n"
    details = '{"parsed": 1}'
    return ResultRow(number, 1, text, "ok", "stop", number, 3, number / 7, None, details, False, hash or digest(number))


@pytest.mark.parametrize("pending", [1, 7, 10_000])
def test_what_was_added_is_found(monkeypatch: pytest.MonkeyPatch, pending: int) -> None:
    monkeypatch.setattr(duplicates, "PENDING_ROWS", pending)
    dice, known = random.Random(pending), {}
    with ResultIndex() as index:
        for _ in range(200):
            numbers = [dice.randrange(2000) for _ in range(dice.randrange(30))]
            asked = [digest(dice.randrange(2000)) for _ in range(40)]
            index.add(result(number) for number in numbers)
            known |= {digest(number): result(number) for number in numbers}
            assert index.find(asked) == {each: known[each] for each in asked if each in known}
        assert index.find([]) == {}


def test_the_first_answer_of_a_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "PENDING_ROWS", 2)
    with ResultIndex() as index:
        for round in range(3):
            index.add([result(round, digest(1)), result(9, digest(1)), result(10 + round)])
        assert index.find([digest(1)]) == {digest(1): result(0, digest(1))}


def test_prompts_whose_hashes_begin_alike_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "PENDING_ROWS", 1)
    one, other, third = (b"\xff" * 8 + bytes([number]) * 8 for number in range(3))
    with ResultIndex() as index:
        index.add([result(1, one)])
        index.add([result(2, other)])  # its key is taken, so it is asked anew
        assert index.find([one, other, third]).get(one) == result(1, one)
        assert index.find([other, third]).get(third) is None
        assert index.find([other]).get(other) is None
