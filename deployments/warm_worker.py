"""Starts a warm worker: one process that runs the flow runs of a work pool and keeps their models loaded.

    python -m prefect_huggingface.deployments.warm_worker --pool hugging-face-warm --name warm-1 --limit 4

It also serves the requests of processes that use its models through a `WarmModel` block. SIGTERM and Ctrl-C end it
within ten seconds: what runs is interrupted, keeps what it has committed, and is scheduled again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn

import httpx
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)

from prefect_huggingface.deployments.warm.health import find_page
from prefect_huggingface.deployments.warm.serving import RequestService
from prefect_huggingface.deployments.warm.workers import STOP_SECONDS, WarmWorker
from prefect_huggingface.tasks.engines.cache import set_memory_budget
from prefect_huggingface.tasks.errors import WorkerError

# Runs that are started by hand shall not wait for Prefect's ten seconds.
QUERY_SECONDS = 2.0
# The automation for zombie runs takes a run for dead that is silent for three times as long.
HEARTBEAT_SECONDS = 30
# A health page that is older than this is one of a worker that is gone.
STALE_SECONDS = 180.0
END_SECONDS = STOP_SECONDS + 1.5
DRAIN_SECONDS = 1.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line."""
    parser = argparse.ArgumentParser(prog="warm_worker", description=__doc__.split("\n")[0])
    parser.add_argument("--pool", default="hugging-face-warm", help="work pool to poll; created where it is missing")
    parser.add_argument("--name", default=f"warm-{socket.gethostname()}", help="name of the worker, to be given once")
    parser.add_argument("--queue", action="append", dest="queues", help="work queue to poll; all when left out")
    parser.add_argument("--limit", type=_count, default=4, help="flow runs at once (default: 4)")
    parser.add_argument("--memory-gb", type=_positive, help="resident memory that loaded models may take, in GiB")
    parser.add_argument("--idle-minutes", type=_minutes, help="close models that nobody used so long; 0 for never")
    parser.add_argument("--no-create-pool", action="store_true", help="refuse a pool that does not exist")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer /health on Prefect's worker port")
    parser.add_argument("--status", action="store_true", help="print the health view of the worker of this name")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs; give 1 or more")
    return int(text)


def _positive(text: str) -> float:
    if (value := _minutes(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} leaves no memory; give a size in GiB, such as 4")
    return value


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give one such as 30")
    return value


async def check_pool(pool: str, create: bool) -> None:
    """Look at the work pool before anything is started.

    Raises:
        WorkerError: If there is no server, or the pool is missing or of another type.
    """
    if not PREFECT_API_URL.value():
        raise WorkerError("PREFECT_API_URL is not set. Set it to the server's API, such as http://127.0.0.1:4200/api.")
    try:
        async with get_client() as client:
            found = await client.read_work_pool(pool)
    except ObjectNotFound:
        if create:
            return
        raise WorkerError(
            f"The work pool {pool!r} does not exist. Create it with `prefect work-pool create {pool} --type "
            f"{WarmWorker.type}`, or start the worker without --no-create-pool."
        ) from None
    except httpx.HTTPError as exc:
        raise WorkerError(
            f"No Prefect server answers at {PREFECT_API_URL.value()!r}: {type(exc).__name__}. Start one with `prefect "
            "server start`, or set PREFECT_API_URL."
        ) from None
    if found.type != WarmWorker.type:
        raise WorkerError(
            f"The work pool {pool!r} is of the type {found.type!r}. Give a pool of the type {WarmWorker.type!r}, or a "
            "new name to have one created."
        )


async def print_status(name: str) -> int:
    """Print the health view of a worker. Return 0 if it is alive, 1 if it has stopped or is gone, 2 if unknown."""
    async with get_client() as client:
        found = await find_page(client, name)
        if found is None:
            print(f"No warm worker of the name {name!r} has ever reported.", file=sys.stderr)
            return 2
    page = str(found.data)
    print(page)
    age = time.time() - (found.updated or found.created or datetime.now()).timestamp()
    if "| stopped |" in page:
        return 1
    if age > STALE_SECONDS:
        print(f"The worker is gone: it has not reported for {age:.0f} s.", file=sys.stderr)
    return int(age > STALE_SECONDS)


async def run_worker(settings: argparse.Namespace) -> None:
    """Run the worker until it is told to stop."""
    await check_pool(settings.pool, not settings.no_create_pool)
    worker = WarmWorker(
        settings.pool, settings.queues, settings.name, limit=settings.limit,
        create_pool_if_not_found=not settings.no_create_pool,
    )  # fmt: skip
    if settings.idle_minutes is not None:
        worker.idle.minutes = settings.idle_minutes
    stopping = _listen()
    requests = RequestService(worker.health, settings.limit)
    running = asyncio.create_task(worker.start(with_healthcheck=settings.with_healthcheck))
    serving = asyncio.create_task(requests.run())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ending = asyncio.create_task(requests.stop(STOP_SECONDS - 1))
    running.cancel()
    await asyncio.wait({running, ending}, timeout=END_SECONDS)
    if not ending.done() or not running.done():
        await asyncio.to_thread(leave, 1)
    serving.cancel()
    if running.done() and not running.cancelled() and (error := running.exception()) is not None:
        raise error


def _listen() -> asyncio.Future[None]:
    """Return what is done when the process is told to stop. Told again, it ends at once."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if stopping.done():
            os._exit(1)
        print("Stopping: runs are interrupted and scheduled again.", flush=True)
        stopping.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
    return stopping


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    settings = parse_arguments(arguments)
    try:
        if settings.status:
            return asyncio.run(print_status(settings.name))
        set_memory_budget(settings.memory_gb)
        query = min(PREFECT_WORKER_QUERY_SECONDS.value(), QUERY_SECONDS)
        own = {PREFECT_WORKER_QUERY_SECONDS: query, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_SECONDS}
        with temporary_settings(own):
            asyncio.run(run_worker(settings))
    except WorkerError as exc:
        print(f"warm_worker: {exc}", file=sys.stderr)
        return 2
    return 0


def leave(status: int) -> NoReturn:
    """End the process, also under a run that does not end."""
    for service in (APILogWorker, EventsWorker):
        service.drain_all(timeout=DRAIN_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
