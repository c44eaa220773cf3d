"""A live Prefect server for the tests of deployments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.prefect_services import PrefectServices, prefect_services


@pytest.fixture(scope="session")
def services(session_folder: Path) -> Iterator[PrefectServices]:
    """A real server in a process of its own, with its scheduler."""
    with prefect_services(session_folder / "services") as running:
        yield running
