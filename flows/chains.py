"""The flow that runs a chain of prompts over one set of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.batching.requests import ChainStep
from prefect_huggingface.tasks.chains import run_chain
from prefect_huggingface.tasks.parent_processes import end_with_parent


@form_flow(name="prompt-chain")
def prompt_chain(
    model: Annotated[LocalModel | InferenceEndpoint, titled("Model or endpoint")],
    steps: Annotated[Sequence[ChainStep], titled("Steps")],
    inputs: Annotated[dict[str, Any] | None, titled("Inputs by name")] = None,
    options: Annotated[GenerationOptions | None, titled("Generation")] = None,
) -> dict[str, Any]:
    """Run named prompts one after the other, each with the inputs and the outputs of earlier steps.

    It is what `batch_inference` does with `steps` for every row of a table.

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
    outputs: dict[str, Any] = run_chain(model, steps, inputs or {}, options)
    return outputs
