"""The source of the installed optimum-intel, read as data.

Its tables of recommended recipes and of supported architectures decide what an export is. To import them takes
seconds and brings torch along; to parse them takes a few hundredths of a second.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

CONFIGURATION = "optimum/intel/openvino/configuration.py"
MODEL_CONFIGS = "optimum/exporters/openvino/model_configs.py"
DATASETS = "optimum/intel/openvino/utils.py"


@cache
def parse_source(path: str) -> tuple[ast.stmt, ...]:
    """Return the statements of a module of optimum-intel; none if it cannot be read."""
    try:
        text = Path(str(distribution("optimum-intel").locate_file(path))).read_text(encoding="utf-8")
        return tuple(ast.parse(text).body)
    except (PackageNotFoundError, OSError, SyntaxError):
        return ()


@cache
def read_constants(path: str) -> Mapping[str, Any]:
    """Return the constants of a module of optimum-intel that are literals, by name."""
    found = {}
    for node in parse_source(path):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = literal_value(node.value)
            except ValueError:
                continue
    return found


def literal_value(node: ast.expr) -> Any:
    """Return the value of a literal; a member of an enumeration is the name of the member in lower case.

    Raises:
        ValueError: If the expression is not a literal.
    """
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {literal_value(key): literal_value(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [literal_value(element) for element in node.elts]
    return ast.literal_eval(node)
