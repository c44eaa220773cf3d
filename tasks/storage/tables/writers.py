"""How the output table is written: the rows of the input with further columns, in the format of the destination.

A writer takes every row that a reader gives: what is wrong with a row or a type is found before.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date, time
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, TableFormat

ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 * 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")


class TableWriter(AbstractContextManager["TableWriter"]):
    """Writes rows of an input and, beside them, further columns.

    `kept` are the columns of the input to write, in order, or None for all that a row has; `added` the further ones.
    """

    _file: IO[Any]

    def __init__(self, kept: Sequence[str] | None, added: Sequence[str]) -> None:
        self.kept, self.added = kept, tuple(added)

    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        """Write the rows of a chunk. `further` holds a `pyarrow` array, for JSONL or a list, for each added column."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    @override
    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLinesWriter(TableWriter):
    """One JSON object per line. NaN and infinities become null, since JSON has none of them.

    Rows of JSONL keep their text, to which the further columns are appended.
    """

    def __init__(self, path: Path, kept: Sequence[str] | None, added: Sequence[str]) -> None:
        super().__init__(kept, added)
        self._file = open(path, "wb")

    @override
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        rows: Sequence[bytes] = chunk.texts
        if self.kept is not None:
            rows = [to_json({name: row[name] for name in self.kept if name in row}) for row in chunk.rows]
        elif not rows:
            rows = [to_json(row) for row in chunk.rows]
        columns = [further[name] for name in self.added]
        added = zip(*(each if isinstance(each, list) else each.to_pylist() for each in columns), strict=True)
        tails = [to_json(dict(zip(self.added, values)))[1:] for values in added]  # noqa: B905
        # An object without a quote has no key.
        lines = [row[:-1] + b"," + tail if b'"' in row else b"{" + tail for row, tail in zip(rows, tails, strict=True)]
        self._file.write(b"\n".join([*lines, b""]))


def to_json(value: Any) -> bytes:
    """Return a value as compact UTF-8 JSON: dates become ISO texts, bytes Base64, unknown types their text."""
    import orjson

    try:
        # orjson 3.13 loses a zero of times with 10 to 99 milliseconds, so that dates and times are written here.
        return orjson.dumps(value, default=_to_plain, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # integers above 64 bits, lone surrogates, keys that are no text
        return json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), default=_to_plain).encode()


def _to_plain(value: Any) -> Any:
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class CsvWriter(TableWriter):
    """Comma-separated values with a header. Lists and structures become JSON; null becomes an empty cell."""

    def __init__(self, path: Path, kept: Sequence[str], added: Sequence[str], delimiter: str = ",") -> None:
        super().__init__(kept, added)
        self._columns = tuple(kept)
        self._file = open(path, "w", encoding="utf-8", newline="")
        # With this line end, a cell with a lone carriage return is quoted too. `write` shortens it.
        self._writer = csv.writer(self, delimiter=delimiter, lineterminator="\r\n")
        self._writer.writerow(_to_cells([*kept, *added]))

    @override
    def write(self, chunk: Chunk | str, further: Mapping[str, Any] | None = None) -> None:
        if isinstance(chunk, str):  # a record of the `csv` module
            self._file.write(chunk[:-2] + "\n")
            return
        columns = [_to_cells([row.get(name) for row in chunk.rows]) for name in self._columns]
        columns += [_to_cells((further or {})[name].to_pylist()) for name in self.added]
        self._writer.writerows(zip(*columns, strict=True))


def _to_cells(values: list[Any]) -> list[Any]:
    kinds = set(map(type, values))
    if kinds <= {int, float, bool, type(None)}:
        return values
    if kinds <= {str, type(None)} and "".join(filter(None, values)).isascii():
        return values
    return [
        to_json(value).decode() if isinstance(value, (dict, list, tuple)) else to_unicode(value) for value in values
    ]


def to_unicode(value: Any) -> Any:
    """Return a text that UTF-8 can hold, with a replacement character for each lone surrogate; others as they are."""
    return _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


class ColumnarWriter(TableWriter):
    """Parquet or Arrow, with the types of the input, `schema`, and those of the further columns, `further`."""

    def __init__(
        self, path: Path, kept: Sequence[str], added: Sequence[str], schema: Any, further: Any, format: TableFormat
    ) -> None:
        import pyarrow as pa

        super().__init__(kept, added)
        self._input = pa.schema([schema.field(name) for name in kept])
        self._schema = pa.schema([*self._input, *(further.field(name) for name in added)])
        self._pending: list[Any] = []
        self._writer = _open_columnar(str(path), self._schema, format)

    @override
    def write(self, chunk: Chunk, further: Mapping[str, Any]) -> None:
        import pyarrow as pa

        if chunk.batch is not None:
            columns = [_as_type(chunk.batch.column(field.name), field.type) for field in self._input]
        else:
            columns = [_to_array([row.get(field.name) for row in chunk.rows], field.type) for field in self._input]
        self._pending.append(pa.table([*columns, *(further[name] for name in self.added)], schema=self._schema))
        if sum(map(len, self._pending)) >= ROW_GROUP_ROWS or sum(t.nbytes for t in self._pending) >= ROW_GROUP_BYTES:
            self._flush()

    @override
    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending = []


def _as_type(column: Any, kind: Any) -> Any:
    """Return a column of a file, which has no type where it has no value, with that of the other files."""
    import pyarrow as pa

    return pa.nulls(len(column), kind) if pa.types.is_null(column.type) else column


def _open_columnar(target: Any, schema: Any, format: TableFormat) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    return parquet.ParquetWriter(target, schema) if format == "parquet" else pa.ipc.new_file(target, schema)


def _to_array(values: list[Any], kind: Any) -> Any:
    """Return values of JSON or CSV as an array of the type that was found for their column."""
    import pyarrow as pa

    if pa.types.is_string(kind) and not set(map(type, values)) <= {str, type(None)}:
        values = [value if value is None or isinstance(value, str) else to_json(value).decode() for value in values]
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([to_unicode(value) for value in values], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # An integer within a list that a floating-point number does not hold exactly.
        return pa.array([json.loads(to_json(value), parse_int=float) for value in values], kind)


def check_types(schema: Any, format: TableFormat) -> list[str]:
    """Return the columns whose types a format cannot hold."""
    import pyarrow as pa

    def fits(field: Any) -> bool:
        if "dictionary<" in str(field.type):  # within lists; each batch has its own, which a file cannot hold
            return False
        try:
            with _open_columnar(io.BytesIO(), pa.schema([field]), format) as writer:
                writer.write_table(pa.table([pa.nulls(1, field.type)], schema=pa.schema([field])))
        except (pa.ArrowException, OSError):
            return False
        return True

    return [field.name for field in schema if not fits(field)] if format in ("parquet", "arrow") else []


def open_writer(
    path: Path, format: TableFormat, kept: Sequence[str] | None, added: Sequence[str], schema: Any, further: Any
) -> TableWriter:
    """Return the writer of a format.

    Args:
        path: Local file to write.
        format: Format of the file.
        kept: Columns of the input to write, in order, or None for all (in JSONL for all that a row has).
        added: Names of the further columns.
        schema: `pyarrow` types of the columns of the input; JSONL needs none.
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
