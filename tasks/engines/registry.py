"""The engines of this process: one table for local models, pipelines that somebody made, and endpoints.

An engine is loaded once and shared by all callers, who hold an `EngineHandle` with their own default options. Engines
are kept in the order of their last use. Before a model is loaded, and after it, those that nobody uses are closed until
the resident memory of the process, and of those that its engines have, is within the budget. The table belongs to this
module and not to any task: Prefect sends tasks to workers by value, and what a task's own module holds would be copied
with them.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.engines.base import Engine, OnText, RequestError
from prefect_huggingface.tasks.engines.cores import share_cores
from prefect_huggingface.tasks.engines.inputs import TemplateUse, resolve_options
from prefect_huggingface.tasks.engines.memory import give_back_memory, resident_bytes, total_bytes
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.worker import EngineWorker
from prefect_huggingface.tasks.errors import EngineBusyError, EngineError, ModelSourceError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.adapters import check_fit, get_adapters, pin_adapters
from prefect_huggingface.tasks.storage.files import hash_json
from prefect_huggingface.tasks.storage.locks import hold_export
from prefect_huggingface.tasks.waiting import WAKE_SECONDS, WaitNotice

logger = get_logger(__name__)

BUDGET_VARIABLE = "PREFECT_HUGGINGFACE_MEMORY_GB"
DEFAULT_SHARE_OF_MEMORY = 0.8
GIB = 2**30
WEIGHT_SUFFIXES = (".bin", ".safetensors", ".pt", ".pth", ".xml", ".gguf")
# What decides how a model is loaded. Options, template and credentials are matters of the caller.
SOURCE_FIELDS = ("model_id", "revision", "weight_format", "quantization", "adapters", "offline", "allow_pickle")
LOADING_FIELDS = (
    "task", "backend", "device", "device_map", "dtype", "load_in", "attn_implementation", "ov_config", "engine",
    "model_kwargs", "trust_remote_code", "allow_pickle", "embedding",
)  # fmt: skip

_SEQ2SEQ_TASKS = ("text2text-generation", "summarization", "translation")
ENGINE_CLASSES = {
    ("openvino", "text-generation"): "openvino_engine:OpenVINOTextEngine",
    ("openvino", "image-text-to-text"): "openvino_engine:OpenVINOVisionEngine",
    ("torch", "text-generation"): "torch_engine:TorchTextEngine",
    ("torch", "image-text-to-text"): "torch_engine:TorchVisionEngine",
    **{("openvino", task): "torch_engine:OpenVINOSeq2SeqEngine" for task in _SEQ2SEQ_TASKS},
    **{("torch", task): "torch_engine:TorchSeq2SeqEngine" for task in _SEQ2SEQ_TASKS},
    **{
        (backend, task): "embedding_engine:EmbeddingEngine"
        for backend in ("openvino", "torch")
        for task in VECTOR_TASKS
    },
}
ENDPOINT_CLASS = "endpoint_engine:EndpointEngine"
GROUP_CLASS = "engine_group:EngineGroup"


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What an engine is known by.

    Attributes:
        engine: Module and name of its class.
        source: Folder of its model, address of its endpoint, or name of its pipeline.
        settings: Settings of its loading. The times of the weights are in them, so that a folder that was overwritten
            is another model.
    """

    engine: str
    source: str
    settings: str


