"""Leases protect what is in use, and end with their process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.storage.locks import LEASE, hold_export, take_alone

HOLDER = (
    "import sys, time; from pathlib import Path\n"
    "from prefect_huggingface.tasks.storage.locks import hold_export\n"
    "lease = hold_export(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    (made / LEASE).touch()
    return made


def test_a_held_folder_cannot_be_taken(folder: Path) -> None:
    with hold_export(folder), hold_export(folder):
        assert take_alone(folder / LEASE) is None
    lease = take_alone(folder / LEASE)
    assert lease is not None
    lease.close()


def test_a_killed_process_holds_nothing(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    assert take_alone(folder / LEASE) is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    lease = take_alone(folder / LEASE)
    assert lease is not None
    lease.close()


def test_a_use_is_noted(folder: Path) -> None:
    os.utime(folder / LEASE, (0, 0))
    hold_export(folder).close()
    assert (folder / LEASE).stat().st_mtime > 1e9


def test_a_removed_folder_cannot_be_held(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(ModelSourceError, match="was removed from the store"):
        hold_export(folder)


def test_a_folder_of_the_user_needs_no_lease(tmp_path: Path) -> None:
    with hold_export(tmp_path) as lease:
        assert lease.descriptor is None
