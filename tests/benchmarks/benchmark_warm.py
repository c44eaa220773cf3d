"""How soon a scheduled run gives its first token: in a warm worker, and in a fresh process of a process worker.

Both workers stand ready, poll once a second and take turns. A run is scheduled, as a schedule does it, for a moment
some seconds ahead. The flow streams an answer of the model and writes down when its first piece came; what counts is
the time from the scheduled start to that. The first run of the warm worker loads the model and is left out. The target
is a fifth of the time. Prefect begins a run up to a third of a second before its time, so that a time may be negative.

    python tests/benchmarks/benchmark_warm.py [--runs 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

import httpx  # noqa: E402
from benchmark_models import make_checkpoint, make_exports  # noqa: E402

from support.prefect_services import PrefectServices, prefect_services, stop_process, wait_until  # noqa: E402
from support.warm_flows import notes  # noqa: E402
from support.warm_workers import WarmServices, stop_worker  # noqa: E402

FOLDER = TESTS.parent / "build" / "benchmarks"
AHEAD_SECONDS = 6
PROCESS_POOL = "benchmark-processes"


def make_model(quick: bool) -> dict[str, Any]:
    """Return the settings of the model; make its int8 export where it is missing."""
    place = FOLDER / ("quick-shape" if quick else "smollm2-135m-shape")
    checkpoint = make_checkpoint(place / "checkpoint", quick=quick)
    return {"model_id": str(make_exports(checkpoint, place / "store", ["int8"])["int8"]), "offline": True}


def time_run(pool: WarmServices, deployment: str, model: dict[str, Any], path: Path) -> float:
    """Schedule a run, wait for its end, and return the seconds from its scheduled start to its first piece of text."""
    start = datetime.now(UTC) + timedelta(seconds=AHEAD_SECONDS)
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": start.isoformat()}}
    made = pool.post(
        f"deployments/{deployment}/create_flow_run", parameters={"model": model, "path": str(path)}, state=state
    )
    ended = pool.wait_for_end(made["id"], 180)
    assert ended["type"] == "COMPLETED", ended
    return float(notes(path)[-1]["time"]) - start.timestamp()


def measure(services: PrefectServices, model: dict[str, Any], runs: int, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of the runs of both workers, which take turns."""
    warm, cold = WarmServices(services), WarmServices(services, PROCESS_POOL)
    services.run("work-pool", "create", PROCESS_POOL, "--type", "process")
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    processes = services.start("processes", "worker", "start", "--pool", PROCESS_POOL, PYTHONPATH=path)
    worker = warm.start_worker("benchmark")
    cold.workers.append(processes)
    try:
        warm.wait_for_pool()
        name = f"process worker {PROCESS_POOL}"
        url = f"{services.url}/work_pools/{PROCESS_POOL}/workers/filter"
        wait_until(lambda: httpx.post(url, json={}, timeout=60).json(), 120, f"the {name}")
        pools = {"warm worker": warm, "process worker": cold}
        deployments = {key: pool.deploy("support.warm_flows.first_token") for key, pool in pools.items()}
        seconds: dict[str, list[float]] = {key: [] for key in pools}
        first = time_run(warm, deployments["warm worker"], model, folder / "first.jsonl")
        print(f"first run of the warm worker, with loading: {first:.2f} s", flush=True)
        for number in range(runs):
            for key, pool in pools.items():
                seconds[key].append(time_run(pool, deployments[key], model, folder / f"{number}-{key}.jsonl"))
                print(f"{key}: {seconds[key][-1]:.2f} s", flush=True)
        return seconds
    finally:
        stop_worker(worker)
        stop_process(processes)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each worker")
    parser.add_argument("--quick", action="store_true", help="a far smaller model")
    settings = parser.parse_args()
    model = make_model(settings.quick)
    with tempfile.TemporaryDirectory() as folder, prefect_services(Path(folder) / "home") as services:
        seconds = measure(services, model, settings.runs, Path(folder))
    print(f"\n{'':16} {'median':>8} {'least':>8} {'most':>8}")
    for key, values in seconds.items():
        print(f"{key:16} {statistics.median(values):7.2f}s {min(values):7.2f}s {max(values):7.2f}s")
    ratio = statistics.median(seconds["process worker"]) / statistics.median(seconds["warm worker"])
    print(f"\nA run in the warm worker gives its first token {ratio:.1f} times as soon; wanted is 5 times or more.")
    (FOLDER / "warm.json").write_text(json.dumps({"seconds": seconds, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
