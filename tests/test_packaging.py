"""The installed package: names, direction of imports, light imports, registered blocks, sizes of files."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {"blocks": 0, "tasks": 1, "flows": 2, "deployments": 3}
SCRIPTS = ROOT / "deployments" / "quickstart"  # runs from a clone; not part of the installed package
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if SCRIPTS not in path.parents)
HEAVY = ("torch", "transformers", "optimum", "openvino", "openvino_genai", "nncf", "accelerate", "pyarrow", "datasets")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("prefect_huggingface", *(part for part in parts if part != "__init__")))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = LAYERS[path.relative_to(ROOT).parts[0]]
    for name in imported_modules(path):
        if name.startswith("prefect_huggingface."):
            assert LAYERS[name.split(".")[1]] <= layer, f"{path} imports {name}"
        assert name.split(".")[0] not in LAYERS, f"{path} imports {name} without the package"
    engines_and_storage = path.relative_to(ROOT).parts[:2] in {("tasks", "engines"), ("tasks", "storage")}
    plain = ("", ".records", ".errors", ".hub_errors", ".artifacts", ".run_logs", ".waiting", ".openai_protocol")
    verbs = {module_name(p) for p in (ROOT / "tasks").glob("*.py")} - {f"prefect_huggingface.tasks{p}" for p in plain}
    if engines_and_storage:
        assert not imported_modules(path) & verbs, f"{path} imports a verb"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_importable_documented_and_short(path):
    module = importlib.import_module(module_name(path))
    assert module.__doc__
    assert len(path.read_text().splitlines()) <= 700, "split the file by idea"
    assert path.stem not in {"utils", "common", "helpers"}


def test_every_folder_with_code_is_packaged():
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module_name(path / "__init__.py") for path in {source.parent for source in SOURCES}}
    assert folders == set(packages)


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_everything_stays_light(tmp_path):
    code = (
        "import prefect_huggingface.blocks, prefect_huggingface.tasks, prefect_huggingface.flows, sys;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run_python(code, tmp_path).strip() == "[]"


def test_no_generic_name_lands_on_the_path(tmp_path):
    names = "'tasks', 'flows', 'blocks', 'deployments'"
    code = f"import importlib.util; print([importlib.util.find_spec(name) for name in ({names})])"
    assert run_python(code, tmp_path).strip() == "[None, None, None, None]"


def test_the_collection_registers_every_block(tmp_path):
    assert [entry.value for entry in entry_points(group="prefect.collections") if entry.name == "prefect_huggingface"]
    code = (
        "from prefect.plugins import load_prefect_collections;"
        "from prefect.blocks.core import Block;"
        "from prefect.utilities.dispatch import get_registry_for_type;"
        "load_prefect_collections();"
        "print(sorted(s for s in get_registry_for_type(Block) if s.startswith('hugging-face')))"
    )
    assert "hugging-face-local-model" in run_python(code, tmp_path)


def test_the_version_and_the_changelog_agree():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_top_level_is_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    assert top <= {
        "pyproject.toml", "flows", "tasks", "blocks", "tests", "deployments", "README.md",
        "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
    }  # fmt: skip
