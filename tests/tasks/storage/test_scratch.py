"""Scratch data of a killed process is gone, at once or with the next process that writes to the same place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefect_huggingface.tasks.storage.files import scratch_file
from prefect_huggingface.tasks.storage.places import Place

# More than SQLite keeps in memory, so that there is a file.
INDEX_ANSWERS = """
import os, signal
from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
from prefect_huggingface.tasks.storage.journals.journal import ResultRow
index = ResultIndex()
index.add(ResultRow(number, completion="text" * 10, digest=number.to_bytes(8) * 2) for number in range(400_000))
index.add([])
assert index.find([(7).to_bytes(8) * 2])
paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
files = [os.readlink(path) for path in paths if os.path.lexists(path)]
print(sum(name.startswith(os.environ["TMPDIR"]) for name in files), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
WRITE_HALF = """
import os, signal, sys
from prefect_huggingface.tasks.storage.places import Place
with Place.of(sys.argv[1]).published() as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a process that kills itself, and return what it has printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    return done.stdout


def test_a_killed_process_leaves_no_index(tmp_path: Path) -> None:
    printed = run(INDEX_ANSWERS, TMPDIR=str(tmp_path))
    assert printed.strip() == "2", "the results and their keys are on disk"
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_publication(tmp_path: Path) -> None:
    place = Place.of(tmp_path / "out[1].txt")
    other = tmp_path / ".other.txt.1.abc.tmp"
    other.write_text("somebody else's")
    run(WRITE_HALF, place.url)
    assert len(os.listdir(tmp_path)) == 2
    with place.published() as path:
        path.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [other.name, "out[1].txt"]


def test_a_file_that_is_written_just_now_stays(tmp_path: Path) -> None:
    with scratch_file(tmp_path, "out.txt") as first, scratch_file(tmp_path, "out.txt") as second:
        assert first != second
        assert first.exists()
        assert second.exists()
    assert os.listdir(tmp_path) == []
