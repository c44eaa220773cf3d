"""Downloads in processes of their own, so that they can be killed and can compete."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.hub_models import hub_model
from support.hub_server import LocalHub


class _Place:
    """The address of a Hub, for a process that does not have the Hub itself."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint


def _download(pipe: Any, endpoint: str, store: Path, options: dict[str, Any]) -> None:
    from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot

    try:
        snapshot = fetch_snapshot(hub_model(_Place(endpoint), store, **options))  # type: ignore[arg-type]
        pipe.send(("done", snapshot.commit, str(snapshot.path)))
    except Exception as exc:
        pipe.send(("failed", type(exc).__name__, str(exc)))


class DownloadProcess:
    """One process that downloads a model, started at once."""

    def __init__(self, hub: LocalHub, store: Path, **options: Any) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_download, args=(theirs, hub.endpoint, store, options))
        self.process.start()
        theirs.close()

    def result(self, seconds: float = 60.0) -> tuple[str, str, str]:
        """Return "done" with commit and folder, or "failed" with the kind and words of the error."""
        assert self._pipe.poll(seconds), "the download takes too long"
        answer: tuple[str, str, str] = self._pipe.recv()
        self.process.join(10)
        return answer

    def kill(self) -> None:
        """Kill the process at this instant (SIGKILL)."""
        self.process.kill()
        self.process.join(10)


def _context() -> ForkServerContext:
    # The fork server imports once; each download is then a process of its own within milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prefect_huggingface.tasks.storage.hub.download", "huggingface_hub"])
    return context


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)
    return value
