"""Which models a server offers: saved blocks, folders and Hub ids, under which names, and what it says of them."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.deployments.model_server.__main__ import load_blocks, load_models, main
from prefect_huggingface.deployments.model_server.app import create_app
from prefect_huggingface.deployments.model_server.models import ServedModel, ServedModels
from prefect_huggingface.deployments.model_server.settings import ServerSettings, parse_arguments
from prefect_huggingface.tasks.engines.endpoint_retry import HttpTrace, explain_status
from prefect_huggingface.tasks.engines.registry import list_engines, unload_engines, unload_idle_engines
from prefect_huggingface.tasks.openai_protocol import BodyError

ENDPOINT = InferenceEndpoint(url="http://localhost:8000/v1")
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def client_of(block: LocalModel, **settings: object) -> TestClient:
    models = ServedModels([ServedModel("model", block)])
    return TestClient(create_app(models, ServerSettings(**settings)), base_url="http://localhost")  # type: ignore[arg-type]


def test_the_console_script_is_the_program() -> None:
    [script] = [one for one in entry_points(group="console_scripts") if one.name == "prefect-huggingface-server"]
    assert script.load() is main


@pytest.mark.usefixtures("prefect_server")
def test_blocks_are_served_under_their_names(tiny_llama: Path, bundled_model: Path) -> None:
    LocalModel(model_id=str(tiny_llama), backend="torch").save("served-one", overwrite=True)
    LocalModel(model_id=str(bundled_model)).save("served-two", overwrite=True)

    found = list(load_blocks(["served-two", "hugging-face-local-model/served-one", "served-two"]))
    assert [(one.name, one.block.model_id) for one in found] == [
        ("served-two", str(bundled_model)), ("served-one", str(tiny_llama)),
    ]  # fmt: skip
    assert {"served-one", "served-two"} <= {one.name for one in load_blocks(["all"])}
    models = ServedModels(found)
    for name in ("served-one", "hugging-face-local-model/served-one", str(tiny_llama)):
        assert models.find(name) is found[1]
    with pytest.raises(BodyError, match="Use one of 'served-two', 'served-one', or restart the server"):
        models.find("saved-later")
    with pytest.raises(SystemExit, match="There is no valid block hugging-face-local-model/served-none"):
        list(load_blocks(["served-none"]))


@pytest.mark.usefixtures("prefect_server")
def test_a_block_that_is_not_valid_holds_up_no_other(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    LocalModel(model_id=str(tiny_llama), backend="torch").save("served-one", overwrite=True)
    wrong = LocalModel.model_construct(**LocalModel(model_id="a/b", backend="torch").model_dump())
    object.__setattr__(wrong, "weight_format", "int8")
    wrong.save("served-wrong", overwrite=True)

    names = {one.name for one in load_blocks(["all"])}
    assert "served-one" in names
    assert "served-wrong" not in names
    assert "There is no valid block hugging-face-local-model/served-wrong" in caplog.text
    with pytest.raises(SystemExit, match="valid block hugging-face-local-model/served-wrong"):
        list(load_blocks(["served-wrong"]))


def test_models_need_no_prefect_server(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", str(tiny_llama), "--model", "org/name", "--weight-format", "int4", "--device", "cpu"]
    first, second = load_models(parse_arguments(arguments))
    assert (first.name, second.name) == (tiny_llama.name, "org/name")
    assert (second.block.model_id, second.block.weight_format, second.block.device) == ("org/name", "int4", "cpu")
    [torch] = load_models(parse_arguments(["--model", str(tiny_llama), "--backend", "torch"]))
    assert torch.block.backend == "torch"

    same = [ServedModel("a", first.block), ServedModel("a", second.block)]
    with pytest.raises(SystemExit, match="Two models have the same name, got 'a', 'a'"):
        ServedModels(same)
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: ""}), pytest.raises(SystemExit, match="Blocks need a Prefect server"):
        list(load_blocks(["all"]))


def test_the_server_is_healthy_once_its_models_are_loaded(tiny_llama: Path) -> None:
    unload_engines()
    with client_of(LocalModel(model_id=str(tiny_llama), backend="torch"), preload=True) as client:
        end, seen = time.monotonic() + 60, set()
        while (answer := client.get("/health")).status_code != 200 and time.monotonic() < end:
            seen.add(answer.json()["status"])
        assert answer.json() == {"status": "ok"}
        assert seen <= {"loading"}
        assert len(list_engines()) == 1
    unload_engines()


def test_a_preloaded_model_that_nobody_uses_can_be_closed(tiny_llama: Path) -> None:
    unload_engines()
    with client_of(LocalModel(model_id=str(tiny_llama), backend="torch"), preload=True) as client:
        end = time.monotonic() + 60
        while client.get("/health").status_code != 200 and time.monotonic() < end:
            time.sleep(0.05)
        gc.collect()
        assert unload_idle_engines(0.0) == 1
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    unload_engines()


def test_an_engine_that_failed_is_loaded_anew_while_others_still_hold_it(tiny_llama: Path) -> None:
    async def use_twice() -> tuple[str | None, str | None]:
        model = ServedModel("model", LocalModel(model_id=str(tiny_llama), backend="torch"))
        async with model.use() as first:
            first.unshared.failure = "The engine failed. Load it again."  # type: ignore[attr-defined]
            async with model.use() as second:
                return first.failure, second.failure

    assert asyncio.run(use_twice()) == ("The engine failed. Load it again.", None)
    unload_engines()


def test_what_a_body_leaves_out_is_that_of_the_block(tiny_llama: Path) -> None:
    options = GenerationOptions(do_sample=True, temperature=0.7, max_new_tokens=600, seed=1)
    with client_of(LocalModel(model_id=str(tiny_llama), backend="torch", options=options)) as client:
        answer = client.post("/v1/completions", json={"prompt": "One", "n": 2, "max_tokens": 4, "top_k": 40})
        assert (answer.status_code, len(answer.json()["choices"])) == (200, 2)
        assert client.post("/v1/completions", json={"prompt": "One", "min_tokens": 601}).status_code == 400
        greedy = {"prompt": "One", "n": 2, "temperature": 0}
        assert client.post("/v1/completions", json=greedy).status_code == 400
    unload_engines()


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_the_block_would_skip_is_refused(tiny_llama: Path, stream: bool) -> None:
    block = LocalModel(model_id=str(tiny_llama), backend="torch", options={"context_overflow": "skip"})
    with client_of(block) as client:
        answer = client.post("/v1/completions", json={"prompt": "One, two. " * 900, "max_tokens": 4, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    unload_engines()


@pytest.mark.parametrize("name", ["nowhere", "broken"])
def test_a_model_that_cannot_be_loaded_is_told_and_tried_again(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_llama, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x00" * 64)
    with client_of(LocalModel(model_id=str(tmp_path / name), backend="torch"), preload=True) as client:
        end = time.monotonic() + 60
        while client.get("/health").json()["status"] == "loading" and time.monotonic() < end:
            time.sleep(0.05)
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert name in health.json()["errors"][0]
        for _ in range(2):
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.headers.get("retry-after")) == (500, None)
            failure = explain_status(answer.status_code, answer.text, HttpTrace(), ENDPOINT)
            assert (failure.code, failure.kind) == ("engine_error", "final")
            assert "cannot load its model" in str(failure)
            assert "wake_timeout_seconds" not in str(failure)
            assert answer.json()["error"]["code"] == "model_unavailable"
            assert "'model' cannot be loaded" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_the_cache_never_holds_is_no_outage(tiny_openvino: Path, stream: bool) -> None:
    with client_of(LocalModel(model_id=str(tiny_openvino), engine=EngineOptions(cache_size_gb=1e-5))) as client:
        answer = client.post("/v1/completions", json={"prompt": "One, two. " * 30, "max_tokens": 9, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "out_of_cache")
        assert "retry-after" not in answer.headers
        # In the middle of a stream there is no status any more.
        for status in (413, 400):
            failure = explain_status(status, answer.text, HttpTrace(), ENDPOINT)
            assert (failure.code, failure.kind) == ("too_long", "final")
    unload_engines()
