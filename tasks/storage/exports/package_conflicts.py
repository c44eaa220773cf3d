"""Optional packages that stop exports and loads when they do not fit torch, a `torchvision` for another one above all.

Optimum and Transformers import these packages as soon as they are installed, whatever the model needs. Their versions
do not tell whether they work, since a build for CUDA has the same number as one for the CPU, so they are imported in a
child process. Nothing is started where none of them is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from prefect_huggingface.tasks.storage.exports.versions import installed_version

# Measured with optimum-intel 2.1 and Transformers 5.5: a broken one of these ends the import of Optimum.
IMPORTED_WHEN_PRESENT = (
    "torchvision", "torchao", "kernels", "hqq", "librosa", "soundfile", "pandas", "datasets", "diffusers", "kokoro",
)  # fmt: skip
LONGEST_SECONDS = 60.0
PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name, "it ends the process that imports it"]), flush=True)
    try:
        importlib.import_module(name)
        reason = None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(json.dumps([name, reason]), flush=True)
"""


def find_conflict() -> str | None:
    """Return a sentence about the first optional package that cannot be imported beside torch, or None."""
    present = [name for name in IMPORTED_WHEN_PRESENT if _is_installed(name)]
    versions = tuple((name, installed_version(name)) for name in present)
    return next((_describe(name, reason) for name, reason in probe_packages(versions) if reason is not None), None)


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    # A folder of that name without Python files is no package.
    return spec is not None and spec.origin is not None


@cache
def probe_packages(versions: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Import torch and then each package in a child process, and return why it cannot be imported, if so."""
    if not versions:
        return []
    names = ["torch", *(name for name, _ in versions)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE, *names],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace",
            timeout=LONGEST_SECONDS, env={**os.environ, "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []  # not known, which is no reason to refuse an export
    found: dict[str, str | None] = {}
    for line in done.stdout.splitlines():
        if line.startswith('["'):
            found.update([json.loads(line)])
    return list(found.items())


def _describe(name: str, reason: str) -> str:
    version = installed_version(name)
    named = f"{name!r} {version}" if version else repr(name)
    if name == "torch":
        return f"The package {named} cannot be imported: {reason}. Install it again."
    return (
        f"The package {named} does not fit torch {installed_version('torch')}, and is imported where it is installed: "
        f"{reason}. Remove it with `pip uninstall {name}`, or install the build for this torch."
    )
