"""An answer of the demo is right by whole words and numbers."""

from __future__ import annotations

import json

import pytest

from support.quickstart import FOLDER, load_script

is_right = load_script("grading").is_right


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("The capital of Italy is Rome.", ["Rome"]),
        ("ROME, of course", ["Rome"]),
        ("Water boils at 100°C.", ["100"]),
        ("There are seven days.", ["7", "seven"]),
        ("It has 24 hours.", ["24", "twenty-four"]),
        ("It is H2O.", ["H2O", "H₂O"]),
        ("(Delhi)", ["New Delhi", "Delhi"]),
        ("The symbol is 'O'.", ["O"]),
    ],
)
def test_an_answer_is_found(text: str, accepted: list[str]) -> None:
    assert is_right(text, accepted)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("Romeo wrote it.", ["Rome"]),
        ("There are 17 days.", ["7"]),
        ("It freezes at 100 degrees.", ["0"]),
        ("About 7.5, or 1,000", ["7", "1"]),
        ("It freezes at -0.", ["0"]),
        ("The symbol of oxygen is unknown.", ["O"]),
        ("Gold has an audience.", ["Au"]),
        ("", ["Paris"]),
    ],
)
def test_a_part_of_another_word_is_no_answer(text: str, accepted: list[str]) -> None:
    assert not is_right(text, accepted)


def test_every_question_of_the_demo_has_answers() -> None:
    rows = [json.loads(line) for line in (FOLDER / "real_questions.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(range(1, 61))
    assert all(row["answers"] and all(is_right(answer, row["answers"]) for answer in row["answers"]) for row in rows)
