"""Models whose exports are in stores that are made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.flows.preparation import prepare_model
from support.export_requests import LoggedExport
from support.flow_logs import messages_of


@pytest.fixture
def exported(crowd: tuple[Path, list[dict[str, Any]]], tiny_llama: Path) -> LocalModel:
    """A model whose int8 export is in the store."""
    return LocalModel(model_id=str(tiny_llama), store=ModelStore(path=crowd[0]))


@pytest.fixture(scope="session")
def logged_export(
    crowd: tuple[Path, list[dict[str, Any]]], tiny_llama: Path, prefect_server: None, made_once: Callable[..., Any]
) -> LoggedExport:
    """The int4 export of the tiny Llama, made by a flow in a copy of the store of the crowd."""

    def export_with_log(store: Path) -> LoggedExport:
        shutil.copytree(crowd[0], store)
        model = LocalModel(model_id=str(tiny_llama), weight_format="int4", store=ModelStore(path=store))
        home = store.with_name("home-of-an-export")
        home.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(home))
            state = prepare_model(model, return_state=True)
        return LoggedExport(model, state.result(), messages_of(state.state_details.flow_run_id), home)

    return made_once("logged-export", export_with_log)
