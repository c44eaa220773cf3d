"""Runs one batch in a process of its own, which a test may kill, and notes every answer of the engine in a file.

Usage: python -m support.batch_runs settings.json
The settings hold `parameters` for the flow, `model` for the block, and `log`, the file for the answers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


def start_batch(folder: Path, life: int, model: Mapping[str, Any], **parameters: Any) -> subprocess.Popen[bytes]:
    """Start the flow in a process of its own, with the Prefect API of this process."""
    from prefect.settings import PREFECT_API_URL

    settings = folder / f"settings-{life}.json"
    record = {"model": dict(model), "parameters": parameters, "log": str(folder / f"answers-{life}.log")}
    settings.write_text(json.dumps(record))
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": path}
    output = (folder / f"output-{life}.txt").open("wb")
    with output:
        return subprocess.Popen(
            [sys.executable, "-m", "support.batch_runs", str(settings)],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def read_answers(folder: Path, life: int) -> list[int]:
    """Return the rows that the engine answered in a life, in order."""
    log = folder / f"answers-{life}.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def note_answers(path: str) -> None:
    """Write the row of every answer to a file, right when the engine gives it."""
    from prefect_huggingface.tasks.engines.embedding_engine import EmbeddingEngine
    from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine

    submit = OpenVINOTextEngine.submit
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def noted(self: Any, request: Any, *rest: Any) -> Any:
        future = submit(self, request, *rest)
        future.add_done_callback(
            lambda done: None if done.cancelled() else os.write(log, f"{done.result().request_id}\n".encode())
        )
        return future

    OpenVINOTextEngine.submit = EmbeddingEngine.submit = noted  # type: ignore[method-assign]


def main() -> None:
    """Run the flow of a settings file."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    if settings["parameters"].pop("die_with_parent", True):
        threading.Thread(target=_die_with_parent, daemon=True).start()
    note_answers(settings["log"])
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.flows import batches

    name = settings["parameters"].pop("flow", "batch_inference")
    getattr(batches, name)(LocalModel(**settings["model"]), **settings["parameters"])


def _die_with_parent() -> None:
    import time

    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
