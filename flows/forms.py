"""Forms: titles for the parameters of a flow, and one sentence for a value that cannot be right.

Prefect makes the form of a deployment from the signature of its flow. Limits, choices and titles come from annotations,
descriptions from the docstring. What the form and the API let pass is refused here, before the flow begins.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_origin

from prefect import Flow
from prefect.blocks.core import Block
from prefect.exceptions import ParameterTypeError
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

P = ParamSpec("P")
R = TypeVar("R")

MAX_PARAMETER_BYTES = 524_288  # what a Prefect server takes unless it is told otherwise


def titled(title: str, **limits: Any) -> Any:
    """Return the annotation that gives a parameter a title in the form, and limits.

    Prefect sets the title of a field to the name of the parameter; only the extra part of its schema is left alone.
    The limits are those of `pydantic.Field`, such as `ge`.
    """
    return Field(json_schema_extra={"title": title}, **limits)


class FormFlow(Flow[P, R]):
    """A flow that says which parameter of a run is wrong, and what to do about it.

    Parameters that are rarely changed are the fields of one parameter, `more`, which is a group of the form. A call in
    Python may also give them by their own names.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flow."""
        own = inspect.signature(self.fn, eval_str=True).parameters
        group = _group_of(own)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name not in own and name in group}
        if given:
            more = kwargs.get("more") or {}
            kwargs["more"] = {**(more if isinstance(more, Mapping) else dict(more)), **given}
        return super().__call__(*args, **kwargs)

    def with_options(self, **options: Any) -> FormFlow[P, R]:
        """Return a copy with other settings, which says as well what is wrong."""
        plain = super().with_options(**options)
        plain.__class__ = FormFlow
        return cast("FormFlow[P, R]", plain)

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters as JSON values.

        Raises:
            ParameterTypeError: If they are larger than the server takes; its own error would repeat them.
        """
        values = super().serialize_parameters(parameters)
        sizes = {name: len(json.dumps(value, default=str)) for name, value in values.items()}
        if sum(sizes.values()) > MAX_PARAMETER_BYTES:
            name = max(sizes, key=sizes.__getitem__)
            raise ParameterTypeError(
                f"`{name}` has {sizes[name]:,} bytes, and the parameters of a run must have less than "
                f"{MAX_PARAMETER_BYTES:,}. Write it to a file, and use `batch_inference`."
            )
        return values

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters with their blocks loaded and their values converted.

        Raises:
            ParameterTypeError: If a block cannot be loaded or is of another type, if rows are given in place of a
                file, or if a value does not fit its parameter.
        """
        own = inspect.signature(self.fn, eval_str=True).parameters
        loaded = {name: load_references(name, value) for name, value in parameters.items()}
        for name, value in loaded.items():
            if name not in own:
                raise ParameterTypeError(f"{self.name!r} has no parameter `{name}`. Use one of {list(own)!r}.")
            kinds = list(_parts(own[name].annotation))
            _check_block(name, value, tuple(kind for kind in kinds if Block.is_block_class(kind)))
            _check_rows(name, value, kinds)
        return {name: _converted(name, value, own[name].annotation) for name, value in loaded.items()}


def _group_of(parameters: Mapping[str, inspect.Parameter]) -> frozenset[str]:
    """Return the names of the fields of the parameter `more`, where a flow has one."""
    more = parameters.get("more")
    kinds = [kind for kind in _parts(more.annotation) if isinstance(kind, type)] if more else []
    return frozenset(name for kind in kinds if issubclass(kind, BaseModel) for name in kind.model_fields)


def form_flow(**settings: Any) -> Callable[[Callable[P, R]], FormFlow[P, R]]:
    """Return a decorator like `prefect.flow`, with its settings, whose flow explains wrong parameters."""
    return lambda function: FormFlow(function, **settings)


def load_references(name: str, value: Any) -> Any:
    """Return a parameter's value with the blocks in place of the references to them.

    Raises:
        ParameterTypeError: If there is no such block, or if its fields do not fit each other.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), Mapping):  # the reference of a JSON schema is a text
            return _load_block(name, value["$ref"])
        return {key: load_references(name, item) for key, item in value.items()}
    return [load_references(name, item) for item in value] if isinstance(value, list) else value


def _converted(name: str, value: Any, annotation: Any) -> Any:
    """Return a value as its parameter has it. Prefect would take the references of a JSON schema for blocks.

    Raises:
        ParameterTypeError: If it does not fit.
    """
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as exc:
        reasons = (".".join(map(str, (name, *each["loc"]))) + f": {each['msg']}" for each in exc.errors())
        raise ParameterTypeError("; ".join(reasons)) from None


def _load_block(name: str, reference: Any) -> Block:
    shown = next(iter(reference.values()), reference) if isinstance(reference, Mapping) else reference
    try:
        return Block.load_from_ref(reference, _sync=True)  # type: ignore[call-arg, return-value]
    except ValueError as exc:
        raise ParameterTypeError(
            f"`{name}` refers to block {shown!r}, which is not there. "
            "Choose a saved block in the form, or save the default blocks with `make blocks`."
        ) from exc
    except RuntimeError as exc:
        raise ParameterTypeError(
            f"`{name}` refers to block {shown!r}, which cannot be loaded: {_reason(exc)} Correct it under Blocks."
        ) from exc


def _reason(error: RuntimeError) -> str:
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return f"{error}"
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in cause.errors()[:3]) + "."


def _parts(annotation: Any) -> Iterator[Any]:
    """Return an annotation and everything in it, without what is in its lists and tables."""
    yield annotation
    if get_origin(annotation) not in (list, dict):
        for part in get_args(annotation):
            yield from _parts(part)


def _check_block(name: str, value: Any, classes: tuple[type[Block], ...]) -> None:
    if classes and isinstance(value, Block) and not isinstance(value, classes):
        wanted = " or ".join(each.get_block_type_slug() for each in classes)
        raise ParameterTypeError(
            f"`{name}` must be a block of type {wanted}, got one of type {value.get_block_type_slug()}. Choose another."
        )


def _check_rows(name: str, value: Any, kinds: list[Any]) -> None:
    if isinstance(value, list) and str in kinds and not any(get_origin(kind) is list for kind in kinds):
        raise ParameterTypeError(
            f"`{name}` must be a text, got a list of {len(value)} rows. "
            "Write the rows to a file, JSONL for instance, and give its path."
        )
