"""Dates in the names of inputs and outputs, so that a batch of every night has files of its own for every night.

`answers-{date}.jsonl` stands for `answers-2026-11-21.jsonl` in a run that was scheduled for that day. A run that is
started again keeps the time that it was scheduled for, and so it finds its own journal, also after midnight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from string import Formatter
from uuid import UUID
from zoneinfo import ZoneInfo

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.journals.journal import SUFFIX, Journal
from prefect_huggingface.tasks.storage.journals.ownership import is_held
from prefect_huggingface.tasks.storage.places import Place

PLACEHOLDERS = {
    "date": ("%Y-%m-%d", r"\d{4}-\d\d-\d\d"),
    "yesterday": ("%Y-%m-%d", r"\d{4}-\d\d-\d\d"),
    "time": ("%H-%M-%S", r"\d\d-\d\d-\d\d"),
    "year": ("%Y", r"\d{4}"),
    "month": ("%m", r"\d\d"),
    "day": ("%d", r"\d\d"),
    "hour": ("%H", r"\d\d"),
    "minute": ("%M", r"\d\d"),
    "week": ("%G-W%V", r"\d{4}-W\d\d"),
}
"""Placeholders, how each is written, and a pattern of what it becomes. `yesterday` is the day before the run's."""

MAX_FOLDERS = 31  # folders of earlier dates that are looked into


def find_start(time_zone: str = "UTC") -> datetime:
    """Return the time for which the current flow run was scheduled, that of the outermost run in a subflow.

    Outside a flow run it is the current time.

    Raises:
        BatchError: If the time zone is not known.
    """
    try:
        zone = ZoneInfo(time_zone)
    except (OSError, ValueError, KeyError):
        raise BatchError(
            f"`time_zone` must be a name such as 'UTC' or 'Europe/Berlin', got {time_zone!r}. Correct it."
        ) from None
    return (_scheduled_start() or datetime.now(UTC)).astimezone(zone)


def _scheduled_start() -> datetime | None:
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.runtime import flow_run as current

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    start: datetime | None = context.flow_run.expected_start_time
    if context.flow_run.parent_task_run_id is not None:
        try:
            with get_client(sync_client=True) as client:
                start = client.read_flow_run(UUID(current.get_root_flow_run_id())).expected_start_time
        except Exception as exc:
            run_log().warning("The start of the outermost run is not known: %s.", type(exc).__name__)
    return start


def fill_dates(name: str, location: str, start: datetime) -> str:
    """Return a path or URL with its placeholders filled in. Doubled braces become single ones.

    Raises:
        BatchError: If a placeholder is not known, or a brace stands alone.
    """
    return "".join(literal + (_write(field, start) if field else "") for literal, field in _parse(name, location))


def _write(field: str, start: datetime) -> str:
    moment = start - timedelta(days=1) if field == "yesterday" else start
    return moment.strftime(PLACEHOLDERS[field][0])


def _parse(name: str, location: str) -> list[tuple[str, str | None]]:
    """Return the literal pieces, each with the placeholder behind it."""
    remedy = (
        f"Use {', '.join(f'{{{each}}}' for each in PLACEHOLDERS)}, and double the braces that stand for themselves."
    )
    try:
        parts = list(Formatter().parse(location))
    except ValueError as exc:
        raise BatchError(f"`{name}` has a brace that stands alone, got {location!r}: {exc}. {remedy}") from None
    for _, field, form, conversion in parts:
        if field is not None and (field not in PLACEHOLDERS or form or conversion):
            raise BatchError(f"`{name}` has the unknown placeholder {{{field}}}, got {location!r}. {remedy}")
    return [(literal, field) for literal, field, _, _ in parts]


def warn_of_unfinished(template: str, destination: str) -> None:
    """Log which batches of other dates were left, with the way to go on. It never fails."""
    if template == destination:
        return
    try:
        left = find_unfinished(template, destination)
    except Exception as exc:
        run_log().warning("Batches of other dates could not be looked for: %s.", type(exc).__name__)
        return
    for each in left:
        run_log().warning(
            "The batch of %r was left unfinished. Retry its flow run, which keeps its date, or run this flow with the "
            "date written out, to go on with it.", each,
        )  # fmt: skip


def find_unfinished(template: str, destination: str) -> list[str]:
    """Return the outputs of other dates whose batch began and neither ended nor runs now, the earliest first.

    `destination` is that of this run, which is left out.
    """
    location = Journal.beside(template).place.url.removesuffix(SUFFIX)
    parts = _parse("destination", location)
    pieces = [re.escape(literal) + (PLACEHOLDERS[field][1] if field else "") for literal, field in parts]
    pattern = re.compile("".join(pieces) + re.escape(SUFFIX))
    root = Place(parts[0][0].rpartition("/")[0] or "/")
    depth = location.count("/") - root.url.rstrip("/").count("/")
    found = {place.url for place in _descend(root, depth)}
    begun = [url.removesuffix(SUFFIX) for url in sorted(found) if pattern.fullmatch(url)]
    own = Journal.beside(destination).place.url.removesuffix(SUFFIX)
    return [each for each in begun if each not in {*found, own} and _is_left(each)]


def _descend(folder: Place, depth: int) -> Iterator[Place]:
    """Yield what lies so many folders deep, in the folders with the latest names."""
    names = folder.names()
    if depth <= 1:
        yield from map(folder.child, names)
        return
    for name in names[-MAX_FOLDERS:]:
        yield from _descend(folder.child(name), depth - 1)


def _is_left(destination: str) -> bool:
    journal = Journal.beside(destination)
    if is_held(journal):
        return False
    try:
        record = journal.read_job()
        # The journal stays after the end where rows failed, and the output may be elsewhere by now.
        ended = record and any(each.get("job") == record.get("key") for each in journal.list_published())
    except BatchError:
        return True
    return record is not None and not ended
