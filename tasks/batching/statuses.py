"""The statuses of rows, and that of a whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import is_held

STATUSES = {
    "ok": "The model ended its answer.",
    "length": "The answer was cut off at `max_new_tokens`, or at the end of the model's context.",
    "malformed": "The row could not be read.",
    "missing_value": "A column that the prompt needs is null, NaN or not there.",
    "empty_prompt": "The prompt has no text.",
    "too_long": "Prompt and answer do not fit the context of the model.",
    "skipped": "The prompt is too long, and such prompts were to be left out.",
    "invalid_prompt": "The chat messages are no conversation that the model's template accepts.",
    "invalid_option": "The options of the row are not valid.",
    "unknown_model": "The row asks for another model.",
    "duplicate_id": "An earlier row has the same id.",
    "schema_invalid": "The answer does not have the form that was asked for.",
    "deadline": "The answer took longer than the row was given.",
    "out_of_cache": "The engine had no memory left for the row.",
    "engine_error": "The engine failed on the row.",
    "unauthorized": "The endpoint does not accept the token, or asks for one.",
    "not_found": "The endpoint has no such model or route.",
    "rate_limited": "The endpoint took no more requests, however long they waited.",
    "unavailable": "The endpoint could not be reached, or did not wake up in time.",
    "bad_answer": "The endpoint did not answer as an inference server does, or its answer was too large.",
}
"""What each status means. "ok" and "length" are the statuses without an error."""


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How far a batch is.

    Attributes:
        source: Its input.
        rows: Number of its rows.
        finished: Number of rows in its journal.
        failed: Number of those that failed.
        statuses: Number of finished rows by status.
        running: Whether a run works on it now.
    """

    source: str
    rows: int
    finished: int
    failed: int
    statuses: Mapping[str, int] = field(default_factory=dict)
    running: bool = False

    @property
    def left(self) -> int:
        """Number of rows that are left."""
        return self.rows - self.finished


def get_status(destination: str) -> BatchStatus:
    """Look into the journal of a batch, also while it runs. Nothing is changed.

    Args:
        destination: Output of the batch.

    Raises:
        BatchError: If the batch has no journal.
    """
    journal = Journal.beside(destination)
    record = journal.read_job()
    if record is None:
        raise BatchError(f"{journal.place.url!r} is not there: the batch never began, or is done. Look for its output.")
    job = BatchJob.from_dict(record)
    sweep = JournalRows(journal, job.key)
    statuses: Counter[str] = Counter()
    finished = failed = 0
    for start in range(0, job.table.rows, 50_000):
        rows = sweep.take(start, start + 50_000)
        finished += rows.num_rows
        failed += rows.num_rows - rows["error"].null_count
        statuses.update(rows["status"].to_pylist())
    return BatchStatus(
        job.table.source, job.table.rows, finished, failed, dict(sorted(statuses.items())), is_held(journal)
    )
