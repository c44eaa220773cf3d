"""The journal of a batch: what the job is, and every finished row, durable from the moment its segment is there.

It is a folder beside the destination, or, where that is on the Hub, in the store of this machine: each write to the Hub
is a commit for ever, and it takes a hundred or so in an hour. Every file belongs to one owner, whose number (`epoch`)
stands in its name, so that nobody ever writes or deletes what another owner has written:

    owner-000001.json      a run that owns the journal, or did; the highest number owns it, see `ownership`
    alive-000001-ID.json   written again and again while that run lives (remote journals)
    job-000001.json        what the job consists of, human readable, and its key
    published-000001.json  what is known of the output, once there is one
    stop-000001.json       asks the shards of that run to stop, wherever they run
    segments/              finished rows

A segment is an Arrow IPC file with the key of its job in the metadata and a checksum of the file in its name. It
appears whole or not at all: by rename locally, as a single object elsewhere. One that cannot be trusted is set aside
under a `.damaged` name and its rows are generated again. (Measured: Arrow writes 600,000 and reads 1,400,000 rows per
second of processor time where Parquet has 420,000 and 450,000, and Parquet's checksums leave out its footer, so that
a quarter of all flipped bits would pass.)
"""

from __future__ import annotations

import contextvars
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

from prefect.logging import get_logger
from typing_extensions import override

from prefect_huggingface.blocks.store import default_store_path
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.places import Place

logger = get_logger(__name__)

SUFFIX = ".journal"
SEGMENT_NAME = re.compile(
    r"^e(\d{6,})-([0-9a-f]{8})-(\d{6,})-(\d{12,})-(\d{12,})-n(\d+)-r(\d+)-f(\d+)-i(\d+)-t(\d+)-([0-9a-f]{16})\.arrow$"
)
INVALID = "schema_invalid"  # status of an answer that does not have the form that was asked for
TORN_READS = 5  # of a record that a store without whole writes shows while it is written
TORN_SECONDS = 0.2
COMMIT_ROWS = 512  # rows that are worth a segment of their own
SHORTEST_INTERVAL, SHORTEST_REMOTE_INTERVAL = 0.1, 2.0  # seconds between two segments; remote ones cost requests
LONGEST_INTERVAL = 4.0
BUFFER_ROWS = 32_768  # rows that wait for the disk at most
SWEEP_ROWS = 10_000


class SegmentError(Exception):
    """A segment is torn, changed, or of another job."""


class ResultRow(NamedTuple):
    """A finished step of one row: the columns of the output, see `Completion`, and what the journal needs besides.

    The journal keeps one for each step of each row; of two with the same row and step, that of the later epoch counts.

    Attributes:
        step: Number of the step in the chain, from 0. A batch without steps has the step 0 only.
        details: JSON of what else belongs to the step (structured values, further answers), or None.
        shared: Whether the text was generated for another row with the same prompt.
        digest: Hash of the prompt and its options, where the text may be shared with other rows.
        is_last: Whether the row is finished with it: it is the last step of the chain, or it failed.
    """

    row: int
    step: int = 0
    completion: str | None = None
    status: str = "ok"
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    details: str | None = None
    shared: bool = False
    digest: bytes | None = None
    is_last: bool = True


class SegmentName(NamedTuple):
    """What the name of a segment tells.

    `epoch` is the number of its owner, `attempt` the random name of an attempt at a shard, in which it has a `number`.
    It holds so many `steps` of the rows from `first` to `last`; so many `rows` are finished with them, of which some
    `failed`, and some of these have an `invalid` answer, without the form that was asked for.
    """

    epoch: int
    attempt: str
    number: int
    first: int
    last: int
    steps: int
    rows: int
    failed: int
    invalid: int
    tokens: int
    checksum: str

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """Return what a file name tells, or None if it is not that of a segment."""
        if (found := SEGMENT_NAME.match(name)) is None:
            return None
        epoch, attempt, *numbers, checksum = found.groups()
        number, first, last, steps, rows, failed, invalid, tokens = map(int, numbers)
        return cls(int(epoch), attempt, number, first, last, steps, rows, failed, invalid, tokens, checksum)

    @override
    def __str__(self) -> str:
        return "e{:06}-{}-{:06}-{:012}-{:012}-n{}-r{}-f{}-i{}-t{}-{}.arrow".format(*self)


