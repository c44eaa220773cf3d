"""What a person at the terminal sees: a progress bar while a batch runs and a table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from prefect.logging import get_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prefect_huggingface.tasks.batching.run import Progress as BatchProgress
from prefect_huggingface.tasks.records import BatchSummary

logger = get_logger(__name__)

LOG_SECONDS = 30.0
PLACES = ("Output", "Errors")


class ProgressBar:
    """A progress bar on the terminal; where there is no terminal, a line in the log twice a minute.

    Args:
        title: What is under way.
        rows: Number of rows.
        show: Whether to draw it.
        console: Where to draw it; by default the error output.
    """

    def __init__(self, title: str, rows: int, show: bool = True, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), console=self._console, disable=not show or not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=rows, rate="")
        self._logged = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, progress: BatchProgress) -> None:
        """Show the progress."""
        text = describe(progress)
        self._bar.update(self._task, completed=min(progress.finished, progress.rows), rate=text)
        if not self._console.is_terminal and time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s: %d of %d rows, %s", self._title, progress.finished, progress.rows, text)


def describe(progress: BatchProgress) -> str:
    """Return the rates, the time left and the failures in a few words."""
    parts = [f"{progress.rows_per_second:,.1f} rows/s", f"{progress.tokens_per_second:,.0f} tokens/s"]
    if progress.seconds_left is not None and progress.finished < progress.rows:
        parts.append(f"{format_seconds(progress.seconds_left)} left")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.resumed:
        parts.append(f"{progress.resumed:,} from before")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Return a duration such as "1:02:03" or "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_summary(
    summary: BatchSummary, further: Mapping[str, Any] | None = None, console: Console | None = None
) -> None:
    """Print the closing table of a batch.

    Args:
        summary: What the batch came to.
        further: More lines, such as an accuracy, by their names.
        console: Where to print it; by default the standard output.
    """
    console = console or Console()
    lines = {**summary_lines(summary), **(further or {})}
    table = Table(title="Batch inference", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        if name not in PLACES:
            table.add_row(name, str(value))
    console.print(table)
    for name in PLACES:
        if name in lines:  # on a line of its own, whole, so that it can be copied
            console.print(f"{name}: {lines[name]}", markup=False, highlight=False, soft_wrap=True)


def summary_lines(summary: BatchSummary) -> dict[str, str]:
    """Return the lines of the closing table."""
    lines = {
        "Rows": f"{summary.rows:,}",
        "Succeeded": f"{summary.succeeded:,}",
        "Failed": f"{summary.failed:,}",
    }
    if set(summary.statuses) - {"ok"}:
        lines["Statuses"] = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.statuses.items()))
    if summary.resumed:
        lines["From an earlier run"] = f"{summary.resumed:,}"
    if summary.shared:
        lines["Shared answers"] = f"{summary.shared:,}"
    lines["Tokens per second"] = f"{summary.tokens_per_second:,.1f}"
    lines["Time"] = format_seconds(summary.seconds)
    lines["Output"] = summary.destination
    if summary.errors_destination:
        lines["Errors"] = summary.errors_destination
    return lines
