"""Several engines of one model in processes of their own, each on a part of the cores, behind one queue.

Memory is near to some cores of a large machine and far from others (NUMA), and the steps of one model do not keep many
cores busy. So each process is bound to cores that are near to each other before it loads its model. A request goes to
the process that has the fewest requests; where all have as many as they take, it waits here until one of them is free.

Requests and what comes of them travel through pipes. A process ends when its pipe does, so that none outlives the one
that started it. Where one ends by itself, the whole engine has failed, as any engine that cannot go on.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import Engine, OnText
from prefect_huggingface.tasks.engines.cores import THREADS_PROPERTY, divide_cores, read_nodes
from prefect_huggingface.tasks.engines.detokenizer import RustTokenizer
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine, OpenVINOVisionEngine
from prefect_huggingface.tasks.engines.openvino_runtime import apply_tuning, choose_device
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.worker import LocalEngine
from prefect_huggingface.tasks.errors import EngineError, HuggingFaceTaskError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.waiting import WAKE_SECONDS

logger = get_logger(__name__)

CLASSES: dict[str, type[OpenVINOTextEngine]] = {
    "text-generation": OpenVINOTextEngine,
    "image-text-to-text": OpenVINOVisionEngine,
}
ENDING_SECONDS = 30.0
KILLED = -9  # SIGKILL, which Windows does not name


class EngineGroup(LocalEngine):
    """The engines of one model in several processes, as one."""

    tuned = staticmethod(apply_tuning)

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Start the processes and load the OpenVINO model of a folder in each.

        Raises:
            EngineError: If one of them cannot load it with these settings, or there are too few cores.
            ModelSourceError: If an adapter does not fit the model.
        """
        device, count = choose_device(model), model.engine.processes
        if device != "CPU":
            raise EngineError(f"`instances` divide the cores of a CPU, got device {model.device!r}. Set it to 1.")
        # It guards what waits, and the requests of all processes.
        self._lock = threading.Lock()
        self._waiting: deque[tuple[RequestState, bytes]] = deque()
        self._closed = False
        self._instances: list[_Instance] = []
        try:
            for cores in divide_cores(read_nodes(), count):
                self._instances.append(_Instance(self, self._lock, path, model, cores))
            for instance in self._instances:
                instance.wait_until_ready()
            from openvino_genai import Tokenizer

            engine = CLASSES[model.task]
            super().__init__(engine.read_inputs(path, model, Tokenizer(path), RustTokenizer.of_folder(path)))
        except BaseException:
            self._abort_all()
            self._join()
            raise
        self.in_flight = sum(instance.in_flight for instance in self._instances)

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Hand a request to the process that has the fewest, and return the future of its completion."""
        state = RequestState(request, on_text, on_reasoning)
        try:
            message = pickle.dumps((request, on_text is not None, on_reasoning is not None))
        except Exception as exc:
            state.fail_with(exc, "The request cannot be sent to another process", "Give it plain values.")
            state.complete()
            return state.future
        # One with a deadline does not wait here: the process that ends it in time must know of it.
        is_urgent = state.seconds_left != float("inf")
        with self._lock:
            if not self._closed:
                instance = min(self._instances, key=lambda one: len(one.states))
                if is_urgent or len(instance.states) < instance.in_flight:
                    instance.begin(state, message)
                else:
                    self._waiting.append((state, message))
                return state.future
        self.refuse(state)
        return state.future

    def close(self) -> None:
        """End the processes. Requests that are not done end as cancelled."""
        self._abort_all()
        self._join()
        self.inputs.close()
        if self.on_close is not None:
            on_close, self.on_close = self.on_close, None
            on_close()

    @property
    def cache_usage(self) -> float:
        """Share of the KV caches that was in use when the last requests ended, 0 to 1."""
        return sum(instance.cache_usage for instance in self._instances) / len(self._instances)

    @property
    def outside_bytes(self) -> int:
        """Resident memory of the processes."""
        return sum(instance.resident_bytes for instance in self._instances)

    @property
    def process_ids(self) -> list[int]:
        """The processes, in the order of their cores."""
        return [instance.process.pid for instance in self._instances]

    def check_integrity(self) -> None:
        """Check that nothing is held of any request. For tests.

        Raises:
            AssertionError: With the number of requests that are left over.
        """
        left = len(self._waiting) + sum(len(instance.states) for instance in self._instances)
        assert left == 0, f"The engine is idle and still holds {left} requests."

    def dispatch(self, instance: _Instance) -> None:
        """Give a process the next of the requests that wait."""
        with self._lock:
            while self._waiting and not self._closed and len(instance.states) < instance.in_flight:
                state, message = self._waiting.popleft()
                if not state.future.cancelled():
                    instance.begin(state, message)

    def fail(self, failure: str) -> None:
        """End all processes after one has failed, and all requests with them."""
        if not self._closed:
            self.failure = failure
            logger.error(failure)
            self._abort_all()

    def _abort_all(self) -> None:
        with self._lock:
            self._closed = True
            left = [state for state, _ in self._waiting]
            self._waiting.clear()
            for instance in self._instances:
                left += instance.states.values()
                instance.states.clear()
        for instance in self._instances:
            instance.request_close()
        for state in left:
            self.refuse(state)

    def _join(self) -> None:
        end = time.monotonic() + ENDING_SECONDS
        for instance in self._instances:
            instance.join(max(end - time.monotonic(), 0.1))


class _Instance:
    """One process, with the requests that it works on.

    Attributes:
        states: Its requests by their numbers. The lock of the group guards it.
        in_flight: How many it takes.
        cache_usage: Share of its KV cache that was in use when its last request ended.
    """

    def __init__(
        self, group: EngineGroup, lock: threading.Lock, path: Path, model: LocalModel, cores: list[int]
    ) -> None:
        """Start the process on some cores.

        Raises:
            EngineError: If the system starts no process.
        """
        self._group, self._lock = group, lock
        self.states: dict[int, RequestState] = {}
        self.in_flight, self.cache_usage = 1, 0.0
        self._last_number = 0
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._loaded: Future[int] = Future()
        # No token: the files are there.
        self._send(cores, path, model.model_copy(update={"credentials": None}))
        # With `-P`, no file of the working folder stands in for a module. An interruption from the terminal is for the
        # process that loaded it, which closes this one.
        command = [sys.executable, "-P", "-m", __name__]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as exc:
            raise EngineError(f"No process can be started for the engine: {exc}. Lower `instances`.") from None
        # Each end of a pipe has a thread of its own, since a write may wait for what the other end has to say first.
        for work in (self._write, self._read):
            threading.Thread(target=work, name=f"{type(self).__name__} {self.process.pid}", daemon=True).start()

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the process, 0 where it has ended."""
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            HuggingFaceTaskError: If it cannot be loaded, of the kind that one engine raises.
        """
        # In slices: an exception that Prefect puts into this thread waits for the end of a call.
        while not self._loaded.done():
            with suppress(TimeoutError):
                self._loaded.exception(timeout=WAKE_SECONDS)
        self.in_flight = self._loaded.result()

    def begin(self, state: RequestState, message: bytes) -> None:
        """Send a request to the process, with the lock held."""
        self._last_number = number = self._last_number + 1
        self.states[number] = state
        self._send("submit", number, message)
        state.future.add_done_callback(lambda future: self._cancel(number) if future.cancelled() else None)

    def request_close(self) -> None:
        """Have the process end. It does not wait; one that still loads would not hear of it, and is killed."""
        self._outbox.put(None)
        if not self._loaded.done():
            self.process.kill()

    def join(self, seconds: float) -> None:
        """Wait for the end of the process, and force it where it does not come."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _cancel(self, number: int) -> None:
        if number in self.states:
            self._send("cancel", number)

    def _send(self, *message: Any) -> None:
        self._outbox.put(pickle.dumps(message))

    def _write(self) -> None:
        assert self.process.stdin is not None
        # Where the process has ended, its reader sees it.
        with suppress(OSError), self.process.stdin as pipe:
            while (message := self._outbox.get()) is not None:
                pipe.write(message)
                pipe.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        receivers: dict[str, Callable[..., None]] = {
            "ready": self._loaded.set_result, "refused": self._loaded.set_exception, "done": self._on_done,
            "text": self._on_text, "reasoning": partial(self._on_text, reasoning=True),
        }  # fmt: skip
        try:
            with self.process.stdout as pipe:
                while True:
                    kind, *values = pickle.load(pipe)
                    receivers[kind](*values)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self.process.wait()
            problem = f"a process of it ended with status {status}"
            problem += ", probably because memory ran out." if status == KILLED else "."
        except Exception as exc:
            # Nobody would wait for the answers of this process any more.
            problem = f"{type(exc).__name__}: {exc}."
        if not self._loaded.done():
            self._loaded.set_exception(EngineError(f"The engine cannot be loaded: {problem} Lower `instances`."))
        elif self._loaded.exception() is None:
            self._group.fail(f"The engine failed: {problem} Load it again.")

    def _on_text(self, number: int, text: str, *, reasoning: bool = False) -> None:
        state = self.states.get(number)
        call = None if state is None else state.on_reasoning if reasoning else state.on_text
        if state is None or call is None or state.future.cancelled():
            return
        try:
            call(text)
        except Exception as exc:
            self._cancel(number)
            with self._lock:
                mine = self.states.pop(number, None)
            if mine is not None:
                state.fail("engine_error", f"`on_text` failed: {type(exc).__name__}: {exc}. Correct it.")
                state.complete()

    def _on_done(self, number: int, completion: Completion | None, cache_usage: float, failure: str | None) -> None:
        self.cache_usage = cache_usage
        with self._lock:
            state = self.states.pop(number, None)
        if failure is not None:
            # First, so that who asks again because of the completion gets another engine.
            self._group.fail(failure)
        if state is not None and completion is not None:
            # With the time that it waited here.
            state.complete(replace(completion, seconds=state.seconds, request_id=state.request.id))
        self._group.dispatch(self)


