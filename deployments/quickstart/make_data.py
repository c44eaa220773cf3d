"""Questions and answers to train and to test the quickstart model. Standard library only.

All text is made here from `facts.py` and `phrasings.py`, and the same seed gives the same data. Held-out questions use
phrasings, sentences' subjects (names, pairs of name and age) and combinations that no training example has.

`python make_data.py` writes `questions.jsonl`, the questions of the quickstart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import facts
import phrasings
from phrasings import expand

KINDS = ("number", "capital", "country", "continent", "sentiment", "extraction")
NEW_NAME = "extraction, name never seen"  # only evaluated
QUESTION_COUNTS = {"number": 160, "capital": 80, "country": 30, "continent": 30, "sentiment": 40, "extraction": 60}
TRAINING_SHARES = {
    "number": 28, "capital": 13, "country": 7, "continent": 8, "sentiment": 11, "extraction": 28, "repetition": 5
}  # fmt: skip
QUESTIONS_FILE = Path(__file__).parent / "questions.jsonl"
_HELD_OUT_PAIR_EVERY = 8


@dataclass(frozen=True)
class Question:
    """One question with the answer that exact match compares with."""

    id: str
    kind: str
    question: str
    answer: str


def _is_held_out_pair(name: str, age: int) -> bool:
    return (sum(map(ord, name)) + age) % _HELD_OUT_PAIR_EVERY == 0


def _invented_name(rng: random.Random) -> str:
    """Invent a name of any letters, so that a model learns to copy a name and not to know it."""
    manner = rng.random()
    if manner < 0.3:
        first, second = rng.choice(facts.NAMES), rng.choice(facts.NAMES)
        return first[: rng.randint(1, 4)] + second[-rng.randint(1, 4) :].lower()
    if manner < 0.6:
        consonants, vowels = "bcdfghjklmnprstvwyz", ("a", "e", "i", "o", "u", "ia", "en", "ar", "il")
        syllables = (rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.randint(1, 4)))
        return ("".join(syllables) + rng.choice(("", "n", "s", "ra", "el", "th"))).capitalize()
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzaeiou") for _ in range(rng.randint(2, 7))).capitalize()


def _small_or_any(rng: random.Random, largest: int) -> int:
    """Choose a number, those of one digit more often: they are few and easily taken for longer ones."""
    return rng.choice((*range(10), 100)) if rng.random() < 0.15 else rng.randint(0, largest)


def _person(rng: random.Random, held_out: bool) -> tuple[str, int]:
    """Choose a name and an age; a held-out pair never occurs in training, though its name does."""
    while True:
        age = max(1, _small_or_any(rng, 100))
        if held_out:
            name = rng.choice(facts.NAMES)
        else:
            name = _invented_name(rng) if rng.random() < 0.35 else rng.choice(facts.NAMES)
        if name in facts.HELD_OUT_NAMES or _is_held_out_pair(name, age):
            if held_out:
                return name, age
        elif not held_out:
            surname = rng.choice(facts.SURNAMES) if rng.random() < 0.5 else _invented_name(rng)
            return (f"{name} {surname}" if rng.random() < 0.15 else name), age


def _extraction(rng: random.Random, person: tuple[str, int]) -> tuple[dict[str, str], str]:
    name, age = person
    city = rng.choice(facts.PLACES).capital
    sentence = expand(rng, rng.choice(phrasings.PERSON_SENTENCES)).format(name=name, age=age, city=city)
    return {"s": sentence}, json.dumps({"name": name, "age": age}, ensure_ascii=False)


def _sentiment(rng: random.Random, held_out: bool) -> tuple[dict[str, str], str]:
    """Make a sentence; those with an odd sum of characters are held out."""
    label = rng.choice(("positive", "negative"))
    words, opposites = (facts.GOOD_WORDS, facts.BAD_WORDS)[:: 1 if label == "positive" else -1]
    verbs, opposite_verbs = (facts.GOOD_VERBS, facts.BAD_VERBS)[:: 1 if label == "positive" else -1]
    while True:
        pattern = expand(rng, rng.choice(phrasings.SENTIMENT_SENTENCES))
        sentence = pattern.format(
            word=rng.choice(words),
            opposite=rng.choice(opposites),
            verb=rng.choice(verbs),
            opposite_verb=rng.choice(opposite_verbs),
            thing=rng.choice(facts.THINGS),
        )
        if (sum(map(ord, sentence)) % 10 == 0) == held_out:
            return {"s": sentence}, label


def _slots(rng: random.Random, kind: str, held_out: bool) -> tuple[dict[str, str], str]:
    """Choose the facts of a question and give its answer."""
    if kind == "extraction":
        return _extraction(rng, _person(rng, held_out))
    if kind == NEW_NAME:
        return _extraction(rng, (rng.choice(facts.HELD_OUT_NAMES), rng.randint(1, 100)))
    if kind == "repetition":
        words = " ".join(_invented_name(rng) for _ in range(rng.randint(1, 5)))
        return {"s": words}, words
    if kind == "sentiment":
        return _sentiment(rng, held_out)
    if kind == "number":
        number, language = _small_or_any(rng, facts.LARGEST_NUMBER), rng.choice(facts.LANGUAGES)
        shown = language if rng.random() < 0.5 else language.capitalize()
        return {"n": str(number), "language": shown}, facts.number_in_words(number, language)
    place = rng.choice(facts.PLACES)
    if kind == "continent":
        place = rng.choice([place for place in facts.PLACES if place.continent])
        return {"place": rng.choice((place.country, place.capital))}, place.continent
    return place._asdict(), place.capital if kind == "capital" else place.country


def make_question(rng: random.Random, kind: str, *, held_out: bool) -> tuple[str, str]:
    """Make one question and its answer.

    Args:
        rng: Source of all choices.
        kind: One of `KINDS`, `repetition` or, held out only, `NEW_NAME`.
        held_out: Whether to use only what training never uses, instead of only what it may use.
    """
    slots, answer = _slots(rng, kind, held_out)
    asked = "extraction" if kind == NEW_NAME else kind
    pattern = rng.choice((phrasings.HELD_OUT if held_out else phrasings.TRAINING)[asked])
    return expand(rng, pattern).format(**slots), answer


def vary(rng: random.Random, kind: str, question: str) -> str:
    """Change what should not matter: case, end mark, spaces around, a greeting, a closing."""
    if kind not in ("extraction", "repetition") and rng.random() < 0.15:
        question = question.lower()
    elif kind not in ("extraction", "repetition", "sentiment") and rng.random() < 0.03:
        question = question.upper()
    if rng.random() < 0.15 and question[-1] in "?.!":
        question = question[:-1] + rng.choice(("", "", "", " ?", "??", "."))
    if rng.random() < 0.2:
        question = rng.choice(phrasings.GREETINGS) + question
    if kind != "repetition" and rng.random() < 0.12 and question[-1] in "?.!":
        question += rng.choice(phrasings.CLOSINGS)
    if rng.random() < 0.06:
        question = rng.choice((" ", "  ", "\n")) + question
    return question + rng.choice((" ", "  ")) if rng.random() < 0.06 else question


def make_preamble(rng: random.Random, sentence_count: int) -> str:
    """Write a long text that has nothing to do with the question that follows."""
    sentences = []
    for _ in range(sentence_count):
        pattern = expand(rng, rng.choice(phrasings.PREAMBLE_SENTENCES))
        for slot, words in (("adjective", phrasings.ADJECTIVES), ("noun", phrasings.NOUNS), ("role", phrasings.ROLES),
                            ("action", phrasings.ACTIONS), ("name", facts.NAMES)):  # fmt: skip
            while "{" + slot + "}" in pattern:
                pattern = pattern.replace("{" + slot + "}", rng.choice(words), 1)
        while "{nonsense}" in pattern:
            pattern = pattern.replace("{nonsense}", _invented_name(rng).lower(), 1)
        pattern = pattern.replace("{digits}", str(rng.randint(1, 2100)))
        sentences.append(pattern.replace("{city}", rng.choice(facts.PLACES).capital))
    return rng.choice((" ", " ", "\n")).join(sentences)


def training_questions(seed: int) -> Iterator[tuple[str, str, str]]:
    """Give training triples of kind, question and answer without end."""
    rng = random.Random(seed)
    kinds, shares = list(TRAINING_SHARES), list(TRAINING_SHARES.values())
    while True:
        kind = rng.choices(kinds, shares)[0]
        question, answer = make_question(rng, kind, held_out=False)
        yield kind, vary(rng, kind, question), answer


def held_out_questions(seed: int, counts: dict[str, int]) -> list[Question]:
    """Make different held-out questions, `counts[kind]` of each kind, the languages in turn."""
    rng = random.Random(seed)
    questions: list[Question] = []
    for kind, count in counts.items():
        seen: set[str] = set()
        while len(seen) < count:
            question, answer = make_question(rng, kind, held_out=True)
            turn = facts.LANGUAGES[len(seen) % len(facts.LANGUAGES)]
            if question not in seen and (kind != "number" or turn in question.lower()):
                seen.add(question)
                questions.append(Question(f"{kind}-{len(seen):03d}", kind, question, answer))
    return questions


def quickstart_questions() -> list[Question]:
    """Make the questions of `questions.jsonl`."""
    return held_out_questions(20_260, QUESTION_COUNTS)


def main() -> None:
    """Check that no phrasing is shared and write `questions.jsonl`."""
    for kind in KINDS:
        training, held_out = (
            {phrase.rstrip("?. ").lower() for pattern in table[kind] for phrase in phrasings.expansions(pattern)}
            for table in (phrasings.TRAINING, phrasings.HELD_OUT)
        )
        if shared := training & held_out:
            raise SystemExit(f"Phrasings of `{kind}` are in both splits: {sorted(shared)}. Change one of them.")
    rows = (json.dumps(asdict(question), ensure_ascii=False) for question in quickstart_questions())
    QUESTIONS_FILE.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
