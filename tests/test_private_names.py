"""The package stands on the public parts of Prefect and of the interpreter."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import prefect
import pytest
from prefect.blocks.core import Block

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.blocks.base import ConfigurationBlock

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("blocks", "tasks", "flows", "deployments") for path in (ROOT / folder).rglob("*.py")]
FORBIDDEN = ("PyThreadState_SetAsyncExc", "_current_frames", "prefect._internal")

# What cannot be avoided, and where: neither the title of a type of blocks nor the name of a saved block is public.
ALLOWED = {
    "_block_type_name": ["deployments/defaults.py"],
    "_block_document_name": ["blocks/base.py"],
}


# What Prefect asks the authors of blocks to set, and what the class machinery sets.
BLOCK_SETTINGS = {
    "_abc_impl",
    "_block_schema_id",
    "_block_type_id",
    "_block_type_name",
    "_block_type_slug",
    "_documentation_url",
    "_logo_url",
    "_description",
}


def is_private(name: str) -> bool:
    of_named_tuples = ("_replace", "_asdict", "_fields")
    return name.startswith("_") and not name.startswith("__") and name not in of_named_tuples


@cache
def own_names() -> set[str]:
    """Private names that the package defines itself."""
    names: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return {name for name in names if is_private(name)}


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported from a private module of Prefect, or under a private name from a public one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in imported:
            parts = name.split(".")
            if parts[0].startswith("prefect") and parts[0] != "prefect_huggingface" and any(map(is_private, parts)):
                yield name


@cache
def names_of_prefect() -> set[str]:
    """Private names in the sources of Prefect."""
    sources = Path(prefect.__file__).parent.rglob("*.py")
    return {name for path in sources for name in re.findall(r"\b_[a-z]\w*", path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_part_of_prefect_and_no_foreign_thread(path: Path) -> None:
    text, place = path.read_text(), str(path.relative_to(ROOT))
    tree = ast.parse(text)
    assert [word for word in FORBIDDEN if word in text] == []
    assert list(private_imports(tree)) == []
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    foreign = (used - own_names()) & names_of_prefect()
    assert {name for name in foreign if place not in ALLOWED.get(name, ())} == set()


def test_no_block_replaces_a_private_part_of_prefect() -> None:
    of_prefect = {name for kind in Block.__mro__ for name in vars(kind) if is_private(name)} - BLOCK_SETTINGS
    ours = [ConfigurationBlock, *ConfigurationBlock.__subclasses__()]
    assert {name for kind in ours for name in vars(kind).keys() & of_prefect} == set()


def test_a_saved_block_still_says_its_name(prefect_server: None) -> None:
    """A new version of Prefect that names this otherwise is noticed here."""
    ModelStore().save("private-name", overwrite=True)
    assert ModelStore.load("private-name")._block_document_name == "private-name"
