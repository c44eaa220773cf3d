"""Settings and fixtures of the whole suite: no network, folders of its own, one Prefect server for each process."""

from __future__ import annotations

import gc
import os
import pickle
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

gc.disable()  # until the tests are collected; imports make objects that stay

# Processes of pytest-xdist share this folder with the one that starts them, and in it one store: what one of them has
# exported, the others find there. Everything else is each process's own.
_SHARED_NAME = "PREFECT_HUGGINGFACE_TESTS_FOLDER"
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER is None:
    os.environ[_SHARED_NAME] = tempfile.mkdtemp(prefix="prefect-huggingface-tests-")
_SHARED = Path(os.environ[_SHARED_NAME])
_HOME = _SHARED / (_WORKER or "main")
_HOME.mkdir()

# The libraries read these when they are imported, so they stand before every import.
os.environ.update(
    HF_HOME=str(_HOME / "hf"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DISABLE_SAFETENSORS_CONVERSION="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
    PREFECT_HOME=str(_HOME / "prefect"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="ignore",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
    PREFECT_HUGGINGFACE_HOME=str(_SHARED / "store"),
    OMP_NUM_THREADS="1",  # the models are tiny, and there is a process of tests on every core
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HF_ENDPOINT", "PREFECT_API_URL"):
    os.environ.pop(_name, None)

# Whoever starts the suite in the background of a shell has it ignore Ctrl-C, and every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if _WORKER is not None and hasattr(os, "sched_setaffinity"):
    # OpenVINO counts the processors when it is first used. One is enough for its tiny models, too: more threads cost
    # a sixth of the processor time of these tests and gain nothing.
    import openvino

    _processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_processors[int(_WORKER.removeprefix("gw")) % len(_processors)]})
    openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    os.sched_setaffinity(0, _processors)

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

from support.hub_server import LocalHub  # noqa: E402
from support.serve_process import transformers_serve  # noqa: E402
from support.text_models import TextModel  # noqa: E402
from support.tgi_server import TgiServer  # noqa: E402
from support.tiny_models import make_tiny_llama  # noqa: E402

# Servers of Prefect take long to start: one process of several has all files that need one, and begins with them.
_NEEDS_SERVER = re.compile(r"\b(prefect_server|services|deployed|logged_export)\b")


@cache
def _needs_server(file: str) -> bool:
    return _NEEDS_SERVER.search((Path(__file__).parent.parent / file).read_text(encoding="utf-8")) is not None


# Examples of a property that names no number of its own.
_EXAMPLES, _SLOW_EXAMPLES = 20, 100


def pytest_configure(config: pytest.Config) -> None:
    """Try properties on fewer examples where the slow tests are left out."""
    if _WORKER is None and config.getoption("numprocesses", None):
        return  # the process that only hands out the tests
    from hypothesis import settings

    examples = _EXAMPLES if "not slow" in config.option.markexpr else _SLOW_EXAMPLES
    settings.register_profile("tests", max_examples=examples)
    settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out a file at a time, and all that need a server of Prefect together."""
    from xdist.scheduler import LoadFileScheduling

    class FileScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "servers" if _needs_server(file) else file

    return FileScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let processes of several begin with what needs a server of Prefect; it takes longest."""
    for item in items:
        # The first of these waits until the server has started and everything is deployed.
        if "services" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
    if _WORKER is not None:  # those of the top level are long, too
        items.sort(key=lambda item: (not _needs_server(item.nodeid.split("::")[0]), item.nodeid.count("/") > 1))


def pytest_collection_finish() -> None:
    """Leave what is imported by now alone in collections of garbage, which many tests ask for."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Remove the folder of the session."""
    shutil.rmtree(_SHARED if _WORKER is None else _HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def session_folder() -> Path:
    """Folder of this process of the test session."""
    return _HOME


@pytest.fixture(scope="session")
def made_once() -> Callable[[str, Callable[[Path], Any]], Any]:
    """Return what the first process makes in a folder of a given name; the others read it."""

    def get(name: str, make: Callable[[Path], Any]) -> Any:
        folder = _SHARED / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            record = folder.with_suffix(".pickle")
            if not record.exists():
                record.write_bytes(pickle.dumps(make(folder)))
            return pickle.loads(record.read_bytes())

    return get


@pytest.fixture(scope="session")
def tiny_llama(made_once) -> Path:
    """Checkpoint folder of a random Llama of two layers with a chat template."""
    return made_once("tiny-llama", make_tiny_llama)


@pytest.fixture(scope="session")
def tiny_openvino(tiny_llama: Path) -> Path:
    """OpenVINO folder of the tiny Llama, with its weights in full precision."""
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.tasks.storage.exports.store import get_export

    return get_export(LocalModel(model_id=str(tiny_llama), weight_format="fp32")).path


@pytest.fixture(scope="session")
def crowd(tiny_llama: Path, made_once: Callable[..., Any]) -> tuple[Path, list[dict[str, Any]]]:
    """A store, and the answers of four processes that asked it at once for the same export."""
    from support.export_requests import finish_request, start_request

    def ask_at_once(store: Path) -> tuple[Path, list[dict[str, Any]]]:
        processes = [start_request(store, tiny_llama) for _ in range(4)]
        return store, [finish_request(process) for process in processes]

    return made_once("crowd", ask_at_once)


@pytest.fixture(scope="session")
def tiny_llama_int8(tiny_llama: Path, crowd: tuple[Path, list[dict[str, Any]]], made_once) -> Path:
    """The tiny Llama. Its int8 export is in the store of the session, a copy of that in the store of the crowd."""

    def copy_export(work: Path) -> None:
        made = Path(crowd[1][0]["path"])
        target = Path(os.environ["PREFECT_HUGGINGFACE_HOME"]) / "exports" / made.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, work)
        if not target.exists():
            work.rename(target)

    made_once("tiny-llama-int8", copy_export)
    return tiny_llama


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """Folder of the model that comes with the project."""
    return Path(__file__).parent.parent / "deployments" / "quickstart" / "model"


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LocalHub]:
    """One local Hub for the whole session; tests use it through `hub`."""
    with LocalHub() as server:
        yield server


@pytest.fixture
def hub(hub_server: LocalHub) -> LocalHub:
    """The local Hub without repositories, users, faults and logged requests."""
    hub_server.clear()
    return hub_server


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One real Prefect server with a fresh database for the whole session."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # Without the heartbeat thread a synchronous flow run takes a second less.
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture(scope="session")
def tgi_server(tiny_llama: Path) -> Iterator[TgiServer]:
    """One server with the protocol of TGI over the random Llama; tests use it through `tgi`."""
    with TgiServer(TextModel(tiny_llama)) as server:
        yield server


@pytest.fixture
def tgi(tgi_server: TgiServer) -> TgiServer:
    """The server with the protocol of TGI, without faults, token and logged requests."""
    tgi_server.clear()
    return tgi_server


@pytest.fixture(scope="session")
def serve_url(tiny_llama: Path, session_folder: Path) -> Iterator[str]:
    """Address of the real `transformers serve` over the random Llama."""
    with transformers_serve(tiny_llama, session_folder / "serve") as url:
        yield url
