"""Measures how the cost of this library grows with the work.

    python tests/benchmarks/benchmark_growth.py [--model real] [--of concurrency prompts processes rows]

Tables, with the exponent of growth (the slope of the logarithms: 1 is twice the time for twice the work) and the memory
beside the time. Every size has a process of its own, and `--model quick` the smaller sizes only.

- `concurrency`: 1 to 256 requests at once, 32 new tokens each.
- `prompts`: one prompt of 10 to 8,000 tokens, one new token.
- `processes`: 1 to 4 processes with an engine each, 16 requests at once for each; with all cores for each, with a part
  of them for each, and as one engine with so many `instances`.
- `rows`: batches of 10,000 to 1,000,000 rows, with an engine that answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark_engines import HERE, WARM_UP_ROWS, Worker
from benchmark_models import add_model, make_export, work_folder
from benchmark_workloads import Workload
from machine import Machine, measure_machine, share_of_products, weight_facts
from report import show, store

CONCURRENCY = (1, 4, 16, 64, 256)
PROMPT_TOKENS = (10, 100, 1000, 4000, 8000)
PROCESSES = (1, 2, 4)
ROWS = (10_000, 100_000, 1_000_000)
QUICK_SIZES = 2
NEW_TOKENS = 32
PROMPT = 30  # tokens of a prompt, where their number is not what grows
ROWS_OF_A_PROCESS = 16
REPEATS = 2
ENOUGH_SECONDS = 10  # what takes longer is measured once


def workload_of(folder: Path, rows: int, new_tokens: int, prompt_tokens: int, repeat: int) -> Workload:
    """Return prompts of so many tokens that begin differently in every row and repeat."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = "".join(f" {(repeat * 7919 + place) % 10_000}" for place in range(prompt_tokens))
    ids = [tokenizer.encode(f"{repeat} {row}{words}").ids[:prompt_tokens] for row in range(rows)]
    return Workload("growth", list(map(tokenizer.decode, ids)), [new_tokens] * rows)


def measure(folder: Path, sizes: list[tuple[int, int, int]]) -> list[tuple[float, float]]:
    """Return the least seconds and the memory in MiB for each size: rows, new tokens, and tokens of a prompt."""
    found = []
    for rows, new_tokens, prompt_tokens in sizes:
        engine, seconds = Worker("ours", folder), []
        engine.run(workload_of(folder, min(rows, WARM_UP_ROWS), new_tokens, min(prompt_tokens, PROMPT), 0))
        while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
            engine.begin(workload_of(folder, rows, new_tokens, prompt_tokens, len(seconds) + 1))
            seconds.append(engine.finish()["seconds"])
        found.append((min(seconds), engine.peak_mib()))
        engine.close()
    return found


def measure_processes(folder: Path, parts: list[set[int]]) -> tuple[float, float]:
    """Return the tokens per second of several processes together, each bound to some cores, and their memory in MiB."""
    engines = [Worker("ours", folder, cores=cores) for cores in parts]
    rates = measure_rates(engines, folder, ROWS_OF_A_PROCESS)
    memory = sum(engine.peak_mib() for engine in engines)
    for engine in engines:
        engine.close()
    return max(rates), memory


def measure_instances(folder: Path, count: int) -> float:
    """Return the tokens per second of one engine with several processes."""
    engine = Worker("ours", folder, instances=count)
    rates = measure_rates([engine], folder, count * ROWS_OF_A_PROCESS)
    engine.close()
    return max(rates)


