"""Quality of exports: the records, and the tables and plots that people see."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 720, 300, 56


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


def plot_quality(quality: ExportQuality) -> str:
    """Return a plot of agreement against size and against speed as SVG, a point for each format."""
    half = WIDTH / 2
    sizes = [(entry.size_bytes / 1e6, entry) for entry in quality.formats]
    speeds = [(entry.tokens_per_second, entry) for entry in quality.formats]
    title = escape(f"{quality.source}: agreement with the source")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<text x="{half}" y="20" text-anchor="middle" font-size="14">{title}</text>'
        f"{_panel(0, 'size (MB)', sizes)}{_panel(half, 'tokens per second', speeds)}</svg>"
    )


def as_data_url(svg: str) -> str:
    """Return an SVG image as a URL that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _panel(left: float, label: str, points: Sequence[tuple[float, FormatQuality]]) -> str:
    """Return one coordinate system with its points; x from 0 to the largest value, y the agreement."""
    width, height = WIDTH / 2 - MARGIN - 30, HEIGHT - 2 * MARGIN
    origin, bottom = left + MARGIN, HEIGHT - MARGIN
    largest = max((x for x, _ in points), default=1.0) * 1.15 or 1.0
    lowest = min(0.9, min((entry.agreement for _, entry in points), default=0.9) - 0.02)
    parts = [
        f'<path d="M{origin} {bottom - height}V{bottom}H{origin + width}" fill="none" stroke="#888"/>',
        f'<text x="{origin + width / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(label)}</text>',
        f'<text x="{origin - 6}" y="{bottom}" text-anchor="end">{lowest:.2f}</text>',
        f'<text x="{origin - 6}" y="{bottom - height + 4}" text-anchor="end">1.00</text>',
        f'<text x="{origin + width}" y="{bottom + 16}" text-anchor="end">{largest:.4g}</text>',
        f'<text x="{origin}" y="{bottom + 16}" text-anchor="middle">0</text>',
    ]
    for x, entry in points:
        at_x = origin + width * x / largest
        at_y = bottom - height * (entry.agreement - lowest) / (1 - lowest)
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="#3b6fd4"/>')
        parts.append(f'<text x="{at_x + 7:.1f}" y="{at_y + 14:.1f}">{escape(entry.weight_format)}</text>')
    return "".join(parts)
