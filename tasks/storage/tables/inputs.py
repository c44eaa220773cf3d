"""Input tables: JSONL, JSON, CSV, Parquet and Arrow files, alone or many, read in order and in small pieces.

A table is looked at once before the work starts (`inspect_table`): every row is read, so that what is wrong with a file
is known before a model is loaded. It is then read in chunks, from any row on, so that memory does not grow with its
rows.
"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.files import open_scratch_database
from prefect_huggingface.tasks.storage.places import Place, find_places, is_pattern

TableFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "openai"]

SUFFIXES: dict[str, TableFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".pq": "parquet", ".parq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
DATASET_FILES = {"dataset_info.json", "state.json"}  # beside the data in a folder of `datasets.save_to_disk`

CHUNK_ROWS = 1024
CHUNK_BYTES = 4 * 2**20


class SourceOptions(BaseModel):
    """How text files of an input are read, where that cannot be guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="Character between the cells of a CSV file, such as ;."
    )
    encoding: str | None = Field(default=None, description="Encoding of text files, such as cp1252 or utf-16-le.")

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, name: str | None) -> str | None:
        try:
            return name and codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"`encoding` {name!r} is not known. Use one that Python knows, such as cp1252.") from None


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of a table.

    Attributes:
        url: Where it is.
        rows: Number of rows.
        digest: Hash of its content.
        layout: How it is read where that is not the usual way: compression, encoding, delimiter, partition and so on.
        marks: Row number, line number and byte offset of some rows, to start reading there.
    """

    url: str
    rows: int
    digest: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    marks: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """An input that was looked at: its files in order, their format, all columns, and the number of rows.

    Attributes:
        types: The `pyarrow` schema that all rows fit, in base64, where the files do not tell it (JSON).
    """

    source: str
    format: TableFormat
    files: tuple[TableFile, ...]
    columns: tuple[str, ...]
    types: str = ""

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Table:
        """Return the table of a record that `dataclasses.asdict` made, also after a way through JSON."""
        files = tuple(
            TableFile(**{**file, "marks": tuple(tuple(mark) for mark in file["marks"])}) for file in record["files"]
        )
        return cls(**{**record, "files": files, "columns": tuple(record["columns"])})


class Chunk:
    """Some rows of a table, in order.

    Attributes:
        first: Number of the first row in the table, from 0.
        problems: What is wrong with the rows that could not be read, by their place in the chunk.
        batch: The rows as a `pyarrow.RecordBatch`, where the format has types.
        lines: Line of each row in its file, where the format has lines.
        origin: Line and byte offset in its file at which reading can start with this chunk.
    """

    __slots__ = ("_make", "_rows", "_size", "batch", "first", "lines", "origin", "problems")

    def __init__(
        self,
        first: int,
        size: int,
        make: Callable[[], list[dict[str, Any]]],
        batch: Any = None,
        lines: Sequence[int] = (),
        problems: dict[int, str] | None = None,
    ) -> None:
        self.first, self.batch, self.lines = first, batch, lines
        self.problems = problems or {}
        self.origin: tuple[int, int] | None = None
        self._size, self._make = size, make
        self._rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries. One that could not be read holds what could be read of it."""
        if self._rows is None:
            self._rows = self._make()
        return self._rows

    def where(self, place: int) -> str:
        """Return where a row of the chunk is, for a message."""
        return f"line {self.lines[place]}" if self.lines else f"row {self.first + place + 1}"

    def part(self, start: int, stop: int) -> Chunk:
        """Return the chunk without the rows before `start` and from `stop` on, numbered as the chunk is."""
        low, high = max(start - self.first, 0), min(stop - self.first, self._size)
        if (low, high) == (0, self._size):
            return self
        problems = {place - low: text for place, text in self.problems.items() if low <= place < high}
        batch = None if self.batch is None else self.batch.slice(low, high - low)
        return Chunk(
            self.first + low, high - low, lambda: self.rows[low:high], batch, self.lines[low:high], problems
        )  # fmt: skip


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


