"""Benchmarks of batch inference. Run on an otherwise idle machine:

    python tests/benchmarks/benchmark_batches.py scale      # machinery alone: rows per second, memory, calls to the API
    python tests/benchmarks/benchmark_batches.py overhead   # the flow against the engine alone, SmolLM2-135M's shape
    python tests/benchmarks/benchmark_batches.py sharing    # ordering, shared beginnings and deduplication

Every measurement runs in a process of its own and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from support.request_counts import counted_requests  # noqa: E402

MIB = 2**20
OVERHEAD_REPEATS = 3
OVERHEAD_TOKENS = 64  # as many as the default block allows
FROM_PATH = "import sys, pathlib; path = pathlib.Path(sys.argv[1]); "
MAKE_TINY = f"{FROM_PATH}from support.tiny_models import make_tiny_llama; make_tiny_llama(path)"
MAKE_SMOLLM = f"{FROM_PATH}from support.smollm_models import make_smollm; make_smollm(path)"


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("scale", "overhead", "sharing", "_scale", "_overhead", "_sharing"))
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "csv", "parquet"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-batches")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.benchmark.startswith("_"):
        {"_scale": measure_scale, "_overhead": measure_overhead, "_sharing": measure_sharing}[arguments.benchmark](
            arguments.rows[0], arguments.format, arguments.folder
        )
        return
    home = str(arguments.folder / "prefect")
    environment = {**os.environ, "PREFECT_HOME": home, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    defaults = {"scale": [10_000, 100_000, 1_000_000], "overhead": [2000], "sharing": [1000]}
    for rows in arguments.rows or defaults[arguments.benchmark]:
        command = [sys.executable, __file__, f"_{arguments.benchmark}", "--rows", str(rows)]
        more = ["--format", arguments.format, "--folder", str(arguments.folder)]
        subprocess.run(command + more, check=True, env=environment)


@contextmanager
def prefect_server() -> Iterator[None]:
    """Run a server with a fresh database."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


class MemoryWatch:
    """Samples the resident memory of this process ten times a second."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_mib(self) -> float:
        """Greatest sample."""
        return max(self.samples) / MIB

    def _run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._ended.wait(0.1):
            self.samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)


def write_countries(path: Path, rows: int) -> None:
    """Write rows with an id and a country of its own each."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema([("id", pa.int64()), ("country", pa.string())])
        with parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, rows, 50_000):
                ids = range(start, min(start + 50_000, rows))
                writer.write_table(pa.table([list(ids), [f"Land {index}" for index in ids]], schema=schema))
        return
    with path.open("w") as file:
        file.write("id,country\n" if path.suffix == ".csv" else "")
        for index in range(rows):
            line = f"{index},Land {index}" if path.suffix == ".csv" else f'{{"id":{index},"country":"Land {index}"}}'
            file.write(f"{line}\n")


def measure_scale(rows: int, format: str, folder: Path) -> None:
    """Put rows through the whole flow, with an engine that gives a constant answer at once."""
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.flows.batches import batch_inference
    from prefect_huggingface.tasks.engines import registry

    checkpoint = make_checkpoint(folder / "tiny-llama", MAKE_TINY)
    # Classes of engines are looked up in the package.
    sys.modules["prefect_huggingface.tasks.engines.instant"] = import_module("support.instant_engines")
    registry.ENGINE_CLASSES["torch", "text-generation"] = "instant:ConstantEngine"
    model = LocalModel(model_id=str(checkpoint), backend="torch")
    with tempfile.TemporaryDirectory(dir=folder) as work, prefect_server():
        source, destination = Path(work) / f"in.{format}", Path(work) / f"out.{format}"
        write_countries(source, rows)
        with counted_requests() as requests, MemoryWatch() as memory:
            began, cpu = time.monotonic(), time.process_time()
            summary = batch_inference(
                model, str(source), str(destination), "Capital of {country}?", show_progress=False
            )
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    assert summary.succeeded == rows
    report(
        "scale", rows=rows, format=format, seconds=seconds, rows_per_second=rows / seconds, cpu_seconds=cpu,
        rows_per_cpu_second=rows / cpu, peak_mib=memory.peak_mib, requests=len(requests),
        requests_per_second=len(requests) / seconds,
    )  # fmt: skip


def make_checkpoint(path: Path, code: str) -> Path:
    """Make a model in a process of its own, so that this one stays free of torch, and return its folder."""
    if not (path / "config.json").exists():
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=TESTS)
    return path


