"""Recommended recipes of known models, as the installed optimum-intel has them.

They are read from its source as data, because importing it takes seconds and brings torch along. A recipe belongs to
a repository id; the name of a folder never chooses one.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

SOURCE = "optimum/intel/openvino/configuration.py"
INT4_WEIGHTS = "_DEFAULT_4BIT_WQ_CONFIGS"
INT8_WEIGHTS = "_DEFAULT_8BIT_WQ_CONFIGS"
INT8_FULL = "_DEFAULT_INT8_FQ_CONFIGS"
IGNORED_SCOPES = "_DEFAULT_IGNORED_SCOPE_CONFIGS"


def recommended_options(table: str, repo_id: str | None) -> dict[str, Any] | None:
    """Return the recommended options of a repository, or None.

    Args:
        table: Which recommendation is wanted, one of the names of this module.
        repo_id: Repository id; None, for a local folder, has no recommendation.
    """
    if repo_id is None:
        return None
    return _tables().get(table, {}).get(repo_id)


@cache
def _tables() -> dict[str, dict[str, Any]]:
    try:
        path = distribution("optimum-intel").locate_file(SOURCE)
        tree = ast.parse(open(str(path), encoding="utf-8").read())
    except (PackageNotFoundError, OSError, SyntaxError):
        return {}
    tables: dict[str, dict[str, Any]] = {}
    aliases: list[tuple[str, str]] = []
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name in (INT4_WEIGHTS, INT8_WEIGHTS, INT8_FULL, IGNORED_SCOPES):
            tables[name] = _value(node.value)
        elif name == "model_id_aliases":
            aliases = _value(node.value)
    for original, alias in aliases:
        if original in tables.get(INT4_WEIGHTS, {}):
            tables[INT4_WEIGHTS][alias] = tables[INT4_WEIGHTS][original]
    return tables


def _value(node: ast.expr) -> Any:
    """Return the value of a literal; a member of an enumeration is the name of the member in lower case."""
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    return ast.literal_eval(node)
