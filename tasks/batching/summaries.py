"""What a finished batch leaves to look at: its summary, sample rows, failed rows, and two plots."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal
from xml.sax.saxutils import escape

from prefect_huggingface.tasks.artifacts import escape_markdown, markdown_table, publish_markdown, publish_table
from prefect_huggingface.tasks.batching.monitors import BatchMonitor
from prefect_huggingface.tasks.batching.publications import LENGTH_BOUNDS, Publication
from prefect_huggingface.tasks.batching.statuses import STATUSES
from prefect_huggingface.tasks.progress import summary_lines
from prefect_huggingface.tasks.records import BatchSummary
from prefect_huggingface.tasks.storage.journals.journal import Journal

KeepJournal = Literal["failed", "always", "never"]
WIDTH, HEIGHT = 640, 160


def summarize(
    destination: str, publication: Publication, resumed: int, generated_tokens: int, seconds: float
) -> BatchSummary:
    """Return the summary of a batch."""
    return BatchSummary(
        rows=publication.rows,
        succeeded=publication.rows - publication.failed,
        failed=publication.failed,
        destination=destination,
        generated_tokens=generated_tokens,
        seconds=seconds,
        statuses=dict(sorted(publication.statuses.items())),
        resumed=resumed,
        shared=publication.shared,
        errors_destination=publication.errors_destination,
    )


def is_kept(keep: KeepJournal, summary: BatchSummary) -> bool:
    """Tell whether a journal stays when its batch is done."""
    return keep == "always" or (keep == "failed" and summary.failed > 0)


def publish_artifacts(summary: BatchSummary, publication: Publication, monitor: BatchMonitor, journal: Journal) -> None:
    """Leave a table of the first rows, one of failed rows, and the summary in Prefect."""
    publish_table("batch-samples", publication.samples, f"First rows of {summary.destination}")
    if publication.failures:
        publish_table("batch-failures", publication.failures, f"First failed rows of {summary.destination}")
    publish_markdown("batch-summary", describe_batch(summary, publication, monitor, journal), "Summary of the batch")


def describe_batch(summary: BatchSummary, publication: Publication, monitor: BatchMonitor, journal: Journal) -> str:
    """Return the summary as Markdown."""
    parts = ["# Batch inference", markdown_table(("", ""), summary_lines(summary).items())]
    statuses = [(name, f"{count:,}", STATUSES.get(name, "")) for name, count in summary.statuses.items()]
    parts += ["## Statuses", markdown_table(("status", "rows", "meaning"), statuses)]
    rates = _rates(monitor.samples)
    # A short run commits all at once, after its last measurement.
    if sum(rate > 0 for rate in rates) > 1:
        parts += ["## Throughput (rows per second over time)", _image(rates, "throughput", monitor.samples)]
    lengths = [publication.lengths.get(bound, 0) for bound in LENGTH_BOUNDS]
    parts += ["## Lengths of the answers (tokens)", _image(lengths, "answer lengths", None)]
    if publication.failures:
        failures = [(row["row"] + 1, row["status"], row["error"]) for row in publication.failures]
        parts += ["## First failures", markdown_table(("row", "status", "error"), failures)]
    if summary.failed:
        parts.append(f"The journal {escape_markdown(journal.place.url)} can be used to retry the failed rows.")
    return "\n\n".join(parts)


def _rates(samples: Sequence[tuple[float, int]]) -> list[float]:
    pairs = zip(samples[:-1], samples[1:], strict=True)
    return [max(rows - before, 0) / max(now - then, 1e-6) for (then, before), (now, rows) in pairs]


def _image(values: Sequence[float], name: str, samples: Sequence[tuple[float, int]] | None) -> str:
    """Return an image of bars, self-contained, so that it needs no file and no server."""
    labels = [f"{bound:,}" for bound in LENGTH_BOUNDS]
    if samples is not None:
        labels = [f"{seconds:.0f} s" for seconds, _ in samples[1:]]
    content = base64.b64encode(draw_bars(values, labels).encode()).decode()
    return f"![{name}](data:image/svg+xml;base64,{content})"


def draw_bars(values: Sequence[float], labels: Sequence[str]) -> str:
    """Return an SVG with one bar per value, the greatest value, and about a dozen of the labels."""
    top = max(values, default=0) or 1
    step = WIDTH / max(len(values), 1)
    every = max(1, len(values) // 12)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 20}" height="{HEIGHT + 44}" '
        'font-family="sans-serif" font-size="10" fill="#555">',
        f'<text x="10" y="12">{escape(f"{top:,.4g}")}</text>',
    ]
    for index, (value, label) in enumerate(zip(values, labels, strict=False)):
        height = HEIGHT * value / top
        left = 10 + index * step
        parts.append(
            f'<rect x="{left:.1f}" y="{20 + HEIGHT - height:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{height:.1f}" fill="#4c78a8"/>'
        )
        if index % every == 0:
            parts.append(f'<text x="{left:.1f}" y="{HEIGHT + 36}">{escape(label)}</text>')
    return "".join(parts) + "</svg>"
