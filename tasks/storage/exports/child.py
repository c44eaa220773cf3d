"""Child processes that do heavy work for one job: their surroundings, their log, their end.

The child is a program of this package that imports nothing of it. It gets a JSON job, writes only below a work folder,
reports its steps in marked lines of its output, and dies with its parent. It has no secrets and no network.
The log of the run has its steps; what the libraries say is there at the level DEBUG, and in a file that stays if the
child fails.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from io import RawIOBase
from pathlib import Path
from typing import IO, Any

from prefect_huggingface.tasks.errors import ExportError, ExportOutOfMemoryError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.run_logs import RunLog, run_log
from prefect_huggingface.tasks.storage.exports import exporter
from prefect_huggingface.tasks.storage.exports.exporter import REPORT_MARK
from prefect_huggingface.tasks.storage.exports.recipes import Recipe, installed_version
from prefect_huggingface.tasks.storage.files import free_disk, link_file

# What Python, the libraries and the system need to find their files and the processor. Whatever else the environment
# of a run holds, database addresses and passwords for instance, is not for them.
PASSED_ON = frozenset((
    "PATH", "PATHEXT", "HOME", "USER", "USERNAME", "LOGNAME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "APPDATA",
    "LOCALAPPDATA", "PROGRAMDATA", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "LANG", "LANGUAGE", "TZ",
    "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONWARNINGS",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "XDG_CACHE_HOME", "NUMBER_OF_PROCESSORS",
    "PROCESSOR_ARCHITECTURE", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "MALLOC_ARENA_MAX",
    "CUDA_VISIBLE_DEVICES", "INTEL_OPENVINO_DIR", "OPENVINO_LIB_PATHS", "HF_HOME", "HF_HUB_CACHE",
    "HF_DATASETS_CACHE", "HF_ENDPOINT",
))  # fmt: skip
PASSED_ON_PREFIXES = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "TBB_", "OV_", "OPENVINO_", "TORCH_", "ONEDNN_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
NO_MEMORY = (
    "bad_alloc", "MemoryError", "can't allocate memory", "bad allocation", "Cannot allocate memory",
    "not enough memory", "Unable to allocate",
)  # fmt: skip
NO_SPACE = "No space left on device"
FULL_DISK_BYTES = 4 << 20
TAIL_LINES = 15
KILLED = -9  # SIGKILL, which Windows does not name
KEPT_LOGS = 20
# With the share before the bar, as of tqdm, and behind it, as of rich.
BARS = (re.compile(r"(.*?)[:\s|]*(\d+)%[\s|]*[|█━╸]"), re.compile(r"([^█━╸]*?)[\s|]*[█━╸][^%]*?(\d+)%"))
PROGRESS_SECONDS = 10.0
STEPS = {
    "export": "converting the model to OpenVINO",
    "quantize": "quantizing the weights",
    "verify": "loading the export and generating from it",
}
# Measured with optimum-intel 2.1 and Transformers 5.5: a broken one of these ends the import of Optimum.
IMPORTED_WHEN_PRESENT = (
    "torchvision", "torchao", "kernels", "hqq", "librosa", "soundfile", "pandas", "datasets", "diffusers", "kokoro",
)  # fmt: skip
PROBE_SECONDS = 60.0
PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name, "it ends the process that imports it"]), flush=True)
    try:
        importlib.import_module(name)
        reason = None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(json.dumps([name, reason]), flush=True)
"""


@dataclass(slots=True)
class ChildReport:
    """What a child process tells: its step, its result, and the end of its log for errors."""

    step: str = ""
    result: dict[str, Any] | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))


@dataclass(frozen=True, slots=True)
class ChildProgram:
    """A program that a child process runs.

    Attributes:
        path: File of the program.
        purpose: What it does, for errors: "export of 'x'".
        steps: What each step is called in the log, in order.
        network: Whether it may use the network, for public data sets.
    """

    path: Path
    purpose: str
    steps: Mapping[str, str]
    network: bool = False


