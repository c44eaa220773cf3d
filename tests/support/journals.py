"""Owning a journal without its lock, as a run does that has stalled or lost its machine."""

from __future__ import annotations

from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner


def claim_journal(journal: Journal) -> JournalOwner:
    """Succeed whoever owns a journal."""
    owner = JournalOwner.after(journal, journal.read_owner())
    assert owner.claim()
    return owner
