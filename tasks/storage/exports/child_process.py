"""Child processes that do heavy work for one job: their surroundings, their log, their end.

The child is a program of this package that imports nothing of it. It gets a JSON job, writes only below a work folder,
reports its steps in marked lines of its output, and dies with its parent. It has no secrets and no network.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.errors import ExportError, ExportOutOfMemoryError
from prefect_huggingface.tasks.run_logs import RunLog, run_log
from prefect_huggingface.tasks.storage.exports.exporter import REPORT_MARK
from prefect_huggingface.tasks.storage.exports.resources import free_disk

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL|AUTH", re.IGNORECASE)
NO_MEMORY = ("bad_alloc", "MemoryError", "can't allocate memory", "bad allocation", "Cannot allocate memory")
NO_SPACE = "No space left on device"
NOISE = re.compile(r"TracerWarning|^\s+(if|torch|is_causal|warnings\.warn)\b")
FULL_DISK_BYTES = 4 << 20
TAIL_LINES = 40
# With the share before the bar, as of tqdm, and behind it, as of rich.
BARS = (re.compile(r"(.*?)[:\s|]*(\d+)%[\s|]*[|█━╸]"), re.compile(r"([^█━╸]*?)[\s|]*[█━╸][^%]*?(\d+)%"))
PROGRESS_SECONDS = 10.0


@dataclass(slots=True)
class ChildReport:
    """What a child process tells: its step, its result, and the end of its log for errors."""

    step: str = "start"
    result: dict[str, Any] | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))


@dataclass(frozen=True, slots=True)
class ChildProgram:
    """A program that a child process runs.

    Attributes:
        path: File of the program.
        purpose: What it does, for errors: "export of 'x'".
        steps: What each step is called in the log, in order.
        network: Whether it may use the network, for public data sets.
    """

    path: Path
    purpose: str
    steps: Mapping[str, str]
    network: bool = False

    def describe(self, step: str) -> str:
        """Return a step for people."""
        return self.steps.get(step, step)


def run_child(program: ChildProgram, job: Mapping[str, Any], work: Path, descriptor: int = -1) -> dict[str, Any]:
    """Run a program in a child process and return what it reports at its end.

    Args:
        program: What to run.
        job: JSON-friendly content of the job; `parent` is added.
        work: Folder for everything that the process writes.
        descriptor: Open file that the child inherits, so that its lock lives as long as the child; -1 for none.

    Raises:
        ExportOutOfMemoryError: If the child was killed, most likely for want of memory.
        ExportError: If the child failed.
    """
    job_path = work / "job.json"
    job_path.write_text(json.dumps({**job, "parent": os.getpid()}), encoding="utf-8")
    (work / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-u", str(program.path), str(job_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment(work, program.network),
        cwd=work,
        pass_fds=(descriptor,) if descriptor >= 0 else (),
    )
    report = ChildReport()
    try:
        if process.stdout is not None:
            _follow(process.stdout, report, program, run_log())
        code = process.wait()
    finally:
        _end(process)
    if code == 0 and report.result is not None:
        return report.result
    raise _failure(program, report, code, work)


def child_environment(work: Path, network: bool = False) -> dict[str, str]:
    """Return the environment of a child: that of this process without secrets, offline."""
    kept = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
    kept = {name: value for name, value in kept.items() if not name.startswith("PREFECT_")}
    return {
        **kept,
        "TMPDIR": str(work / "tmp"),
        "HF_HUB_OFFLINE": "0" if network else "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN_PATH": str(work / "no-token"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8",
    }


def _follow(stream: IO[bytes], report: ChildReport, program: ChildProgram, log: RunLog) -> None:
    """Read the output of the child to its end; log each line once, and where its progress bars are now and then."""
    last_progress = time.monotonic()
    logged: set[str] = set()
    for line in _lines(stream):
        if line.startswith(REPORT_MARK):
            _note_step(json.loads(line.removeprefix(REPORT_MARK)), report, program, log)
            continue
        if not line.strip():
            continue
        if (progress := describe_bar(line)) is not None:
            if time.monotonic() - last_progress < PROGRESS_SECONDS:
                continue
            line, last_progress = progress, time.monotonic()
        else:
            report.tail.append(line)
        if not NOISE.search(line) and line not in logged:
            logged.add(line)
            log.info("%s", line.rstrip())


def describe_bar(line: str) -> str | None:
    """Return a state of a progress bar as plain text, or None if a line is no bar."""
    found = next(filter(None, (bar.match(line) for bar in BARS)), None)
    return None if found is None else f"{found[1].strip(' :') or 'Progress'}: {found[2]} %"


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield lines, and each state of a progress bar that is overwritten by the next."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        *parts, pending = re.split(rb"(\r\n|\n|\r)", pending + chunk)
        for text in parts[::2]:
            yield text.decode("utf-8", "replace")
    if pending:
        yield pending.decode("utf-8", "replace")


def _note_step(values: dict[str, Any], report: ChildReport, program: ChildProgram, log: RunLog) -> None:
    report.step = str(values.pop("step"))
    if report.step == "done":
        report.result = values
        return
    number = list(program.steps).index(report.step) + 1 if report.step in program.steps else 0
    name = f" ({values['name']})" if "name" in values else ""
    log.info("Step %d of %d: %s%s.", number, len(program.steps), program.describe(report.step), name)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _failure(program: ChildProgram, report: ChildReport, code: int, work: Path) -> ExportError:
    """Return the error for a child that did not come to its end."""
    text = "\n".join(report.tail)
    where = f"at the step {program.describe(report.step)!r}"
    if code == -signal.SIGKILL or any(words in text for words in NO_MEMORY):
        return ExportOutOfMemoryError(
            f"The {program.purpose} was killed {where}, most likely for want of memory. Use a machine with more "
            "memory, or an OpenVINO repository of the model ('OpenVINO/...' on the Hub) as `model_id`.",
            exit_code=code,
            step=report.step,
        )
    # OpenVINO does not say why it cannot write.
    if NO_SPACE in text or free_disk(work) < FULL_DISK_BYTES:
        return ExportError(
            f"The disk of the store is full; the {program.purpose} failed {where}. Free some space, or set another "
            "`path` of the store.",
            step=report.step,
        )
    return ExportError(
        f"The {program.purpose} failed {where} (exit code {code}). The end of its log:\n{text}",
        exit_code=code,
        step=report.step,
    )
