"""Artifacts that the flows leave in Prefect: progress, tables and summaries. Outside a run nothing happens.

Values that come from models and tables are made safe: they cannot break a table, open a link or become HTML.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.logging import get_logger

logger = get_logger(__name__)

UPDATE_SECONDS = 1.0
MAX_TABLE_ROWS = 100
MAX_CELL_CHARACTERS = 300
MAX_MARKDOWN_CHARACTERS = 500_000
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def make_key(text: str) -> str:
    """Return a text as the key of an artifact: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "artifact"


def shorten(value: Any, characters: int = MAX_CELL_CHARACTERS) -> str:
    """Return a value as one line of bounded length."""
    text = "" if value is None else str(value)
    if len(text) > characters:
        text = f"{text[:characters]}…"
    return " ".join(text.split())


def escape_markdown(value: Any, characters: int = MAX_CELL_CHARACTERS) -> str:
    """Return a value as one line of Markdown that shows it literally, also in a cell of a table."""
    return _SPECIAL.sub(r"\\\1", shorten(value, characters)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table with escaped cells."""
    lines = [columns, ["---"] * len(columns)]
    head = [" | ".join(map(escape_markdown, columns)), " | ".join(lines[1])]
    body = [" | ".join(map(escape_markdown, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in (*head, *body))


def in_run() -> bool:
    """Tell whether this thread is within a flow run or task run."""
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def publish_markdown(key: str, markdown: str, description: str | None = None) -> None:
    """Leave a text in Markdown. What is too long is cut off."""
    if not in_run():
        return
    from prefect.artifacts import create_markdown_artifact

    _attempt(create_markdown_artifact, make_key(key), description, markdown=markdown[:MAX_MARKDOWN_CHARACTERS])


def publish_table(key: str, rows: Sequence[Mapping[str, Any]], description: str | None = None) -> None:
    """Leave a table. It has at most 100 rows and short cells; the whole of it belongs in a file."""
    if not in_run():
        return
    from prefect.artifacts import create_table_artifact

    columns = list(dict.fromkeys(name for row in rows[:MAX_TABLE_ROWS] for name in row))
    table = [{shorten(name): _plain(row.get(name)) for name in columns} for row in rows[:MAX_TABLE_ROWS]]
    _attempt(create_table_artifact, make_key(key), description, table=table)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) or value is None else shorten(value)


def _attempt(create: Any, key: str, description: str | None, **content: Any) -> UUID | None:
    """Create an artifact. A run never fails for want of one."""
    try:
        found: UUID | None = create(key=key, description=description, **content)
        return found
    except Exception as exc:
        logger.warning("The artifact %r could not be written: %s.", key, type(exc).__name__)
        return None


class ProgressReport:
    """A progress artifact that is updated at most once a second.

    Args:
        key: Key of the artifact.
        description: What is under way.
    """

    def __init__(self, key: str, description: str) -> None:
        self._id: UUID | None = None
        self._last = time.monotonic()
        if in_run():
            from prefect.artifacts import create_progress_artifact

            self._id = _attempt(create_progress_artifact, make_key(key), description, progress=0.0)

    def update(self, share: float, description: str | None = None, final: bool = False) -> None:
        """Show a share from 0 to 1 and a text beside it, unless the last update was within a second.

        Args:
            share: How much is done.
            description: What to say about it.
            final: Whether the update is made in any case.
        """
        if self._id is None or (not final and time.monotonic() - self._last < UPDATE_SECONDS):
            return
        from prefect.artifacts import update_progress_artifact

        self._last = time.monotonic()
        try:
            update_progress_artifact(self._id, progress=100.0 * min(max(share, 0.0), 1.0), description=description)
        except Exception as exc:
            logger.warning("The progress artifact could not be updated: %s.", type(exc).__name__)
