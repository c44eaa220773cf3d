"""Measures how the cost of this library's OpenVINO engine grows with the work.

    python tests/benchmarks/benchmark_growth.py [--real] [--of concurrency prompts processes] [--output FOLDER]

Three tables, each with the exponent of growth (the slope of the logarithms: 1 is twice the time for twice the work) and
the memory beside the time:

- `concurrency`: 1 to 256 requests at once, 32 new tokens each.
- `prompts`: one prompt of 10 to 8,000 tokens, one new token.
- `processes`: 1 to 4 processes with an engine each, 16 requests at once; with all cores for each, and with the cores
  divided among them.

Rows of a batch, 1,000 to 1,000,000, are the `scale` of `benchmark_batches.py`. Every size has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark_models import find_real_weights, make_checkpoint, make_exports
from benchmark_workloads import Workload
from machine import measure_machine

HERE = Path(__file__).parent
CONCURRENCY = (1, 4, 16, 64, 256)
PROMPT_TOKENS = (10, 100, 1000, 4000, 8000)
PROCESSES = (1, 2, 4)
NEW_TOKENS = 32
ROWS_OF_A_PROCESS = 16
REPEATS = 3


class Engine:
    """An engine in a process of its own, that of `benchmark_contenders.py`."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        properties = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "benchmark_contenders.py"), "ours", str(folder), json.dumps(properties)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.finish()

    def begin(self, workload: Workload) -> None:
        """Begin a workload."""
        assert self._process.stdin is not None
        print(json.dumps(asdict(workload)), file=self._process.stdin, flush=True)

    def finish(self) -> dict[str, Any]:
        """Wait for the end of a workload and return its figures."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The engine ended with status {self._process.wait()}.")
        return dict(json.loads(line))

    def peak_mib(self) -> float:
        """Return the greatest resident memory of the process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def workload_of(rows: int, new_tokens: int, prompt_tokens: int, repeat: int) -> Workload:
    """Return prompts of a length, whose words no two repeats have in common."""
    words = [f" {(repeat * 7919 + place) % 10_000}" for place in range(prompt_tokens)]
    return Workload("growth", [f"{row}{''.join(words)}" for row in range(rows)], [new_tokens] * rows)


def trimmed(workload: Workload, tokenizer: Any, tokens: int) -> Workload:
    """Return the workload with prompts cut to a number of tokens."""
    prompts = [tokenizer.decode(tokenizer.encode(prompt).ids[:tokens]) for prompt in workload.prompts]
    return Workload(workload.name, prompts, workload.new_tokens)


def measure(folder: Path, sizes: list[tuple[int, int, int]]) -> list[tuple[float, float]]:
    """Return the least seconds and the memory in MiB for each size: rows, new tokens, and tokens of a prompt."""
    from tokenizers import Tokenizer

    tokenizer, found = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for rows, new_tokens, prompt_tokens in sizes:
        engine, seconds = Engine(folder), []
        for repeat in range(REPEATS + 1):
            engine.begin(trimmed(workload_of(rows, new_tokens, prompt_tokens, repeat), tokenizer, prompt_tokens))
            figures = engine.finish()
            if repeat:
                seconds.append(figures["seconds"])
        found.append((min(seconds), engine.peak_mib()))
        engine.close()
    return found


def measure_processes(folder: Path, processes: int, threads: int | None) -> tuple[float, float]:
    """Return the tokens per second of several processes together, and their memory in MiB."""
    engines = [Engine(folder, threads) for _ in range(processes)]
    rates = []
    for repeat in range(REPEATS + 1):
        work = workload_of(ROWS_OF_A_PROCESS, NEW_TOKENS, 30, repeat)
        for engine in engines:
            engine.begin(work)
        slowest = max(engine.finish()["seconds"] for engine in engines)
        if repeat:
            rates.append(processes * work.tokens / slowest)
    memory = sum(engine.peak_mib() for engine in engines)
    for engine in engines:
        engine.close()
    return max(rates), memory


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the slope of the logarithms of costs over those of sizes, by least squares."""
    across, up = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    products = sum((x - middle) * (y - height) for x, y in zip(across, up, strict=True))
    return products / sum((x - middle) ** 2 for x in across)


def show(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def grow_concurrency(folder: Path) -> dict[str, Any]:
    """Measure requests at once."""
    found = measure(folder, [(rows, NEW_TOKENS, 30) for rows in CONCURRENCY])
    slope = exponent(list(CONCURRENCY), [seconds for seconds, _ in found])
    rows = [
        [str(count), f"{seconds:.2f}", f"{count * NEW_TOKENS / seconds:.1f}", f"{memory:.0f}"]
        for count, (seconds, memory) in zip(CONCURRENCY, found, strict=True)
    ]
    show(f"Requests at once: exponent {slope:.2f}", ["requests", "seconds", "tokens/s", "MiB"], rows)
    return {"sizes": CONCURRENCY, "seconds_and_mib": found, "exponent": slope}


def grow_prompts(folder: Path) -> dict[str, Any]:
    """Measure prompts of different lengths."""
    found = measure(folder, [(1, 1, tokens) for tokens in PROMPT_TOKENS])
    slope = exponent(list(PROMPT_TOKENS), [seconds for seconds, _ in found])
    rows = [
        [f"{tokens:,}", f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{memory:.0f}"]
        for tokens, (seconds, memory) in zip(PROMPT_TOKENS, found, strict=True)
    ]
    headings = ["tokens of the prompt", "seconds to the first token", "tokens read/s", "MiB"]
    show(f"Long prompts: exponent {slope:.2f}", headings, rows)
    return {"sizes": PROMPT_TOKENS, "seconds_and_mib": found, "exponent": slope}


def grow_processes(folder: Path) -> dict[str, Any]:
    """Measure processes beside each other, with all cores each and with the cores divided."""
    cores, rows, figures = os.cpu_count() or 1, [], {}
    for count in PROCESSES:
        shared = measure_processes(folder, count, None)
        divided = measure_processes(folder, count, max(cores // count, 1))
        figures[str(count)] = {"all_cores_each": shared, "divided": divided}
        rows.append([str(count), f"{shared[0]:.1f}", f"{divided[0]:.1f}", f"{shared[1]:.0f}", f"{divided[1]:.0f}"])
    headings = ["processes", "tokens/s, all cores each", "tokens/s, cores divided", "MiB", "MiB, divided"]
    show("Processes on one machine", headings, rows)
    return figures


GROWTHS = {"concurrency": grow_concurrency, "prompts": grow_prompts, "processes": grow_processes}


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the weights of SmolLM2-135M-Instruct, else random ones")
    parser.add_argument("--of", nargs="+", default=list(GROWTHS), choices=list(GROWTHS), help="which tables")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    arguments = parser.parse_args()
    work = arguments.output.absolute() / ("real" if arguments.real else "135m-shape")
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = find_real_weights() if arguments.real else make_checkpoint(work / "checkpoint")
    folder = make_exports(checkpoint, work / "store", ["int8"])["int8"]
    figures: dict[str, Any] = {"machine": asdict(measure_machine())}
    print(f"The machine: {json.dumps(figures['machine'])}")
    for name in arguments.of:
        figures[name] = GROWTHS[name](folder)
    path = work / "growth.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
