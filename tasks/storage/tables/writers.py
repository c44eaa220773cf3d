"""How the output table is written: the rows of the input with further columns, in the format of the destination."""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, TableFormat

ROW_GROUP_ROWS = 65_536


class TableWriter(ABC):
    """Writes rows of an input and, beside them, further columns.

    Args:
        path: Local file to write.
        kept: Columns of the input to write, in order, or None for all that a row has.
        added: Names of the further columns.
    """

    def __init__(self, path: Path, kept: Sequence[str] | None, added: Sequence[str]) -> None:
        self.path, self.kept, self.added = path, kept, tuple(added)

    @abstractmethod
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        """Write the rows of a chunk. `further` holds a `pyarrow` array as long as the chunk for each added column."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _added_rows(self, further: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        return zip(*(further[name].to_pylist() for name in self.added), strict=True)


class JsonLinesWriter(TableWriter):
    """One JSON object per line. NaN and infinities become null, since JSON has none of them."""

    def __init__(self, path: Path, kept: Sequence[str] | None, added: Sequence[str]) -> None:
        super().__init__(path, kept, added)
        self._file: IO[bytes] = open(path, "wb")

    @override
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        lines = []
        for row, values in zip(chunk.rows, self._added_rows(further), strict=True):
            kept = row if self.kept is None else {name: row[name] for name in self.kept if name in row}
            lines.append(to_json({**kept, **dict(zip(self.added, values, strict=True))}))
        lines.append(b"")
        self._file.write(b"\n".join(lines))

    @override
    def close(self) -> None:
        self._file.close()


def to_json(value: Any) -> bytes:
    """Return a value as compact UTF-8 JSON; dates become ISO texts and unknown types their text."""
    import orjson

    try:
        return orjson.dumps(value, default=str)
    except TypeError:  # integers above 64 bits, lone surrogates, keys that are no text
        return json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), default=str).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class CsvWriter(TableWriter):
    """Comma-separated values with a header. Lists and structures become JSON; null becomes an empty cell."""

    def __init__(self, path: Path, kept: Sequence[str], added: Sequence[str], delimiter: str = ",") -> None:
        super().__init__(path, kept, added)
        self._columns = tuple(kept)
        self._file = open(path, "w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, delimiter=delimiter, lineterminator="\n")
        self._writer.writerow((*kept, *added))

    @override
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        for row, values in zip(chunk.rows, self._added_rows(further), strict=True):
            self._writer.writerow([*map(_cell, map(row.get, self._columns)), *map(_cell, values)])

    @override
    def close(self) -> None:
        self._file.close()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        # A surrogate stands for a byte that is not UTF-8; it cannot be written.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    return to_json(value).decode() if isinstance(value, (dict, list, tuple)) else value


class ColumnarWriter(TableWriter):
    """Parquet or Arrow, with the types of the input.

    Args:
        path: Local file to write.
        kept: Columns of the input to write, in order.
        added: Names of the further columns.
        schema: Types of the kept columns.
        further: Types of the further columns.
        format: "parquet" or "arrow".
    """

    def __init__(
        self, path: Path, kept: Sequence[str], added: Sequence[str], schema: Any, further: Any, format: TableFormat
    ) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        super().__init__(path, kept, added)
        self._input = pa.schema([schema.field(name) for name in kept])
        self._schema = pa.schema([*self._input, *(further.field(name) for name in added)])
        self._pending: list[Any] = []
        self._pending_rows = self._pending_bytes = 0
        if format == "parquet":
            self._writer = parquet.ParquetWriter(path, self._schema)
        else:
            self._writer = pa.ipc.new_file(str(path), self._schema)

    @override
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        import pyarrow as pa

        batch = chunk.batch
        if batch is None:
            batch = pa.RecordBatch.from_pylist([self._typed(row) for row in chunk.rows], schema=self._input)
        columns = [*(batch.column(name) for name in self._input.names), *(further[name] for name in self.added)]
        table = pa.table(columns, schema=self._schema)
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self._pending_bytes += table.nbytes
        if self._pending_rows >= ROW_GROUP_ROWS or self._pending_bytes >= 64 * 2**20:
            self._flush()

    @override
    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def _typed(self, row: dict[str, Any]) -> dict[str, Any]:
        import pyarrow as pa

        typed = {}
        for field in self._input:
            value = row.get(field.name)
            if value is not None and pa.types.is_string(field.type) and not isinstance(value, str):
                value = to_json(value).decode()
            typed[field.name] = value
        return typed


def open_writer(
    path: Path, format: TableFormat, kept: Sequence[str] | None, added: Sequence[str], schema: Any, further: Any
) -> TableWriter:
    """Return the writer of a format.

    Args:
        path: Local file to write.
        format: Format of the file.
        kept: Columns of the input to write, or None for all that a row has (JSONL only).
        added: Names of the further columns.
        schema: `pyarrow` types of the columns of the input; only Parquet and Arrow need them.
        further: `pyarrow` types of the further columns.
    """
    if format == "jsonl":
        return JsonLinesWriter(path, kept, added)
    names = tuple(schema.names) if kept is None else tuple(kept)
    if format in ("csv", "tsv"):
        return CsvWriter(path, names, added, "\t" if format == "tsv" else ",")
    if format in ("parquet", "arrow"):
        return ColumnarWriter(path, names, added, schema, further, format)
    raise TableError(f"A table cannot be written as {format!r}. Choose jsonl, csv, parquet or arrow.")
