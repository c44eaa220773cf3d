"""A worker of background tasks and callers of it, as processes of their own.

Usage: python -m support.warm_processes serve MODULE
       python -m support.warm_processes call SETTINGS.json
The settings hold `prompts`, `calls`, `warm` (fields of the block) and `options`; each call prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


def start_warm(services, log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start this module with arguments as a process whose output is in a file."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "support.warm_processes", *arguments],
            env={**services.environment, "PYTHONPATH": path, **environment},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def start_worker(services, log: Path) -> subprocess.Popen[bytes]:
    """Start a process that serves the tasks of warm models and nothing else."""
    return start_warm(services, log, "serve")


def start_caller(services, folder: Path, name: str, **settings: Any) -> subprocess.Popen[bytes]:
    """Start a process that asks a warm model; its answers are read with `read_calls`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    return start_warm(services, folder / f"{name}.log", "call", str(path), PREFECT_LOGGING_LEVEL="WARNING")


def read_calls(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what the calls of a process came to, as far as they are done."""
    lines = (folder / f"{name}.log").read_text().splitlines()
    return [json.loads(line.removeprefix("CALL ")) for line in lines if line.startswith("CALL ")]


def serve() -> None:
    """Serve background tasks until the process is ended."""
    from prefect.task_worker import serve as serve_tasks

    from prefect_huggingface.tasks.warm_requests import SERVED_TASKS

    serve_tasks(*SERVED_TASKS, limit=10)


def call(path: str) -> None:
    """Ask a warm model as often as a settings file says."""
    from prefect_huggingface.blocks import GenerationOptions, WarmModel
    from prefect_huggingface.tasks.generation import complete_prompts

    settings = json.loads(Path(path).read_text())
    warm = WarmModel(**settings["warm"])
    for _ in range(settings.get("calls", 1)):
        began = time.monotonic()
        try:
            found = complete_prompts(warm, settings["prompts"], GenerationOptions(**settings.get("options", {})))
            record = {"completions": [each.as_dict() for each in found]}
        except Exception as exc:
            record = {"error": f"{type(exc).__name__}: {exc}"}
        loaded = [name for name in ("torch", "transformers", "openvino_genai") if name in sys.modules]
        record |= {"seconds": time.monotonic() - began, "loaded": loaded}
        print(f"CALL {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    {"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
