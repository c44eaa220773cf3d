"""The wheel installs as people install, without the constraints file, beside a CPU build of torch that stays."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.version import Version

from support.wheels import build_wheel, make_environment, pip_install, skip_without_index

CUDA = re.compile(r"nvidia|cuda|triton|torchvision", re.IGNORECASE)
PROGRAM = """
import sys
from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore
from prefect_huggingface.tasks import generate_text

model = LocalModel(model_id=sys.argv[1], weight_format="int8", store=ModelStore(path=sys.argv[2]))
(answer,) = generate_text.fn(model, ["What is the capital of Peru?"], GenerationOptions(max_new_tokens=8))
print(answer.text)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The wheel of this clone."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_ranges_resolve_beside_torch_and_bring_nothing_of_cuda(wheel: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    # For the resolver, a package is there when its metadata is.
    metadata = Path(str(distribution("torch").locate_file("."))) / f"torch-{distribution('torch').version}.dist-info"
    (packages,) = (tmp_path / "venv").rglob("site-packages")
    shutil.copytree(metadata, packages / metadata.name)

    command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--python", str(python), wheel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    skip_without_index(done)

    chosen = {
        name: Version(version) for name, version in re.findall(r"^ \+ ([\w.-]+)==(\S+)$", done.stderr, re.MULTILINE)
    }
    assert "torch" not in chosen
    assert not [name for name in chosen if CUDA.search(name)]
    assert chosen["prefect"] >= Version("3.9.1")
    assert chosen["sqlalchemy"] >= Version("2.1")
    assert chosen["langchain-core"] >= Version("1.8")
    assert {"optimum-intel", "openvino-genai", "nncf", "transformers"} <= chosen.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_environment_exports_and_answers(wheel: str, tmp_path: Path, bundled_model: Path) -> None:
    torch = distribution("torch").version
    if "+cpu" not in torch:
        pytest.skip("the torch of this environment is no CPU build")
    python = make_environment(tmp_path / "venv")
    pip_install(python, f"torch=={torch}", seconds=600)
    pip_install(python, wheel, seconds=900)

    code = (
        "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()), sep='\\n')"
    )
    installed = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"torch=={torch}" in installed
    assert not [line for line in installed if CUDA.search(line)]

    command = [str(python), "-c", PROGRAM, str(bundled_model), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "Lima"
