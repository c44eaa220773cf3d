"""The scripts of the quickstart, which are no part of the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "deployments" / "quickstart"


def load_script(name: str) -> Any:
    """Return a script of the quickstart as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
