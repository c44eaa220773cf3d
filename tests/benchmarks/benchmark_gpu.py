"""Measures this library's torch engine on a CUDA GPU beside its peers, in bfloat16, on models of random weights.

    python tests/benchmarks/benchmark_gpu.py [--shapes 135m 1b] [--rows 256] [--repeats 3] [--output figures.json]

Each contender does the same rows, interleaved, with prompts that differ in every repeat; the figures are medians. The
limits beside them are measured in the same run: one stream reads all weights for each token, a batch computes two
operations for each parameter and token.

cuDNN's attention is off for all of them, as this library sets it: with it each new length costs a plan, for every
layer, and the peers are several times slower. `--as-they-come` leaves it on.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmark_models import SHAPES, make_checkpoint
from machine import REPEATS

Prompts = list[str]
Run = Callable[[Prompts, int], int]
# Of these a workload gets fewer rows: they take minutes.
SLOW = {"transformers pipeline, one by one": 8, "langchain-huggingface": 32}


def ours(folder: Path, device: str) -> tuple[Run, Callable[[], None]]:
    """Return this library's torch engine."""
    from prefect_huggingface.blocks import GenerationOptions, LocalModel
    from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
    from prefect_huggingface.tasks.records import Request

    settings = {"backend": "torch", "device": device, "dtype": "bfloat16", "chat_template": "never"}
    engine = TorchTextEngine(folder, LocalModel(model_id=str(folder), **settings))

    def run(prompts: Prompts, tokens: int) -> int:
        options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
        requests = [Request(prompt, options=options) for prompt in prompts]
        return sum(completion.generated_tokens for completion in engine.generate(requests))

    return run, engine.close


def generate_batch(folder: Path, device: str) -> tuple[Run, Callable[[], None]]:
    """Return the continuous batching of Transformers."""
    from transformers import GenerationConfig

    model, tokenizer = _loaded(folder, device)

    def run(prompts: Prompts, tokens: int) -> int:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=2)
        results = model.generate_batch(ids, generation_config=settings, progress_bar=False)
        for result in results.values():
            tokenizer.decode(result.generated_tokens)
        return sum(len(result.generated_tokens) for result in results.values())

    return run, lambda: None


def static_batches(folder: Path, device: str, size: int = 64) -> tuple[Run, Callable[[], None]]:
    """Return `generate` of Transformers in padded batches, sorted by length."""
    model, tokenizer = _loaded(folder, device)

    def run(prompts: Prompts, tokens: int) -> int:
        rows = sorted(prompts, key=len)
        for start in range(0, len(rows), size):
            inputs = tokenizer(rows[start : start + size], return_tensors="pt", padding=True).to(device)
            found = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :])
        return len(prompts) * tokens

    return run, lambda: None


def one_by_one(folder: Path, device: str) -> tuple[Run, Callable[[], None]]:
    """Return Transformers' pipeline as most scripts call it."""
    from transformers import pipeline

    model, tokenizer = _loaded(folder, device)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def run(prompts: Prompts, tokens: int) -> int:
        for prompt in prompts:
            generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return len(prompts) * tokens

    return run, lambda: None


def langchain_huggingface(folder: Path, device: str) -> tuple[Run, Callable[[], None]]:
    """Return langchain-huggingface's pipeline at its default batch size."""
    from langchain_huggingface import HuggingFacePipeline
    from transformers import pipeline

    model, tokenizer = _loaded(folder, device)
    llm = HuggingFacePipeline(pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer))

    def run(prompts: Prompts, tokens: int) -> int:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        llm.bind(pipeline_kwargs=settings).batch(prompts)
        return len(prompts) * tokens

    return run, lambda: None


CONTENDERS: dict[str, Callable[[Path, str], tuple[Run, Callable[[], None]]]] = {
    "ours": ours,
    "generate_batch": generate_batch,
    "generate, padded batches of 64": static_batches,
    "langchain-huggingface": langchain_huggingface,
    "transformers pipeline, one by one": one_by_one,
}


def _loaded(folder: Path, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval(), tokenizer


def limits(device: str, width: int = 8192) -> tuple[float, float]:
    """Return the bytes per second that a device reads and writes in a copy, and its bfloat16 operations per second."""
    import torch

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    width = width if device.startswith("cuda") else 512
    source = torch.ones(16 * width * width, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    left = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    copied = 2 * source.nbytes / best(lambda: target.copy_(source))
    return copied, 2 * width**3 / best(lambda: left @ left)


def synchronize(device: str) -> None:
    """Wait until a device has done all that was asked."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rate(run: Run, prompts: Prompts, tokens: int, device: str) -> float:
    """Return tokens per second."""
    started = time.perf_counter()
    count = run(prompts, tokens)
    synchronize(device)
    return count / (time.perf_counter() - started)


def make_prompts(folder: Path, rows: int, salt: int) -> Prompts:
    """Return texts of 16 to 256 random tokens, other ones for every salt."""
    from tokenizers import Tokenizer

    tokenizer, choose = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(salt)
    highest = tokenizer.get_vocab_size() - 1
    lengths = [choose.randint(16, 256) for _ in range(rows)]
    return [str(tokenizer.decode([choose.randint(300, highest) for _ in range(length)])) for length in lengths]


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of every contender, by workload; a contender that fails gives its error."""
    import torch

    device, rows, tokens, repeats = arguments.device, arguments.rows, arguments.tokens, arguments.repeats
    figures: dict[str, Any] = {"one stream": {}, f"{rows} rows": {}}
    for name in arguments.contenders:
        torch.backends.cuda.enable_cudnn_sdp(arguments.as_they_come)
        try:
            run, close = CONTENDERS[name](folder, device)
            run(make_prompts(folder, min(rows, 8), 99), 8)
            for workload, count in (("one stream", 1), (f"{rows} rows", min(rows, SLOW.get(name, rows)))):
                rates = [rate(run, make_prompts(folder, count, salt), tokens, device) for salt in range(repeats)]
                figures[workload][name] = median(rates)
            close()
        except Exception as exc:  # a peer that does not run here is a row of the table, not its end
            figures["one stream"][name] = f"{type(exc).__name__}: {exc}"[:300]
        run = close = None  # type: ignore[assignment]
        gc.collect()
        print(json.dumps({name: {key: value.get(name) for key, value in figures.items()}}), flush=True)
    return figures


def main() -> None:
    """Read the arguments, measure, and write."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--as-they-come", action="store_true", help="leave the attention of cuDNN on for the peers")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gpu.json"))
    arguments = parser.parse_args()
    copied, products = limits(arguments.device)
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    facts: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "copied_bytes_per_second": copied, "bfloat16_operations_per_second": products,
    }  # fmt: skip
    print(json.dumps(facts), flush=True)
    with tempfile.TemporaryDirectory() as work:
        for shape in arguments.shapes:
            folder = make_checkpoint(Path(work) / shape, {**SHAPES[shape], "dtype": "bfloat16"}, arguments.device)
            figures = measure(folder, arguments)
            parameters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2
            facts[shape] = {
                "parameters": parameters,
                "tokens_per_second": figures,
                "one stream at the limit": copied / (2 * parameters),
                "batch at the limit": products / (2 * parameters),
            }
            print(json.dumps(facts[shape]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
