"""One tiny model of every kind of engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks import unload_engines
from support.engine_families import FAMILY_NAMES, LOCAL_FAMILY_NAMES, Family, family_model
from support.export_models import TASK_SETTINGS, make_model
from support.tiny_vision_model import draw_image, make_tiny_llava


@pytest.fixture(scope="session")
def tiny_t5(session_folder: Path) -> Path:
    """Checkpoint folder of a random T5."""
    return make_model(session_folder / "models" / "tiny-t5", "t5", task_specific_params=TASK_SETTINGS)


@pytest.fixture(scope="session")
def tiny_t5_openvino(tiny_t5: Path) -> Path:
    """OpenVINO folder of the tiny T5, with its weights in full precision."""
    from prefect_huggingface.tasks.storage.exports.store import get_export

    return get_export(family_model("openvino-seq2seq", tiny_t5)).path


@pytest.fixture(scope="session")
def tiny_llava(session_folder: Path) -> Path:
    """Checkpoint folder of a random LLaVA."""
    pytest.importorskip("PIL", reason="the extra `vision` is not installed")
    return make_tiny_llava(session_folder / "models" / "tiny-llava-of-families")


@pytest.fixture(scope="session")
def tiny_llava_openvino(tiny_llava: Path) -> Path:
    """OpenVINO folder of the tiny LLaVA, with its weights in full precision."""
    from prefect_huggingface.tasks.storage.exports.store import get_export

    return get_export(family_model("openvino-images", tiny_llava)).path


@pytest.fixture(scope="session")
def tiny_picture(session_folder: Path) -> Path:
    """An image."""
    return draw_image(session_folder / "picture-of-families.png", seed=1)


FOLDERS = {
    "openvino-text": "tiny_openvino", "openvino-group": "tiny_openvino", "torch-text": "tiny_llama",
    "openvino-seq2seq": "tiny_t5_openvino", "torch-seq2seq": "tiny_t5",
    "openvino-images": "tiny_llava_openvino", "torch-images": "tiny_llava",
}  # fmt: skip


@pytest.fixture(scope="module")
def _kept_engines() -> Iterator[None]:
    """Keep engines from test to test, and close them after the last one of a file."""
    yield
    unload_engines()


@pytest.fixture
def family_of(request: pytest.FixtureRequest, _kept_engines: None) -> Iterator[object]:
    """Return the family of a name. Its engine is closed after a test that changes something under it."""

    def find(name: str) -> Family:
        if name == "endpoint":
            server = request.getfixturevalue("tgi")
            return Family(name, InferenceEndpoint(url=server.url, options=GenerationOptions(max_new_tokens=16)))
        images = (str(request.getfixturevalue("tiny_picture")),) if name.endswith("images") else ()
        return Family(name, family_model(name, request.getfixturevalue(FOLDERS[name])), images)

    yield find
    if {"monkeypatch", "tmp_path"} & set(request.fixturenames):
        unload_engines()


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest, family_of) -> Family:
    """Every kind of engine."""
    return family_of(request.param)


@pytest.fixture(params=LOCAL_FAMILY_NAMES)
def local_family(request: pytest.FixtureRequest, family_of) -> Family:
    """Every kind of engine whose model runs on this machine."""
    return family_of(request.param)
