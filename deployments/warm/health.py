"""The health view of a warm worker: what it runs, which models it holds, and how much memory that takes."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound

from prefect_huggingface.tasks.artifacts import make_key, markdown_table
from prefect_huggingface.tasks.engines.cache import list_engines, memory_budget
from prefect_huggingface.tasks.engines.cache_entries import EngineState
from prefect_huggingface.tasks.engines.memory import resident_bytes

# Changes are shown at once, but not more often than this; without changes the page is renewed once a minute.
CHANGE_SECONDS = 10.0
RENEW_SECONDS = 60.0
KEPT_RUNS = 10
GIB, MIB = 2**30, 2**20


@dataclass
class WorkerHealth:
    """What a warm worker has done and is doing.

    Args:
        name: Name of the worker.
        process: Process and machine, in words.
        began: Its start, in seconds since the epoch.
        now: Names of the runs that it runs and when each began, in seconds since the epoch.
        ended: How many runs ended in each state.
        last: State, seconds and name of the runs that ended last.
        requests: How many background requests it has served, or None where it serves none.
    """

    name: str
    process: str
    began: float = field(default_factory=time.time)
    now: dict[str, float] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    last: deque[tuple[str, str, float]] = field(default_factory=lambda: deque(maxlen=KEPT_RUNS))
    requests: int | None = None

    def note_end(self, run: str, state: str) -> None:
        """Note that a run has ended."""
        self.ended[state] += 1
        self.last.appendleft((run, state, time.time() - self.now.pop(run, time.time())))

    def headline(self, stopped: bool = False) -> str:
        """Return the state of the worker in a few words."""
        if stopped:
            return "stopped"
        return f"working on {len(self.now)} runs" if self.now else "waiting for runs"

    def fingerprint(self) -> tuple[object, ...]:
        """Return what is new when the page is worth showing again."""
        engines = [(engine.model, engine.users > 0) for engine in list_engines()]
        return tuple(self.now), dict(self.ended), engines, self.requests

    def page(self, stopped: bool = False) -> str:
        """Return the health view as Markdown."""
        rows = [
            ("State", self.headline(stopped)),
            ("Updated", clock(time.time())),
            ("Up for", duration(time.time() - self.began)),
            ("Process", self.process),
            ("Memory", f"{resident_bytes() / GIB:.2f} GiB of {memory_budget() / GIB:.2f} GiB"),
            ("Runs ended", ", ".join(f"{count} {state}" for state, count in sorted(self.ended.items())) or "none"),
        ]
        if self.requests is not None:
            rows.append(("Background requests", str(self.requests)))
        running = [(name, clock(began), duration(time.time() - began)) for name, began in self.now.items()]
        ended = [(name, state, duration(seconds)) for name, state, seconds in self.last]
        parts = [
            f"# Warm worker {make_key(self.name)}",
            markdown_table(("", "now"), rows),
            "## Loaded models",
            _engine_table(list_engines()),
            "## Runs at work",
            markdown_table(("Run", "Since", "For"), running) if running else "None.",
            "## Runs that ended last",
            markdown_table(("Run", "State", "Took"), ended) if ended else "None.",
        ]
        return "\n\n".join(parts) + "\n"


def _engine_table(engines: list[EngineState]) -> str:
    if not engines:
        return "None."
    rows = [
        (
            engine.model, engine.engine, engine.device or "default", f"{engine.memory_bytes / MIB:.0f} MiB",
            f"{engine.requests} requests of {engine.users} holders" if engine.users or engine.requests else "no",
            clock(engine.loaded_at), clock(engine.used_at),
        )
        for engine in engines
    ]  # fmt: skip
    return markdown_table(("Model", "Engine", "Device", "Took memory", "In use", "Loaded", "Last used"), rows)


def clock(seconds: float) -> str:
    """Return a time in words, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """Return a duration in words."""
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if whole >= 3600:
        return f"{days} d {hours} h {minutes} min" if days else f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def health_key(name: str) -> str:
    """Return the key of the health artifact of a worker."""
    return f"warm-worker-{make_key(name)}"


class HealthPage:
    """The artifact with the health view. It is one artifact for all lives of a worker, changed in place.

    Args:
        health: What is to be shown.
    """

    def __init__(self, health: WorkerHealth) -> None:
        self._health = health
        self._id: UUID | None = None
        self._shown: tuple[object, ...] | None = None
        self._last = 0.0

    async def show(self, client: PrefectClient, stopped: bool = False) -> None:
        """Write the page, unless it was written just now or nothing has changed for less than a minute."""
        waited = time.monotonic() - self._last
        fingerprint = self._health.fingerprint()
        if not stopped and self._last and waited < (CHANGE_SECONDS if fingerprint != self._shown else RENEW_SECONDS):
            return
        self._last, self._shown = time.monotonic(), fingerprint
        page = self._health.page(stopped)
        if self._id is None and (found := await find_page(client, self._health.name)):
            self._id = found.id
        if self._id is not None:
            try:
                await client.update_artifact(self._id, ArtifactUpdate(data=page))
                return
            except ObjectNotFound:
                pass
        created = await client.create_artifact(
            ArtifactCreate(
                key=health_key(self._health.name), type="markdown", data=page, description="Health of a warm worker"
            )
        )
        self._id = created.id


async def find_page(client: PrefectClient, name: str) -> Artifact | None:
    """Return the artifact of a worker's health view, if there is one."""
    found = await client.read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[health_key(name)])),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    return found[0] if found else None
