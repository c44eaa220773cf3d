"""Processes that one command starts and another one ends, found again by process id and start time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from prefect_huggingface.tasks.storage.files import write_file

# Clocks are corrected while processes run, and start times are computed from the time of the last boot.
START_TOLERANCE_SECONDS = 2.0
STOP_SECONDS = 20.0
CHILD_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """A process that was started in a session of its own.

    Attributes:
        name: What it is.
        pid: Its process id, which another process may have by now.
        started: When it started (seconds since 1970).
        log: File with its output.
    """

    name: str
    pid: int
    started: float
    log: str

    def is_alive(self) -> bool:
        """Tell whether this very process runs, and not another one with its id."""
        return is_process(self.pid, self.started)

    def read_end_of_log(self, lines: int = 8) -> str:
        """Return the last lines of its output."""
        with suppress(OSError):
            return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-lines:])
        return ""


def start_of(pid: int) -> float | None:
    """Return when a process started (seconds since 1970), or None where it has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_process(pid: int, started: float) -> bool:
    """Tell whether the process of this id that started then still runs."""
    found = start_of(pid)
    return found is not None and abs(found - started) < START_TOLERANCE_SECONDS


def start_process(name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> ServiceProcess:
    """Start a process that outlives this one. Its output goes to a file in the folder.

    Args:
        name: What it is.
        command: Program and arguments.
        folder: Folder for the output, and the process's own folder.
        environment: All its environment variables.
    """
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows has no sessions
        )  # fmt: skip
    # It is to outlive this process, so that Python shall not warn of it.
    process.returncode = 0
    return ServiceProcess(name, process.pid, psutil.Process(process.pid).create_time(), str(log))


def end_process(service: ServiceProcess, seconds: float = STOP_SECONDS) -> bool:
    """End a process and what it started, gently first.

    Args:
        service: The process.
        seconds: How long it may take to end by itself.

    Returns:
        Whether it was running.
    """
    if not service.is_alive():
        return False
    processes = [psutil.Process(service.pid)]
    with suppress(psutil.NoSuchProcess):
        processes += processes[0].children(recursive=True)
    _end(processes[:1], seconds)
    # What it left behind has nobody to wait for.
    _end(processes[1:], CHILD_SECONDS)
    return True


def _end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Ask processes to end, and kill those that do not in time."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


class ProcessRecord:
    """The file that says which processes were started. It is replaced as a whole, so it is never half written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, ServiceProcess]:
        """Return the processes by name; none if the file is missing or damaged."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            return {entry["name"]: ServiceProcess(**entry) for entry in entries}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def write(self, services: Mapping[str, ServiceProcess]) -> None:
        """Replace the file."""
        write_file(self.path, json.dumps([asdict(service) for service in services.values()], indent=2).encode())

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def wait_for(condition: Callable[[], object], seconds: float, every: float = 0.2) -> bool:
    """Wait until a condition is true, and return whether it was in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return False
