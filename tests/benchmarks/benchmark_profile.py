"""Measures where the time of this library's OpenVINO engine goes: model, reading of tokens, text, scheduling, the rest.

    python tests/benchmarks/benchmark_profile.py [--real] [--rows 256] [--output build/benchmarks]

Batches of 64 rows with 64 new tokens each. The methods of the engine's thread are timed, each without those that it
calls.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from benchmark_models import make_int8
from report import show, store

NEW_TOKENS = 64


class Stopwatches:
    """Seconds of some methods, each without those of the others that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Time a method or function of one thread from now on, as a part of the work."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - started
                self.seconds[part] += took - self._inner
                self._inner = outer + took

        setattr(owner, name, timed)


def watch_engine() -> Stopwatches:
    """Time the parts of the engine."""
    from prefect_huggingface.tasks.engines import openvino_engine, openvino_runtime, openvino_scheduler, request_state
    from prefect_huggingface.tasks.engines.worker import EngineWorker

    watches, engine = Stopwatches(), openvino_engine.OpenVINOTextEngine
    watches.watch("model and choice of tokens (OpenVINO GenAI)", openvino_runtime.GenaiPipeline, "step")
    watches.watch("start of requests (OpenVINO GenAI and ours)", engine, "_start")
    watches.watch("reading of tokens from OpenVINO GenAI", openvino_engine, "_read_handle")
    watches.watch("text of tokens, stops", request_state.Sequence, "append")
    watches.watch("completions", request_state.RequestState, "complete")
    watches.watch("which requests run", openvino_scheduler.Scheduler, "admit")
    watches.watch("the loop over the requests", engine, "step")
    watches.watch("deadlines and cancellations", EngineWorker, "_abort_expired")
    watches.watch("new requests: templates and tokens", EngineWorker, "_drain_inbox")
    watches.watch("the loop over the steps", EngineWorker, "_advance")
    return watches


def main() -> None:
    """Read the arguments, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the weights of SmolLM2-135M-Instruct, else random ones")
    parser.add_argument("--rows", type=int, default=256, help="how many prompts")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the models")
    arguments = parser.parse_args()
    work = arguments.output.absolute() / ("real" if arguments.real else "135m-shape")
    folder = make_int8(work, real=arguments.real)
    watches = watch_engine()

    from prefect_huggingface.blocks import GenerationOptions, LocalModel
    from prefect_huggingface.tasks.engines.registry import load_engine
    from prefect_huggingface.tasks.records import Request

    engine = load_engine(LocalModel(model_id=str(folder)))
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [Request(f"What is the {row}th word about {row * 7}?", options=options) for row in range(arguments.rows)]
    list(engine.generate(requests[:8]))
    watches.seconds.clear()
    started = time.perf_counter()
    tokens = sum(completion.generated_tokens for completion in engine.generate(requests[8:]))
    seconds = time.perf_counter() - started
    parts = dict(sorted(watches.seconds.items(), key=lambda part: -part[1]))
    parts["rest"] = seconds - sum(parts.values())
    rows = [
        [name, f"{took:.3f}", f"{took / seconds:.2%}", f"{took / tokens * 1e6:.1f}"] for name, took in parts.items()
    ]
    show(f"{tokens:,} tokens in {seconds:.1f} s", ["part", "seconds", "share", "µs per token"], rows)
    store(work / "profile.json", {"tokens": tokens, "seconds": parts})


if __name__ == "__main__":
    main()
