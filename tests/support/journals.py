"""Owning a journal without its lock, as a run does that has stalled or lost its machine."""

from __future__ import annotations

from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner


def claim_journal(journal: Journal) -> JournalOwner:
    """Succeed whoever owns a journal."""
    record = journal.read_owner() or {}
    owner = JournalOwner(journal, record.get("epoch", 0) + 1, base=record.get("base", 0))
    assert owner.claim()
    return owner
