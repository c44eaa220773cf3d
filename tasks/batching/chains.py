"""Chains of prompts: named steps whose prompts use the columns of a row and the outputs of its earlier steps.

Prompts are f-string templates. The output of a step is available to later steps under its name; the fields of a JSON
object also under `<step>_<field>`. Nothing is generated before the whole chain has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.batching.requests import RowProblem, RowRequest, Template
from prefect_huggingface.tasks.errors import BatchError, ChainError

Parser = Literal["text", "json", "list"]
SHOWN_CHARACTERS = 200


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
    model: LocalModel | InferenceEndpoint | None = Field(
        default=None, title="Model of the step", description="Model or endpoint of this step, where it is another one."
    )


def check_chain(steps: Sequence[ChainStep], inputs: Iterable[str]) -> None:
    """Check that every prompt can be filled in when its turn comes.

    Args:
        steps: Steps in their order.
        inputs: Names of the inputs, or of the columns of a table.

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
        for name in template_of(step).columns:
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


def template_of(step: ChainStep) -> Template:
    """Return the prompt of a step as a template.

    Raises:
        ChainError: If it is none.
    """
    try:
        return Template(step.prompt)
    except BatchError as exc:
        raise ChainError(
            f"The prompt of step {step.name!r} is not a prompt template. {_shorten(exc.message)}"
        ) from None


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
    if step.parser == "text":
        return text
    from langchain_core.exceptions import OutputParserException
    from langchain_core.output_parsers import CommaSeparatedListOutputParser, JsonOutputParser

    parser: Any = JsonOutputParser() if step.parser == "json" else CommaSeparatedListOutputParser()
    try:
        return parser.parse(text.strip())
    except OutputParserException:
        raise ChainError(
            f"The output of step {step.name!r} is not {step.parser}: {_shorten(repr(text))}. "
            "Ask for the form in the prompt, or give the step a `response_format`."
        ) from None


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


class ChainRows:
    """Makes the requests of a chain, one step of one row at a time.

    Args:
        steps: Steps in their order.
        options: Generation options of all steps.
        system: Template of a system message for all steps, or None.
        greedy: For each step, whether equal prompts have equal answers.
        engines: For each step, the number of its engine.
    """

    def __init__(
        self,
        steps: Sequence[ChainStep],
        options: GenerationOptions | None = None,
        system: str | None = None,
        greedy: Sequence[bool] = (),
        engines: Sequence[int] = (),
    ) -> None:
        self.steps = tuple(steps)
        self._templates = [template_of(step) for step in steps]
        self._system = Template(system) if system is not None else None
        merged = [options.merged(step.options) if options else step.options for step in steps]
        self._options = merged
        self._greedy = list(greedy) or [True] * len(merged)
        self._engines = list(engines) or [0] * len(merged)
        # Steps share answers with nothing but the same step of other rows.
        self._marks = [f"\0{place} {step.name}" for place, step in enumerate(steps)]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that the prompts use and that no earlier step gives."""
        known: dict[str, Parser | None] = {}
        needed: dict[str, None] = {}
        for step, template in zip(self.steps, self._templates, strict=True):
            needed |= dict.fromkeys(name for name in template.columns if not _is_known(name, known))
            known[step.name] = step.parser
        return tuple(dict.fromkeys([*needed, *(self._system.columns if self._system else ())]))

    def make(self, row: int, step: int, values: Mapping[str, Any]) -> RowRequest | RowProblem:
        """Return the request of a step.

        Args:
            row: Number of the row.
            step: Number of the step.
            values: Columns of the row and outputs of its earlier steps, by name.
        """
        available = values_of(values)
        texts = []
        for template in (self._templates[step], self._system):
            text = template.render(available) if template else None
            if isinstance(text, RowProblem):
                return RowProblem(
                    text.status, f"Step {self.steps[step].name!r}: {self._explain(text, step, available)}"
                )
            texts.append(text)
        prompt, system = texts
        options, number = self._options[step], row * len(self.steps) + step
        fields: dict[str, Any] = {"options": options}
        if system is not None:
            fields["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return RowRequest(
            number, f"{prompt}\0{system}{self._marks[step]}", prompt if system is None else None, fields,
            shareable=self._greedy[step] and not (options is not None and options.do_sample),
            engine=self._engines[step],
        )  # fmt: skip

    def _explain(self, problem: RowProblem, step: int, available: Mapping[str, Any]) -> str:
        for name in self._templates[step].columns:
            json_steps = {each.name: each.parser for each in self.steps[:step] if each.parser == "json"}
            if name not in available and _is_known(name, json_steps):
                return (
                    f"{{{name}}} is not there, since the JSON of the step before has no such field. There are: "
                    f"{sorted(available)!r}. Correct the prompt, or ask the model for the field."
                )
        return problem.message