@lru_cache(maxsize=1)
def segment_schema() -> Any:
    """Return the types of a segment's columns, in the order of `ResultRow`."""
    import pyarrow as pa

    kinds = {
        "row": pa.int64(), "step": pa.int16(), "prompt_tokens": pa.int32(), "generated_tokens": pa.int32(),
        "seconds": pa.float64(), "shared": pa.bool_(), "digest": pa.binary(), "is_last": pa.bool_(),
    }  # fmt: skip
    return pa.schema([(name, kinds.get(name, pa.string())) for name in ResultRow._fields])


def make_batch(rows: Sequence[tuple[Any, ...]]) -> Any:
    """Return finished steps, at least one, that have the fields of `ResultRow`, as a `pyarrow.RecordBatch`."""
    import pyarrow as pa

    schema = segment_schema()
    columns = [_to_array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.record_batch(columns, schema=schema)


def encode_segment(job: str, batch: Any) -> bytes:
    """Return the content of a segment with the steps of a batch."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, batch.schema.with_metadata({"job": job}), options=options) as file:
        file.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _to_array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # a lone surrogate, in a message that quotes its input for instance
        return pa.array([value and value.encode("utf-8", "replace").decode() for value in values], kind)


def decode_segment(job: str, name: SegmentName, content: bytes) -> Any:
    """Return the rows of a segment as a `pyarrow.Table`.

    Raises:
        SegmentError: If it is torn, changed, or of another job.
    """
    import pyarrow as pa

    if checksum(content) != name.checksum:
        raise SegmentError("its content does not match the checksum in its name")
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except pa.ArrowInvalid as exc:
        raise SegmentError(f"it is no Arrow file: {exc}") from None
    if not table.schema.equals(segment_schema()):
        raise SegmentError("it is of another version")
    if (owner := (table.schema.metadata or {}).get(b"job", b"").decode()) != job:
        raise SegmentError(f"it belongs to another job: {owner!r}")
    return table.replace_schema_metadata(None)


def checksum(content: bytes) -> str:
    """Return the checksum that stands in the name of a segment."""
    return blake2b(content, digest_size=8).hexdigest()


class JournalCounts(NamedTuple):
    """Finished rows, those that failed, of these those with an invalid answer, and the tokens that were generated."""

    rows: int = 0
    failed: int = 0
    invalid: int = 0
    tokens: int = 0

    @classmethod
    def sum(cls, counts: Iterable[JournalCounts]) -> JournalCounts:
        """Return the counts of several parts together."""
        return cls(*map(sum, zip(*counts, strict=True)))

    @classmethod
    def of(cls, steps: Any) -> JournalCounts:
        """Return what the steps in a `pyarrow` table or batch come to."""
        import pyarrow.compute as pc

        rows = steps.filter(steps["is_last"])
        invalid = pc.sum(pc.equal(rows["status"], INVALID)).as_py() or 0
        tokens = pc.sum(steps["generated_tokens"].filter(pc.invert(steps["shared"]))).as_py() or 0
        return cls(rows.num_rows, rows.num_rows - rows["error"].null_count, invalid, tokens)


@dataclass(frozen=True, slots=True)
class Journal:
    """Access to the journal at a place, its folder. It holds nothing in memory and can travel between processes."""

    place: Place

    @property
    def segments(self) -> Place:
        """Folder of the finished rows."""
        return self.place.child("segments")

    @classmethod
    def beside(cls, destination: str) -> Journal:
        """Return the journal of a destination."""
        place = Place.of(destination)
        if place.is_on_hub:  # `@main` names the branch that is meant without it
            path = place.url.removeprefix("hf://").replace("@main/", "/", 1)
            place = Place.of(default_store_path() / "journals" / path)
        return cls(place.beside(SUFFIX))

    @property
    def poll_seconds(self) -> float:
        """How often it is worth looking at the journal: every look at a remote one costs requests."""
        return 0.5 if self.place.is_local else 5.0

    def read_job(self) -> dict[str, Any] | None:
        """Return what the job consists of, or None if there is no journal, or it was cleared.

        Raises:
            BatchError: If the record cannot be read.
        """
        return self._read_latest("job")

    def list_published(self) -> list[dict[str, Any]]:
        """Return what is known of the outputs that were published, or were about to be, the last one first."""
        names = sorted((name for name in self.place.names() if name.startswith("published-")), reverse=True)
        return [record for name in names if (record := self.read_record(name)) is not None]

    def read_owner(self) -> dict[str, Any] | None:
        """Return the record of the run that owns the journal, or owned it last: its `epoch`, `id` and so on."""
        return self._read_latest("owner", since=0)

    def names(self) -> list[SegmentName]:
        """Return the names of all segments, which are not read."""
        since = self._valid_since()
        return [name for name in map(SegmentName.parse, self.segments.names()) if name and name.epoch > since]

    def count(self) -> JournalCounts:
        """Return the counts that the names of the segments tell, without reading them."""
        return JournalCounts.sum(
            JournalCounts(name.rows, name.failed, name.invalid, name.tokens) for name in self.names()
        )

    def append(self, epoch: int, attempt: str, number: int, job: str, rows: Sequence[tuple[Any, ...]]) -> SegmentName:
        """Write a segment of finished steps, at least one, durably, and return its name.

        `attempt` is the random name of the attempt at a shard, 8 hexadecimal digits, in which it has the `number`.
        """
        import pyarrow.compute as pc

        batch = make_batch(rows)
        content, (first, last) = encode_segment(job, batch), pc.min_max(batch["row"]).as_py().values()
        counts = JournalCounts.of(batch)
        name = SegmentName(epoch, attempt, number, first, last, len(rows), *counts, checksum(content))
        self.segments.child(str(name)).write(content)
        return name

    def _valid_since(self) -> int:
        """Return the number under which the journal was cleared last: what is older is about to be deleted."""
        return 0 if self.place.is_local else int((self.read_owner() or {}).get("base", 0))

    def _read_latest(self, kind: str, since: int | None = None) -> dict[str, Any] | None:
        pattern = re.compile(rf"{kind}-(\d{{6,}})\.json")
        while True:
            epochs = [int(found[1]) for found in map(pattern.fullmatch, self.place.names()) if found]
            since = (self._valid_since() if epochs else 0) if since is None else since
            latest = max((epoch for epoch in epochs if epoch > since), default=None)
            # One that was deleted meanwhile has a successor.
            record = None if latest is None else self.read_record(f"{kind}-{latest:06}.json")
            if latest is None or record is not None:
                return record

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Return the content of a record, None if there is none."""
        place = self.place.child(name)
        for left in reversed(range(TORN_READS)):
            try:
                record: dict[str, Any] = json.loads(place.read())
                return record
            except FileNotFoundError:
                return None
            except ValueError as exc:
                if place.is_local or not left:
                    raise BatchError(
                        f"{place.url!r} cannot be read: {exc}. Delete the journal to start from the beginning."
                    ) from None
            time.sleep(TORN_SECONDS)
        return None


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the content of a record."""
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


class JournalRows:
    """A sweep over the rows of a journal. Ranges are taken in ascending order.

    Only the segments that overlap the current range are read and in memory: rows finish within a bounded window, so
    these are few, whatever the number of rows. With `repair`, those that cannot be trusted are set aside, for which the
    journal must be owned while no shard runs.
    """

    def __init__(self, journal: Journal, job: str, repair: bool = False) -> None:
        self._journal, self._job, self._repair = journal, job, repair
        for name in journal.segments.names() if repair else ():
            if name.endswith(".tmp"):  # what a killed process was about to rename
                journal.segments.child(name).remove()
        self._waiting = sorted(journal.names(), key=lambda name: (name.first, name), reverse=True)
        self._open: list[Any] = []

    def take(self, start: int, stop: int) -> Any:
        """Return what is finished of the rows from `start` up to, and without, `stop`, as a `pyarrow.Table`.

        It has the columns of `ResultRow` and the epoch, and is sorted by row and step. Steps that were made of an
        earlier one that is lost, or was asked again since, are not there. Rows before `stop` cannot be taken any more.

        Raises:
            BatchError: If a segment cannot be trusted any more.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        while self._waiting and self._waiting[-1].first < stop:
            name = self._waiting.pop()
            self._open += [self._load(name)] if name.last >= start else []
        taken, kept = [], []
        for table in self._open:
            rows = table["row"]
            inside = table.filter(pc.and_(pc.greater_equal(rows, start), pc.less(rows, stop)))
            rest = table.filter(pc.greater_equal(rows, stop))
            taken += [inside] if inside.num_rows else []
            kept += [rest] if rest.num_rows else []
        self._open = kept
        if not taken:
            return segment_schema().append(pa.field("epoch", pa.int32())).empty_table()
        return _without_gaps(_latest(pa.concat_tables(taken).combine_chunks()))

    def sweep(self, start: int, stop: int) -> Iterator[Any]:
        """Yield what is finished of a range of rows, some rows at a time."""
        for first in range(start, stop, SWEEP_ROWS):
            yield self.take(first, min(first + SWEEP_ROWS, stop))

    def _load(self, name: SegmentName) -> Any:
        import pyarrow as pa

        place = self._journal.segments.child(str(name))
        try:
            table = decode_segment(self._job, name, place.read())
        except (SegmentError, FileNotFoundError) as exc:
            if not self._repair:
                raise BatchError(
                    f"Segment {str(name)!r} of the journal {self._journal.place.url!r} is damaged: {exc}. Start again: "
                    "it is set aside then, and its rows are generated again."
                ) from None
            logger.warning("Segment %s is set aside: %s. Its rows are generated again.", name, exc)
            place.beside(".damaged").write(place.read())
            place.remove()
            table = segment_schema().empty_table()
        return table.append_column("epoch", pa.array([name.epoch] * table.num_rows, pa.int32()))


def _latest(table: Any) -> Any:
    """Sort by row and step, and keep of each the one with the latest epoch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = table.sort_by([("row", "ascending"), ("step", "ascending"), ("epoch", "descending")])
    if table.num_rows > 1:
        rows, steps = table["row"].combine_chunks(), table["step"].combine_chunks()
        is_first = pc.or_(pc.not_equal(rows[1:], rows[:-1]), pc.not_equal(steps[1:], steps[:-1]))
        if not pc.all(is_first).as_py():
            table = table.filter(pa.concat_arrays([pa.array([True]), is_first]))
    return table


def _without_gaps(table: Any) -> Any:
    """Keep of each row, sorted by steps, those from 0 on to the first that is missing, newer than the next, or last."""
    import numpy as np
    import pyarrow as pa

    row, step, epoch, is_last = (table[name].to_numpy() for name in ("row", "step", "epoch", "is_last"))
    begins = np.append(True, row[1:] != row[:-1])
    follows = np.append(False, (step[1:] == step[:-1] + 1) & (epoch[1:] >= epoch[:-1]) & ~is_last[:-1])
    is_gap = ~np.where(begins, step == 0, follows)
    gaps = np.cumsum(is_gap)
    before = (gaps - is_gap)[begins]  # gaps in the rows before that of an entry
    fits = gaps == before[np.cumsum(begins) - 1]
    return table if fits.all() else table.filter(pa.array(fits))


class JournalWriter(AbstractContextManager["JournalWriter"]):
    """Commits the finished rows of one shard, in a thread of its own so that no engine waits for a disk.

    `add` is for one thread.
    """

    def __init__(self, journal: Journal, job: str, epoch: int) -> None:
        self._journal, self._job, self._epoch = journal, job, epoch
        self._pause = SHORTEST_INTERVAL if journal.place.is_local else SHORTEST_REMOTE_INTERVAL
        # Plain tuples of texts and numbers: Python's search for garbage looks at each once, and then leaves it alone.
        self._rows: list[tuple[Any, ...]] = []
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="journal-writer", daemon=True
        )
        self._thread.start()

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Take over finished rows. They are committed within seconds.

        Raises:
            OSError: What the disk said to an earlier row.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._rows) <= BUFFER_ROWS or self._error)
            self._check()
            self._rows += map(tuple, rows)
            if len(self._rows) >= COMMIT_ROWS:
                self._changed.notify_all()

    def close(self) -> None:
        """Commit what is left and end the thread.

        Raises:
            OSError: What the disk said.
        """
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._check()

    @override
    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        attempt, number, began = os.urandom(4).hex(), 0, time.monotonic()
        try:
            while True:
                self._closed.wait(self._pause)
                # The older the batch, the larger its segments, so that a night makes thousands and not more.
                interval = min((time.monotonic() - began) / 60, LONGEST_INTERVAL)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed.is_set() or len(self._rows) >= COMMIT_ROWS, interval)
                    rows, self._rows = self._rows, []
                    self._changed.notify_all()
                if rows:
                    self._journal.append(self._epoch, attempt, number, self._job, rows)
                    number += 1
                elif self._closed.is_set():
                    return
        except BaseException as exc:
            with self._changed:
                self._error = exc
                self._changed.notify_all()
