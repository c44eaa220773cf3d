"""One store with one export, made once for all tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from support.export_requests import finish_request, start_request


@pytest.fixture(scope="session")
def crowd(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A store, and the answers of eight processes that asked it at once for the same export."""
    store = tmp_path_factory.mktemp("crowd")
    processes = [start_request(store, tiny_llama) for _ in range(8)]
    return store, [finish_request(process) for process in processes]


@pytest.fixture
def exported(crowd: tuple[Path, list[dict[str, Any]]], tiny_llama: Path) -> LocalModel:
    """A model whose int8 export is in the store."""
    return LocalModel(model_id=str(tiny_llama), store=ModelStore(path=crowd[0]))
