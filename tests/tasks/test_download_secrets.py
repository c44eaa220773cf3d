"""The canary: after every kind of fault, the token and the signatures of addresses are nowhere to be found."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import cloudpickle
import pytest
from prefect import flow
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_LEVEL,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_RESULTS_PERSIST_BY_DEFAULT,
    temporary_settings,
)

from prefect_huggingface.tasks.downloads import download_model, plan_download
from prefect_huggingface.tasks.hub_errors import HubError
from support.hub_models import MEGABYTE, hub_model, model_files
from support.hub_workers import DownloadProcess, wait_for

TOKEN = "hf_CanaryTokenThatMustNeverBeSeenAgain0123456789"
TESTS = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"
FAULTS = {
    "none": [],
    "cut": [("cut", "cdn", {"after": MEGABYTE, "times": 1})],
    "cut for ever": [("cut", "cdn", {})],
    "stall": [("stall", "cdn", {})],
    "stall of the api": [("stall", "api", {})],
    "stall in the middle": [("stall_body", "cdn", {"after": 10})],
    "truncated": [("truncate", "cdn", {"after": 10})],
    "corrupt": [("corrupt", "cdn", {})],
    "expired address": [("status", "cdn", {"status": 403})],
    "storage fails": [("status", "cdn", {"status": 500})],
    "hub fails": [("status", "api", {"status": 503})],
    "rate limit": [("status", "resolve", {"status": 429, "headers": {"Retry-After": "9999"}})],
    "forbidden": [("status", "resolve", {"status": 403})],
    "no such file": [("status", "resolve", {"status": 404})],
    "unauthorised": [("status", "api", {"status": 401})],
    "echo": [("status", "api", {"status": 400, "headers": {"X-Error-Message": f"your token is {TOKEN}"}})],
    "bad address": [("headers", "resolve", {"path": WEIGHTS, "headers": {"location": "http://127.0.0.1:1/x?Signature=SIG"}})],
}  # fmt: skip
# The waits of a test; retries of the tasks would only repeat what has been seen.
quick_download, quick_plan = download_model.with_options(retries=1), plan_download.with_options(retries=0)
quick_download = quick_download.with_options(retry_delay_seconds=0)


@flow(persist_result=True)
def canary_flow(model):
    quick_plan(model, return_state=True)
    return quick_download(model)


def hidden_forms(secret: str) -> list[bytes]:
    """Return a secret as it is, and as it looks within base64 at each of the three offsets."""
    forms = [secret.encode()]
    for offset in range(3):
        coded = base64.b64encode(bytes(offset) + secret.encode())
        # Without the characters at both ends, which depend on what is beside the secret.
        forms.append(coded[4:-4])
    return forms


def where_is(secrets: list[str], texts: dict[str, bytes]) -> list[str]:
    return [name for name, text in texts.items() for s in secrets for form in hidden_forms(s) if form in text]


def files_of(*folders: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}


def command_lines() -> dict[str, bytes]:
    found = {}
    for place in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/task/*/comm")]:
        try:
            found[str(place)] = place.read_bytes()
        except OSError:
            continue
    return found


@pytest.fixture
def debug_log(tmp_path):
    """File with every log line of this process at the level DEBUG."""
    handler = logging.FileHandler(tmp_path / "debug.log")
    root, chatty = (
        logging.getLogger(),
        [logging.getLogger(n) for n in ("prefect", "httpx", "httpcore", "huggingface_hub")],
    )
    levels = [(logger, logger.level) for logger in (root, *chatty)]
    for logger, _ in levels:
        logger.setLevel(logging.DEBUG)
    root.addHandler(handler)
    logging.getLogger("prefect").addHandler(handler)
    yield tmp_path / "debug.log"
    root.removeHandler(handler)
    logging.getLogger("prefect").removeHandler(handler)
    for logger, level in levels:
        logger.setLevel(level)


@pytest.fixture
def canary_runs(hub, tmp_path, prefect_server, debug_log):
    """Run the flow once for each fault, and return the errors."""
    hub.users[TOKEN] = "alice"
    storage = tmp_path / "results"
    settings = {
        PREFECT_RESULTS_PERSIST_BY_DEFAULT: True,
        PREFECT_LOCAL_STORAGE_PATH: storage,
        PREFECT_LOGGING_LEVEL: "DEBUG",
        PREFECT_LOGGING_TO_API_ENABLED: True,
    }
    errors = []
    with temporary_settings(settings):
        for number, (name, faults) in enumerate(FAULTS.items()):
            repo_id = f"org/canary{number}"
            hub.create(repo_id, model_files(2 * MEGABYTE, seed=number), gated="manual", readers={"alice"})
            hub.journal.clear()
            for kind, place, options in faults:
                hub.fault(kind, place, **{"times": None, **options})
            quick = {"timeout_seconds": 0.4, "max_attempts": 1}
            model = hub_model(hub, tmp_path / "store", repo_id, token=TOKEN, settings=quick)
            state = canary_flow(model, return_state=True)
            assert state.is_completed() == (name in ("none", "cut")), name
            if not state.is_completed():
                errors.append(state.result(raise_on_failure=False))
    return errors


def output_of_a_process(hub, store: Path) -> dict[str, bytes]:
    """Run the flow in a process of its own that logs everything to its terminal, and return what it says."""
    hub.journal.clear()
    hub.fault("status", "cdn", status=403, times=None)
    code = (
        "import logging, os; logging.basicConfig(level=logging.DEBUG)\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from support.hub_models import hub_model\n"
        "from prefect import flow\n"
        "from prefect_huggingface.tasks.downloads import download_model\n"
        "@flow(log_prints=True)\n"
        "def canary_flow(model):\n"
        "    print(model, repr(model), model.credentials)\n"
        "    return download_model.with_options(retries=0)(model)\n"
        "hub = SimpleNamespace(endpoint=os.environ['HUB'])\n"
        "model = hub_model(hub, Path(os.environ['STORE']), 'org/canary0', token=os.environ['CANARY'],\n"
        "    settings={'max_attempts': 1})\n"
        "canary_flow(model)\n"
    )
    environment = {
        **os.environ, "HUB": hub.endpoint, "STORE": str(store / "other"), "CANARY": TOKEN, "PYTHONPATH": str(TESTS),
        "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_LOGGING_LEVEL": "DEBUG",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=200, env=environment)
    assert b"HubUnavailableError" in done.stderr
    return {"out": done.stdout, "err": done.stderr}


def test_the_token_and_the_signatures_are_nowhere(hub, tmp_path, canary_runs, debug_log):
    assert len(canary_runs) == len(FAULTS) - 2
    assert all(isinstance(error, HubError) for error in canary_runs)
    output = output_of_a_process(hub, tmp_path)
    assert len(hub.signatures) > 10
    hub.journal.clear()
    hub.create("org/slow", model_files(2 * MEGABYTE, seed=99), gated="manual", readers={"alice"})
    hub.fault("stall_body", after=MEGABYTE)
    process = DownloadProcess(
        hub, tmp_path / "store", model_id="org/slow", token=TOKEN, settings={"timeout_seconds": 30}
    )
    wait_for(lambda: hub.journal.gets(place="cdn"))
    lines = command_lines()
    process.kill()
    secrets = [TOKEN, *hub.signatures]
    # The database with its write-ahead file; state messages, artifacts, logs and block documents are in it.
    database = Path(PREFECT_API_DATABASE_CONNECTION_URL.value().split("///", 1)[1]).parent
    wait_for(lambda: where_is(["org/canary16"], files_of(database)))
    places = {
        "the store": files_of(tmp_path / "store"),
        "result storage": files_of(tmp_path / "results"),
        "the database": files_of(database),
        "the log": {"debug.log": debug_log.read_bytes()},
        "pickled exceptions": {repr(e): cloudpickle.dumps(e) + pickled_traceback(e) for e in canary_runs},
        "the output": output,
        "command lines": lines,
    }
    for name, texts in places.items():
        assert where_is(secrets, texts) == [], name
    # What must be found shows that the search can find something.
    for name in ("the store", "result storage", "the database", "the log", "pickled exceptions", "the output"):
        assert where_is(["org/canary"], places[name]), name
    assert where_is(["Signature="], places["the log"]) == []
    assert where_is(["pytest"], lines)


def pickled_traceback(error: BaseException) -> bytes:
    return "".join(traceback.format_exception(error)).encode()
