"""Faults that the local Hub can be told to make, and its log of requests."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Place = Literal["api", "resolve", "cdn"]
Kind = Literal["status", "stall", "cut", "stall_body", "truncate", "corrupt", "ignore_range", "headers", "drip"]


@dataclass
class Fault:
    """One thing that goes wrong with the requests that it matches.

    Attributes:
        kind: "status" answers with `status`; "stall" answers nothing; "cut" ends the connection after `after` bytes of
            the body; "stall_body" stops there and keeps the connection; "truncate" ends the answer there as if it were
            whole; "corrupt" changes the byte there; "ignore_range" sends the whole file whatever was asked for;
            "headers" puts other headers into the answer; "drip" sends 20 bytes a second.
        place: Which server and route: the API, the resolve route of the Hub, or the CDN.
        path: Regular expression that the path of the request must contain. CDN paths end with the file's name.
        method: Method of the request, or None for all.
        times: How often the fault happens, or None for always.
        skip: How many matching requests pass before.
        after: Byte of the answer's body where it happens.
        status: Status code of "status".
        headers: Headers of "status" and "headers".
        seconds: How long a stall lasts.
    """

    kind: Kind
    place: Place = "cdn"
    path: str = ""
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    after: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 600.0
    is_over: bool = False

    async def stall(self) -> None:
        """Wait for the length of the stall, or until the faults are cleared."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and not self.is_over:
            await asyncio.sleep(0.02)

    def matches(self, place: str, method: str, path: str) -> bool:
        """Tell whether the fault is for a request, and count it."""
        if place != self.place or self.method not in (None, method) or not re.search(self.path, path):
            return False
        if method == "HEAD" and self.kind not in ("status", "stall", "headers"):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass
class LoggedRequest:
    """What the Hub saw of one request and did with it."""

    place: str
    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    bytes_sent: int = 0

    @property
    def start(self) -> int:
        """First byte that was asked for."""
        return int(re.sub(r"\D.*", "", self.range.removeprefix("bytes="))) if self.range else 0


class Journal:
    """The faults to make and the requests that were seen. Safe to use from other threads."""

    def __init__(self) -> None:
        self.requests: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def note(self, entry: LoggedRequest) -> Fault | None:
        """Log a request and return the fault to make with it."""
        with self._lock:
            self.requests.append(entry)
            return next((f for f in self.faults if f.matches(entry.place, entry.method, entry.path)), None)

    def clear(self) -> None:
        """Forget all faults and requests."""
        with self._lock:
            for fault in self.faults:
                fault.is_over = True
            self.requests.clear()
            self.faults.clear()

    def sent(self, path: str = "", place: str | None = None) -> int:
        """Return the number of body bytes sent for GET requests whose path contains `path`."""
        return sum(
            r.bytes_sent
            for r in self.requests
            if r.method == "GET" and path in r.path and place in (None, r.place)
        )  # fmt: skip

    def gets(self, path: str = "", place: str | None = None) -> list[LoggedRequest]:
        """Return the GET requests whose path contains `path`, in order."""
        return [r for r in self.requests if r.method == "GET" and path in r.path and place in (None, r.place)]
