"""Parts of the suite without `fcntl`, `resource`, `/proc`, cgroups and `fork`, which Windows or macOS lack."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHER_SYSTEM = ROOT / "tests" / "support" / "other_system"
SOURCES = sorted(
    path for folder in ("blocks", "tasks", "flows", "deployments") for path in (ROOT / folder).rglob("*.py")
)
STORE = ("test_leases.py", "test_scratch.py", "test_places.py", "test_journals.py", "test_local_snapshots.py")
# The scratch database is looked for in /proc, and its file is not removed while it is open elsewhere.
UNIX_ONLY = "not index"
UNIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "crypt"}
UNIX_NAMES = {
    ("os", name)
    for name in ("fork", "killpg", "getpgid", "setsid", "getuid", "geteuid", "statvfs", "uname", "O_CLOEXEC")
} | {("signal", name) for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "pthread_kill")}


def run_elsewhere(*arguments: str, seconds: float) -> str:
    # What pytest-xdist tells its processes is not for the suite within the suite.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "PYTHONPATH": str(OTHER_SYSTEM), "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_system_is_another_one() -> None:
    code = (
        "import os; import prefect_huggingface.tasks.storage.locks as leases; import filelock;"
        "print(leases.fcntl, hasattr(os, 'fork'), filelock.FileLock.__name__)"
    )
    assert run_elsewhere("-W", "ignore", "-c", code, seconds=120).split() == ["None", "False", "SoftFileLock"]


@pytest.mark.timeout(900)
def test_the_store_and_the_journal_work_elsewhere() -> None:
    files = [f"tests/tasks/storage/{name}" for name in STORE]
    printed = run_elsewhere("-m", "pytest", "-q", "-k", UNIX_ONLY, *files, seconds=850)
    assert " passed" in printed
    assert "failed" not in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_export_and_a_batch_work_elsewhere() -> None:
    files = ["tests/tasks/test_exports.py", "tests/tasks/storage/test_eviction.py", "tests/flows/test_chains.py"]
    printed = run_elsewhere("-m", "pytest", "-q", *files, seconds=1700)
    assert " passed" in printed
    assert "failed" not in printed


def _is_guard(node: ast.AST) -> bool:
    """Return whether an import within may fail."""
    return isinstance(node, ast.Try) or (
        isinstance(node, ast.With) and any("ImportError" in ast.dump(item.context_expr) for item in node.items)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_only_unix_has_is_asked_for_first(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {node for outer in ast.walk(tree) if _is_guard(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        assert node in guarded or not names & UNIX_MODULES, f"{path.name}:{node.lineno} is for Unix only"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in UNIX_NAMES, f"{path.name}:{node.lineno} is for Unix only"
