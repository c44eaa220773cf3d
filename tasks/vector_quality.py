"""How near the vectors or scores of an export are to those of its source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.embedding import as_embeddings, as_score
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import QualityError
from prefect_huggingface.tasks.quality import ExportQuality, FormatQuality
from prefect_huggingface.tasks.records import Export, Request, Snapshot

# Of so many texts each is a query for a reranker; more would take long and say no more.
QUERIES = 4
# Texts that are too long for a model are cut for both.
LENIENT = GenerationOptions(context_overflow="truncate_right")


def compare_vectors(
    model: LocalModel, models: Sequence[LocalModel], exports: Sequence[Export], snapshot: Snapshot, texts: list[str]
) -> ExportQuality:
    """Compare exports with their source by the engines that answer: vectors by their angle, rankings by their order.

    Args:
        model: Model with task "feature-extraction" or "text-ranking".
        models: The model in each format.
        exports: Export of each of them.
        snapshot: Source of the exports.
        texts: Texts to compare on.

    Raises:
        QualityError: If a text has no vector.
    """
    plain: dict[str, Any] = {
        "backend": "torch",
        "weight_format": None,
        "quantization": None,
        "ov_config": {},
        "dtype": "float32",
    }
    expected, source_speed = _compute(model.model_copy(update={**plain, "device": "cpu"}), texts)
    found = []
    for one, export in zip(models, exports, strict=True):
        got, speed = _compute(one, texts)
        cosine = None if model.task == "text-ranking" else float(_cosines(expected, got).min())
        ranking = spearman(_orders(expected, model.task), _orders(got, model.task))
        found.append(
            FormatQuality(
                weight_format=str(export.recipe.get("weight_format") or one.weight_format),
                key=export.key,
                agreement=max(0.0, ranking if cosine is None else min(cosine, ranking)),
                divergence=0.0,
                perplexity_ratio=1.0,
                exact_matches=_same_best(expected, got, model.task),
                positions=len(texts),
                tokens_per_second=speed,
                size_bytes=export.size_bytes,
                cosine=cosine,
                ranking=ranking,
            )
        )
    size = sum(file.size for file in snapshot.files)
    return ExportQuality(model.model_id, snapshot.commit, len(texts), source_speed, size, tuple(found))


def spearman(one: Any, other: Any) -> float:
    """Return the rank correlation of two lists of numbers, 1 where they have the same order."""
    import numpy as np

    first, second = (np.argsort(np.argsort(np.ravel(values), kind="stable")) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def _compute(model: LocalModel, texts: list[str]) -> tuple[Any, float]:
    """Return the vectors of texts, or the scores of [queries, texts], and the tokens per second."""
    import numpy as np

    engine = load_engine(model)
    if model.task == "text-ranking":
        requests = [Request(query, pair=text, options=LENIENT) for query in texts[:QUERIES] for text in texts]
    else:
        requests = [Request(text, options=LENIENT, input_type="document") for text in texts]
    started = time.perf_counter()
    completions = engine.answer_all(requests)
    seconds = time.perf_counter() - started
    failed = next((one for one in completions if one.vector is None), None)
    if failed is not None:
        raise QualityError(f"{model.model_id!r} gives no vector for a text: {failed.error}")
    speed = sum(completion.prompt_tokens for completion in completions) / seconds
    if model.task == "text-ranking":
        return np.array([as_score(one).score for one in completions]).reshape(-1, len(texts)), speed
    return as_embeddings(completions).vectors, speed


def _cosines(one: Any, other: Any) -> Any:
    import numpy as np

    return (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def _orders(values: Any, task: str) -> Any:
    """Return what ranks texts: the scores, or how similar each text is to each other one."""
    import numpy as np

    if task == "text-ranking":
        return values
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    return (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]


def _same_best(one: Any, other: Any, task: str) -> float:
    """Return the share of the queries whose best text is the same."""
    best = []
    for values in (one, other):
        table = _orders(values, task).reshape(len(values), -1)
        best.append(table.argmax(1))
    return float((best[0] == best[1]).mean())
