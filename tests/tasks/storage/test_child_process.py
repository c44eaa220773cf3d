"""The child process: no secrets, an error that says what happened, and an end with its parent."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.errors import ExportError, ExportOutOfMemoryError, PlanError
from prefect_huggingface.tasks.exports import plan_model
from prefect_huggingface.tasks.storage.exports.child import KEPT_LOGS, ChildProgram, child_environment, run_child
from prefect_huggingface.tasks.storage.exports.store import get_export, lock_path
from prefect_huggingface.tasks.storage.files import staging_folder
from support.export_requests import processes_below, published, staged, wait_for_child


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def ask_in_thread(model: LocalModel) -> tuple[threading.Thread, list[BaseException]]:
    """Ask for an export in a thread, and return it with the list that takes its error."""
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            get_export(model)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, errors


def test_the_child_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "hf_canary")
    environment = child_environment(tmp_path)
    assert "hf_canary" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not Path(environment["HF_TOKEN_PATH"]).exists()
    assert environment["PATH"] == os.environ["PATH"]


def test_a_child_that_is_killed_is_out_of_memory(tiny_llama: Path, tmp_path: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path / "store"))
    thread, errors = ask_in_thread(model)
    wait_for_child(model.store_path)
    time.sleep(0.3)
    for child in processes_below(model.store_path):
        os.kill(child, signal.SIGKILL)
    thread.join(timeout=30)
    assert isinstance(errors[0], ExportOutOfMemoryError)
    assert "memory" in str(errors[0])
    assert "OpenVINO repository" in str(errors[0])
    assert staged(model.store_path) == published(model.store_path) == []


def test_a_full_disk_is_found_before_the_start(tiny_llama: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 90_000_000)
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=small_disk / "store"))
    with pytest.raises(PlanError, match="of disk and .* are free"):
        get_export(model)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named(tiny_llama: Path, small_disk: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=small_disk / "store"))
    thread, errors = ask_in_thread(model)
    wait_for_child(model.store_path)
    (small_disk / "ballast").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    thread.join(timeout=120)
    assert isinstance(errors[0], ExportError)
    assert "disk of the store is full" in str(errors[0])
    assert staged(model.store_path) == published(model.store_path) == []


@pytest.mark.slow
def test_room_that_another_process_takes_for_the_same_export_is_no_reason_to_refuse(
    tiny_llama: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=small_disk / "store"))
    path = lock_path(model.store_path, plan_model(model).key)
    path.parent.mkdir(parents=True)
    with FileLock(path):
        (small_disk / "ballast").write_bytes(b"x" * 90_000_000)
        thread, errors = ask_in_thread(model)
        end = time.monotonic() + 60
        while "which makes the same export" not in caplog.text and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.1)
        assert thread.is_alive(), errors
        (small_disk / "ballast").unlink()
    thread.join(timeout=120)
    assert not errors
    assert len(published(model.store_path)) == 1


FAILING = """
for number in range(100):
    print("line", number)
print("operator torchvision::nms does not exist")
raise SystemExit(3)
"""


def test_the_log_of_a_child_that_failed_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(FAILING)
    program = ChildProgram(tmp_path / "program.py", "export of 'org/model'", {"export": "converting"})
    for _ in range(KEPT_LOGS + 3):
        work = staging_folder(tmp_path) / secrets.token_hex(8)
        work.mkdir(parents=True)
        with pytest.raises(ExportError, match="failed at the step 'starting the libraries'") as caught:
            run_child(program, {}, work)
        shutil.rmtree(work)
    (named,) = re.findall(r"Its log is in '(.+?)'\. Its last lines:", str(caught.value))
    assert Path(named).read_text().splitlines()[:2] == ["line 0", "line 1"]
    assert Path(named).read_text().splitlines()[-1] == "operator torchvision::nms does not exist"
    assert "operator torchvision::nms does not exist" in str(caught.value)
    assert "line 50" not in str(caught.value)
    assert Path(named).name.startswith("export-of-org-model-")
    assert len(list(Path(named).parent.iterdir())) == KEPT_LOGS
