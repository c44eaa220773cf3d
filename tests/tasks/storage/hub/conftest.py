"""Short waits between attempts, so that the faults of these tests take milliseconds."""

from __future__ import annotations

import pytest

from prefect_huggingface.tasks.storage.hub import client


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.05)
