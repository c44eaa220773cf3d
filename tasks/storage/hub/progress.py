"""Progress of a download over its bytes: a bar in a terminal, and an artifact in the run of a flow or a task."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from prefect.logging import get_logger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

ARTIFACT_SECONDS = 1.0
BAR_SECONDS = 0.2
logger = get_logger(__name__)


class Display(Protocol):
    """Something that shows how far a download is."""

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are there."""

    def close(self) -> None:
        """Stop showing."""


class Progress:
    """Count of the bytes of one download.

    Any thread may call `advance`. Only the thread that started the download calls `show` and `close`, because a run of
    Prefect is known to that thread only.
    """

    def __init__(self, title: str, displays: list[Display] | None = None) -> None:
        self.title = title
        self.total = 0
        self._done = 0
        self._lock = threading.Lock()
        self._displays = displays if displays is not None else _displays(title)

    @property
    def done(self) -> int:
        """Number of bytes that are there, those of an earlier attempt included."""
        return self._done

    def advance(self, size: int) -> None:
        """Count bytes, or take them back if negative."""
        with self._lock:
            self._done += size

    def show(self) -> None:
        """Bring the displays up to date. They limit by themselves how often they change."""
        for display in self._displays:
            display.show(min(self._done, self.total), self.total)

    def close(self) -> None:
        """Bring the displays up to date for the last time."""
        for display in self._displays:
            display.close()


def _displays(title: str) -> list[Display]:
    displays: list[Display] = []
    if sys.stderr.isatty():
        displays.append(TerminalBar(title))
    if _is_in_run():
        displays.append(ProgressArtifact(title))
    return displays


def _is_in_run() -> bool:
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


class TerminalBar:
    """One bar over all bytes, with rate and time left."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        screen = console or Console(stderr=True)
        self._bar: RichProgress = Bar(*columns, TimeRemainingColumn(), console=screen, auto_refresh=False)
        self._task = self._bar.add_task(title, total=None)
        self._bar.start()

    def show(self, done: int, total: int) -> None:
        """Redraw the bar."""
        self._bar.update(self._task, completed=done, total=total, refresh=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


class ProgressArtifact:
    """Progress artifact of the current run, changed once a second at most. It never makes a download fail."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._artifact: UUID | None = None
        self._shown: tuple[int, int] = (-1, -1)
        self._latest: tuple[int, int] = (0, 0)
        self._next = 0.0

    def show(self, done: int, total: int) -> None:
        """Change the artifact if it is time to."""
        self._latest = (done, total)
        if time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        """Write the last numbers."""
        if self._latest != self._shown:
            self._write()

    def _write(self) -> None:
        done, total = self._latest
        percent = 100.0 * done / total if total else 0.0
        if self._artifact is None:
            self._artifact = _quietly(self._create, percent)
        else:
            _quietly(self._update, percent)
        self._shown, self._next = self._latest, time.monotonic() + ARTIFACT_SECONDS

    def _create(self, percent: float) -> Any:
        from prefect.artifacts import create_progress_artifact

        key = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return create_progress_artifact(progress=percent, key=key, description=self.title)

    def _update(self, percent: float) -> Any:
        from prefect.artifacts import update_progress_artifact

        return update_progress_artifact(self._artifact, progress=percent)  # type: ignore[arg-type]


def _quietly(call: Callable[[float], Any], percent: float) -> Any:
    try:
        return call(percent)
    except Exception as exc:
        logger.warning("The progress artifact cannot be written (%s).", type(exc).__name__)
        return None
