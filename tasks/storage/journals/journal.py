"""The journal of a batch: what the job is, and every finished row, durable from the moment its segment is there.

It is a folder beside the destination:

    job.json       what the job consists of, human readable, and its key
    attempt.json   the run that owns the journal now; shards of an older run notice it and stop
    published.json the hash of the output, once there is one
    stop           asks all shards to stop, wherever they run
    lock           held while a run owns the journal (local file systems)
    segments/      finished rows, see `segments`

A segment appears whole or not at all: by rename locally, as a single object elsewhere. One that cannot be trusted is
set aside under a `.damaged` name and its rows are generated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.segments import (
    SegmentError,
    SegmentName,
    decode_segment,
    encode_segment,
)
from prefect_huggingface.tasks.storage.places import Place

logger = get_logger(__name__)

SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class JournalCounts:
    """Counts of what is in a journal, over all its segments."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    segments: int = 0


@dataclass(frozen=True, slots=True)
class Journal:
    """Access to the journal at a place. It holds nothing in memory and can travel between processes.

    Attributes:
        place: Folder of the journal.
    """

    place: Place
    segments: Place = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", self.place.child("segments"))

    @classmethod
    def beside(cls, destination: str) -> Journal:
        """Return the journal of a destination."""
        return cls(Place.of(destination).beside(SUFFIX))

    @property
    def poll_seconds(self) -> float:
        """How often it is worth looking at the journal: every look at a remote one costs requests."""
        return 0.5 if self.place.is_local else 5.0

    def read_job(self) -> dict[str, Any] | None:
        """Return what the job consists of, or None if there is no journal.

        Raises:
            BatchError: If the record cannot be read.
        """
        return self._read_record("job.json")

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Write what the job consists of."""
        self._write_record("job.json", job)

    def read_published(self) -> dict[str, Any]:
        """Return the record of the output that was published last, empty if there is none."""
        return self._read_record("published.json") or {}

    def write_published(self, record: Mapping[str, Any]) -> None:
        """Note what was published."""
        self._write_record("published.json", record)

    def read_attempt(self) -> dict[str, Any]:
        """Return the record of the run that owns the journal, empty if there is none."""
        return self._read_record("attempt.json") or {}

    def write_attempt(self, attempt: Mapping[str, Any]) -> None:
        """Make a run the owner of the journal, and withdraw an earlier wish to stop."""
        self.place.child("stop").remove()
        self._write_record("attempt.json", attempt)

    def request_stop(self, reason: str) -> None:
        """Ask all shards to stop. They commit what is finished."""
        self._write_record("stop", {"reason": reason})

    def is_stopped(self, attempt: str) -> bool:
        """Tell whether the shards of a run have to stop: they were asked to, or another run has taken over."""
        return self.place.child("stop").exists() or self.read_attempt().get("id") != attempt

    def names(self) -> list[SegmentName]:
        """Return the names of all segments, which are not read."""
        return [name for name in map(SegmentName.parse, self.segments.names()) if name]

    def count(self) -> JournalCounts:
        """Return the counts that the names of the segments tell, without reading them."""
        names = self.names()
        return JournalCounts(
            sum(name.rows for name in names),
            sum(name.failed for name in names),
            sum(name.tokens for name in names),
            len(names),
        )

    def append(self, name: SegmentName, job: str, answers: list[tuple[Any, ...]]) -> None:
        """Write a segment durably."""
        self.segments.child(str(name)).write(encode_segment(job, answers))

    def load(self, name: SegmentName, job: str) -> Any:
        """Return the rows of a segment as a `pyarrow.Table`.

        Raises:
            SegmentError: If the segment cannot be trusted.
        """
        import pyarrow.compute as pc

        table = decode_segment(job, self.segments.child(str(name)).read())
        bounds = pc.min_max(table["row"]).as_py()
        if (name.rows, name.first, name.last) != (table.num_rows, bounds["min"], bounds["max"]):
            raise SegmentError("its rows are not those that its name tells")
        return table

    def check(self, job: str) -> list[SegmentName]:
        """Read every segment, set those aside that cannot be trusted, and return the names of the others.

        Call it only while the journal is owned and no shard runs.
        """
        trusted = []
        for text in self.segments.names():
            name = SegmentName.parse(text)
            if name is None:
                if text.endswith(".tmp"):  # what a killed process was about to rename
                    self.segments.child(text).remove()
                continue
            try:
                self.load(name, job)
            except SegmentError as exc:
                logger.warning("Segment %s is set aside: %s. Its rows are generated again.", text, exc)
                self._set_aside(self.segments.child(text))
                continue
            trusted.append(name)
        return trusted

    def remove(self) -> None:
        """Delete the journal."""
        self.place.remove()

    def _set_aside(self, place: Place) -> None:
        if place.is_local:
            os.replace(place.url, f"{place.url}.damaged")
            return
        place.beside(".damaged").write(place.read())
        place.remove()

    def _read_record(self, name: str) -> dict[str, Any] | None:
        place = self.place.child(name)
        try:
            record: dict[str, Any] = json.loads(place.read())
        except FileNotFoundError:
            return None
        except ValueError as exc:
            raise BatchError(
                f"{place.url!r} cannot be read: {exc}. Delete the journal to start from the beginning."
            ) from None
        return record

    def _write_record(self, name: str, record: Mapping[str, Any]) -> None:
        self.place.child(name).write(json.dumps(record, indent=1, ensure_ascii=False).encode())