def run_child(program: ChildProgram, job: Mapping[str, Any], work: Path, descriptor: int = -1) -> dict[str, Any]:
    """Run a program in a child process and return what it reports at its end.

    Args:
        program: What to run.
        job: JSON-friendly content of the job; `parent` is added.
        work: Folder for everything that the process writes.
        descriptor: Open file that the child inherits, so that its lock lives as long as the child; -1 for none.

    Raises:
        ExportOutOfMemoryError: If the child was killed, most likely for want of memory.
        ExportError: If the child failed.
    """
    job_path = work / "job.json"
    job_path.write_text(json.dumps({**job, "parent": os.getpid()}), encoding="utf-8")
    (work / "tmp").mkdir(exist_ok=True)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", str(program.path), str(job_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            env=child_environment(work, program.network), cwd=work, pass_fds=(descriptor,) if descriptor >= 0 else (),
        )  # fmt: skip
    except OSError as error:
        raise _not_started(program, error) from None
    report, output = ChildReport(), work / "output.log"
    # Without a buffer, which would fail at the end on a disk that is full.
    with process, output.open("wb", buffering=0) as file:
        assert process.stdout is not None
        try:
            _follow(process.stdout, report, program, file)
            code = process.wait()
        finally:
            process.kill()
    if code == 0 and report.result is not None:
        return report.result
    raise _failure(program, report, code, work, _keep_log(output, program))


def _not_started(program: ChildProgram, error: OSError) -> ExportError:
    """Return the error for a process that the system does not start, for want of memory or of processes."""
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return ExportOutOfMemoryError(
            f"The {program.purpose} cannot be started: the machine has no memory for another process "
            f"({error.strerror}). End other programs, or use a machine with more memory."
        )
    return ExportError(f"The {program.purpose} cannot be started: {error.strerror or error}. Check {sys.executable!r}.")


def passed_on(network: bool = False) -> dict[str, str]:
    """Return what a child is given of the environment of this process."""
    wanted = PASSED_ON | set(PROXIES) if network else PASSED_ON
    names = [name for name in os.environ if name.upper() in wanted or name.upper().startswith(PASSED_ON_PREFIXES)]
    return {name: os.environ[name] for name in names}


