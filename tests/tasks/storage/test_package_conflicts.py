"""A package that does not fit torch is found by the plan, before an export starts, in the environment of the export."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.exports import plan_model
from prefect_huggingface.tasks.storage.exports.child import probe_packages
from prefect_huggingface.tasks.storage.exports.recipes import installed_version
from support.tiny_vision_model import make_tiny_llava

# What a torchvision says that was built for another torch.
NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Function that installs a package of one file, for this process and those that it starts."""
    folder = tmp_path / "packages"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def make(name: str, body: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(body)
        (folder / f"{name}-0.99.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.99\n"
        (folder / f"{name}-0.99.dist-info" / "METADATA").write_text(metadata)

    yield make
    installed_version.cache_clear()
    probe_packages.cache_clear()


def processor_seconds() -> float:
    """Seconds that the processors worked for this process and for those that it started."""
    return sum(os.times()[:4])


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("torchvision", f"import torch\nraise RuntimeError('{NMS}')\n", NMS),
        ("torchao", "import torch\nraise ImportError('undefined symbol: _ZN3c10')\n", "undefined symbol: _ZN3c10"),
        ("kernels", "import os\nos._exit(139)\n", "it ends the process that imports it"),
    ],
)
def test_a_package_that_does_not_fit_is_named_with_the_remedy(
    install: Callable[[str, str], None], tiny_llama: Path, tmp_path: Path, name: str, body: str, words: str
) -> None:
    install(name, body)
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path / "store"))
    began = processor_seconds()
    (problem,) = plan_model(model).problems
    # On an idle machine these are the seconds of the clock; on a busy one the clock shows the others' work.
    assert processor_seconds() - began < 5
    assert problem.startswith(f"The package '{name}' 0.99 does not fit torch ")
    assert words in problem
    assert f"`pip uninstall {name}`" in problem
    assert "\n" not in problem
    began = processor_seconds()
    assert plan_model(model).problems == (problem,)
    assert processor_seconds() - began < 1, "the second plan asks nothing again"


LOAD = """
import sys
from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.errors import EngineError
try:
    load_engine(LocalModel(model_id=sys.argv[1], backend="torch", task=sys.argv[2]))
except EngineError as error:
    print(error)
"""


@pytest.mark.slow
def test_it_is_named_as_well_where_torch_runs_the_model(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install("torchvision", f"import torch\nraise RuntimeError('{NMS}')\n")
    command = [sys.executable, "-c", LOAD, str(make_tiny_llava(tmp_path / "llava")), "image-text-to-text"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("The package 'torchvision' 0.99 does not fit torch ")
    assert NMS in printed
    assert "`pip uninstall torchvision`" in printed


def test_packages_that_work_or_are_not_imported_are_no_problem(
    install: Callable[[str, str], None], tiny_llama: Path, tmp_path: Path
) -> None:
    install("torchvision", "import torch\n")
    install("torchaudio", "raise RuntimeError('not asked for')\n")
    assert plan_model(LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path))).problems == ()
