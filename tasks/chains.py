"""The task that puts one row of values through a chain of prompts, with the machinery of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.artifacts import publish_table
from prefect_huggingface.tasks.batching.job import list_models, number_models
from prefect_huggingface.tasks.batching.requests import ChainRows, ChainStep, check_chain
from prefect_huggingface.tasks.batching.shard import UNFINISHED, answer_row
from prefect_huggingface.tasks.errors import ChainError
from prefect_huggingface.tasks.run_logs import library_logs


def answer_chain(
    model: LocalModel | InferenceEndpoint,
    steps: Sequence[ChainStep],
    inputs: Mapping[str, Any],
    options: GenerationOptions | None = None,
) -> dict[str, Any]:
    """Run named prompts one after the other, and return the output of each step by its name.

    Raises:
        ChainError: If the chain cannot be filled in, a step fails, or an output is not of its form.
    """
    from prefect_huggingface.tasks.engines.registry import load_engine

    check_chain(steps, inputs)
    chain = ChainRows(steps, options, engines=number_models(steps))
    values = dict(inputs)
    with library_logs():
        results = answer_row([load_engine(each) for each in list_models(model, steps)], chain, values)
    rows, names = [], [step.name for step in steps]
    for number, (step, result) in enumerate(zip(steps, results, strict=False)):
        known = {name: value for name, value in values.items() if name not in names[number:]}
        prompt = None if result.status == "missing_value" else chain(0, known, number).prompt
        rows.append({"step": step.name, "prompt": prompt, "output": result.completion, "error": result.error})
    publish_table("prompt-chain", rows, "Prompts and outputs of the chain, in order.")
    last = results[-1]
    if last.error is not None:
        raise ChainError(last.error, error_code=last.status)
    if last.status in UNFINISHED:
        why = "its prompt is too long. Shorten it" if last.status == "skipped" else "its deadline passed. Raise it"
        raise ChainError(f"Step {steps[last.step].name!r} was not answered: {why}.", error_code=last.status)
    return {name: values[name] for name in names}


run_chain = task(name="run-chain", cache_policy=NO_CACHE, persist_result=False)(answer_chain)