def inspect_table(
    source: str, format: TableFormat | None = None, options: SourceOptions | Mapping[str, Any] | None = None
) -> Table:
    """Read an input once: count its rows, hash its files, find its columns and their types.

    Args:
        source: File, folder, glob pattern, or fsspec URL of one. Folders named `column=value` are columns.
        format: Format of the files; None for what their names and their content tell.
        options: How text files are read; what is left out is guessed where that is safe, and logged.

    Raises:
        TableError: If there is nothing, a file cannot be read, or the files do not go together.
    """
    from prefect_huggingface.tasks.storage.tables.layouts import find_layout
    from prefect_huggingface.tasks.storage.tables.readers import ColumnTypes, open_reader

    options = SourceOptions.model_validate(options or {})
    places = _choose_files(source, format)
    formats = {format or get_format(place.name)[0] for place in places}
    if not formats - {"json", "jsonl"}:  # which of them a file is, its content tells
        found: TableFormat = "jsonl"
    elif len(formats) > 1:
        raise TableError(f"{source!r} holds files of several formats: {sorted(formats)!r}. Keep one of them.")
    else:
        (found,) = formats
    files: list[TableFile] = []
    columns: tuple[str, ...] = ()
    kinds: Any = None
    types = ColumnTypes(nested=found != "openai")
    for place in places:
        layout = find_layout(place, format or get_format(place.name)[0], options, guess=format is None)
        layout |= {"partition": partition} if (partition := _partition_of(source, place)) else {}
        try:
            file, file_columns, file_kinds = open_reader(place, found, layout).inspect(types)
        except TableError:
            raise
        except Exception as exc:
            raise TableError(f"{place.url!r} cannot be read as {found}: {exc}. Check the file.") from None
        if files:
            _check_same(places[0], columns, kinds, place, file_columns, file_kinds)
        else:
            columns, kinds = file_columns, file_kinds
        files.append(file)
    text = base64.b64encode(types.schema().serialize()).decode() if found == "jsonl" else ""
    table = Table(source, found, tuple(files), columns or tuple(types.columns), text)
    if table.rows == 0:
        raise TableError(f"{source!r} has no rows. Give a file with at least one row.")
    return table


def _choose_files(source: str, format: TableFormat | None) -> list[Place]:
    """Return the files of an input, without what other tools put beside the data."""
    folder, places = Place.of(source), find_places(source)
    if any(place.name == "dataset_dict.json" for place in places):
        parts = [name for name in folder.names() if folder.child(name).is_folder()]
        raise TableError(f"{source!r} holds several datasets, {parts!r}. Give the folder of one of them.")
    if not places or not all(place.exists() for place in places):
        raise TableError(f"{source!r} holds no file to read. Correct the path, or create the file first.")
    if not folder.is_folder():
        return places
    if {place.name for place in places} >= DATASET_FILES:
        places = [place for place in places if place.name not in DATASET_FILES]
    known = places if format else [place for place in places if _is_table(place.name)]
    if known and len(known) < len(places):
        left = [place.name for place in places if place not in known]
        run_log().info("Files of %r that are no tables are left out: %s.", source, ", ".join(map(repr, left)))
    return known or places


def _is_table(name: str) -> bool:
    try:
        return bool(get_format(name))
    except TableError:
        return False


def _partition_of(source: str, place: Place) -> dict[str, str | None]:
    """Return the columns that the folders between an input and its file tell, as Hive and Spark write them."""
    root = Place.of(source).url
    root = re.split(r"[*?\[]", root)[0].rpartition("/")[0] if is_pattern(source) else root
    parts = [part.partition("=") for part in place.url[len(root) :].split("/")[:-1] if "=" in part]
    values = {unquote(name): unquote(value) for name, _, value in parts}
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else value for name, value in values.items()}


def _check_same(first: Place, columns: tuple[str, ...], kinds: Any, place: Place, others: Any, other: Any) -> None:
    if kinds is None:  # rows of JSONL need not have the same columns
        return
    if tuple(columns) != tuple(others):
        different = sorted(set(columns) ^ set(others)) or list(others)
        raise TableError(
            f"{place.url!r} has other columns than {first.url!r}: {different!r} differ. "
            "Give all files the same columns in the same order."
        )
    if kinds != other:
        raise TableError(
            f"{place.url!r} has other column types than {first.url!r}: {other!r}, not {kinds!r}. Convert the file."
        )


def get_schema(table: Table) -> Any:
    """Return the `pyarrow` types of all columns of a table. CSV columns are text."""
    import pyarrow as pa

    from prefect_huggingface.tasks.storage.tables.readers import open_reader

    if table.types:
        return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(table.types)))
    if table.format in ("parquet", "arrow"):
        first = table.files[0]
        return open_reader(Place(first.url), table.format, first.layout).schema()
    return pa.schema([(name, pa.string()) for name in table.columns])


def check_unchanged(table: Table) -> None:
    """Check that the local files of a table have the content that they had when it was looked at.

    Remote files are not read once more for this; their number of rows is checked while they are read.

    Raises:
        TableError: If one has changed.
    """
    from prefect_huggingface.tasks.storage.tables.layouts import hash_place

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
            for chunk in open_reader(Place(file.url), table.format, file.layout).read(file, low, high):
                expected = chunk.first + len(chunk)
                chunk.first += offset
                yield chunk
            if expected != high:
                raise TableError(f"{file.url!r} has changed while it was read. Start again with a file that stays.")
        offset += file.rows


def find_duplicates(table: Table, column: str) -> Iterator[tuple[int, str, Any]]:
    """Yield the number, the place and the id of every row whose id an earlier row has, with flat memory.

    Rows without an id are left out.
    """
    with closing(open_scratch_database()) as base:
        base.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        base.execute("BEGIN")
        for chunk in read_chunks(table):
            for place, row in enumerate(chunk.rows):
                value = row.get(column)
                if value is None or value != value:
                    continue
                text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
                if base.execute("INSERT OR IGNORE INTO ids VALUES (?)", (text,)).rowcount == 0:
                    yield chunk.first + place, chunk.where(place), value
