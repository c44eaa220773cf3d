"""A live Prefect server for the tests of deployments, and the project's deployments on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.model_servers import ModelServerProcess, model_server
from support.prefect_services import PrefectServices, prefect_services, wait_until

SERVER_KEY = "key-of-the-tests-5f1d"
PREFECT_FILE = Path(__file__).parent.parent.parent / "deployments" / "prefect.yaml"


@pytest.fixture(scope="session")
def services(session_folder: Path) -> Iterator[PrefectServices]:
    """A real server in a process of its own, with its scheduler."""
    with prefect_services(session_folder / "services") as running:
        yield running


@pytest.fixture(scope="session")
def deployed(services: PrefectServices, session_folder: Path) -> PrefectServices:
    """The server with the default blocks and the project's deployments, deployed from a folder that is no clone."""
    elsewhere = session_folder / "elsewhere"
    elsewhere.mkdir()

    def run_module(name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"prefect_huggingface.deployments.{name}", *arguments]
        subprocess.run(command, env=services.environment, cwd=elsewhere, check=True, timeout=280)

    services.run("work-pool", "create", "hugging-face", "--type", "process", "--overwrite")
    run_module("defaults", "--answers", str(elsewhere / "answers" / "answers-{date}-{time}.jsonl"))
    services.run("deploy", "--prefect-file", str(PREFECT_FILE), "--all", cwd=elsewhere)
    run_module("forms")
    return services


@pytest.fixture(scope="session")
def deployments(deployed: PrefectServices) -> dict[str, dict[str, Any]]:
    """The deployments of the project by their names."""
    found = deployed.post("deployments/filter")
    return {each["name"]: each for each in found if each["entrypoint"].startswith("prefect_huggingface.")}


@pytest.fixture(scope="session")
def long_model(tiny_openvino: Path, session_folder: Path) -> Path:
    """The tiny Llama for OpenVINO, with room for texts that take long."""
    folder = session_folder / "long-model"
    shutil.copytree(tiny_openvino, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="session")
def guarded_server(long_model: Path, session_folder: Path) -> Iterator[ModelServerProcess]:
    """A model server with a key, which takes few requests and small bodies."""
    keys = session_folder / "keys.txt"
    keys.write_text(f"{SERVER_KEY}\nanother-key\n")
    limits = ("--max-requests", "80", "--max-body-mb", "1", "--api-key-file", str(keys), "--preload")
    with model_server(session_folder, "--model", str(long_model), *limits, key=SERVER_KEY) as server:
        wait_until(lambda: httpx.get(f"{server.origin}/health").status_code == 200, 120, "the loading")
        yield server
