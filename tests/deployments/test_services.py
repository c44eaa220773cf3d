"""`make deployments` and `make stop`: what they start, what they end, and what they say."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from prefect_huggingface.deployments.defaults import QUESTIONS_VARIABLE
from prefect_huggingface.deployments.processes import ProcessRecord, ServiceProcess, end_process, start_process
from prefect_huggingface.deployments.services import LocalServices, main
from support.browser import BROWSER, DRIVER
from support.ports import free_port

TESTS = Path(__file__).parent.parent
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


def test_the_server_keeps_what_is_its_own_in_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@db/prefect")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@db/prefect")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_HOST", "db")
    environment = LocalServices(tmp_path / "home", 4300).environment
    assert not [name for name in environment if "DATABASE" in name]
    assert environment["PREFECT_HOME"] == str(tmp_path / "home" / "prefect")


def start_pair(folder: Path) -> ServiceProcess:
    """Start a process with a child."""
    service = start_process("pair", [sys.executable, "-c", CHILD], folder, os.environ)
    end = time.monotonic() + 60
    while not psutil.Process(service.pid).children() and time.monotonic() < end:
        time.sleep(0.05)
    return service


def test_a_process_ends_with_its_children_and_no_other_does(tmp_path):
    ours, other = start_pair(tmp_path), start_pair(tmp_path)
    children = psutil.Process(ours.pid).children()
    assert end_process(ours)
    assert not ours.is_alive()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert other.is_alive()
    assert not end_process(ours)
    assert end_process(other)


def test_another_process_with_the_same_id_is_left_alone(tmp_path):
    real = start_pair(tmp_path)
    reused = ServiceProcess("server", real.pid, real.started - 3600, real.log)
    assert not reused.is_alive()
    assert not end_process(reused)
    assert real.is_alive()
    end_process(real)


def test_stop_ends_what_was_recorded_and_forgets_the_rest(tmp_path, capsys):
    real = start_pair(tmp_path)
    services = {
        "server": ServiceProcess("server", real.pid, real.started, real.log),
        "worker": ServiceProcess("worker", real.pid, 1.0, real.log),
    }
    ProcessRecord(tmp_path / "processes.json").write(services)
    main(["stop", "--home", str(tmp_path)])
    assert "Ended: server." in capsys.readouterr().out
    assert not real.is_alive()
    main(["stop", "--home", str(tmp_path)])
    assert "Nothing was running." in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"name": "server"}]'])
def test_a_damaged_record_is_an_empty_one(tmp_path, content):
    (tmp_path / "processes.json").write_text(content)
    assert LocalServices(tmp_path).services == {}


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_nothing_runs_on_behind_a_removed_environment(tmp_path):
    def make(target: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-f", str(TESTS.parent / "Makefile"), target]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert make("stop").returncode == 0, "nothing was started"
    (tmp_path / ".deployments").mkdir()
    ProcessRecord(tmp_path / ".deployments" / "processes.json").write({})
    (tmp_path / "build").mkdir()
    for target in ("stop", "clean"):
        done = make(target)
        assert done.returncode != 0
        assert "make install" in done.stdout
    assert (tmp_path / "build").is_dir()


def test_a_taken_port_is_said_at_once(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"Port {port} is in use by another program.*make deployments PORT="):
            main(["start", "--home", str(tmp_path), "--port", str(port)])
    assert not (tmp_path / "processes.json").exists()


def test_a_port_that_is_none_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["start", "--home", str(tmp_path), "--port", "99999"])


def test_two_commands_at_once_do_not_mix(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "lock"):
        with pytest.raises(SystemExit, match=r"Another `make deployments` or `make stop` works on"):
            main(["status", "--home", str(tmp_path)])


def test_blocks_are_not_saved_on_a_temporary_server(tmp_path):
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "prefect_huggingface.deployments.defaults"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "There is no Prefect server to save the blocks on. Set PREFECT_API_URL" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_runs_already_is_left_alone_and_what_died_comes_back(tmp_path, capsys):
    home, port = str(tmp_path / "home"), free_port()
    try:
        main(["start", "--home", home, "--port", str(port)])
        assert f"The Prefect UI is at http://127.0.0.1:{port}" in capsys.readouterr().out
        first = LocalServices(Path(home)).services
        assert set(first) == {"server", "worker", "model-server"}

        local = LocalServices(Path(home))
        questions = "/elsewhere/questions.jsonl"
        (variable,) = local.post("variables/filter", variables={"name": {"any_": [QUESTIONS_VARIABLE]}})
        changed = httpx.patch(f"{local.address}/api/variables/{variable['id']}", json={"value": questions})
        changed.raise_for_status()
        main(["start", "--home", home])
        assert "Everything runs already." in capsys.readouterr().out
        deployed = {each["name"]: each["parameters"] for each in local.post("deployments/filter")}
        assert deployed["batch-inference"]["source"] == questions
        with pytest.raises(SystemExit, match=f"runs at port {port} already"):
            main(["start", "--home", home, "--port", str(free_port())])

        server = psutil.Process(first["server"].pid)
        server.kill()
        server.wait(60)
        main(["start", "--home", home])
        second = LocalServices(Path(home)).services
        assert second["server"].pid != first["server"].pid
        assert second["worker"] == first["worker"]
        assert second["model-server"] == first["model-server"]
    finally:
        main(["stop", "--home", home])
    assert not any(each.is_alive() for each in [*first.values(), *second.values()])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium: install chromium and chromium-driver")
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="no way to make an empty network")
def test_from_the_command_to_the_first_run_in_the_ui_without_a_network(tmp_path):
    command = f'ip link set lo up && exec "{sys.executable}" -m support.ui_path "{tmp_path / "home"}"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "sh", "-c", command],
        cwd=TESTS, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert seconds["first run"] < 180, seconds