@dataclass(frozen=True, slots=True)
class EngineState:
    """What is known of a loaded engine, for those who look after a process.

    Attributes:
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


class RegistryEntry:
    """A loaded engine with its users and its requests."""

    def __init__(self, key: EngineKey, name: str, load: Callable[[], Engine], model: LocalModel | None = None) -> None:
        """Load the engine, for a model id, a folder or an address."""
        self.key = key
        self._name, self._model = name, model
        self._lock = threading.Lock()
        # Adding to and taking out of a dictionary need no lock: the garbage collector does it in any thread.
        self._users: dict[int, None] = {}
        self.requests = 0
        before = resident_bytes()
        self.engine = load()
        self._memory_bytes = max(resident_bytes() - before, 0) + self.engine.outside_bytes
        self._loaded_at = self._used_at = time.time()

    @property
    def state(self) -> EngineState:
        """What is known of the engine now."""
        return EngineState(
            self._name, type(self.engine).__name__, self._model.device if self._model else None, self._memory_bytes,
            len(self._users), self.requests, self._loaded_at, time.time() if self.in_use else self._used_at,
        )  # fmt: skip

    def is_on(self, devices: Collection[str] | None) -> bool:
        """Whether closing the engine frees memory of one of these devices of torch; None is the process."""
        return devices is None or (self._model is not None and not set(_torch_devices(self._model)).isdisjoint(devices))

    @property
    def in_use(self) -> bool:
        """Whether somebody holds the engine, or waits for a request."""
        return len(self._users) + self.requests > 0

    def acquire(self, defaults: GenerationOptions, chat_template: TemplateUse | None) -> EngineHandle:
        """Return a handle that counts as a use as long as it is held."""
        handle = EngineHandle(self, defaults, chat_template)
        number = id(handle)
        self._users[number] = None
        weakref.finalize(handle, self._forget_user, number).atexit = False
        return handle

    def submit(self, request: Request, on_text: OnText | None, on_reasoning: OnText | None) -> Future[Completion]:
        """Hand a request to the engine."""
        with self._lock:
            self.requests += 1
        future = self.engine.submit(request, on_text, on_reasoning)
        future.add_done_callback(self._forget_request)
        return future

    def _forget_user(self, number: int) -> None:
        self._users.pop(number, None)
        self._used_at = time.time()

    def _forget_request(self, future: Future[Completion]) -> None:
        with self._lock:
            self.requests -= 1
            self._used_at = time.time()


class EngineHandle(Engine):
    """One caller's handle of an engine: with the caller's default options, and not to be closed by it.

    Attributes:
        unshared: The engine itself.
    """

    def __init__(self, entry: RegistryEntry, defaults: GenerationOptions, chat_template: TemplateUse | None) -> None:
        self._entry, self._defaults, self._chat_template = entry, defaults, chat_template
        self.unshared = entry.engine
        self.in_flight, self.inputs = entry.engine.in_flight, entry.engine.inputs

    @property
    def failure(self) -> str | None:  # type: ignore[override]
        """Why the engine can be used no more, or None."""
        return self.unshared.failure

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Queue a request with the caller's defaults and return the future of its completion."""
        try:
            if self.failure is not None:
                raise RequestError("engine_error", self.failure)
            options = resolve_options(self._defaults, request)
        except RequestError as exc:
            state = RequestState(request)
            state.fail(exc.code, str(exc))
            state.complete()
            return state.future
        template = request.chat_template or self._chat_template
        return self._entry.submit(replace(request, options=options, chat_template=template), on_text, on_reasoning)

    def close(self) -> None:
        """Do nothing: others may use the engine. The registry closes it when its memory is needed."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return self.unshared.count_tokens(text)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self.unshared.context_length

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that is in use, 0 to 1; 0 where the engine does not tell."""
        return self.unshared.cache_usage


