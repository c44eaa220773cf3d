"""Input tables: JSONL, CSV, Parquet and Arrow files, alone or many, read in order and in small pieces.

A table is looked at once before the work starts (`inspect_table`): its rows are counted, its content is hashed and its
columns are compared. It is then read in chunks, from any row on, so that memory does not grow with its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.places import Place, find_places

TableFormat = Literal["jsonl", "csv", "tsv", "parquet", "arrow", "openai"]

SUFFIXES: dict[str, TableFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

CHUNK_ROWS = 1024
CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of a table.

    Attributes:
        url: Where it is.
        rows: Number of rows.
        digest: Hash of its content.
        marks: Row number and byte offset of some rows, to start reading there.
    """

    url: str
    rows: int
    digest: str
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """An input that was looked at: its files in order, their format, the columns, and the number of rows.

    The columns of JSONL are those of its first rows; each row may have others.
    """

    source: str
    format: TableFormat
    files: tuple[TableFile, ...]
    columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)


class Chunk:
    """Some rows of a table, in order.

    Attributes:
        first: Number of the first row in the table, from 0.
        problems: What is wrong with the rows that could not be read, by their place in the chunk.
        batch: The rows as a `pyarrow.RecordBatch`, where the format has types.
    """

    __slots__ = ("_rows", "batch", "first", "problems")

    def __init__(self, first: int, rows: list[dict[str, Any]] | None = None, batch: Any = None) -> None:
        self.first = first
        self.problems: dict[int, str] = {}
        self.batch = batch
        self._rows = rows

    def __len__(self) -> int:
        return int(self.batch.num_rows) if self._rows is None else len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries. A row that could not be read is empty."""
        if self._rows is None:
            self._rows = self.batch.to_pylist()
        return self._rows


def get_format(name: str) -> tuple[TableFormat, str | None]:
    """Return the format and the compression that a file's name tells.

    Raises:
        TableError: If the name tells none.
    """
    stem, compression = name.lower(), None
    for suffix, kind in COMPRESSIONS.items():
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), kind
    for suffix, format in SUFFIXES.items():
        if stem.endswith(suffix):
            return format, compression
    raise TableError(
        f"The format of {name!r} is not known. Use one of {', '.join(sorted(SUFFIXES))} as the end of its name, "
        f"or name the format: {', '.join(get_args(TableFormat))}."
    )


def inspect_table(source: str, format: TableFormat | None = None) -> Table:
    """Count, hash and compare the files of an input.

    Args:
        source: File, folder, glob pattern, or fsspec URL of one.
        format: Format of the files; None for what their names tell.

    Raises:
        TableError: If there is nothing, a file cannot be read, or the files do not go together.
    """
    from prefect_huggingface.tasks.storage.tables.readers import open_reader

    places = find_places(source)
    if not places or not all(place.exists() for place in places):
        raise TableError(f"{source!r} holds no file to read. Correct the path, or create the file first.")
    formats = {format or get_format(place.name)[0] for place in places}
    if len(formats) > 1:
        raise TableError(f"{source!r} holds files of several formats: {sorted(formats)!r}. Keep one of them.")
    (found,) = formats
    files: list[TableFile] = []
    columns: tuple[str, ...] = ()
    schema = None
    for place in places:
        reader = open_reader(place, found)
        try:
            file, file_columns, file_schema = reader.inspect()
        except TableError:
            raise
        except Exception as exc:
            raise TableError(f"{place.url!r} cannot be read as {found}: {exc}. Check the file.") from None
        if files:
            _check_same(places[0], columns, schema, place, file_columns, file_schema)
        else:
            columns, schema = file_columns, file_schema
        files.append(file)
    table = Table(source, found, tuple(files), columns)
    if table.rows == 0:
        raise TableError(f"{source!r} has no rows. Give a file with at least one row.")
    return table


def _check_same(first: Place, columns: tuple[str, ...], schema: Any, place: Place, others: Any, other: Any) -> None:
    if schema is None:  # rows of JSONL need not have the same columns
        return
    if tuple(columns) != tuple(others):
        different = sorted(set(columns) ^ set(others)) or list(others)
        raise TableError(
            f"{place.url!r} has other columns than {first.url!r}: {different!r} differ. "
            "Give all files the same columns in the same order."
        )
    if schema != other:
        raise TableError(
            f"{place.url!r} has other column types than {first.url!r}: {other!r}, not {schema!r}. Convert the file."
        )


def check_unchanged(table: Table) -> None:
    """Check that the local files of a table have the content that they had when it was looked at.

    Remote files are not read once more for this; their number of rows is checked while they are read.

    Raises:
        TableError: If one has changed.
    """
    from prefect_huggingface.tasks.storage.tables.readers import hash_place

    for file in table.files:
        place = Place(file.url)
        if place.is_local and hash_place(place) != file.digest:
            raise TableError(f"{file.url!r} has changed since the batch began. Put it back, or start a new batch.")


def read_chunks(table: Table, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Yield the rows of a table from `start` up to, and without, `stop`.

    Raises:
        TableError: If a file has changed since it was looked at.
    """
    from prefect_huggingface.tasks.storage.tables.readers import open_reader

    stop = table.rows if stop is None else min(stop, table.rows)
    offset = 0
    for file in table.files:
        low, high = max(start - offset, 0), min(stop - offset, file.rows)
        if low < high:
            expected = low
            for chunk in open_reader(Place(file.url), table.format).read(file, low, high):
                expected = chunk.first + len(chunk)
                chunk.first += offset
                yield chunk
            if expected != high:
                raise TableError(f"{file.url!r} has changed while it was read. Start again with a file that stays.")
        offset += file.rows
