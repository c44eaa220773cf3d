"""The child process that makes an export, as its parent sees it: surroundings, log, progress and end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.errors import ExportError, ExportOutOfMemoryError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage import exporter
from prefect_huggingface.tasks.storage.recipes import Recipe

RunLog = logging.Logger | logging.LoggerAdapter[logging.Logger]
"""Logger of a Prefect run, or a plain one."""

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL", re.IGNORECASE)
TAIL_LINES = 40
PROGRESS_SECONDS = 5.0
STEPS = {
    "import": "Starting Optimum",
    "export": "Converting the model to OpenVINO",
    "quantize": "Quantizing the weights",
    "verify": "Loading the export and generating from it",
}


@dataclass(slots=True)
class ExportReport:
    """What the child process tells: its steps, and the end of its log for errors."""

    step: str = "start"
    done: dict[str, Any] | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))


def run_export(snapshot: Snapshot, recipe: Recipe, work: Path, descriptor: int, log: RunLog) -> dict[str, Any]:
    """Make an export in a child process, without network and without a token.

    Args:
        snapshot: Files of the source.
        recipe: Every setting.
        work: Empty folder for everything that the process writes. The export is in its folder `output`.
        descriptor: Open file that the child inherits, so that its lock lives as long as the child.
        log: Receives the output of the child line by line.

    Returns:
        What the child reports at its end: `seconds`, `peak_memory_bytes`, `weights`.

    Raises:
        ExportOutOfMemoryError: If the child was killed, most likely for want of memory.
        ExportError: If the child failed.
    """
    job = work / "job.json"
    content = {"source": str(link_source(snapshot, recipe, work / "model")), "output": str(work / "output")}
    job.write_text(json.dumps({**content, "recipe": recipe.as_dict(), "parent": os.getpid()}), encoding="utf-8")
    (work / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-P", "-u", exporter.__file__, str(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment(recipe, work),
        cwd=work,
        pass_fds=(descriptor,),
    )
    report = ExportReport()
    try:
        if process.stdout is not None:
            _follow(process.stdout, report, log)
        code = process.wait()
    finally:
        _end(process)
    if code == 0 and report.done is not None:
        return report.done
    raise _failure(snapshot, report, code)


def link_source(snapshot: Snapshot, recipe: Recipe, folder: Path) -> Path:
    """Make a folder of links to the files of a snapshot, under a name that says nothing.

    Optimum chooses settings by the name of the folder and by the name in `config.json`. The name in `config.json` is
    that of the repository where the recipe has such settings, and else there is none.
    """
    folder.mkdir()
    for file in snapshot.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to((snapshot.path / file.path).resolve())
    config_path = folder / "config.json"
    if config_path.exists():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if (recipe.quantization or {}).get("ignored_scopes"):
            config["_name_or_path"] = snapshot.repo_id
        config_path.unlink()
        config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def child_environment(recipe: Recipe, work: Path) -> dict[str, str]:
    """Return the environment of the child: that of this process without secrets, offline."""
    kept = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
    kept = {name: value for name, value in kept.items() if not name.startswith("PREFECT_")}
    temporary = str(work / "tmp")
    return {
        **kept,
        "TMPDIR": temporary,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN_PATH": str(work / "no-token"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def _follow(stream: IO[bytes], report: ExportReport, log: RunLog) -> None:
    """Read the output of the child to its end; log its lines, and its progress bars every few seconds."""
    last_progress = 0.0
    for line, is_progress in _lines(stream):
        if line.startswith(exporter.REPORT_MARK):
            _note_step(json.loads(line.removeprefix(exporter.REPORT_MARK)), report, log)
        elif is_progress and time.monotonic() - last_progress < PROGRESS_SECONDS:
            continue
        elif line.strip():
            last_progress = time.monotonic() if is_progress else last_progress
            report.tail.append(line)
            log.info("export: %s", line)


def _lines(stream: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Yield lines, and whether each is a state of a progress bar that is overwritten by the next."""
    pending = b""
    while chunk := stream.read1(65536) if hasattr(stream, "read1") else stream.read(1):
        *parts, pending = re.split(rb"(\r\n|\n|\r)", pending + chunk)
        for text, end in zip(parts[::2], parts[1::2], strict=True):
            yield text.decode("utf-8", "replace"), end == b"\r"
    if pending:
        yield pending.decode("utf-8", "replace"), False


def _note_step(values: dict[str, Any], report: ExportReport, log: RunLog) -> None:
    report.step = str(values.pop("step"))
    if report.step == "done":
        report.done = values
    else:
        log.info("%s.", STEPS.get(report.step, report.step))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _failure(snapshot: Snapshot, report: ExportReport, code: int) -> ExportError:
    """Return the error for a child that did not come to its end."""
    name = snapshot.repo_id or str(snapshot.path)
    text = "\n".join(report.tail)
    step = STEPS.get(report.step, report.step).lower()
    out_of_memory = code == -signal.SIGKILL or "bad_alloc" in text or "MemoryError" in text
    if out_of_memory or "can't allocate memory" in text or "bad allocation" in text:
        return ExportOutOfMemoryError(
            f"The export of {name!r} was killed while {step}, most likely for want of memory. Use a machine with more "
            "memory, or an OpenVINO repository of the model ('OpenVINO/...' on the Hub) as `model_id`.",
            exit_code=code,
            step=report.step,
        )
    if "No space left on device" in text:
        return ExportError(
            f"The disk of the store is full; the export of {name!r} failed while {step}. Free some space, "
            "or set another `path` of the store.",
            step=report.step,
        )
    return ExportError(
        f"The export of {name!r} failed while {step} (exit code {code}). The end of its log:\n{text}",
        exit_code=code,
        step=report.step,
    )
