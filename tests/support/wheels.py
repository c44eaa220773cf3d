"""The wheel of this project, and fresh environments to install it into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGED = ("blocks", "tasks", "flows", "deployments", "pyproject.toml", "README.md", "LICENSE")
NO_INDEX = re.compile(
    "NewConnectionError|ConnectTimeout|dns error|client error .Connect.|name resolution", re.IGNORECASE
)


def build_wheel(folder: Path) -> str:
    """Build a wheel of a copy of the clone, so that the clone stays clean, and return its path."""
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, timeout=250, env=os.environ)
    return str(next(folder.glob("*.whl")))


def make_environment(folder: Path) -> Path:
    """Make a virtual environment without any package and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=250)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def pip_install(python: Path, *arguments: str, seconds: float) -> None:
    """Run `pip install` for an environment, as a user does."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments]
    skip_without_index(subprocess.run(command, capture_output=True, text=True, timeout=seconds))


def skip_without_index(done: subprocess.CompletedProcess[str]) -> None:
    """Skip the test where an installation failed because no package index can be reached; fail it for other reasons."""
    if done.returncode != 0 and NO_INDEX.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