def child_environment(work: Path, network: bool = False) -> dict[str, str]:
    """Return the environment of a child: what it needs of that of this process, offline.

    Only a child that may use the network gets the proxies, whose addresses can hold a password.
    """
    return {
        **passed_on(network),
        "TMPDIR": str(work / "tmp"),
        "HF_HUB_OFFLINE": "0" if network else "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN_PATH": str(work / "no-token"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8",
    }


def _follow(stream: IO[str], report: ChildReport, program: ChildProgram, file: RawIOBase) -> None:
    """Read the output of the child to its end: its steps are for the log of the run, the rest for a file.

    Each state of a progress bar is a line, as Python takes a carriage return for its end.
    """
    log, last_progress = run_log(), time.monotonic()
    for line in map(str.rstrip, stream):
        if line.startswith(REPORT_MARK):
            _note_step(json.loads(line.removeprefix(REPORT_MARK)), report, program, log)
            continue
        if not line:
            continue
        if (progress := describe_bar(line)) is not None:
            if time.monotonic() - last_progress < PROGRESS_SECONDS:
                continue
            line, last_progress = progress, time.monotonic()
        else:
            report.tail.append(line)
        log.debug("%s", line)
        with suppress(OSError):  # a full disk, which the child meets too
            file.write(f"{line}\n".encode("utf-8", "replace"))


def describe_bar(line: str) -> str | None:
    """Return a state of a progress bar as plain text, or None if a line is no bar."""
    found = next(filter(None, (bar.match(line) for bar in BARS)), None)
    return None if found is None else f"{found[1].strip(' :') or 'Progress'}: {found[2]} %"


def _note_step(values: dict[str, Any], report: ChildReport, program: ChildProgram, log: RunLog) -> None:
    report.step = str(values.pop("step"))
    if report.step == "done":
        report.result = values
        return
    if report.step in program.steps:
        number = list(program.steps).index(report.step) + 1
        name = f" ({values['name']})" if "name" in values else ""
        log.info("Step %d of %d: %s%s.", number, len(program.steps), program.steps[report.step], name)


def _keep_log(output: Path, program: ChildProgram) -> Path | None:
    """Keep the output of a child that failed, and the newest ones of those before; return where it is."""
    folder = output.parent.parent.parent / ".logs"
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", program.purpose).strip("-.")[-80:]
    try:
        folder.mkdir(exist_ok=True)
        kept = output.replace(folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{output.parent.name[:4]}.log")
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
    except OSError:
        return None
    return kept


def _failure(program: ChildProgram, report: ChildReport, code: int, work: Path, kept: Path | None) -> ExportError:
    """Return the error for a child that did not come to its end."""
    text = "\n".join(report.tail)
    whole = f" Its log is in {str(kept)!r}." if kept else ""
    where = f"at the step {program.steps.get(report.step, 'starting the libraries')!r}"
    if code == KILLED or any(words in text for words in NO_MEMORY):
        return ExportOutOfMemoryError(
            f"The {program.purpose} was killed {where}, most likely for want of memory. Use a machine with more "
            f"memory, or an OpenVINO repository of the model ('OpenVINO/...' on the Hub) as `model_id`.{whole}",
            exit_code=code,
            step=report.step,
        )
    # OpenVINO does not say why it cannot write.
    if NO_SPACE in text or free_disk(work) < FULL_DISK_BYTES:
        return ExportError(
            f"The disk of the store is full; the {program.purpose} failed {where}. Free some space, or set another "
            "`path` of the store.",
            step=report.step,
        )
    return ExportError(
        f"The {program.purpose} failed {where} (exit code {code}).{whole} Its last lines:\n{text}",
        exit_code=code,
        step=report.step,
    )


def run_export(snapshot: Snapshot, recipe: Recipe, work: Path, descriptor: int) -> dict[str, Any]:
    """Make an export in a child process, into the folder `output` of an empty work folder.

    Only where the recipe names a public data set to calibrate with, the process may use the network. `run_child` says
    what it returns and raises.
    """
    dataset = (recipe.quantization or {}).get("dataset")
    program = ChildProgram(
        path=Path(exporter.__file__),
        purpose=f"export of {snapshot.repo_id or str(snapshot.path)!r}",
        steps={step: text for step, text in STEPS.items() if step != "quantize" or recipe.quantization is not None},
        network=isinstance(dataset, str) and dataset != "auto",
    )
    source = link_source(snapshot, work / "model")
    job = {"source": str(source), "output": str(work / "output"), "recipe": recipe.as_dict()}
    return run_child(program, job, work, descriptor)


def link_source(snapshot: Snapshot, folder: Path) -> Path:
    """Make a folder of links to the files of a snapshot, without a name: Optimum chooses settings by names."""
    folder.mkdir()
    for file in snapshot.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file((snapshot.path / file.path).resolve(), target)
    config_path = folder / "config.json"
    if config_path.exists():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        config_path.unlink()
        config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def find_conflict() -> str | None:
    """Return a sentence about the first optional package that cannot be imported beside torch, or None."""
    specs = {name: find_spec(name) for name in IMPORTED_WHEN_PRESENT}
    # A folder of that name without Python files is no package.
    present = (name for name, spec in specs.items() if spec is not None and spec.origin is not None)
    versions = tuple((name, installed_version(name)) for name in present)
    return next((_describe(name, reason) for name, reason in probe_packages(versions) if reason is not None), None)


@cache
def probe_packages(versions: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Import torch and then each package in a child process, and return why it cannot be imported, if so."""
    if not versions:
        return []
    names = ["torch", *(name for name, _ in versions)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE, *names],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace",
            timeout=PROBE_SECONDS, env={**passed_on(), "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []  # not known, which is no reason to refuse an export
    # What is said of a package last counts.
    return list(dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')).items())


def _describe(name: str, reason: str) -> str:
    version = installed_version(name)
    named = f"{name!r} {version}" if version else repr(name)
    if name == "torch":
        return f"The package {named} cannot be imported: {reason}. Install it again."
    return (
        f"The package {named} does not fit torch {installed_version('torch')}, and is imported where it is installed: "
        f"{reason}. Remove it with `pip uninstall {name}`, or install the build for this torch."
    )