def measure_rates(engines: list[Worker], folder: Path, rows: int) -> list[float]:
    """Return the tokens per second of engines beside each other, with so many rows each, for each repeat."""
    rates = []
    for repeat in range(REPEATS + 1):
        work = workload_of(folder, rows, NEW_TOKENS, PROMPT, repeat)
        for engine in engines:
            engine.begin(work)
        slowest = max(engine.finish()["seconds"] for engine in engines)
        if repeat:
            rates.append(len(engines) * work.tokens / slowest)
    return rates


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Return the slope of the logarithms of costs over those of sizes, by least squares."""
    across, up = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    products = sum((x - middle) * (y - height) for x, y in zip(across, up, strict=True))
    return products / sum((x - middle) ** 2 for x in across)


def grow_concurrency(folder: Path, _: Machine, count: int | None) -> dict[str, Any]:
    """Measure requests at once."""
    sizes = CONCURRENCY[:count]
    found = measure(folder, [(rows, NEW_TOKENS, PROMPT) for rows in sizes])
    slope = exponent(sizes, [seconds for seconds, _ in found])
    rows = [
        [str(size), f"{seconds:.2f}", f"{size * NEW_TOKENS / seconds:.1f}", f"{memory:.0f}"]
        for size, (seconds, memory) in zip(sizes, found, strict=True)
    ]
    show(f"Requests at once: exponent {slope:.2f}", ["requests", "seconds", "tokens/s", "MiB"], rows)
    bars = {str(size): size * NEW_TOKENS / seconds for size, (seconds, _) in zip(sizes, found, strict=True)}
    return {"sizes": sizes, "seconds_and_mib": found, "exponent": slope, "bars": bars}


def grow_prompts(folder: Path, machine: Machine, count: int | None) -> dict[str, Any]:
    """Measure prompts of different lengths, and their share of the products that the machine does.

    The products of attention are left out, so that the share of long prompts is too small.
    """
    parameters, fastest = weight_facts(folder)[1], max(machine.products, key=machine.products.__getitem__)
    sizes = PROMPT_TOKENS[:count]
    found = measure(folder, [(1, 1, tokens) for tokens in sizes])
    slope = exponent(sizes, [seconds for seconds, _ in found])
    rows = [
        [
            f"{tokens:,}", f"{seconds:.3f}", f"{tokens / seconds:,.0f}",
            f"{share_of_products(machine, tokens / seconds, parameters, fastest):.2f}", f"{memory:.0f}",
        ]
        for tokens, (seconds, memory) in zip(sizes, found, strict=True)
    ]  # fmt: skip
    headings = ["tokens of the prompt", "seconds to the first token", "tokens read/s", "of the limit", "MiB"]
    show(f"Long prompts: exponent {slope:.2f}", headings, rows)
    bars = {str(tokens): tokens / seconds for tokens, (seconds, _) in zip(sizes, found, strict=True)}
    return {"sizes": sizes, "seconds_and_mib": found, "exponent": slope, "bars": bars}


def grow_processes(folder: Path, _: Machine, limit: int | None) -> dict[str, Any]:
    """Measure processes beside each other, with all cores each and with the cores divided."""
    cores, rows, figures, bars = sorted(os.sched_getaffinity(0)), [], {}, {}
    for count in PROCESSES[:limit]:
        shared = measure_processes(folder, [set(cores)] * count)
        # With more processes than cores, some share one.
        parts = [set(cores[place::count]) or {cores[place % len(cores)]} for place in range(count)]
        divided = measure_processes(folder, parts) if count > 1 else shared
        group = measure_instances(folder, count) if count <= len(cores) else None
        figures[str(count)] = {"all_cores_each": shared, "divided": divided, "instances": group}
        bars |= {f"{count}, all cores each": shared[0], f"{count}, cores divided": divided[0]}
        bars |= {} if group is None else {f"one engine with {count}": group}
        rates = [f"{rate:.1f}" for rate in (shared[0], divided[0], *([] if group is None else [group]))]
        rows.append([str(count), *rates, *([""] if group is None else []), f"{shared[1]:.0f}", f"{divided[1]:.0f}"])
    headings = ["processes", "tokens/s, all cores each", "cores divided", "one engine", "MiB", "MiB, divided"]
    show("Processes on one machine", headings, rows)
    return {**figures, "bars": bars}


def grow_rows(_: Path, __: Machine, count: int | None) -> dict[str, Any]:
    """Measure batches, without the time of a model."""
    sizes = ROWS[:count]
    command = [sys.executable, str(HERE / "benchmark_batches.py"), "scale", "--rows", *map(str, sizes)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    slope = exponent(sizes, [batch["seconds"] for batch in found])
    names = ("seconds", "rows_per_second", "cpu_seconds", "peak_mib", "requests")
    rows = [[f"{batch['rows']:,}", *(f"{batch[name]:,.1f}" for name in names)] for batch in found]
    headings = ["rows", "seconds", "rows/s", "processor seconds", "MiB", "requests to Prefect"]
    show(f"Rows of a batch: exponent {slope:.2f}", headings, rows)
    bars = {f"{batch['rows']:,}": batch["rows_per_second"] for batch in found}
    return {"sizes": sizes, "batches": found, "exponent": slope, "bars": bars}


GROWTHS = {
    "concurrency": grow_concurrency,
    "prompts": grow_prompts,
    "processes": grow_processes,
    "rows": grow_rows,
}


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--of", nargs="+", default=list(GROWTHS), choices=list(GROWTHS), help="which tables")
    arguments = parser.parse_args()
    work = work_folder(arguments)
    folder = make_export(work)
    machine = measure_machine()
    figures: dict[str, Any] = {"machine": asdict(machine)}
    print(f"The machine: {json.dumps(figures['machine'])}")
    for name in arguments.of:
        figures[name] = GROWTHS[name](folder, machine, QUICK_SIZES if arguments.model == "quick" else None)
    panels = {name: figures[name]["bars"] for name in arguments.of}
    store(work / "growth.json", figures, panels, "tokens or rows per second")


if __name__ == "__main__":
    main()
