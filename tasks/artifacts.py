"""Artifacts that the flows leave in Prefect: progress, tables and summaries. Outside a run nothing happens.

Values that come from models and tables are made safe: they cannot break a table, become a link or HTML, or turn the
direction of the text around them, and every one of them can be stored. Control characters are shown as their pictures.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

from httpx import ConnectError
from prefect.logging import get_logger

logger = get_logger(__name__)

UPDATE_SECONDS = 1.0
MAX_RETRIES = 3  # after 2, 4 and 8 seconds
UNREACHABLE_SECONDS = 120.0
MAX_TABLE_ROWS = 100
MAX_TABLE_COLUMNS = 100
MAX_CELL_CHARACTERS = 300
MAX_MARKDOWN_CHARACTERS = 500_000
MAX_EXACT_INTEGER = 2**53  # browsers round integers above it
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")
_LINK_START = re.compile(r"(https?:(?=//)|www(?=\.))", re.IGNORECASE)
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_DIRECTIONS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_unreachable_until = 0.0
_settings: tuple[Any, Any] = (None, None)  # those of Prefect, and the same with fewer retries
_SURROGATES = re.compile("[\ud800-\udfff]")


def make_key(text: str) -> str:
    """Return a text as the key of an artifact: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "artifact"


def make_printable(text: str) -> str:
    """Return a text that every database and browser takes, without the characters that turn its direction."""
    return _SURROGATES.sub("\ufffd", text.translate(_CONTROLS | _DIRECTIONS))


def shorten(value: Any, characters: int = MAX_CELL_CHARACTERS) -> str:
    """Return a value as one line of bounded length."""
    try:
        text = "" if value is None else str(value)
    except ValueError:  # an integer of thousands of digits
        text = f"({type(value).__name__})"
    if len(text) > characters:
        text = f"{text[:characters]}…"
    return " ".join(make_printable(text).split())


def escape_markdown(value: Any, characters: int = MAX_CELL_CHARACTERS) -> str:
    """Return a value as one line of Markdown that shows it literally, also in a cell of a table."""
    # Markdown makes links of bare addresses; a space without width keeps it from doing so.
    text = _LINK_START.sub("\\1\u200b", shorten(value, characters))
    return _SPECIAL.sub(r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")


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

    if len(markdown) > MAX_MARKDOWN_CHARACTERS:
        markdown = f"{markdown[:MAX_MARKDOWN_CHARACTERS]}\n\n(cut off)"
    _attempt(create_markdown_artifact, key, description, markdown=make_printable(markdown))


def publish_table(key: str, rows: Sequence[Mapping[str, Any]], description: str | None = None) -> None:
    """Leave a table. It has at most 100 rows and columns and short cells; the whole of it belongs in a file."""
    if not in_run():
        return
    from prefect.artifacts import create_table_artifact

    _attempt(create_table_artifact, key, description, table=make_table(rows))


def make_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first rows and columns of a table, with values that JSON and browsers can hold."""
    rows = rows[:MAX_TABLE_ROWS]
    titles: dict[Any, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        title = shorten(name)
        while title in titles.values():  # long names may differ behind the cut only
            title += "'"
        titles[name] = title
        if len(titles) == MAX_TABLE_COLUMNS:
            break
    return [{title: _plain(row.get(name)) for name, title in titles.items()} for row in rows]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= MAX_EXACT_INTEGER:
        return value
    return value if isinstance(value, float) and math.isfinite(value) else shorten(value)


def _attempt(create: Callable[..., Any], key: str, description: str | None, **content: Any) -> UUID | None:
    """Create an artifact. A run never fails for want of one."""
    description = None if description is None else shorten(description)
    found: UUID | None = _call(create, key, key=make_key(key), description=description, **content)
    return found


def _call(write: Callable[..., Any], name: str, *arguments: Any, **content: Any) -> Any:
    """Write to the server. One that cannot be reached is left alone for a while, and no run waits for it."""
    global _unreachable_until
    if time.monotonic() < _unreachable_until:
        return None
    try:
        with _few_retries():
            return write(*arguments, **content)
    except Exception as exc:
        if isinstance(exc, ConnectError):  # and not one that is only busy
            _unreachable_until = time.monotonic() + UNREACHABLE_SECONDS
        logger.warning("The artifact %r could not be written: %s.", name, type(exc).__name__)
        return None


def _few_retries() -> AbstractContextManager[Any]:
    """Return Prefect's settings with fewer retries. They take 50 ms to make, so that they are made once."""
    global _settings
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

    current = get_settings_context()
    if _settings[0] is not current.settings:
        changed = current.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: MAX_RETRIES})
        _settings = (current.settings, changed)
    return SettingsContext(profile=current.profile, settings=_settings[1])


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

            self._id = _attempt(create_progress_artifact, key, description, progress=0.0)

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
        progress = 100.0 * min(max(share, 0.0), 1.0)
        _call(update_progress_artifact, "progress", self._id, progress=progress, description=description)
