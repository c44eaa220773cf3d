"""Prompt chains: named steps whose prompts use the inputs and the outputs of earlier steps.

Prompts are `langchain_core` f-string templates. The output of a step is available to later steps under its name; the
fields of a JSON object also under `<step>_<field>`. Nothing is generated before the whole chain has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.errors import ChainError

Parser = Literal["text", "json", "list"]


class ChainStep(BaseModel):
    """One step of a prompt chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        title="Name", description="Name of the step, under which later prompts can use its output."
    )
    prompt: str = Field(
        min_length=1,
        title="Prompt",
        description="Prompt template with the names of inputs and of earlier steps in braces.",
    )
    parser: Parser = Field(
        default="text", title="Parser", description="What the output is: text, a JSON value, or a comma-separated list."
    )
    options: GenerationOptions | None = Field(
        default=None, title="Generation", description="Options of this step, put over those of the chain."
    )


def check_chain(steps: Sequence[ChainStep], inputs: Mapping[str, Any]) -> None:
    """Check that every prompt can be filled in when its turn comes.

    Raises:
        ChainError: If there is no step, a name occurs twice, a template is broken, or it uses a name that is neither
            an input nor an earlier step.
    """
    if not steps:
        raise ChainError("`steps` must hold at least one step, got []. Add a step with a name and a prompt.")
    known: dict[str, Parser | None] = dict.fromkeys(inputs)
    for step in steps:
        if step.name in known:
            raise ChainError(f"The name {step.name!r} is used twice in the chain. Rename the step or the input.")
        for name in template_names(step.prompt):
            if not _is_known(name, known):
                raise ChainError(
                    f"Step {step.name!r} uses {{{name}}}, which is neither an input nor an earlier step. "
                    f"Use one of {sorted(known)!r}, or write {{{{{name}}}}} for the braces themselves."
                )
        known[step.name] = step.parser


def _is_known(name: str, known: Mapping[str, Parser | None]) -> bool:
    # The fields of a JSON output are not known before it is there, so any `<step>_<field>` is accepted.
    return name in known or any(
        parser == "json" and name.startswith(f"{step}_") and len(name) > len(step) + 1 for step, parser in known.items()
    )


def template_names(template: str) -> list[str]:
    """Return the names that a prompt template uses.

    Raises:
        ChainError: If the text is not a template.
    """
    from langchain_core.prompts import PromptTemplate

    try:
        return PromptTemplate.from_template(template).input_variables
    except (ValueError, KeyError, IndexError) as exc:
        raise ChainError(
            f"{template!r} is not a prompt template: {exc}. Close the braces, and double those that are text."
        ) from exc


def render_prompt(step: ChainStep, values: Mapping[str, Any]) -> str:
    """Fill in the prompt of a step.

    Raises:
        ChainError: If the prompt uses a field that the JSON output of an earlier step lacks.
    """
    from langchain_core.prompts import PromptTemplate

    template = PromptTemplate.from_template(step.prompt)
    available = values_of(values)
    missing = [name for name in template.input_variables if name not in available]
    if missing:
        raise ChainError(
            f"Step {step.name!r} uses {{{missing[0]}}}, but the JSON output has no such field. "
            f"There are: {sorted(available)!r}. Correct the prompt, or ask the model for the field."
        )
    return template.format(**{name: available[name] for name in template.input_variables})


def values_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs and outputs by name, with the fields of JSON objects beside them."""
    fields = {
        f"{name}_{field}": content
        for name, value in values.items()
        if isinstance(value, Mapping)
        for field, content in value.items()
    }
    return {**fields, **values}


def parse_output(step: ChainStep, text: str) -> Any:
    """Return the output of a step as its parser says.

    Raises:
        ChainError: If the text is not of that form.
    """
    from langchain_core.exceptions import OutputParserException
    from langchain_core.output_parsers import (
        BaseOutputParser,
        CommaSeparatedListOutputParser,
        JsonOutputParser,
        StrOutputParser,
    )

    parsers: dict[Parser, Callable[[], BaseOutputParser[Any]]] = {
        "text": StrOutputParser,
        "json": JsonOutputParser,
        "list": CommaSeparatedListOutputParser,
    }
    try:
        return parsers[step.parser]().parse(text.strip() if step.parser != "text" else text)
    except OutputParserException as exc:
        raise ChainError(
            f"The output of step {step.name!r} is not {step.parser}: {text[:200]!r}. "
            "Ask for the form in the prompt, or give the step a `response_format`."
        ) from exc
