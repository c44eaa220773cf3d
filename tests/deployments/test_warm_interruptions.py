"""Interrupting a thread leaves no lock of the interpreter held."""

from __future__ import annotations

import subprocess
import sys

# Each thread looks for a package that is missing, again and again, and is interrupted there. In a process of its own:
# with the import lock held for ever, not even a signal would end the tests.
INTERRUPT_IMPORTS = """
import sys, threading, time
from contextlib import suppress
from prefect_huggingface.deployments.warm.interruptions import RunInterrupted, interrupt_thread

class FindNothing:
    find_spec = staticmethod(lambda name, path=None, target=None: None)

sys.meta_path = [FindNothing]  # what is left of an import is mostly its locks

def look(rounds):
    with suppress(RunInterrupted):
        for _ in range(rounds):
            with suppress(ModuleNotFoundError):
                import no_such_package

for number in range(200):
    thread = threading.Thread(target=look, args=(10**9,), daemon=True)
    thread.start()
    time.sleep(0.002)
    while not interrupt_thread(thread.ident):
        time.sleep(0.0005)
    thread.join(20)
    assert not thread.is_alive(), "the interruption was lost"
    last = threading.Thread(target=look, args=(1,), daemon=True)
    last.start()
    last.join(20)
    assert not last.is_alive(), f"the import lock is held after {number} interruptions"
print("free")
"""


def test_an_interruption_does_not_leave_the_import_lock_held() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPT_IMPORTS], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "free", done.stderr[-2000:]
