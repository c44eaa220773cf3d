"""Marks: which process works on a flow run.

A warm worker writes its mark into the run as Prefect's `infrastructure_pid`, so that its successor can tell a run that
is under way from one whose process is gone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Self

from prefect_huggingface.deployments.processes import is_process, start_of


@dataclass(frozen=True, slots=True)
class WorkerMark:
    """A worker process. Its start tells it from a later process with the same number.

    Args:
        pid: Number of the process.
        host: Name of its machine.
        started: Start of the process, in whole seconds since the epoch.
        name: Name of the worker.
    """

    pid: int
    host: str
    started: int
    name: str

    @classmethod
    def own(cls, name: str) -> Self:
        """Return the mark of this process."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), int(start_of(pid) or 0), name)

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """Return the mark that a text is, or None where it is none."""
        parts = (text or "").split(":", 4)
        if len(parts) != 5 or parts[0] != "warm" or not (parts[1].isdecimal() and parts[3].isdecimal()):
            return None
        return cls(int(parts[1]), parts[2], int(parts[3]), parts[4])

    def __str__(self) -> str:
        return f"warm:{self.pid}:{self.host}:{self.started}:{self.name}"

    @property
    def is_here(self) -> bool:
        """Whether the process is one of this machine."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether the process is one of this machine and has ended."""
        if not self.is_here:
            return False
        return not is_process(self.pid, self.started)
