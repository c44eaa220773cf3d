"""Measures where the time of this library's OpenVINO engine goes: model, reading of tokens, text, scheduling, the rest.

    python tests/benchmarks/benchmark_profile.py [--model real] [--rows 256] [--output build/benchmarks]

Batches of 64 rows with 64 new tokens each. The methods of the engine's thread are timed, each without those that it
calls. A second table has the operations of the model in OpenVINO, for one row and for 64, with the kernel of each,
whose name tells the instructions and the precision that it computes in.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from benchmark_models import add_model, make_export, work_folder
from machine import weight_facts
from report import show, store

NEW_TOKENS = 64
CONTEXT = 100  # tokens that each row has read before its steps are timed
STEPS, WARM_UP_STEPS = 20, 5
BATCHES = (1, 64)
SMALLEST_SHARE = 0.01


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


def time_operations(folder: Path, rows: int) -> dict[tuple[str, str], float]:
    """Return the seconds of one step of so many rows by kind of operation and kernel, the longest first."""
    import numpy as np
    import openvino as ov

    core = ov.Core()
    model = core.read_model(folder / "openvino_model.xml")
    request = core.compile_model(model, "CPU", {"PERF_COUNT": "YES"}).create_infer_request()
    names = {name for port in model.inputs for name in port.get_names()}
    means: list[dict[tuple[str, str, str], float]] = []
    for step in range(WARM_UP_STEPS + STEPS):
        # The first step reads the context, each other one a token.
        width, past = (1, CONTEXT + step - 1) if step else (CONTEXT, 0)
        inputs = {
            "input_ids": np.full((rows, width), 300 + step, np.int64),
            "attention_mask": np.ones((rows, past + width), np.int64),
            "position_ids": np.tile(np.arange(past, past + width, dtype=np.int64), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        request.infer({name: value for name, value in inputs.items() if name in names})
        if step + 1 in (WARM_UP_STEPS, WARM_UP_STEPS + STEPS):
            means.append({
                (operation.node_name, operation.node_type, operation.exec_type): operation.real_time.total_seconds()
                for operation in request.get_profiling_info()
            })  # fmt: skip
    # OpenVINO tells the mean over all steps so far.
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for (name, kind, kernel), mean in means[1].items():
        before = means[0].get((name, kind, kernel), 0.0)
        seconds[kind, kernel] += (mean * (WARM_UP_STEPS + STEPS) - before * WARM_UP_STEPS) / STEPS
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def show_operations(folder: Path) -> dict[str, list[list[str]]]:
    """Print a table of the operations for each number of rows, and return the rows of the tables."""
    weights, parameters = weight_facts(folder)
    tables = {}
    for rows in BATCHES:
        seconds = time_operations(folder, rows)
        step = sum(seconds.values())
        layers = sum(took for (kind, _), took in seconds.items() if kind.startswith("FullyConnected"))
        title = (
            f"Operations of a step of {rows}: {step * 1e3:.1f} ms; the layers read {weights / layers / 1e9:.1f} GB/s "
            f"and do {2 * parameters * rows / layers / 1e9:.0f} billion operations/s"
        )
        tables[str(rows)] = [
            [kind, kernel, f"{took * 1e3:.2f}", f"{took / step:.1%}"]
            for (kind, kernel), took in seconds.items()
            if took >= SMALLEST_SHARE * step
        ]
        show(title, ["operation", "kernel", "ms", "share"], tables[str(rows)])
    return tables


def main() -> None:
    """Read the arguments, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--rows", type=int, default=256, help="how many prompts")
    arguments = parser.parse_args()
    work = work_folder(arguments)
    folder = make_export(work)
    operations = show_operations(folder)
    watches = watch_engine()

    from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
    from prefect_huggingface.tasks.engines.registry import load_engine
    from prefect_huggingface.tasks.records import Request

    engine = load_engine(LocalModel(model_id=str(folder), engine=EngineOptions(tuned=False)))
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
    store(work / "profile.json", {"tokens": tokens, "seconds": parts, "operations": operations})


if __name__ == "__main__":
    main()
