"""Tasks that turn texts into vectors, and score texts against a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import EmbeddingOptions, GenerationOptions, LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.records import Completion, ErrorCode, Request
from prefect_huggingface.tasks.run_logs import library_logs

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts, in their order.

    Attributes:
        vectors: float32 of [texts, dimensions]; the row of a text that failed is NaN.
        tokens: Number of tokens of each text, as the model saw it.
        errors: Sentence that says what went wrong with a text, or None.
        error_codes: Kind of each error, or None.
    """

    vectors: np.ndarray
    tokens: tuple[int, ...]
    errors: tuple[str | None, ...]
    error_codes: tuple[ErrorCode | None, ...]

    @property
    def dimensions(self) -> int:
        """Number of dimensions, 0 where no text has a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well one text answers a query.

    Attributes:
        score: The higher, the better; None for a text that failed.
        tokens: Number of tokens of query and text.
        error: Sentence that says what went wrong, or None.
        error_code: Kind of the error, or None.
    """

    score: float | None
    tokens: int = 0
    error: str | None = None
    error_code: ErrorCode | None = None


def compute_vectors(
    model: LocalModel,
    texts: Sequence[str],
    input_type: Literal["query", "document"] = "document",
    embedding: EmbeddingOptions | None = None,
    options: GenerationOptions | None = None,
) -> Embeddings:
    """Return the vector of each text.

    The model is loaded once per process and then reused; texts of similar length are computed together, whoever asks. A
    text that is empty or too long has an error in its place, and the others go on.

    Args:
        model: Model with task "feature-extraction", which is downloaded and exported first where needed.
        texts: N texts, in order. A single string is not a list of texts.
        input_type: Whether the texts are queries or documents; some models have a prompt for each.
        embedding: Options over those of the model.
        options: `context_overflow` says what happens to texts that are too long.

    Returns:
        N vectors, in the order of the texts.

    Raises:
        SettingsError: If the model is for another task.
        EngineError: If the model cannot be loaded.
    """
    _check(model, "feature-extraction", texts)
    requests = [Request(text, options=options, input_type=input_type, embedding=embedding) for text in texts]
    return as_embeddings(_run(model, requests))


def compute_scores(
    model: LocalModel,
    query: str,
    texts: Sequence[str],
    embedding: EmbeddingOptions | None = None,
    options: GenerationOptions | None = None,
) -> list[TextScore]:
    """Return how well each text answers a query.

    Args:
        model: Model with task "text-ranking": a cross-encoder, or a reranker that is a language model.
        query: What is asked.
        texts: N texts, in order. A single string is not a list of texts.
        embedding: Options over those of the model.
        options: `context_overflow` says what happens to pairs that are too long.

    Returns:
        N scores, in the order of the texts.

    Raises:
        SettingsError: If the model is for another task.
        EngineError: If the model cannot be loaded.
    """
    _check(model, "text-ranking", texts)
    requests = [Request(query, pair=text, options=options, embedding=embedding) for text in texts]
    return [as_score(completion) for completion in _run(model, requests)]


def as_embeddings(completions: Sequence[Completion]) -> Embeddings:
    """Return the record of completions that have a vector or an error.

    Raises:
        SettingsError: If the vectors differ in length.
    """
    import numpy as np

    found = [completion.vector for completion in completions]
    sizes = {len(vector) for vector in found if vector is not None}
    if len(sizes) > 1:
        raise SettingsError(f"All texts must have the same number of dimensions, got {sorted(sizes)}.")
    vectors = np.full((len(found), max(sizes, default=0)), np.nan, dtype=np.float32)
    for place, vector in enumerate(found):
        if vector is not None:
            vectors[place] = vector
    return Embeddings(
        vectors,
        tuple(completion.prompt_tokens for completion in completions),
        tuple(map(error_of, completions)),
        tuple(None if completion.status == "ok" else _code_of(completion) for completion in completions),
    )


def as_score(completion: Completion) -> TextScore:
    """Return the score of a completion that has one or an error."""
    error = error_of(completion)
    if error is not None:
        return TextScore(None, completion.prompt_tokens, error, _code_of(completion))
    return TextScore(float(completion.vector[0]), completion.prompt_tokens)


def error_of(completion: Completion) -> str | None:
    """Return why a completion has no vector, or None where it has one."""
    if completion.vector is not None:
        return None
    if completion.error is None and completion.finish_reason == "skipped":
        return f"The text has {completion.prompt_tokens} tokens, more than the model takes. It was skipped."
    return completion.error or f"There is no vector: the request ended by {completion.finish_reason!r}."


def _code_of(completion: Completion) -> ErrorCode:
    codes: dict[str, ErrorCode] = {"skipped": "too_long", "deadline": "deadline", "cancelled": "cancelled"}
    return completion.error_code or codes.get(completion.finish_reason, "engine_error")


def _check(model: LocalModel, task_name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"`texts` must be a list of texts, got {texts!r}. Put it into a list.")
    if getattr(model, "task", None) != task_name:
        wanted = " or ".join(map(repr, VECTOR_TASKS))
        raise SettingsError(
            f"The `task` of the model must be {task_name!r}, got {getattr(model, 'task', None)!r}. Vectors and scores "
            f"need a `LocalModel` with task {wanted}."
        )


def _run(model: LocalModel, requests: Sequence[Request]) -> list[Completion]:
    if not requests:
        return []
    with library_logs():
        return load_engine(model).answer_all(requests)


embed_texts = task(name="embed-texts", cache_policy=NO_CACHE)(compute_vectors)
rerank_texts = task(name="rerank-texts", cache_policy=NO_CACHE)(compute_scores)
