"""Many rows against an endpoint that fails often and is away twice: every row is right, and little time is lost."""

from __future__ import annotations

import threading
import time

import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoint_engine import EndpointEngine
from prefect_huggingface.tasks.records import Completion, Request
from support.tgi_server import TgiServer

ROWS = 500
OUTAGE_SECONDS = 2.0


def run(server: TgiServer) -> tuple[dict[int, Completion], float]:
    """Put all rows through a fresh engine, and return its completions by row and the seconds it took."""
    endpoint = InferenceEndpoint(url=server.url, max_concurrency=16, options=GenerationOptions(max_new_tokens=4))
    with EndpointEngine(endpoint) as engine:
        began = time.monotonic()
        rows = {row.request_id: row for row in engine.generate(Request(f"Row {i}:", id=i) for i in range(ROWS))}
        return rows, time.monotonic() - began


def make_outages(server: TgiServer, at_rows: tuple[int, ...], done: list[float]) -> None:
    """Stop the server for a while, each time that it has seen a number of requests, and note how long it was away."""
    for at in at_rows:
        while len(server.requests) < at:
            time.sleep(0.01)
        began = time.monotonic()
        server.stop()
        time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - began)))
        server.start()
        done.append(time.monotonic() - began)


@pytest.mark.slow
def test_a_batch_with_failures_and_outages_is_right_and_hardly_slower(tgi):
    tgi.protocol.step_seconds = 0.05
    undisturbed, quick = run(tgi)
    assert {row.error for row in undisturbed.values()} == {None}
    tgi.requests.clear()
    tgi.fault("status", status=429, path="^/$", times=None, share=0.1, seed=1)
    tgi.fault("status", status=503, path="^/$", times=None, share=0.1 / 0.9, seed=2)
    outages: list[float] = []
    thread = threading.Thread(target=make_outages, args=(tgi, (150, 400), outages))
    thread.start()
    disturbed, slow = run(tgi)
    thread.join()
    made = sum(fault.made for fault in tgi.faults)
    tgi.clear()
    tgi.protocol.step_seconds = 0.05
    # Other work on the machine may change between the runs.
    quick = max(quick, run(tgi)[1])
    print(f"{quick:.2f} s undisturbed, {slow:.2f} s with {made} failures and outages of {sum(outages):.2f} s")
    assert len(disturbed) == ROWS
    assert {i: row.text for i, row in disturbed.items()} == {i: row.text for i, row in undisturbed.items()}
    assert {row.error for row in disturbed.values()} == {None}
    assert made > 0.15 * ROWS
    assert len(outages) == 2
    assert slow <= 1.3 * quick + sum(outages)
