"""Architectures that the installed optimum-intel exports to OpenVINO, with their tasks and limits.

Where the source of optimum-intel has something that cannot be read as data, the export itself finds out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from prefect_huggingface.tasks.storage.exports.optimum_sources import MODEL_CONFIGS, parse_source

REGISTER = "register_in_tasks_manager"
LIMITS = ("MIN_TRANSFORMERS_VERSION", "MAX_TRANSFORMERS_VERSION")


@dataclass(frozen=True, slots=True)
class Support:
    """What optimum-intel says about one architecture.

    Attributes:
        tasks: Tasks that it can be exported for.
        minimum: Lowest version of Transformers, or None.
        maximum: Highest version of Transformers, or None.
    """

    tasks: frozenset[str]
    minimum: str | None = None
    maximum: str | None = None


@cache
def support_table() -> dict[str, Support]:
    """Return what is supported, by model type. Empty if the source cannot be read."""
    constants: dict[str, Any] = {}
    limits: dict[str, dict[str, str]] = {}
    table: dict[str, Support] = {}
    for node in parse_source(MODEL_CONFIGS):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        elif isinstance(node, ast.ClassDef):
            limits[node.name] = _limits(node, limits)
            for model_type, tasks in _registrations(node, constants):
                known = table.get(model_type, Support(frozenset())).tasks
                table[model_type] = Support(known | tasks, *(limits[node.name].get(name) for name in LIMITS))
    return table


def _limits(node: ast.ClassDef, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the limits that a class sets or inherits from a class of the same file."""
    found: dict[str, str] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            found.update(known.get(base.id, {}))
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in LIMITS and isinstance(statement.value, ast.Constant):
                found[name] = str(statement.value.value)
    return found


def _registrations(node: ast.ClassDef, constants: dict[str, Any]) -> Iterable[tuple[str, frozenset[str]]]:
    for decorator in node.decorator_list:
        if not isinstance(decorator, ast.Call) or getattr(decorator.func, "id", None) != REGISTER:
            continue
        first, *rest = decorator.args
        library = next((key.value for key in decorator.keywords if key.arg == "library_name"), None)
        if library is None or getattr(library, "value", None) == "transformers":
            yield str(getattr(first, "value", "")), frozenset(_strings(rest, constants))


def _strings(nodes: Iterable[ast.expr], constants: dict[str, Any]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, ast.Starred):
            yield from _strings([node.value], constants)
        elif isinstance(node, ast.List | ast.Tuple):
            yield from _strings(node.elts, constants)
        elif isinstance(node, ast.Name) and node.id in constants:
            yield from _strings([constants[node.id]], constants)
        elif isinstance(node, ast.Constant):
            yield str(node.value)
