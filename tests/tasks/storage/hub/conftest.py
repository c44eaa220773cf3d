"""Short waits between attempts, so that the faults of these tests take milliseconds."""

from __future__ import annotations

import pytest

from prefect_huggingface.tasks.storage.hub import patience


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.05)
