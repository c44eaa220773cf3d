"""Measures how the cost of this library's OpenVINO engine grows with the work.

    python tests/benchmarks/benchmark_growth.py [--real] [--of concurrency prompts processes] [--output FOLDER]

Three tables, each with the exponent of growth (the slope of the logarithms: 1 is twice the time for twice the work) and
the memory beside the time:

- `concurrency`: 1 to 256 requests at once, 32 new tokens each.
- `prompts`: one prompt of 10 to 8,000 tokens, one new token.
- `processes`: 1 to 4 processes with an engine each, 16 requests at once for each; with all cores for each, with a part
  of them for each, and as one engine with so many `instances`.

Rows of a batch, 1,000 to 1,000,000, are the `scale` of `benchmark_batches.py`. Every size has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark_engines import Worker
from benchmark_models import make_int8
from benchmark_workloads import Workload
from machine import Machine, measure_machine, share_of_products, weight_facts
from report import show, store

CONCURRENCY = (1, 4, 16, 64, 256)
PROMPT_TOKENS = (10, 100, 1000, 4000, 8000)
PROCESSES = (1, 2, 4)
NEW_TOKENS = 32
PROMPT = 30  # tokens of a prompt, where their number is not what grows
ROWS_OF_A_PROCESS = 16
REPEATS = 2


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
        for repeat in range(REPEATS + 1):
            engine.begin(workload_of(folder, rows, new_tokens, prompt_tokens, repeat))
            figures = engine.finish()
            if repeat:
                seconds.append(figures["seconds"])
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


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the slope of the logarithms of costs over those of sizes, by least squares."""
    across, up = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    products = sum((x - middle) * (y - height) for x, y in zip(across, up, strict=True))
    return products / sum((x - middle) ** 2 for x in across)


def grow_concurrency(folder: Path, _: Machine) -> dict[str, Any]:
    """Measure requests at once."""
    found = measure(folder, [(rows, NEW_TOKENS, PROMPT) for rows in CONCURRENCY])
    slope = exponent(list(CONCURRENCY), [seconds for seconds, _ in found])
    rows = [
        [str(count), f"{seconds:.2f}", f"{count * NEW_TOKENS / seconds:.1f}", f"{memory:.0f}"]
        for count, (seconds, memory) in zip(CONCURRENCY, found, strict=True)
    ]
    show(f"Requests at once: exponent {slope:.2f}", ["requests", "seconds", "tokens/s", "MiB"], rows)
    bars = {str(count): count * NEW_TOKENS / seconds for count, (seconds, _) in zip(CONCURRENCY, found, strict=True)}
    return {"sizes": CONCURRENCY, "seconds_and_mib": found, "exponent": slope, "bars": bars}


def grow_prompts(folder: Path, machine: Machine) -> dict[str, Any]:
    """Measure prompts of different lengths, and their share of the products that the machine does.

    The products of attention are left out, so that the share of long prompts is too small.
    """
    parameters, fastest = weight_facts(folder)[1], max(machine.products, key=machine.products.__getitem__)
    found = measure(folder, [(1, 1, tokens) for tokens in PROMPT_TOKENS])
    slope = exponent(list(PROMPT_TOKENS), [seconds for seconds, _ in found])
    rows = [
        [
            f"{tokens:,}", f"{seconds:.3f}", f"{tokens / seconds:,.0f}",
            f"{share_of_products(machine, tokens / seconds, parameters, fastest):.2f}", f"{memory:.0f}",
        ]
        for tokens, (seconds, memory) in zip(PROMPT_TOKENS, found, strict=True)
    ]  # fmt: skip
    headings = ["tokens of the prompt", "seconds to the first token", "tokens read/s", "of the limit", "MiB"]
    show(f"Long prompts: exponent {slope:.2f}", headings, rows)
    bars = {str(tokens): tokens / seconds for tokens, (seconds, _) in zip(PROMPT_TOKENS, found, strict=True)}
    return {"sizes": PROMPT_TOKENS, "seconds_and_mib": found, "exponent": slope, "bars": bars}


def grow_processes(folder: Path, _: Machine) -> dict[str, Any]:
    """Measure processes beside each other, with all cores each and with the cores divided."""
    cores, rows, figures, bars = sorted(os.sched_getaffinity(0)), [], {}, {}
    for count in PROCESSES:
        shared = measure_processes(folder, [set(cores)] * count)
        # With more processes than cores, some share one.
        divided = measure_processes(folder, [set(cores[place::count]) or {cores[place % len(cores)]}
                                             for place in range(count)])  # fmt: skip
        group = measure_instances(folder, count) if count <= len(cores) else None
        figures[str(count)] = {"all_cores_each": shared, "divided": divided, "instances": group}
        bars |= {f"{count}, all cores each": shared[0], f"{count}, cores divided": divided[0]}
        bars |= {} if group is None else {f"one engine with {count}": group}
        rates = [f"{rate:.1f}" for rate in (shared[0], divided[0], *([] if group is None else [group]))]
        rows.append([str(count), *rates, *([""] if group is None else []), f"{shared[1]:.0f}", f"{divided[1]:.0f}"])
    headings = ["processes", "tokens/s, all cores each", "cores divided", "one engine", "MiB", "MiB, divided"]
    show("Processes on one machine", headings, rows)
    return {**figures, "bars": bars}


GROWTHS = {"concurrency": grow_concurrency, "prompts": grow_prompts, "processes": grow_processes}


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the weights of SmolLM2-135M-Instruct, else random ones")
    parser.add_argument("--of", nargs="+", default=list(GROWTHS), choices=list(GROWTHS), help="which tables")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    arguments = parser.parse_args()
    work = arguments.output.absolute() / ("real" if arguments.real else "135m-shape")
    folder = make_int8(work, real=arguments.real)
    machine = measure_machine()
    figures: dict[str, Any] = {"machine": asdict(machine)}
    print(f"The machine: {json.dumps(figures['machine'])}")
    for name in arguments.of:
        figures[name] = GROWTHS[name](folder, machine)
    store(work / "growth.json", figures, {name: figures[name]["bars"] for name in arguments.of}, "tokens per second")


if __name__ == "__main__":
    main()
