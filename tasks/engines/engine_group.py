"""Several engines of one model in processes of their own, each on a part of the cores, behind one queue.

Memory is near to some cores of a large machine and far from others (NUMA), and the steps of one model keep few of many
cores busy. So each process is bound to cores that are near to each other before it loads its model. A request goes to
the process that has the fewest; where all have as many as they take, it waits here until one of them is free.

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
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import Engine, OnText
from prefect_huggingface.tasks.engines.cores import THREADS_PROPERTY, divide_cores, read_nodes
from prefect_huggingface.tasks.engines.detokenizer import RustTokenizer
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.openvino_engine import OpenVINOTextEngine, OpenVINOVisionEngine
from prefect_huggingface.tasks.engines.openvino_runtime import apply_tuning, choose_device
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request

logger = get_logger(__name__)

CLASSES: dict[str, type[OpenVINOTextEngine]] = {
    "text-generation": OpenVINOTextEngine,
    "image-text-to-text": OpenVINOVisionEngine,
}
CLOSED = "The engine was closed before the request was done. Load the engine again."
ENDING_SECONDS = 30.0


class EngineGroup(Engine):
    """The engines of one model in several processes, as one."""

    inputs: InputProcessor
    tuned = staticmethod(apply_tuning)

    def __init__(self, path: Path, model: LocalModel) -> None:
        """Start the processes and load the OpenVINO model of a folder in each.

        Raises:
            EngineError: If one of them cannot load it with these settings, or there are too few cores.
        """
        from openvino_genai import Tokenizer

        device, count = choose_device(model), model.engine.instances or 1
        if device != "CPU":
            raise EngineError(f"`instances` divide the cores of a CPU, got device {model.device!r}. Set it to 1.")
        parts = divide_cores(read_nodes(), count)
        self._lock = threading.Lock()
        self._waiting: deque[RequestState] = deque()
        self._closed = False
        self.inputs = CLASSES[model.task].read_inputs(path, model, Tokenizer(path), RustTokenizer.of_folder(path))
        self._instances = [_Instance(self, path, model, cores) for cores in parts]
        try:
            for instance in self._instances:
                instance.wait_until_ready()
        except BaseException:
            self.close()
            raise
        self.in_flight = sum(instance.in_flight for instance in self._instances)

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Hand a request to the process that has the fewest, and return the future of its completion."""
        state = RequestState(request, on_text, on_reasoning)
        # Its deadline begins now, wherever it waits, so that it does not wait here.
        is_urgent = request.options is not None and request.options.deadline_seconds is not None
        with self._lock:
            if not self._closed:
                instance = min(self._instances, key=lambda one: len(one.states))
                if is_urgent or len(instance.states) < instance.in_flight:
                    instance.begin(state)
                else:
                    self._waiting.append(state)
                return state.future
        self._refuse(state)
        return state.future

    def close(self) -> None:
        """End the processes. Requests that are not done end as cancelled."""
        self._end()
        for instance in self._instances:
            instance.join()
        self.inputs.close()
        if self.on_close is not None:
            on_close, self.on_close = self.on_close, None
            on_close()

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self.inputs.tokenizer.encode(text, add_special_tokens=False))

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self.inputs.context_length

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

    def feed(self, instance: _Instance) -> None:
        """Give a process the next of the requests that wait."""
        with self._lock:
            while self._waiting and not self._closed and len(instance.states) < instance.in_flight:
                state = self._waiting.popleft()
                if not state.future.cancelled():
                    instance.begin(state)

    def fail(self, problem: str) -> None:
        """End all processes after one has failed, and all requests with them."""
        if not self._closed:
            self.failure = f"The engine failed: {problem} Load it again."
            logger.error(self.failure)
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            left = [*self._waiting, *(state for one in self._instances for state in one.take_all())]
            self._waiting.clear()
        for instance in self._instances:
            instance.request_end()
        for state in left:
            self._refuse(state)

    def _refuse(self, state: RequestState) -> None:
        state.fail(*(("engine_error", self.failure) if self.failure is not None else ("cancelled", CLOSED)))
        state.complete()


