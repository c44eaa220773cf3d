"""The engines of the benchmark. Each one runs in a process of its own and does a workload when it is told to.

Run as a program it is such a process: it reads one workload in JSON per line and answers with its tokens and seconds,
by the clock and of the processor.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Job = dict[str, Any]
Run = Callable[[Job], int]
STATIC_BATCH = 8


def ours(folder: str, *, tuned: bool = True, instances: int | None = None, **properties: Any) -> Run:
    """Return this library's engine, with or without the settings that were found for this machine."""
    from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
    from prefect_huggingface.tasks.engines.registry import load_engine
    from prefect_huggingface.tasks.records import Request

    options = EngineOptions(tuned=tuned, instances=instances)
    engine = load_engine(LocalModel(model_id=folder, chat_template="never", engine=options, ov_config=properties))

    def request(prompt: str, tokens: int) -> Request:
        return Request(prompt, options=GenerationOptions(max_new_tokens=tokens, ignore_eos=True))

    def submit(part: list[tuple[str, int]]) -> int:
        futures = [engine.submit(request(prompt, tokens)) for prompt, tokens in part]
        return sum(future.result().generated_tokens for future in futures)

    def run(job: Job) -> int:
        rows = list(zip(job["prompts"], job["new_tokens"], strict=True))
        if job["threads"]:
            with ThreadPoolExecutor(job["threads"]) as pool:
                return sum(pool.map(submit, (rows[place :: job["threads"]] for place in range(job["threads"]))))
        return sum(completion.generated_tokens for completion in engine.generate(request(*row) for row in rows))

    return run


def continuous_batching(folder: str, **settings: Any) -> Run:
    """Return OpenVINO GenAI's continuous batching, one call of `generate` per workload."""
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.cache_size = 4
    for name, value in settings.items():
        setattr(scheduler, name, value)
    pipeline = ContinuousBatchingPipeline(folder, scheduler, "CPU")

    def config(tokens: int) -> GenerationConfig:
        chosen = GenerationConfig()
        chosen.max_new_tokens, chosen.ignore_eos, chosen.apply_chat_template = tokens, True, False
        return chosen

    def run(job: Job) -> int:
        pipeline.generate(job["prompts"], [config(tokens) for tokens in job["new_tokens"]])
        return sum(job["new_tokens"])

    return run


def llm_pipeline(folder: str) -> Run:
    """Return OpenVINO GenAI's `LLMPipeline` in batches of 8, sorted by length."""
    from openvino_genai import GenerationConfig, LLMPipeline

    pipeline = LLMPipeline(folder, "CPU")

    def generate(prompts: list[str], tokens: int) -> None:
        config = GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.apply_chat_template = tokens, True, False
        pipeline.generate(prompts, config)

    return lambda job: in_static_batches(job, generate)


def optimum_static(folder: str) -> Run:
    """Return Optimum's model in padded batches of 8, sorted by length."""
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model = OVModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def generate(prompts: list[str], tokens: int) -> None:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return lambda job: in_static_batches(job, generate)


def in_static_batches(job: Job, generate: Callable[[list[str], int], None]) -> int:
    """Run a job in batches of rows of like length; every batch runs to its longest answer."""
    rows = sorted(zip(job["prompts"], job["new_tokens"], strict=True), key=lambda row: len(row[0]))
    for start in range(0, len(rows), STATIC_BATCH):
        batch = rows[start : start + STATIC_BATCH]
        generate([prompt for prompt, _ in batch], max(tokens for _, tokens in batch))
    return sum(job["new_tokens"])


def langchain_huggingface(folder: str, backend: str) -> Run:
    """Return langchain-huggingface's pipeline at its default batch size."""
    from langchain_huggingface import HuggingFacePipeline

    llm = HuggingFacePipeline.from_model_id(folder, task="text-generation", backend=backend)

    def run(job: Job) -> int:
        tokens = max(job["new_tokens"])
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        llm.bind(pipeline_kwargs=settings).batch(job["prompts"])
        return sum(job["new_tokens"])

    return run


def llama_cpp(file: str) -> Run:
    """Return llama.cpp with continuous batching in 64 slots, all prompts at once."""
    from xllamacpp import CommonParams, Server

    settings = CommonParams()
    settings.model.path, settings.n_parallel, settings.n_ctx = file, 64, 64 * 512
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = Server(settings)

    def complete(row: tuple[str, int]) -> int:
        prompt, tokens = row
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer: Any = server.handle_completions(body)
        return int(answer["usage"]["completion_tokens"])

    def run(job: Job) -> int:
        with ThreadPoolExecutor(64) as pool:
            return sum(pool.map(complete, zip(job["prompts"], job["new_tokens"], strict=True)))

    return run


def transformers_pipeline(folder: str) -> Run:
    """Return Transformers' pipeline on torch."""
    from transformers import pipeline

    generate = pipeline("text-generation", model=folder, device="cpu")

    def run(job: Job) -> int:
        for prompt, tokens in zip(job["prompts"], job["new_tokens"], strict=True):
            generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return sum(job["new_tokens"])

    return run


def transformers_continuous(folder: str) -> Run:
    """Return the continuous batching of Transformers, on torch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(job: Job) -> int:
        # One length for all: it has no options of single requests.
        settings = GenerationConfig(
            max_new_tokens=max(job["new_tokens"]), do_sample=False, eos_token_id=-1, pad_token_id=2
        )
        ids = [tokenizer(prompt)["input_ids"] for prompt in job["prompts"]]
        results = model.generate_batch(ids, generation_config=settings, progress_bar=False)
        for result in results.values():
            tokenizer.decode(result.generated_tokens)
        return sum(job["new_tokens"])

    return run


def in_one_list(run: Run) -> Run:
    """Return an engine that gets the rows of many threads as one list."""
    return lambda job: run({**job, "threads": 0})


CONTENDERS: dict[str, Callable[..., Run]] = {
    "ours": lambda folder, **properties: ours(folder, tuned=False, **properties),
    "ours, tuned": ours,
    "ours, a process per core": lambda folder: ours(folder, tuned=False, instances=os.cpu_count() or 1),
    "ours, one list": lambda folder: in_one_list(ours(folder, tuned=False)),
    "continuous batching, tuned by hand": lambda folder: continuous_batching(
        folder, max_num_batched_tokens=512, max_num_seqs=64, enable_prefix_caching=True
    ),
    "continuous batching, defaults": continuous_batching,
    "LLMPipeline, batches of 8": llm_pipeline,
    "optimum, batches of 8": optimum_static,
    "langchain-huggingface, openvino": lambda folder: langchain_huggingface(folder, "openvino"),
    "langchain-huggingface, torch": lambda folder: langchain_huggingface(folder, "pt"),
    "transformers pipeline": transformers_pipeline,
    "transformers generate_batch": transformers_continuous,
    "llama.cpp": llama_cpp,
}


def processor_seconds() -> float:
    """Return the seconds of the processor that this process and those that it has started have taken."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def serve(name: str, folder: str, properties: str = "{}") -> None:
    """Load an engine, with properties of OpenVINO in JSON, and do the workloads that come on the standard input."""
    # What the libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    run = CONTENDERS[name](folder, **json.loads(properties))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        started, processor = time.perf_counter(), processor_seconds()
        tokens = run(json.loads(line))
        seconds, processor = time.perf_counter() - started, processor_seconds() - processor
        figures = {"seconds": seconds, "processor_seconds": processor, "tokens": tokens}
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