@dataclass(eq=False)
class _Registry:
    """Engines of one process by what they run, the last used one last."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    # Loading measures the memory, so that only one model is loaded at a time.
    loading: threading.Lock = field(default_factory=threading.Lock)
    entries: dict[EngineKey, RegistryEntry] = field(default_factory=dict)
    # What is loaded needs no look into the store.
    known: dict[str, EngineKey] = field(default_factory=dict)
    preparing: dict[str, threading.Lock] = field(default_factory=dict)
    budget_bytes: int | None = None


_registry = _Registry()


def load_engine(model: LocalModel | InferenceEndpoint) -> Engine:
    """Return the engine of a model. It is loaded once per process and shared by all callers.

    The model is downloaded and exported first where needed. Models that differ only in their generation options share
    an engine. Keep the result as long as it is used, and close nothing: an engine that nobody holds is closed when its
    memory is needed. An engine that failed is loaded anew.

    Args:
        model: Model, backend, device and options; or an endpoint, which is asked nothing before the first request.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
        ExportError: If the OpenVINO export failed.
        EngineError: If the model cannot be loaded with these settings, or does not fit into the memory.
    """
    if isinstance(model, InferenceEndpoint):
        key = EngineKey(ENDPOINT_CLASS, model.base_url, _endpoint_settings(model))
        plain = model.model_copy(update={"options": GenerationOptions()})
        return _get_or_add(key, lambda: engine_class(key)(plain), model.options)
    model = share_cores(model)
    source = fingerprint(model)
    with _registry.lock:
        lock = _registry.preparing.setdefault(source, threading.Lock())
    with _held(lock, model.model_id):
        known = _registry.known.get(source)
        found = None if known is None else _acquire(known, model.options, model.chat_template)
        if found is not None:
            return found
        model = pin_adapters(model)
        folder = model_folder(model)
        key = _registry.known[source] = key_of(model, folder)
        with _held(_registry.loading, "another model"):
            return _acquire(key, model.options, model.chat_template) or _load(key, model, folder)


def load_pipeline(pipeline: Any) -> Engine:
    """Return the engine of a pipeline object of Transformers, which all users of the pipeline share.

    It is closed when the pipeline is gone.

    Raises:
        SettingsError: If it is no pipeline whose model can be run.
    """
    from prefect_huggingface.tasks.engines.torch_engine import engine_of_pipeline

    key = EngineKey("torch_engine:engine_of_pipeline", f"pipeline {id(pipeline)}", "")

    def load() -> Engine:
        engine = engine_of_pipeline(pipeline)
        weakref.finalize(pipeline, _drop, _registry, key, engine).atexit = False
        return engine

    with _held(_registry.loading, "another model"):
        return _get_or_add(key, load, GenerationOptions())


def unload_engines() -> int:
    """Close all engines of this process, also those in use, and return how many there were."""
    with _registry.lock:
        entries = list(_registry.entries.values())
        _registry.entries.clear()
    return _close(entries)


def unload_idle_engines(idle_seconds: float) -> int:
    """Close the engines that nobody has used for so long, give their memory back, and return how many there were."""
    oldest = time.time() - idle_seconds
    with _registry.lock:
        entries = list(_registry.entries.values())
        idle = [entry for entry in entries if not entry.in_use and entry.state.used_at <= oldest]
        for entry in idle:
            _registry.entries.pop(entry.key, None)
    return _close(idle)


def list_engines() -> list[EngineState]:
    """Return what is known of the engines of this process, the last used one last."""
    return [entry.state for entry in list(_registry.entries.values())]


def check_integrity() -> None:
    """Check that no engine of this process holds anything of a request while nobody asks. For tests.

    Raises:
        AssertionError: With what is left over.
    """
    for entry in list(_registry.entries.values()):
        assert entry.requests >= 0, f"{entry.key} has {entry.requests} requests"
        if not entry.requests and hasattr(entry.engine, "check_integrity"):
            entry.engine.check_integrity()


def set_memory_budget(size_gb: float | None) -> None:
    """Set how much resident memory this process may take, with the processes that its engines have.

    Args:
        size_gb: Size in units of 2^30 bytes. None for `PREFECT_HUGGINGFACE_MEMORY_GB`, or else 80 % of the machine.
    """
    _registry.budget_bytes = None if size_gb is None else int(size_gb * GIB)


def _budget() -> int:
    if _registry.budget_bytes is not None:
        return _registry.budget_bytes
    given = os.environ.get(BUDGET_VARIABLE)
    return int(float(given) * GIB) if given else int(DEFAULT_SHARE_OF_MEMORY * total_bytes())


def _acquire(
    key: EngineKey, defaults: GenerationOptions, chat_template: TemplateUse | None = None
) -> EngineHandle | None:
    with _registry.lock:
        entry = _registry.entries.pop(key, None)
        if entry is None:
            return None
        if entry.engine.failure is None:
            # The last one in the dictionary is the last one used.
            _registry.entries[key] = entry
            return entry.acquire(defaults, chat_template)
    _close([entry])
    return None


def _get_or_add(key: EngineKey, load: Callable[[], Engine], defaults: GenerationOptions) -> EngineHandle:
    """Return a handle of an engine that takes no memory of its own, and no time to load."""
    found = _acquire(key, defaults)
    if found is not None:
        return found
    with _registry.lock:
        if key not in _registry.entries:
            _registry.entries[key] = RegistryEntry(key, key.source, load)
        return _registry.entries[key].acquire(defaults, None)


def _drop(registry: _Registry, key: EngineKey, engine: EngineWorker) -> None:
    # In the garbage collector, which runs in any thread: nothing here waits or takes a lock.
    registry.entries.pop(key, None)
    engine.request_close()


def _load(key: EngineKey, model: LocalModel, folder: Path) -> EngineHandle:
    cls = engine_class(key)
    # The engine has no defaults of its own: callers with different options share it.
    plain = cls.tuned(model, folder).model_copy(update={"options": GenerationOptions()})
    _make_room(weight_bytes(folder) * plain.engine.processes, key)

    def load() -> Engine:
        try:
            lease = hold_export(folder)
        except OSError as exc:
            raise ModelSourceError(f"The folder {str(folder)!r} cannot be read: {exc}. Check its rights.") from exc
        try:
            engine: Engine = cls(folder, plain)
        except BaseException:
            lease.close()
            raise
        engine.on_close = lease.close
        return engine

    entry = _entry_of(key, model, load)
    handle = entry.acquire(model.options, model.chat_template)
    with _registry.lock:
        _registry.entries[key] = entry
    _make_room(0, None)
    return handle


def _entry_of(key: EngineKey, model: LocalModel, load: Callable[[], Engine]) -> RegistryEntry:
    """Load an engine; where the GPU has no room for it, close idle ones on it, the least recently used one first.

    Raises:
        EngineError: If it cannot be loaded, also when none is idle any more.
    """
    while True:
        try:
            return RegistryEntry(key, model.model_id, load, model)
        except EngineError as exc:
            torch = sys.modules.get("torch")
            if torch is None or not isinstance(exc.__cause__, torch.OutOfMemoryError):
                raise
            problem = str(exc)
        # The exception, and with it what was loaded, is gone here.
        devices = _torch_devices(model)
        if not _close_idle(f"to make room on {', '.join(devices)}", devices):
            others = _others(key, devices)
            if not others:
                raise EngineError(problem)
            raise EngineBusyError(f"{problem} These models are in use: {others}. Let go of one of them.")


def _torch_devices(model: LocalModel) -> list[str]:
    """Return the devices on which torch may hold a model, none for one of another backend."""
    if model.backend != "torch":
        return []
    from prefect_huggingface.tasks.engines.torch_loading import available_devices, resolve_device

    if model.device_map is not None:
        return available_devices()[1:] or ["cpu"]
    return [resolve_device(model.device)]


def _others(key: EngineKey | None, devices: Collection[str] | None = None) -> str:
    """Return the other models that are loaded, on these devices."""
    entries = list(_registry.entries.values())
    return ", ".join(sorted({other.key.source for other in entries if other.key != key and other.is_on(devices)}))


def _close_idle(reason: str, devices: Collection[str] | None = None) -> bool:
    """Close the idle engine, on these devices, that was not used for longest, and return whether there is one."""
    with _registry.lock:
        entries = list(_registry.entries.values())
        idle = next((entry for entry in entries if not entry.in_use and entry.is_on(devices)), None)
        if idle is None:
            return False
        del _registry.entries[idle.key]
    logger.info("Closing the engine of %s %s.", idle.key.source, reason)
    _close([idle])
    return True


def _make_room(needed: int, key: EngineKey | None) -> None:
    """Close idle engines, the least recently used one first, until the memory is within the budget.

    Raises:
        EngineBusyError: If a model does not fit beside the engines that are in use.
    """
    while used_bytes() + needed > _budget():
        if not _close_idle("to keep within the memory budget"):
            break
    else:
        return
    in_use = _others(key)
    if key is None or not in_use:
        logger.warning(
            "The process uses %.1f GiB, more than the budget of %.1f GiB, and no engine is idle.",
            (used_bytes() + needed) / GIB, _budget() / GIB,
        )  # fmt: skip
        return
    raise EngineBusyError(
        f"{key.source!r} needs about {needed / GIB:.2f} GiB, and with it the process would take more than its "
        f"budget of {_budget() / GIB:.2f} GiB while these are in use: {in_use}. Let go of one of them, or "
        f"raise {BUDGET_VARIABLE}."
    )


def used_bytes() -> int:
    """Return the resident memory of this process, and of the processes that its engines have."""
    return resident_bytes() + sum(entry.engine.outside_bytes for entry in list(_registry.entries.values()))


def _close(entries: list[RegistryEntry]) -> int:
    for entry in entries:
        entry.engine.close()
    if entries:
        give_back_memory()
    return len(entries)


@contextmanager
def _held(lock: threading.Lock, model: str) -> Iterator[None]:
    """Hold a lock, and say in the log of the run when that takes long."""
    notice = WaitNotice(run_log(), f"Waiting until another run of this process has loaded {model}")
    while not lock.acquire(timeout=WAKE_SECONDS):
        notice.tell()
    try:
        yield
    finally:
        lock.release()


def _start_anew_after_fork() -> None:
    # The threads of the engines do not live in the child, and a lock may be held by a thread that is gone.
    global _registry
    for entry in list(_registry.entries.values()):
        entry.engine.failure = "The engine belongs to the process that was forked. Load it again in this one."
    _registry = _Registry()


def _close_at_exit() -> None:
    # A thread that is in OpenVINO when the interpreter ends would crash the process.
    with _held(_registry.loading, "a model that nobody waits for"):
        unload_engines()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_after_fork)
atexit.register(_close_at_exit)


def model_folder(model: LocalModel) -> Path:
    """Return the folder that the engine of a model loads; make it first where needed."""
    adapters = get_adapters(model)
    if model.backend == "openvino":
        if os.path.isdir(model.model_id):
            # Engines check what they load; this is before an export is made for nothing.
            check_fit(adapters, Path(model.model_id))
        from prefect_huggingface.tasks.storage.exports.store import get_export

        return get_export(model).path
    from prefect_huggingface.tasks.storage.snapshots import get_snapshot

    return get_snapshot(model).path


def key_of(model: LocalModel, folder: Path) -> EngineKey:
    """Return the key of the engine of a model in a folder.

    Raises:
        EngineError: If there is no engine for its task on its backend.
    """
    name = ENGINE_CLASSES.get((model.backend, model.task))
    if name is None:
        raise EngineError(
            f"There is no engine for task {model.task!r} with backend {model.backend!r}. Choose another backend."
        )
    key = EngineKey(name, str(folder), "")
    tuned = engine_class(key).tuned(model, folder)
    if tuned.engine.processes > 1:
        key = replace(key, engine=GROUP_CLASS)
    adapters = [(one.scale, str(one.path), _file_states(one.files)) for one in get_adapters(model)]
    return replace(key, settings=json.dumps([_settings_of(tuned, LOADING_FIELDS), _weight_states(folder), adapters]))


def engine_class(key: EngineKey) -> type[Any]:
    """Return the class of the engine of a key."""
    module, name = key.engine.split(":")
    try:
        found: type[Any] = getattr(import_module(f"prefect_huggingface.tasks.engines.{module}"), name)
    except ModuleNotFoundError as exc:
        raise EngineError(f"The package {exc.name!r} is missing. Install it with pip.") from exc
    return found


def fingerprint(model: LocalModel) -> str:
    """Return what tells whether two models lead to the same engine, without looking into the store.

    The weights of a local folder are in it with their sizes and times, so that a replaced model is another one.
    """
    path = Path(model.model_id)
    states = (_file_states([path]) if path.is_file() else _weight_states(path)) if model.is_local else []
    states += [state for one in model.adapters if one.is_local for state in _weight_states(Path(one.repo_or_folder))]
    return json.dumps([_settings_of(model, (*SOURCE_FIELDS, *LOADING_FIELDS)), str(model.store_path), states])


def weight_bytes(path: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(size for _, size, _ in _weight_states(path))


def _weight_states(folder: Path) -> list[tuple[str, int, int]]:
    return _file_states(sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES))


def _file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    states = ((file.name, file.stat()) for file in files)
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _settings_of(model: LocalModel, names: tuple[str, ...]) -> str:
    return json.dumps(model.model_dump(mode="json", include=set(names)), sort_keys=True, default=str)


def _endpoint_settings(endpoint: InferenceEndpoint) -> str:
    """Return what tells whether two endpoints are the same, without the token in clear."""
    fields = endpoint.model_dump(mode="json", exclude={"options", "credentials", "headers"})
    secrets = [endpoint.get_token(), sorted(endpoint.get_headers().items())]
    return hash_json([fields, secrets])
