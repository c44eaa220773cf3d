"""The engines of one process by what they run: loaded once, shared by all, and bounded in memory.

Engines are kept in the order of their last use. Before a model is loaded, and after it, those that nobody uses are
closed until the resident memory of the process is within the budget. An engine is in use while somebody holds what was
lent to them, or while it works on a request.
"""

from __future__ import annotations

import os
import threading
import time
from importlib import import_module
from pathlib import Path

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.cache_entries import (
    WEIGHT_SUFFIXES,
    EngineEntry,
    EngineKey,
    EngineState,
    SharedEngine,
    source_mark,
)
from prefect_huggingface.tasks.engines.loader import Loader
from prefect_huggingface.tasks.engines.memory import give_back_memory, resident_bytes, total_bytes
from prefect_huggingface.tasks.engines.protocol import Engine
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.waiting import WaitNotice, held

logger = get_logger(__name__)

BUDGET_VARIABLE = "PREFECT_HUGGINGFACE_MEMORY_GB"
DEFAULT_SHARE_OF_MEMORY = 0.8
GIB = 2**30

_ENGINES = "prefect_huggingface.tasks.engines"
ENGINE_CLASSES = {
    ("openvino", "text-generation"): f"{_ENGINES}.openvino.text:OpenVINOTextEngine",
    ("openvino", "text2text-generation"): f"{_ENGINES}.transformers.seq2seq:OpenVINOSeq2SeqEngine",
    ("openvino", "summarization"): f"{_ENGINES}.transformers.seq2seq:OpenVINOSeq2SeqEngine",
    ("openvino", "translation"): f"{_ENGINES}.transformers.seq2seq:OpenVINOSeq2SeqEngine",
    ("openvino", "image-text-to-text"): f"{_ENGINES}.openvino.images:OpenVINOImageEngine",
    ("torch", "text-generation"): f"{_ENGINES}.transformers.text:TorchTextEngine",
    ("torch", "text2text-generation"): f"{_ENGINES}.transformers.seq2seq:TorchSeq2SeqEngine",
    ("torch", "summarization"): f"{_ENGINES}.transformers.seq2seq:TorchSeq2SeqEngine",
    ("torch", "translation"): f"{_ENGINES}.transformers.seq2seq:TorchSeq2SeqEngine",
    ("torch", "image-text-to-text"): f"{_ENGINES}.transformers.images:TorchImageEngine",
}


class EngineCache:
    """Engines of one process by what they run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._keys: dict[str, EngineKey] = {}
        # Loading measures the memory, so that only one model is loaded at a time.
        self._loading = threading.RLock()
        self._loader = Loader()
        self._entries: dict[EngineKey, EngineEntry] = {}
        self._budget: int | None = None

    @property
    def budget_bytes(self) -> int:
        """Resident memory that this process may take."""
        if self._budget is not None:
            return self._budget
        given = os.environ.get(BUDGET_VARIABLE)
        return int(float(given) * GIB) if given else int(DEFAULT_SHARE_OF_MEMORY * total_bytes())

    def set_budget(self, size_bytes: int | None) -> None:
        """Set the resident memory that this process may take, or None for the default."""
        self._budget = size_bytes

    def get(self, model: LocalModel) -> Engine:
        """Return the engine of a model; load it first where needed."""
        mark = source_mark(model)
        with self._lock:
            lock = self._locks.setdefault(mark, threading.RLock())
        with held(lock, _notice(model.model_id)):
            # What is loaded needs no look into the store.
            known = self._keys.get(mark)
            found = None if known is None else self._lend(known, model)
            if found is not None:
                return found
            key = self._keys[mark] = EngineKey.of(model, ENGINE_CLASSES)
            with held(self._loading, _notice("another model")):
                self._loader.wait(_notice("a model"))
                return self._lend(key, model) or self._load(key, model)

    def unload(self) -> int:
        """Close all engines, also those in use, and return how many there were."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.close()
        give_back_memory()
        return len(entries)

    def unload_idle(self, seconds: float) -> int:
        """Close the engines that nobody has used for so long, and return how many there were."""
        with self._lock:
            oldest = time.time() - seconds
            idle = [key for key, entry in self._entries.items() if not entry.in_use and entry.state.used_at <= oldest]
            entries = [self._entries.pop(key) for key in idle]
        for entry in entries:
            entry.close()
        if entries:
            give_back_memory()
        return len(entries)

    def close(self) -> None:
        """Close all engines, also one that is being loaded for nobody."""
        self._loader.wait(WaitNotice(logger, "The process cannot end while a model is being loaded"))
        self.unload()

    def states(self) -> list[EngineState]:
        """Return what is known of the loaded engines, the last used one last."""
        with self._lock:
            return [entry.state for entry in self._entries.values()]

    def _lend(self, key: EngineKey, model: LocalModel) -> SharedEngine | None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return None
            # The last one in the dictionary is the last one used.
            self._entries[key] = entry
            return entry.lend(model)

    def _load(self, key: EngineKey, model: LocalModel) -> SharedEngine:
        self._make_room(weight_bytes(key.path), key)
        entry = self._loader.run(lambda: self._add(key, model))
        shared = entry.lend(model)
        self._make_room(0, None)
        return shared

    def _add(self, key: EngineKey, model: LocalModel) -> EngineEntry:
        # The engine has no defaults of its own: callers with different options share it.
        entry = EngineEntry(key, load_class(key), model.model_copy(update={"options": GenerationOptions()}))
        with self._lock:
            self._entries[key] = entry
        return entry

    def _make_room(self, needed: int, key: EngineKey | None) -> None:
        """Close idle engines until the memory is within the budget.

        Raises:
            EngineError: If a model does not fit beside the engines that are in use.
        """
        while resident_bytes() + needed > self.budget_bytes:
            entry = self._take_idle()
            if entry is None:
                break
            logger.info("Closing the engine of %s to keep within the memory budget.", entry.key.path)
            entry.close()
            give_back_memory()
        else:
            return
        in_use = ", ".join(sorted({str(other.path) for other in self._entries if other != key}))
        if key is None or not in_use:
            logger.warning(
                "The process uses %.1f GiB, more than the budget of %.1f GiB, and no engine is idle.",
                (resident_bytes() + needed) / GIB, self.budget_bytes / GIB,
            )  # fmt: skip
            return
        raise EngineError(
            f"{str(key.path)!r} needs about {needed / GIB:.2f} GiB, and with it the process would take more than its "
            f"budget of {self.budget_bytes / GIB:.2f} GiB while these are in use: {in_use}. Let go of one of them, or "
            f"raise {BUDGET_VARIABLE}."
        )

    def _take_idle(self) -> EngineEntry | None:
        """Take out the engine whose last use is the longest ago, of those that nobody uses."""
        with self._lock:
            idle = next((key for key, entry in self._entries.items() if not entry.in_use), None)
            return None if idle is None else self._entries.pop(idle)


def _notice(model: str) -> WaitNotice:
    return WaitNotice(run_log(), f"Waiting until another run of this process has loaded {model}")


def load_class(key: EngineKey) -> type[Engine]:
    """Return the class of the engine of a key."""
    module, name = key.engine.split(":")
    try:
        found: type[Engine] = getattr(import_module(module), name)
    except ModuleNotFoundError as exc:
        raise EngineError(f"The package {exc.name!r} is missing. Install it with pip.") from exc
    return found


def weight_bytes(path: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(file.stat().st_size for file in path.glob("*") if file.suffix in WEIGHT_SUFFIXES)
