"""How CSV files are read: as text, with a problem for each row that does not fit the header."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import IO, Any

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import CHUNK_BYTES, CHUNK_ROWS, Chunk, TableFile
from prefect_huggingface.tasks.storage.tables.readers import Reader, hash_place

MAX_CELL = 2**31 - 1


class CsvReader(Reader):
    """Comma-separated values with a header. Every cell is text, exactly as it is written."""

    def __init__(self, place: Place, delimiter: str = ",") -> None:
        super().__init__(place)
        self.delimiter = delimiter

    @override
    def inspect(self) -> tuple[TableFile, tuple[str, ...], Any]:
        columns, rows = None, 0
        with self._records() as records:
            columns = self._header(records)
            rows = sum(1 for _ in _recovering(records))
        digest = hash_place(self.place)
        return TableFile(self.place.url, rows, digest), columns, "text"

    @override
    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        with self._records() as records:
            columns = self._header(records)
            chunk, size = Chunk(start, []), 0
            for number, cells in enumerate(_recovering(records)):
                if number < start:
                    continue
                if number >= stop:
                    break
                problem = _csv_problem(cells, len(columns))
                if problem:
                    chunk.problems[len(chunk.rows)] = f"Row {number + 1} of {self.place.name!r} {problem}"
                chunk.rows.append({} if problem else dict(zip(columns, cells, strict=True)))
                size += sum(map(len, cells)) if isinstance(cells, list) else 0
                if len(chunk.rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = Chunk(number + 1, []), 0
            if chunk.rows:
                yield chunk

    def _records(self) -> _CsvFile:
        return _CsvFile(self.place.open(self.compression()), self.delimiter)

    def _header(self, records: Iterator[list[str]]) -> tuple[str, ...]:
        try:
            header = tuple(next(records))
        except StopIteration:
            raise TableError(f"{self.place.url!r} is empty. Give a file with a header and at least one row.") from None
        if len(set(header)) < len(header):
            raise TableError(f"{self.place.url!r} names a column twice: {list(header)!r}. Rename one of them.")
        return header


class _CsvFile:
    """The records of an open CSV file, as a context manager."""

    def __init__(self, raw: IO[bytes], delimiter: str) -> None:
        self._text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._delimiter = delimiter

    def __enter__(self) -> Iterator[list[str]]:
        # The limit is one number per process; the module's default would refuse cells above 128 KB.
        csv.field_size_limit(MAX_CELL)
        return csv.reader(self._text, delimiter=self._delimiter, strict=True)

    def __exit__(self, *_: object) -> None:
        self._text.close()


def _recovering(records: Iterator[list[str]]) -> Iterator[list[str] | str]:
    """Yield the records that are not empty lines, and the text of the error for those that cannot be read."""
    while True:
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as exc:
            yield str(exc)
            continue
        if cells:
            yield cells


def _csv_problem(cells: list[str] | str, width: int) -> str | None:
    if isinstance(cells, str):
        return f"is no CSV: {cells}. Correct its quotes."
    if len(cells) != width:
        return f"has {len(cells)} cells where the header has {width}. Correct the row."
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "is not UTF-8. Convert the file."
    return None
