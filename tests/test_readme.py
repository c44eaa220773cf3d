"""The examples of the README run, and its tree names every file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_an_example_runs(code, tmp_path):
    from prefect.settings import PREFECT_API_URL

    # The examples name the bundled model relative to the clone, and write where they run.
    (tmp_path / "deployments").symlink_to(ROOT / "deployments")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    for expected in re.findall(r"print\(.*\)  # (.*)", code):
        assert expected in done.stdout


def test_the_examples_are_there():
    assert len(EXAMPLES) >= 3


def test_the_tree_names_every_source_file():
    tree = README.split("## What is where")[1]
    for folder in ("blocks", "tasks", "flows", "deployments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "__init__.py":
                assert re.search(rf"\b{re.escape(path.name)}\b", tree), f"{path.relative_to(ROOT)} is not in the tree"
