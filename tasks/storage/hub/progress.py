"""Progress of a download over its bytes: a bar in a terminal, and an artifact in the run of a flow or a task."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from prefect_huggingface.tasks.artifacts import ProgressReport

BAR_SECONDS = 0.2


class Progress:
    """Count of the bytes of one download, those of an earlier attempt included.

    Any thread may call `advance`. Only the thread that started the download makes it and calls `show` and `close`,
    because a run of Prefect is known to that thread only.

    Args:
        title: What is under way.
        console: Terminal for the bar. When left out, the error output, if it is a terminal.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.total = self.done = 0
        self._lock = threading.Lock()
        self._report = ProgressReport(title, title)
        console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        disable = not console.is_terminal
        self._bar = Bar(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, disable=disable)
        self._task = self._bar.add_task(title, total=None)
        self._bar.start()

    def advance(self, size: int) -> None:
        """Count bytes, or take them back if negative."""
        with self._lock:
            self.done += size

    def show(self, final: bool = False) -> None:
        """Redraw the bar, and write the artifact unless that was done within a second."""
        done = min(self.done, self.total)
        self._bar.update(self._task, completed=done, total=self.total, refresh=True)
        self._report.update(done / self.total if self.total else 0.0, final=final)

    def close(self) -> None:
        """Show how far it came, and leave it at that."""
        self.show(final=True)
        self._bar.stop()