class _Instance:
    """One process, with the requests that it works on.

    Attributes:
        states: Its requests by their numbers.
        in_flight: How many it takes.
        cache_usage: Share of its KV cache that was in use when its last request ended.
    """

    def __init__(self, group: EngineGroup, path: Path, model: LocalModel, cores: list[int]) -> None:
        """Start the process on some cores."""
        self._group = group
        self.states: dict[int, RequestState] = {}
        self.in_flight, self.cache_usage = 1, 0.0
        self._last_number = 0
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._loaded: Future[int] = Future()
        # An interruption from the terminal is for the process that loaded it, which closes this one.
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        # No token: the files are there.
        self._send(cores, path, model.model_copy(update={"credentials": None}))
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
            EngineError: If it cannot be loaded.
        """
        self.in_flight = self._loaded.result()

    def begin(self, state: RequestState) -> None:
        """Send a request to the process."""
        self._last_number = number = self._last_number + 1
        streams = state.on_text is not None, state.on_reasoning is not None
        try:
            self._send("submit", number, state.request, streams)
        except Exception as exc:
            state.fail_with(exc, "The request cannot be sent to a process", "Give it plain values.")
            state.complete()
            return
        self.states[number] = state
        state.future.add_done_callback(lambda future: self._cancel(number) if future.cancelled() else None)

    def take_all(self) -> list[RequestState]:
        """Forget all requests and return them."""
        states, self.states = list(self.states.values()), {}
        return states

    def request_end(self) -> None:
        """Have the process end. It does not wait."""
        self._outbox.put(None)

    def join(self) -> None:
        """Wait for the end of the process, and force it where it does not come."""
        try:
            self.process.wait(ENDING_SECONDS)
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
        try:
            with self.process.stdin as pipe:
                while (message := self._outbox.get()) is not None:
                    pipe.write(message)
                    pipe.flush()
        except OSError:
            return  # the process has ended, which its reader sees

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            with self.process.stdout as pipe:
                while True:
                    kind, *values = pickle.load(pipe)
                    getattr(self, f"_take_{kind}")(*values)
        except (EOFError, OSError, pickle.UnpicklingError):
            problem = f"A process of it ended with status {self.process.wait()}, for want of memory perhaps."
        except Exception as exc:
            # Nobody would wait for the answers of this process any more.
            problem = f"{type(exc).__name__}: {exc}."
        if not self._loaded.done():
            self._loaded.set_exception(EngineError(f"The model cannot be loaded: {problem} Lower `instances`."))
        elif self._loaded.exception() is None:
            self._group.fail(problem)

    def _take_ready(self, in_flight: int) -> None:
        self._loaded.set_result(in_flight)

    def _take_refused(self, message: str) -> None:
        self._loaded.set_exception(EngineError(message))

    def _take_text(self, number: int, text: str, *, reasoning: bool = False) -> None:
        state = self.states.get(number)
        call = None if state is None else state.on_reasoning if reasoning else state.on_text
        if state is None or call is None or state.future.cancelled():
            return
        try:
            call(text)
        except Exception as exc:
            self._cancel(number)
            del self.states[number]
            state.fail_with(exc, "The text cannot be made", "Report it.")
            state.complete()

    def _take_reasoning(self, number: int, text: str) -> None:
        self._take_text(number, text, reasoning=True)

    def _take_done(self, number: int, completion: Completion | None, cache_usage: float, failure: str | None) -> None:
        state, self.cache_usage = self.states.pop(number, None), cache_usage
        if state is not None and completion is not None:
            state.complete(replace(completion, seconds=state.seconds))
        if failure is not None:
            self._group.fail(failure)
        self._group.feed(self)


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
    except EngineError as exc:
        tell("refused", str(exc))
        return
    with engine:
        tell("ready", engine.in_flight)
        _answer(engine, tell)


def bind_to_cores(model: LocalModel, cores: list[int]) -> LocalModel:
    """Bind this process to some cores, before anything counts them, and return the model to load on them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return model.model_copy(update={"ov_config": {THREADS_PROPERTY: len(cores), **model.ov_config}})


def _answer(engine: Engine, tell: Any) -> None:
    futures: dict[int, Future[Completion]] = {}

    def finish(number: int, future: Future[Completion]) -> None:
        futures.pop(number, None)
        completion = None if future.cancelled() else future.result()
        tell("done", number, completion, engine.cache_usage, engine.failure)

    while True:
        try:
            kind, number, *values = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):
            return
        if kind == "cancel":
            if (future := futures.get(number)) is not None:
                future.cancel()
            continue
        request, (has_text, has_reasoning) = values
        on_text = partial(tell, "text", number) if has_text else None
        on_reasoning = partial(tell, "reasoning", number) if has_reasoning else None
        futures[number] = future = engine.submit(request, on_text, on_reasoning)
        future.add_done_callback(partial(finish, number))


if __name__ == "__main__":
    serve()