def smollm(folder: Path, **engine: Any) -> Any:
    """Return a model of random weights with the shape of SmolLM2-135M."""
    from prefect_huggingface.blocks import LocalModel, ModelStore

    checkpoint = make_checkpoint(folder / "smollm", MAKE_SMOLLM)
    return LocalModel(model_id=str(checkpoint), store=ModelStore(path=folder / "store"), engine=engine)


def measure_overhead(rows: int, format: str, folder: Path) -> None:
    """Compare the flow with the engine alone on the same rows, in turn, by the clock and by the processor."""
    from prefect_huggingface.blocks import GenerationOptions
    from prefect_huggingface.flows.batches import batch_inference
    from prefect_huggingface.tasks.engines.registry import load_engine
    from prefect_huggingface.tasks.records import Request

    options = GenerationOptions(max_new_tokens=OVERHEAD_TOKENS, ignore_eos=True)
    # Without the prefix cache, so that the second measurement does not find the prompts of the first.
    model = smollm(folder, enable_prefix_caching=False)
    engine = load_engine(model)
    list(engine.generate(Request(prompt=f"Warm {index}", options=options, id=index) for index in range(64)))
    alone: list[tuple[float, float]] = []
    flow: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as work, prefect_server():
        source = Path(work) / f"in.{format}"
        write_countries(source, rows)
        prompts = [f"What is the capital of Land {index}?" for index in range(rows)]

        def run_alone() -> None:
            requests = (Request(prompt=text, options=options, id=place) for place, text in enumerate(prompts))
            with stopwatch(alone):
                done = sum(1 for _ in engine.generate(requests))
            assert done == rows

        def run_flow() -> None:
            destination = Path(work) / f"out-{len(flow)}.{format}"
            with stopwatch(flow):
                summary = batch_inference(
                    model, str(source), str(destination), "What is the capital of {country}?", options,
                    show_progress=False,
                )  # fmt: skip
            assert summary.succeeded == rows

        for repeat in range(OVERHEAD_REPEATS):
            # In turn, and each first as often as the other, since the machine's speed drifts.
            for run in (run_alone, run_flow) if repeat % 2 == 0 else (run_flow, run_alone):
                run()
    clock, processor = (
        median(first[kind] / second[kind] for first, second in zip(alone, flow, strict=True)) for kind in (0, 1)
    )
    report(
        "overhead", rows=rows, engine_seconds=[each[0] for each in alone], flow_seconds=[each[0] for each in flow],
        share=clock, share_of_processor=processor,
    )  # fmt: skip


@contextmanager
def stopwatch(laps: list[tuple[float, float]]) -> Iterator[None]:
    """Append how many seconds the block takes, by the clock and of this process."""
    clock, processor = time.monotonic(), time.process_time()
    yield
    laps.append((time.monotonic() - clock, time.process_time() - processor))


def measure_sharing(rows: int, format: str, folder: Path) -> None:
    """Compare rows with 10 % duplicates and a beginning of 300 tokens with all sharing on and off."""
    from prefect_huggingface.flows.batches import batch_inference
    from prefect_huggingface.tasks.engines.registry import load_engine

    dice = random.Random(0)
    beginning = " ".join(f"{dice.randrange(10**6)}" for _ in range(44))
    questions = [f"Question {index}?" for index in range(rows * 9 // 10)]
    questions += dice.sample(questions, rows - len(questions))
    dice.shuffle(questions)
    options: Any = {"max_new_tokens": 8, "ignore_eos": True}
    results = {}
    with tempfile.TemporaryDirectory(dir=folder) as work, prefect_server():
        source = Path(work) / "in.jsonl"
        source.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
        for shared in (False, True):
            model = smollm(folder, enable_prefix_caching=shared)
            tokens = load_engine(model).count_tokens(beginning)
            destination = Path(work) / f"out-{shared}.jsonl"
            began = time.monotonic()
            batch_inference(
                model, str(source), str(destination), beginning + " {question}", options, deduplicate=shared,
                group_by_prefix=shared, show_progress=False,
            )  # fmt: skip
            results[shared] = (time.monotonic() - began, destination.read_bytes())
    report(
        "sharing", rows=rows, beginning_tokens=tokens, plain_seconds=results[False][0], shared_seconds=results[True][0],
        speedup=results[False][0] / results[True][0], same_bytes=results[False][1] == results[True][1],
    )  # fmt: skip


def report(benchmark: str, **figures: Any) -> None:
    """Print a line of JSON."""
    short = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"benchmark": benchmark, **short}), flush=True)


if __name__ == "__main__":
    main()
