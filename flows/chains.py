"""The flow that runs a chain of prompts through one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import publish_table
from prefect_huggingface.tasks.chains import ChainStep, check_chain, parse_output, render_prompt
from prefect_huggingface.tasks.errors import ChainError
from prefect_huggingface.tasks.generation import generate_text
from prefect_huggingface.tasks.parent_processes import end_with_parent


@form_flow(name="prompt-chain")
def prompt_chain(
    model: Annotated[LocalModel | InferenceEndpoint, titled("Model or endpoint")],
    steps: Annotated[Sequence[ChainStep], titled("Steps")],
    inputs: Annotated[dict[str, Any] | None, titled("Inputs by name")] = None,
    options: Annotated[GenerationOptions | None, titled("Generation")] = None,
) -> dict[str, Any]:
    """Run named prompts one after the other, each with the inputs and the outputs of earlier steps.

    Args:
        model: Model or endpoint that answers the prompts.
        steps: Steps in their order, each with a name, a prompt template and, where it is not text, a parser.
        inputs: Values for the names in the prompts.
        options: Generation options of all steps, put over the defaults of the model.

    Returns:
        Output of each step by its name, in order: a text, a JSON value or a list of texts.

    Raises:
        ChainError: If the chain cannot be filled in, a step fails, or an output is not of its form.
    """
    end_with_parent()
    steps = [step if isinstance(step, ChainStep) else ChainStep.model_validate(step) for step in steps]
    values = dict(inputs or {})
    check_chain(steps, values)
    outputs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for step in steps:
        prompt = render_prompt(step, {**values, **outputs})
        text = _answer(model, step, prompt, options)
        outputs[step.name] = parse_output(step, text)
        rows.append({"step": step.name, "prompt": prompt, "output": text})
    publish_table("prompt-chain", rows, "Prompts and outputs of the chain, in order.")
    return outputs


def _answer(
    model: LocalModel | InferenceEndpoint, step: ChainStep, prompt: str, options: GenerationOptions | None
) -> str:
    merged = step.options if options is None else options.merged(step.options)
    named = generate_text.with_options(task_run_name=f"step-{step.name}")
    completion = named(model, [prompt], merged)[0]
    if completion.error is not None:
        raise ChainError(f"Step {step.name!r} failed: {completion.error}", error_code=completion.error_code)
    return completion.text
