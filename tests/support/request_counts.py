"""Counting the HTTP requests that this process makes, those to the Prefect API above all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted_requests() -> Iterator[list[float]]:
    """Yield the times of all HTTP requests of this process."""
    import httpx

    times: list[float] = []
    kinds = (httpx.Client, httpx.AsyncClient)
    originals = [kind.send for kind in kinds]

    def counting(original: Any) -> Any:
        def send(self: Any, *rest: Any, **named: Any) -> Any:
            times.append(time.monotonic())
            return original(self, *rest, **named)

        return send

    for kind, original in zip(kinds, originals, strict=True):
        kind.send = counting(original)  # type: ignore[method-assign]
    try:
        yield times
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.send = original  # type: ignore[method-assign]
