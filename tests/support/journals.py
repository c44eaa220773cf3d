"""Owning a journal without its lock, as a run does that has stalled or lost its machine, and what is in one."""

from __future__ import annotations

from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner


def claim_journal(journal: Journal) -> JournalOwner:
    """Succeed whoever owns a journal."""
    owner = JournalOwner.after(journal, journal.read_owner())
    assert owner.claim()
    return owner


def committed_rows(journal: Journal) -> set[int]:
    """Return the numbers of the rows in a journal that is not in use."""
    key = (journal.read_job() or {}).get("key", "")
    return set(JournalRows(journal, key).take(0, 10**9)["row"].to_pylist())
