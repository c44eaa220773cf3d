"""Processes that ask the store for an export, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.records import Export


@dataclass(frozen=True, slots=True)
class LoggedExport:
    """An export that a flow made, with the messages in the log of its run and the home folder of its child."""

    model: LocalModel
    export: Export
    messages: list[str]
    home: Path


PROGRAM = """
import json, sys, time
from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.storage.exports.store import get_export

settings = json.loads(sys.argv[1])
store = ModelStore(path=settings.pop("store"))
started = time.monotonic()
export = get_export(LocalModel(store=store, **settings))
print(json.dumps({"path": str(export.path), "reused": export.reused, "seconds": time.monotonic() - started}))
"""


def start_request(store: Path, model_id: Path, **settings: Any) -> subprocess.Popen[bytes]:
    """Start a process of its own group that asks for the export of a model."""
    argument = json.dumps({"store": str(store), "model_id": str(model_id), **settings})
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "ERROR"},
        start_new_session=True,
    )


def finish_request(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return what a process was given; fail with its log if it failed."""
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors.decode()
    answer: dict[str, Any] = json.loads(output.decode().splitlines()[-1])
    return answer


def processes_below(folder: Path) -> list[int]:
    """Return the processes whose working directory is in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until_gone(folder: Path, seconds: float = 10.0) -> None:
    """Wait until no process works in a folder, and fail if one goes on."""
    end = time.monotonic() + seconds
    while (left := processes_below(folder)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left, f"processes {left} outlive their parent"


def wait_for_child(folder: Path, seconds: float = 60.0) -> None:
    """Wait until a process works in a folder."""
    end = time.monotonic() + seconds
    while not processes_below(folder):
        assert time.monotonic() < end, "no child process was started"
        time.sleep(0.02)


def flip_byte(path: Path) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(100)
        byte = stream.read(1)[0]
        stream.seek(100)
        stream.write(bytes([byte ^ 1]))


def staged(store: Path) -> list[str]:
    """Return what lies in the staging folder of a store."""
    folder = store / "exports" / ".staging"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def published(store: Path) -> list[Path]:
    """Return the folders of a store that have the name of an export."""
    folder = store / "exports"
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
