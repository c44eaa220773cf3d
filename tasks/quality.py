"""Quality of exports: the records, and the tables that people see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-friendly values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExportQuality:
        """Return the quality that `as_dict` gave."""
        return cls(**{**data, "formats": tuple(FormatQuality(**entry) for entry in data["formats"])})


def quality_rows(quality: ExportQuality) -> list[dict[str, Any]]:
    """Return the table of a comparison, the source first."""
    if any(entry.ranking is not None for entry in quality.formats):
        return _vector_rows(quality)
    head = {
        "format": "source (torch)",
        "agreement": 1.0,
        "divergence (nats)": 0.0,
        "perplexity ratio": 1.0,
        "exact answers": 1.0,
        "tokens/s": round(quality.source_tokens_per_second, 1),
        "size (MB)": round(quality.source_size_bytes / 1e6, 1),
    }
    rows = [
        {
            "format": entry.weight_format,
            "agreement": round(entry.agreement, 4),
            "divergence (nats)": round(entry.divergence, 5),
            "perplexity ratio": round(entry.perplexity_ratio, 4),
            "exact answers": round(entry.exact_matches, 4),
            "tokens/s": round(entry.tokens_per_second, 1),
            "size (MB)": round(entry.size_bytes / 1e6, 1),
        }
        for entry in quality.formats
    ]
    return [head, *rows]


def _vector_rows(quality: ExportQuality) -> list[dict[str, Any]]:
    rows = [("source (torch)", 1.0, 1.0, 1.0, quality.source_tokens_per_second, quality.source_size_bytes)] + [
        (each.weight_format, each.cosine, each.ranking, each.exact_matches, each.tokens_per_second, each.size_bytes)
        for each in quality.formats
    ]
    return [
        {
            "format": name,
            "least cosine": None if cosine is None else round(cosine, 5),
            "rank correlation": None if ranking is None else round(ranking, 4),
            "same best text": round(best, 4),
            "tokens/s": round(speed, 1),
            "size (MB)": round(size / 1e6, 1),
        }
        for name, cosine, ranking, best, speed, size in rows
    ]
