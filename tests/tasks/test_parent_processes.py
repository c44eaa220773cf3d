"""The process of a run ends with the process of its worker, gently, and no other process does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefect_huggingface.tasks.parent_processes import RUN_VARIABLE
from support.operated_runs import is_alive, wait_for_end
from support.prefect_services import wait_until

CHILD = """
import pathlib, signal, sys, time
from prefect_huggingface.tasks.parent_processes import end_with_parent

def leave(*_):
    pathlib.Path(sys.argv[1], "committed").touch()
    sys.exit(1)

signal.signal(signal.SIGTERM, leave)
end_with_parent()
end_with_parent()
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(120)
"""
PARENT = """
import subprocess, sys, time
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("is_run", [True, False])
def test_a_run_ends_gently_with_its_killed_worker(tmp_path: Path, is_run):
    environment = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}
    environment |= {RUN_VARIABLE: "a-run"} if is_run else {}
    command = [sys.executable, "-c", PARENT, CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        child = int(parent.stdout.readline())
        wait_until((tmp_path / "ready").exists, 120, "the start of the child")
        parent.kill()
    try:
        if is_run:
            wait_for_end(child, 20)
            assert (tmp_path / "committed").exists()
        else:
            time.sleep(2.5)
            assert is_alive(child)
    finally:
        if is_alive(child):
            os.kill(child, 9)
