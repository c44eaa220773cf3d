"""What the model server costs and saves, each figure beside its counterpart in one process.

    python tests/benchmarks/benchmark_server.py [--model ID_OR_FOLDER] [--rounds 3]

Throughput: 64 requests of 64 new tokens at once, from an engine of this process, through the server by an
`InferenceEndpoint`, and through it as 64 streams. Start: a new process that loads the model itself, and one that asks
the server, from the end of Prefect's own imports to the answer. The rounds take turns. Beside the rates stand processor
seconds, which other work on the machine changes less. Without a model it is one of random weights with the shape of
SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
import psutil

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.records import Request
from support.model_servers import ModelServerProcess, model_server
from support.smollm_models import make_smollm

REQUESTS, NEW_TOKENS = 64, 64
OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
START = """
import os, sys, time
import prefect, prefect.flow_engine, prefect.task_engine
began, used = time.perf_counter(), time.process_time()
from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.generation import complete_prompts
model = InferenceEndpoint(url=sys.argv[2]) if len(sys.argv) > 2 else LocalModel(model_id=sys.argv[1])
[completion] = complete_prompts(model, ["What is the capital of France?"], GenerationOptions(max_new_tokens=8))
assert completion.error is None, completion.error
print(time.perf_counter() - began, time.process_time() - used)
"""


def measure_throughput(
    model: LocalModel, server: ModelServerProcess, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Return for each way the tokens per second, and the processor ms per token of the client and of the server."""
    endpoint = InferenceEndpoint(
        url=server.url, max_concurrency=REQUESTS, extra_options=["ignore_eos"], timeout_seconds=1800
    )
    engines = {"in process": load_engine(model), "through the server": load_engine(endpoint)}
    assert server.process is not None
    process = psutil.Process(server.process.pid)

    def ask(name: str, prompts: list[str]) -> int:
        requests = [Request(messages=[{"role": "user", "content": prompt}], options=OPTIONS) for prompt in prompts]
        completions = list(engines[name].generate(requests, REQUESTS))
        assert all(each.error is None for each in completions), completions[0].error
        return sum(each.generated_tokens for each in completions)

    ways: dict[str, Callable[[list[str]], int]] = {
        "in process": lambda prompts: ask("in process", prompts),
        "through the server": lambda prompts: ask("through the server", prompts),
        "as streams": lambda prompts: stream_all(server, prompts),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            prompts = [
                f"{number} {name} {index}: what is the capital of France?" for index in range(REQUESTS if number else 4)
            ]
            before, began = (time.process_time(), sum(process.cpu_times()[:2])), time.perf_counter()
            tokens = way(prompts)
            after, seconds = (time.process_time(), sum(process.cpu_times()[:2])), time.perf_counter() - began
            client, served = (1000 * (end - start) / tokens for start, end in zip(before, after, strict=True))
            print(f"  {number} {name:<20} {tokens / seconds:7.0f} tokens/s {client:7.3f} + {served:.3f} ms", flush=True)
            if number:  # the first round warms up
                found[name].append((tokens / seconds, client, served))
    return {name: tuple(map(median, zip(*values, strict=True))) for name, values in found.items()}  # type: ignore[misc]


def stream_all(server: ModelServerProcess, prompts: list[str]) -> int:
    """Read all answers as streams and return the number of tokens."""
    with httpx.Client(timeout=1800, limits=httpx.Limits(max_connections=REQUESTS)) as client:

        def stream(prompt: str) -> int:
            body = {
                "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW_TOKENS, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            with client.stream("POST", f"{server.url}/chat/completions", json=body) as response:
                events = [line for line in response.iter_lines() if line]
            return int(json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"])

        with ThreadPoolExecutor(REQUESTS) as pool:
            return sum(pool.map(stream, prompts))


def measure_start(model: LocalModel, server: ModelServerProcess, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the seconds to the first answer of a new process, and its processor seconds, for each way."""
    found: dict[str, list[tuple[float, float]]] = {"loads the model": [], "asks the server": []}
    for _ in range(rounds):
        for name, arguments in {"loads the model": [], "asks the server": [server.url]}.items():
            command = [sys.executable, "-c", START, model.model_id, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            seconds, used = map(float, done.stdout.splitlines()[-1].split())
            found[name].append((seconds, used))
            print(f"  {name:<20} {seconds:6.2f} s, {used:.2f} s of the processor", flush=True)
    return {name: tuple(map(median, zip(*values, strict=True))) for name, values in found.items()}  # type: ignore[misc]


def main() -> None:
    """Measure, and print the figures and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="Hub id or folder")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PREFECT_HUGGINGFACE_HOME", f"{folder}/home")
        path = given.model or str(make_smollm(Path(folder) / "smollm"))
        model = LocalModel(model_id=path)
        load_engine(model)  # exports it once
        with model_server(Path(folder), "--model", path, "--preload") as server:
            rates = measure_throughput(model, server, given.rounds)
            seconds = measure_start(model, server, given.rounds)
    rate, client, served = rates["in process"]
    for name, (rate_here, *here) in rates.items():
        print(
            f"{name:<20} {rate_here:8.0f} tokens/s, {rate_here / rate:.2f} of in process; processor ms per token "
            f"{here[0]:.3f} + {here[1]:.3f} of the server, {(client + served) / sum(here):.2f} of in process"
        )
    slow, slow_used = seconds["loads the model"]
    for name, (value, used) in seconds.items():
        print(
            f"{name:<20} {value:8.2f} s to the answer, {value / slow:.2f} of loading; "
            f"{used:.2f} s of the processor, {used / slow_used:.2f} of loading"
        )


if __name__ == "__main__":
    main()
