"""Quality of exports: the records, and the tables that people see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Title, attribute and digits of the columns of a table.
TEXT_COLUMNS = (
    ("agreement", "agreement", 4), ("divergence (nats)", "divergence", 5), ("perplexity ratio", "perplexity_ratio", 4),
    ("exact answers", "exact_matches", 4),
)  # fmt: skip
VECTOR_COLUMNS = (
    ("least cosine", "cosine", 5), ("rank correlation", "ranking", 4), ("same best text", "exact_matches", 4),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """How one export compares with its source.

    Attributes:
        weight_format: Format of the weights.
        key: Key of the export.
        agreement: Share of the positions at which the most likely next token is that of the source, 0 to 1.
        divergence: Mean Kullback-Leibler divergence from the distribution of the source (nats).
        perplexity_ratio: Perplexity of the export over that of the source; more than 1 is worse.
        exact_matches: Share of the prompts whose greedy answer is that of the source, 0 to 1.
        positions: Number of positions that were compared.
        tokens_per_second: Generated tokens per second of the export, one prompt at a time.
        size_bytes: Size of the export.
        cosine: Least cosine of a vector with that of the source, for models of vectors; `agreement` is then this or
            `ranking`, whichever is less, and `exact_matches` the share of the texts with the same nearest text.
        ranking: Rank correlation (Spearman) of similarities or scores with those of the source.
    """

    weight_format: str
    key: str
    agreement: float
    divergence: float
    perplexity_ratio: float
    exact_matches: float
    positions: int
    tokens_per_second: float
    size_bytes: int
    cosine: float | None = None
    ranking: float | None = None


@dataclass(frozen=True, slots=True)
class ExportQuality:
    """How the exports of one model compare with it.

    Attributes:
        source: Repository id, or the folder.
        commit: Commit of the source.
        prompts: Number of prompts.
        source_tokens_per_second: Generated tokens per second of the source in torch, one prompt at a time.
        source_size_bytes: Size of the source.
        formats: One entry for each export, in the order that was asked for.
    """

    source: str
    commit: str
    prompts: int
    source_tokens_per_second: float
    source_size_bytes: int
    formats: tuple[FormatQuality, ...]

    @property
    def agreement(self) -> float:
        """Agreement of the first export."""
        return self.formats[0].agreement


def quality_rows(quality: ExportQuality) -> list[dict[str, Any]]:
    """Return the table of a comparison, the source first."""
    speed, size = quality.source_tokens_per_second, quality.source_size_bytes
    source = FormatQuality("source (torch)", "", 1.0, 0.0, 1.0, 1.0, 0, speed, size, cosine=1.0, ranking=1.0)
    columns = VECTOR_COLUMNS if any(entry.ranking is not None for entry in quality.formats) else TEXT_COLUMNS
    return [_row(entry, columns) for entry in (source, *quality.formats)]


def _row(entry: FormatQuality, columns: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    row: dict[str, Any] = {"format": entry.weight_format}
    for title, name, digits in columns:
        value = getattr(entry, name)
        row[title] = None if value is None else round(value, digits)
    return row | {"tokens/s": round(entry.tokens_per_second, 1), "size (MB)": round(entry.size_bytes / 1e6, 1)}
