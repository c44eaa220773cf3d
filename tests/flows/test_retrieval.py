"""The retrieval chain of the quickstart: facts are found for each question, ordered, and shown in one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from support.quickstart import load_script
from support.vector_models import make_embedder, make_ranker


@pytest.mark.usefixtures("prefect_server")
def test_each_question_has_facts_and_an_answer(session_folder: Path, tiny_llama: Path) -> None:
    module = load_script("retrieval")
    embedder = make_embedder(session_folder / "retrieval" / "embedder", "bert")
    ranker = make_ranker(session_folder / "retrieval" / "ranker", "bert-reranker")
    torch = {"backend": "torch", "dtype": "float32"}
    facts = module.list_facts()

    rows = module.answer_from_facts(
        LocalModel(model_id=str(embedder), task="feature-extraction", **torch),
        LocalModel(model_id=str(tiny_llama), options=GenerationOptions(max_new_tokens=4), **torch),
        # A fact is nearer to itself than to any other one.
        (facts[3], facts[140]),
        LocalModel(model_id=str(ranker), task="text-ranking", **torch),
    )

    assert [row["question"] for row in rows] == [facts[3], facts[140]]
    for row in rows:
        assert all(f"{part.strip()}." in facts for part in row["facts"].split(".") if part.strip())
        assert row["answer"]
