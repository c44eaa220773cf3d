"""What the downloader of `huggingface_hub` and the one of this library do in each fault of the local Hub.

The client is called plainly and verified afterwards by `verify_repo_checksums`. Both run in a process of their own,
with 120 seconds for an attempt and one further attempt, as a retry of Prefect makes it.

    python -m benchmarks.benchmark_downloaders      # in the folder `tests`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.hub_models import MEGABYTE, model_files
from support.hub_server import LocalHub

SIZE, SECONDS = 24 * MEGABYTE, 120
PROGRAMS = {
    "ours": (
        "import sys; from pathlib import Path\n"
        "from prefect_huggingface.blocks import *\n"
        "from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot\n"
        "credentials = HuggingFaceCredentials(endpoint=sys.argv[1], timeout_seconds=3, max_attempts=3)\n"
        "store = ModelStore(path=Path(sys.argv[2]).parent)\n"
        "fetch_snapshot(LocalModel(model_id='org/model', backend='torch', store=store, credentials=credentials))\n"
    ),
    "client": (
        "import sys; from huggingface_hub import HfApi\n"
        "api = HfApi(endpoint=sys.argv[1], token=False)\n"
        "api.snapshot_download('org/model', cache_dir=sys.argv[2])\n"
        "found = api.verify_repo_checksums('org/model', cache_dir=sys.argv[2])\n"
        "assert not found.mismatches, 'a wrong hash'\n"
    ),
}


@dataclass(frozen=True)
class Case:
    """One fault: how it is made, and whether the first attempt is killed at the half."""

    name: str
    make: Callable[[LocalHub], object]
    killed: bool = False


CASES = [
    Case("none", lambda hub: None),
    Case("cut once", lambda hub: hub.fault("cut", after=SIZE // 2)),
    Case("cut at each 2 MB", lambda hub: hub.fault("cut", after=2 * MEGABYTE, times=None)),
    Case("killed at the half, run again", lambda hub: hub.fault("stall_body", after=SIZE // 2), killed=True),
    Case("one byte is wrong, once", lambda hub: hub.fault("corrupt", after=SIZE // 2)),
    Case("ends early as if whole, once", lambda hub: hub.fault("truncate", after=SIZE // 2)),
    Case("ignores the range", lambda hub: (hub.fault("cut", after=SIZE // 2), hub.fault("ignore_range", times=None))),
    Case("503 of the storage, once", lambda hub: hub.fault("status", status=503)),
    Case("503 of the API, once", lambda hub: hub.fault("status", "api", status=503)),
    Case("429 of the API with Retry-After", lambda hub: hub.fault(
        "status", "api", status=429, headers={"Retry-After": "1"})),
    Case("the API does not answer, once", lambda hub: hub.fault("stall", "api")),
    Case("the storage stops in the middle, once", lambda hub: hub.fault("stall_body", after=SIZE // 2)),
    Case("a hash that leads out of the cache", lambda hub: hub.fault(
        "headers", "resolve", path="config.json", times=None, headers={"ETag": '"../../../../outside"'})),
]  # fmt: skip


def attempt(name: str, hub: LocalHub, cache: Path, killed: bool = False) -> str:
    """Run one downloader once and return how it ended."""
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PROGRAMS[name], hub.endpoint, str(cache)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            while killed and process.poll() is None:
                if hub.journal.sent(place="cdn") >= SIZE // 2:
                    process.kill()
                    return "killed"
                time.sleep(0.1)
            said = process.communicate(timeout=SECONDS)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            return "hangs"
    return "right" if process.returncode == 0 else (said.strip().splitlines() or ["error"])[-1].split(":")[0][-40:]


def run(case: Case, name: str, hub: LocalHub) -> str:
    """Return the outcome of a case: each attempt, the bytes of the storage beyond the file, the seconds."""
    hub.clear()
    files = model_files(SIZE)
    hub.create("org/model", files)
    case.make(hub)
    with tempfile.TemporaryDirectory() as folder:
        cache, started = Path(folder, "a", "hub"), time.monotonic()
        outcomes = [attempt(name, hub, cache, case.killed)]
        if outcomes[0] != "right":
            outcomes.append(attempt(name, hub, cache))
        seconds = time.monotonic() - started
        escaped = [path for path in Path(folder).rglob("outside*")]
    extra = hub.journal.sent(place="cdn") / SIZE
    text = f"{', then '.join(outcomes)}; {extra:.2f} times the file, {seconds:.0f} s"
    return f"{text}; writes outside of the cache" if escaped else text


def main() -> None:
    """Print the table."""
    print("| Fault | `huggingface_hub` | this library |\n|---|---|---|")
    with LocalHub() as hub:
        for case in CASES:
            print(f"| {case.name} | {run(case, 'client', hub)} | {run(case, 'ours', hub)} |", flush=True)


if __name__ == "__main__":
    main()