def serve() -> None:
    """Be one process of a group: load the model and do what comes on the standard input, until that ends."""
    # What the libraries print must not come between the messages.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(*message: Any) -> None:
        with lock:
            pickle.dump(message, pipe)
            pipe.flush()

    cores, path, model = pickle.load(sys.stdin.buffer)
    try:
        engine = CLASSES[model.task](path, bind_to_cores(model, cores))
    except Exception as exc:
        known = isinstance(exc, HuggingFaceTaskError)
        tell("refused", exc if known else EngineError(f"The engine cannot be loaded: {type(exc).__name__}: {exc}."))
        return
    with engine:
        tell("ready", engine.in_flight)
        _answer(engine, tell)


def bind_to_cores(model: LocalModel, cores: list[int]) -> LocalModel:
    """Bind this process to some cores, before anything counts them, and return the model to load on them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return model.model_copy(update={"ov_config": {THREADS_PROPERTY: len(cores), **model.ov_config}})


def _answer(engine: Engine, tell: Callable[..., None]) -> None:
    futures: dict[int, Future[Completion]] = {}

    def finish(number: int, future: Future[Completion]) -> None:
        futures.pop(number, None)
        usage = 0.0
        with suppress(Exception):  # the pipeline may be loaded again meanwhile
            usage = engine.cache_usage
        tell("done", number, None if future.cancelled() else future.result(), usage, engine.failure)

    while True:
        try:
            kind, number, *rest = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):
            return
        if kind == "cancel":
            if (future := futures.get(number)) is not None:
                future.cancel()
            continue
        try:
            request, has_text, has_reasoning = pickle.loads(rest[0])
        except Exception as exc:  # a class of the script that asks, for instance, which is no module here
            error = f"The request cannot be read in another process: {type(exc).__name__}: {exc}. Give it plain values."
            tell("done", number, Completion("", "error", 0, 0, 0.0, error, "invalid_prompt"), 0.0, engine.failure)
            continue
        on_text = partial(tell, "text", number) if has_text else None
        on_reasoning = partial(tell, "reasoning", number) if has_reasoning else None
        futures[number] = future = engine.submit(request, on_text, on_reasoning)
        future.add_done_callback(partial(finish, number))


if __name__ == "__main__":
    serve()
