"""Segments: the immutable pieces of a journal, each with some finished rows and a hash of them.

A segment is one line of JSON followed by an Arrow stream. The line names the job and the hash of the stream, so that a
torn, truncated, changed or foreign segment is noticed. What a progress display needs stands in the name of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAGIC = "prefect-huggingface-segment-1"
NAME = re.compile(r"^e(\d{3,})-([0-9a-f]{8})-(\d{6,})-(\d{12,})-(\d{12,})-r(\d+)-f(\d+)-t(\d+)\.segment$")


class SegmentError(Exception):
    """A segment is torn, changed, or of another job."""


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """What the name of a segment tells.

    Attributes:
        epoch: Number of the run that wrote it. A row of a later epoch replaces one of an earlier.
        attempt: Random name of the attempt at a shard that it belongs to.
        number: Number within the attempt.
        first: Least number of its rows.
        last: Greatest number of its rows.
        rows: Number of rows in it.
        failed: Number of those that failed.
        tokens: Number of tokens that were generated for them.
    """

    epoch: int
    attempt: str
    number: int
    first: int
    last: int
    rows: int
    failed: int
    tokens: int

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """Return what a file name tells, or None if it is not that of a segment."""
        found = NAME.match(name)
        if found is None:
            return None
        epoch, attempt, *rest = found.groups()
        return cls(int(epoch), attempt, *map(int, rest))

    def __str__(self) -> str:
        return (
            f"e{self.epoch:03}-{self.attempt}-{self.number:06}-{self.first:012}-{self.last:012}"
            f"-r{self.rows}-f{self.failed}-t{self.tokens}.segment"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The finished state of one row: the output columns, and what the journal needs besides.

    Attributes:
        row: Number of the row in the input, from 0.
        text: Text that was generated.
        status: "ok", "length", or the kind of the error.
        finish_reason: Why the text ends.
        prompt_tokens: Number of tokens of the prompt.
        generated_tokens: Number of tokens of the text.
        seconds: Time that the row took.
        error: What went wrong, or None.
        details: JSON of what else belongs to the row (structured values, further answers), or None.
        shared: Whether the text was generated for another row with the same prompt.
        digest: Hash of the prompt and its options, where the text may be shared with other rows.
    """

    row: int
    text: str | None
    status: str
    finish_reason: str
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    details: str | None = None
    shared: bool = False
    digest: bytes | None = None

    def as_tuple(self) -> tuple[Any, ...]:
        """Return the fields in the order of the segment's columns."""
        return tuple(getattr(self, name) for name in self.__slots__)


@lru_cache(maxsize=1)
def segment_schema() -> Any:
    """Return the types of a segment's columns, in the order of `Answer`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("row", pa.int64()), ("completion", pa.string()), ("status", pa.string()), ("finish_reason", pa.string()),
            ("prompt_tokens", pa.int32()), ("generated_tokens", pa.int32()), ("seconds", pa.float64()),
            ("error", pa.string()), ("details", pa.string()), ("shared", pa.bool_()), ("digest", pa.binary()),
        ]
    )  # fmt: skip


def encode_segment(job: str, answers: Sequence[tuple[Any, ...]]) -> bytes:
    """Return the bytes of a segment.

    Args:
        job: Key of the job.
        answers: One tuple per row, in the order of the schema. At least one.
    """
    import pyarrow as pa

    schema = segment_schema()
    columns = [
        pa.array(values, type=field.type) for values, field in zip(zip(*answers, strict=True), schema, strict=True)
    ]
    batch = pa.record_batch(columns, schema=schema)
    body = io.BytesIO()
    with pa.ipc.new_stream(body, schema) as stream:
        stream.write_batch(batch)
    content = body.getvalue()
    head = {
        "magic": MAGIC, "job": job, "rows": len(answers), "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    return json.dumps(head).encode() + b"\n" + content


def decode_segment(job: str, content: bytes) -> Any:
    """Return the rows of a segment as a `pyarrow.Table`.

    Raises:
        SegmentError: If it is torn, changed, or of another job.
    """
    import pyarrow as pa

    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        if head["magic"] != MAGIC:
            raise SegmentError(f"it is of another version: {head['magic']!r}")
        if head["job"] != job:
            raise SegmentError(f"it belongs to another job: {head['job']!r}")
        if head["bytes"] != len(body) or head["sha256"] != hashlib.sha256(body).hexdigest():
            raise SegmentError("its content does not match its hash")
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
    except (ValueError, KeyError, TypeError, pa.ArrowInvalid) as exc:
        raise SegmentError(f"it is no segment: {type(exc).__name__}") from None
    if table.num_rows != head["rows"] or table.schema != segment_schema():
        raise SegmentError("its rows are not those that its head names")
    return table
