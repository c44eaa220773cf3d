"""How each table format is counted, hashed and read in chunks."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, Any

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Chunk,
    TableFile,
    TableFormat,
    get_format,
)

MARK_ROWS = 50_000  # JSONL rows between two remembered byte offsets
SAMPLE_ROWS = 1000  # JSONL rows whose columns are looked at

_decode = json.JSONDecoder().decode
_LARGE_INTEGER = re.compile(rb"\d{19}")


class Reader(ABC):
    """Reads one file of one format."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def inspect(self) -> tuple[TableFile, tuple[str, ...], Any]:
        """Return the file with its rows and hash, the columns, and what must be the same in all files or None."""

    @abstractmethod
    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        """Yield the rows `start` to `stop` of the file, numbered from the file's first row."""

    def compression(self) -> str | None:
        """Return the compression that the name of the file tells."""
        try:
            return get_format(self.place.name)[1]
        except TableError:
            return None


class JsonLinesReader(Reader):
    """One JSON object per line. Empty lines are no rows; a malformed line is a row with a problem."""

    @override
    def inspect(self) -> tuple[TableFile, tuple[str, ...], Any]:
        digest, rows, offset = hashlib.sha256(), 0, 0
        marks: list[tuple[int, int]] = []
        columns: dict[str, None] = {}
        with self.place.open(self.compression()) as lines:
            for line in lines:
                digest.update(line)
                if not line.isspace():
                    if rows % MARK_ROWS == 0:
                        marks.append((rows, offset))
                    if rows < SAMPLE_ROWS:
                        columns.update(dict.fromkeys(_parse_line(line)[0]))
                    rows += 1
                offset += len(line)
        if self.compression():
            return TableFile(self.place.url, rows, hash_place(self.place)), tuple(columns), None
        return TableFile(self.place.url, rows, digest.hexdigest(), tuple(marks)), tuple(columns), None

    @override
    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        first, offset = max((mark for mark in file.marks if mark[0] <= start), default=(0, 0))
        with self.place.open(self.compression()) as lines:
            lines.seek(offset)
            chunk, size = Chunk(start, []), 0
            for number, line in enumerate((line for line in lines if not line.isspace()), first):
                if number < start:
                    continue
                if number >= stop:
                    break
                row, problem = _parse_line(line)
                if problem:
                    chunk.problems[len(chunk.rows)] = f"Row {number + 1} of {self.place.name!r} {problem}"
                chunk.rows.append(row)
                size += len(line)
                if len(chunk.rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = Chunk(number + 1, []), 0
            if chunk.rows:
                yield chunk


def _parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as exc:
        return {}, f"is no JSON: {exc}. Correct the line."
    if not isinstance(row, dict):
        return {}, f"is no JSON object but {type(row).__name__}. Write the row as {{...}}."
    return row, None


def parse_json(line: bytes) -> Any:
    """Return the value of a line as the `json` module reads it: with NaN, lone surrogates and integers of any size.

    Raises:
        ValueError: If it is no JSON.
        RecursionError: If it is nested too deeply.
    """
    import orjson

    if not _LARGE_INTEGER.search(line):  # these become floats in `orjson`
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return _decode(line.removeprefix(b"\xef\xbb\xbf").decode())


class ColumnarReader(Reader):
    """Parquet or Arrow: typed record batches."""

    def __init__(self, place: Place, format: TableFormat) -> None:
        super().__init__(place)
        self.format = format

    @override
    def inspect(self) -> tuple[TableFile, tuple[str, ...], Any]:
        with self.place.open() as file:
            if self.format == "parquet":
                from pyarrow import parquet

                opened = parquet.ParquetFile(file)
                schema, rows = opened.schema_arrow, opened.metadata.num_rows
            else:
                source = _open_arrow(file)
                schema, rows = source.schema, sum(batch.num_rows for batch in _arrow_batches(source))
        if len(set(schema.names)) < len(schema.names):
            raise TableError(f"{self.place.url!r} names a column twice: {schema.names!r}. Rename one of them.")
        types = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
        return TableFile(self.place.url, rows, hash_place(self.place)), tuple(schema.names), types

    @override
    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        with self.place.open() as opened:
            for offset, batch in self._batches(opened, start):
                low, high = max(start - offset, 0), min(stop - offset, batch.num_rows)
                for first in range(low, high, CHUNK_ROWS):
                    yield Chunk(offset + first, batch=batch.slice(first, min(CHUNK_ROWS, high - first)))
                if offset + batch.num_rows >= stop:
                    return

    def _batches(self, opened: IO[bytes], start: int) -> Iterator[tuple[int, Any]]:
        """Yield the batches that reach `start` or lie behind it, with the number of their first row."""
        if self.format == "arrow":
            return _counted(_arrow_batches(_open_arrow(opened)), 0)
        from pyarrow import parquet

        file = parquet.ParquetFile(opened)
        offset, first = 0, 0
        while offset + (size := file.metadata.row_group(first).num_rows) <= start:
            offset, first = offset + size, first + 1
        groups = range(first, file.metadata.num_row_groups)
        return _counted(file.iter_batches(batch_size=CHUNK_ROWS, row_groups=list(groups)), offset)


def _counted(batches: Iterator[Any], offset: int) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        yield offset, batch
        offset += batch.num_rows


def _open_arrow(file: IO[bytes]) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _arrow_batches(source: Any) -> Iterator[Any]:
    if hasattr(source, "num_record_batches"):
        return (source.get_batch(index) for index in range(source.num_record_batches))
    return iter(source)


def hash_place(place: Place) -> str:
    """Return the sha256 of a file's content as it lies there."""
    with place.open() as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def open_reader(place: Place, format: TableFormat) -> Reader:
    """Return the reader of a file."""
    if format in ("parquet", "arrow"):
        return ColumnarReader(place, format)
    if format in ("csv", "tsv"):
        from prefect_huggingface.tasks.storage.tables.csv_readers import CsvReader

        return CsvReader(place, "\t" if format == "tsv" else ",")
    return JsonLinesReader(place)
