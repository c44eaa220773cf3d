"""How fast a download is that hashes while it reads, against `snapshot_download`, which does not hash.

Both download the same files from a local Hub in a process of its own, in turns, into fresh folders of the same disk.
The result is the ratio of the medians; the target is 0.8 or more.

    python tests/benchmarks/benchmark_download.py [--gigabytes 1] [--files 4] [--rounds 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.pop("HF_TOKEN", None)
REPO_ID = "org/large"


def make_repository(folder: Path, size: int, count: int) -> None:
    """Write the files of a repository: `count` shards of `size` bytes together, and a configuration."""
    place = folder / REPO_ID
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        block = random.Random(number).randbytes(1 << 20)
        with (place / name).open("wb") as file:
            for _ in range(size // count >> 20):
                file.write(block)


def start_hub(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the local Hub as a process, and return it with its address."""
    command = [sys.executable, "-m", "support.hub_server", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[2]


def time_ours(endpoint: str, store: Path) -> float:
    """Return the seconds of our download."""
    from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore
    from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot

    credentials = HuggingFaceCredentials(endpoint=endpoint)
    model = LocalModel(model_id=REPO_ID, backend="torch", store=ModelStore(path=store), credentials=credentials)
    started = time.perf_counter()
    fetch_snapshot(model)
    return time.perf_counter() - started


def time_client(endpoint: str, store: Path) -> float:
    """Return the seconds of the download of the standard client."""
    from huggingface_hub import snapshot_download

    started = time.perf_counter()
    snapshot_download(REPO_ID, cache_dir=store, endpoint=endpoint, token=False)
    return time.perf_counter() - started


def compare(endpoint: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round."""
    seconds: dict[str, list[float]] = {"ours": [], "client": []}
    for number in range(rounds + 1):
        for name, measure in (("ours", time_ours), ("client", time_client)):
            store = folder / f"{name}-{number}"
            taken = measure(endpoint, store)
            shutil.rmtree(store)
            os.sync()
            # The first round only warms up.
            if number:
                seconds[name].append(taken)
                print(f"{name}: {taken:.2f} s", flush=True)
    return seconds


def main() -> None:
    """Measure and print the result as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-download-", dir=options.folder))
    try:
        size = int(options.gigabytes * 1e9)
        make_repository(folder / "hub", size, options.files)
        hub, endpoint = start_hub(folder / "hub")
        try:
            seconds = compare(endpoint, folder, options.rounds)
        finally:
            hub.terminate()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        speeds = {f"{name}_mb_per_s": round(size / 1e6 / median) for name, median in medians.items()}
        print(json.dumps({"files": options.files, **speeds, "ratio": round(medians["client"] / medians["ours"], 2)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
