"""What the engine cache keeps: what an engine is known by, who uses it, and what its users hold."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.failures import RequestError, refused
from prefect_huggingface.tasks.engines.memory import resident_bytes
from prefect_huggingface.tasks.engines.prompts import TemplateUse, resolve_options
from prefect_huggingface.tasks.engines.protocol import Engine, OnText
from prefect_huggingface.tasks.engines.tunings import apply_tuning
from prefect_huggingface.tasks.errors import EngineError, ModelSourceError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.leases import Lease, hold_export

# What decides how a model is loaded. Options, template and credentials are matters of the caller.
SOURCE_FIELDS = ("model_id", "revision", "weight_format", "quantization", "offline", "allow_pickle")
LOADING_FIELDS = (
    "task", "backend", "device", "device_map", "dtype", "load_in", "attn_implementation", "ov_config", "engine",
    "model_kwargs", "trust_remote_code", "allow_pickle",
)  # fmt: skip
WEIGHT_SUFFIXES = (".bin", ".safetensors", ".pt", ".pth", ".xml")


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What an engine is known by: its class, the folder of its model, and the settings of its loading.

    The settings have the times of the weights with them, so that a folder that was overwritten is another model.
    """

    engine: str
    path: Path
    settings: str

    @classmethod
    def of(cls, model: LocalModel, classes: Mapping[tuple[str, str], str]) -> EngineKey:
        """Return the key of a model; download and export it first where needed."""
        engine = classes.get((model.backend, model.task))
        if engine is None:
            raise EngineError(
                f"There is no engine for task {model.task!r} with backend {model.backend!r}. Choose another backend."
            )
        folder = model_folder(model)
        tuned = apply_tuning(model, folder)
        return cls(engine, folder, json.dumps([_settings_of(tuned, LOADING_FIELDS), _weight_states(folder)]))


def model_folder(model: LocalModel) -> Path:
    """Return the folder that the engine of a model loads; make it first where needed."""
    if model.backend == "openvino":
        from prefect_huggingface.tasks.storage.exports.publication import get_export

        return get_export(model).path
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    return get_snapshot(model).path


def source_mark(model: LocalModel) -> str:
    """Return what tells whether two models lead to the same folder, without looking into the store.

    The weights of a local folder are in it with their sizes and times, so that a replaced model is another one.
    """
    path = Path(model.model_id)
    states = (_file_states([path]) if path.is_file() else _weight_states(path)) if model.is_local else []
    return json.dumps([_settings_of(model, (*SOURCE_FIELDS, *LOADING_FIELDS)), str(model.store_path), states])


def _weight_states(folder: Path) -> list[tuple[str, int, int]]:
    return _file_states(sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES))


def _file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    states = ((file.name, file.stat()) for file in files)
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _settings_of(model: LocalModel, names: tuple[str, ...]) -> str:
    return json.dumps(model.model_dump(mode="json", include=set(names)), sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class EngineState:
    """What is known of a loaded engine, for those who look after a process.

    Args:
        model: Model id or folder that it was loaded for.
        engine: Name of its class.
        device: Device that was asked for, or None for the default.
        memory_bytes: Resident memory that the loading took.
        users: How many hold it.
        requests: How many requests it works on.
        loaded_at: Time of its loading, in seconds since the epoch.
        used_at: Time of its last use, in seconds since the epoch.
    """

    model: str
    engine: str
    device: str | None
    memory_bytes: int
    users: int
    requests: int
    loaded_at: float
    used_at: float


class EngineEntry:
    """A loaded engine with its lease of the folder and the number of its users."""

    def __init__(self, key: EngineKey, engine: type[Engine], model: LocalModel) -> None:
        """Load the engine.

        Args:
            key: What the engine is known by.
            engine: Class of the engine.
            model: Settings without options of their own.
        """
        self.key = key
        self._lock = threading.Lock()
        self._users = 0
        self._requests = 0
        self._lease = hold(key.path)
        self._model, self._device = model.model_id, model.device
        before = resident_bytes()
        try:
            self.engine = engine(key.path, apply_tuning(model, key.path))  # type: ignore[call-arg]
        except BaseException:
            self._lease.close()
            raise
        self._memory_bytes = max(resident_bytes() - before, 0)
        self._loaded_at = self._used_at = time.time()

    @property
    def state(self) -> EngineState:
        """What is known of the engine now."""
        return EngineState(
            self._model, self.key.engine.split(":")[1], self._device, self._memory_bytes, self._users, self._requests,
            self._loaded_at, time.time() if self.in_use else self._used_at,
        )  # fmt: skip

    @property
    def in_use(self) -> bool:
        """Whether somebody holds the engine, or waits for a request."""
        return self._users + self._requests > 0

    def lend(self, model: LocalModel) -> SharedEngine:
        """Return a face of the engine that counts as a use as long as it is held."""
        self._count_user(1)
        shared = SharedEngine(self, model.options, model.chat_template)
        weakref.finalize(shared, self._count_user, -1).atexit = False
        return shared

    def submit(self, request: Request, on_text: OnText | None) -> Future[Completion]:
        """Hand a request to the engine."""
        with self._lock:
            self._requests += 1
        future = self.engine.submit(request, on_text)
        future.add_done_callback(self._forget_request)
        return future

    def close(self) -> None:
        """Close the engine and give the folder back."""
        self.engine.close()
        self._lease.close()

    def _count_user(self, change: int) -> None:
        # No lock: this also runs inside the garbage collector, in a thread that may hold it.
        self._users += change
        self._used_at = time.time()

    def _forget_request(self, future: Future[Completion]) -> None:
        with self._lock:
            self._requests -= 1
            self._used_at = time.time()


def hold(path: Path) -> Lease:
    """Return a lease of a folder, so that the store keeps it."""
    try:
        return hold_export(path)
    except OSError as exc:
        raise ModelSourceError(f"The folder {str(path)!r} cannot be read: {exc}. Check its rights.") from exc


class SharedEngine(Engine):
    """One caller's face of an engine: with the caller's default options, and not to be closed by it."""

    def __init__(self, entry: EngineEntry, defaults: GenerationOptions, chat_template: TemplateUse) -> None:
        self._entry = entry
        self._defaults = defaults
        self._chat_template = chat_template
        self.in_flight = entry.engine.in_flight
        self.prompts = entry.engine.prompts

    @property
    def unshared(self) -> Engine:
        """The engine itself."""
        return self._entry.engine

    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Queue a request with the caller's defaults and return the future of its completion."""
        try:
            options = resolve_options(self._defaults, request)
        except RequestError as exc:
            return refused(request, exc)
        template = request.chat_template or self._chat_template
        return self._entry.submit(replace(request, options=options, chat_template=template), on_text)

    def close(self) -> None:
        """Do nothing: others may use the engine. The cache closes it when its memory is needed."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self._entry.engine.count_tokens(text)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self._entry.engine.context_length
