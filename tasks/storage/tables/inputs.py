"""Input tables: JSONL, JSON, CSV, Parquet and Arrow files, alone or many, read in order and in small pieces.

A table is looked at once before the work starts (`inspect_table`): every row is read, so that what is wrong with a file
is known before a model is loaded. It is then read in chunks, from any row on, so that memory does not grow with its
rows. How its text lies in a file (compression, encoding, delimiter) is guessed where a guess is safe.
"""

from __future__ import annotations

import base64
import codecs
import csv
import io
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import IO, Any, Literal, get_args
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.run_logs import redact, run_log
from prefect_huggingface.tasks.storage.files import open_scratch_database
from prefect_huggingface.tasks.storage.places import Place, find_places, is_pattern

TableFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "openai"]
Rows = range | tuple[int, ...]
"""Numbers of rows, in ascending order: all of them, the first ones, or some that were drawn."""

SUFFIXES: dict[str, TableFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".pq": "parquet", ".parq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
DATASET_FILES = {"dataset_info.json", "state.json"}  # beside the data in a folder of `datasets.save_to_disk`

CHUNK_ROWS = 1024
CHUNK_BYTES = 4 * 2**20
BLOCK_BYTES = 2**20
SAMPLE_BYTES = 2**16  # what is looked at to find out what a file is
SAMPLE_RECORDS = 20
MAGIC = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow file",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook", b"%PDF": "a PDF file", b"SQLite": "an SQLite database",
    b"<!DOCTYPE": "an HTML page", b"<html": "an HTML page", b"version https://git-lfs": "a pointer of Git LFS",
}  # fmt: skip
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})({'|'.join(map(re.escape, COMPRESSIONS))})?$")
_SEPARATOR_LINE = re.compile(r'^"?sep=(.)"?[\r\n]+')


class SourceOptions(BaseModel):
    """How text files of an input are read, where that cannot be guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between the cells of a CSV file, such as ;."""
    encoding: str | None = None
    """Encoding of text files, such as cp1252 or utf-16-le."""

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
        digest: Hash of its content.
        layout: How it is read where that is not the usual way: compression, encoding, delimiter, partition and so on.
        marks: Row number, line number and byte offset of some rows, to start reading there.
        bad_rows: Number of rows that cannot be read.
        version: What its store says of the content, see `Place.version`.
    """

    url: str
    rows: int
    digest: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    marks: tuple[tuple[int, int, int], ...] = ()
    bad_rows: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """An input that was looked at: its files in order, their format, all columns, and the number of rows.

    Attributes:
        types: The `pyarrow` schema that all rows fit, in base64; CSV has none.
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


@dataclass
class Chunk:
    """Some rows of a table, in order.

    Attributes:
        first: Number of the first row in the table, from 0.
        make: Makes the rows when they are asked for.
        batch: The rows as a `pyarrow.RecordBatch`, where the format has types.
        lines: Line of each row in its file, where the format has lines.
        problems: What is wrong with the rows that could not be read, by their place in the chunk.
        texts: The rows as JSON objects, where they are written so in the file.
        origin: Line and byte offset in its file at which reading can start with this chunk.
    """

    first: int
    size: int
    make: Callable[[], list[dict[str, Any]]]
    batch: Any = None
    lines: Sequence[int] = ()
    problems: dict[int, str] = field(default_factory=dict)
    texts: Sequence[bytes] = ()
    origin: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.size

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as dictionaries. One that could not be read holds what could be read of it."""
        return self.make()

    def part(self, start: int, stop: int) -> Chunk:
        """Return the chunk without the rows before `start` and from `stop` on, numbered as the chunk is."""
        low, high = max(start - self.first, 0), min(stop - self.first, self.size)
        if (low, high) == (0, self.size):
            return self
        problems = {place - low: text for place, text in self.problems.items() if low <= place < high}
        batch = None if self.batch is None else self.batch.slice(low, high - low)
        return Chunk(
            self.first + low, high - low, lambda: self.rows[low:high], batch, self.lines[low:high], problems,
            self.texts[low:high],
        )  # fmt: skip


def get_format(name: str) -> tuple[TableFormat, str | None]:
    """Return the format and the compression that a file's name tells.

    Raises:
        TableError: If the name tells none.
    """
    if found := _SUFFIX.search(name.lower()):
        return SUFFIXES[found[1]], COMPRESSIONS.get(found[2])
    raise TableError(
        f"The format of {name!r} is not known. Use one of {', '.join(sorted(SUFFIXES))} as the end of its name, "
        f"or name the format: {', '.join(get_args(TableFormat))}."
    )


def find_formats(source: str) -> set[TableFormat]:
    """Return the formats that the names of the files of an input tell."""
    return {SUFFIXES[found[1]] for place in find_places(source) if (found := _SUFFIX.search(place.name.lower()))}


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
    from prefect_huggingface.tasks.storage.tables.readers import ColumnTypes, open_reader

    options = SourceOptions.model_validate(options or {})
    places = _choose_files(source, format)
    found = _choose_format(source, {format or get_format(place.name)[0] for place in places})
    # The files of a pattern lie below the folder before its first wildcard.
    root = Place.of(source).url
    root = re.split(r"[*?\[]", root)[0].rpartition("/")[0] if is_pattern(source) else root
    types, first, files = ColumnTypes(), None, []
    for place in places:
        layout = find_layout(place, format or get_format(place.name)[0], options, guess=format is None)
        layout |= {"partition": partition} if (partition := _partition_of(root, place)) else {}
        reader = open_reader(place, found, layout)
        try:
            version = place.version()
            file = replace(reader.inspect(types), version=version)
        except TableError:
            raise
        except Exception as exc:
            raise TableError(f"{place.url!r} cannot be read as {found}: {exc}. Check the file.") from None
        if found in ("csv", "tsv") and not reader.columns:
            run_log().info("%r is empty and is left out.", place.name)
            continue
        files.append(file)
        first = first or reader
        _check_same(first, reader)
    if first is None:
        raise TableError(f"{source!r} is empty. Give a file with a header and at least one row.")
    schema = types.schema() if found == "jsonl" else first.schema
    text = "" if schema is None else base64.b64encode(schema.serialize()).decode()
    table = Table(source, found, tuple(files), first.columns or tuple(types.types), text)
    if table.rows == 0:
        raise TableError(f"{source!r} has no rows. Give a file with at least one row.")
    return table


def _choose_files(source: str, format: TableFormat | None) -> list[Place]:
    """Return the files of an input, without what other tools put beside the data."""
    folder, places = Place.of(source), find_places(source)
    if any(place.name == "dataset_dict.json" for place in places):
        parts = [name for name in folder.names() if folder.child(name).is_folder()]
        raise TableError(f"{source!r} holds several datasets, {parts!r}. Give the folder of one of them.")
    if not places or (places == [folder] and not folder.exists()):
        raise TableError(f"{source!r} holds no file to read. Correct the path, or create the file first.")
    if not folder.is_folder():
        return places
    if {place.name for place in places} >= DATASET_FILES:
        places = [place for place in places if place.name not in DATASET_FILES]
    known = places if format else [place for place in places if _SUFFIX.search(place.name.lower())]
    if known and len(known) < len(places):
        left = [place.name for place in places if place not in known]
        run_log().info("Files of %r that are no tables are left out: %s.", source, ", ".join(map(repr, left)))
    return known or places


def _choose_format(source: str, formats: set[TableFormat]) -> TableFormat:
    if not formats - {"json", "jsonl"}:  # which of them a file is, its content tells
        return "jsonl"
    if len(formats) > 1:
        raise TableError(f"{source!r} holds files of several formats: {sorted(formats)!r}. Keep one of them.")
    return formats.pop()


def _partition_of(root: str, place: Place) -> dict[str, str | None]:
    """Return the columns that the folders between an input and its file tell, as Hive and Spark write them."""
    parts = [part.partition("=") for part in place.url[len(root) :].split("/")[:-1] if "=" in part]
    values = {unquote(name): unquote(value) for name, _, value in parts}
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else value for name, value in values.items()}


def _check_same(first: Any, other: Any) -> None:
    """Check that the files of two readers go together. Rows of JSONL need not have the same columns.

    A column without a value has no type in its file. The first reader gets that of another file for it.
    """
    import pyarrow as pa

    if first.columns != other.columns:
        different = sorted({*first.columns} ^ {*other.columns}) or list(other.columns)
        raise TableError(
            f"{other.place.url!r} has other columns than {first.place.url!r}: {different!r} differ. "
            "Give all files the same columns in the same order."
        )
    for index, (known, found) in enumerate(zip(first.schema or (), other.schema or (), strict=True)):
        if pa.types.is_null(known.type):
            first.schema = first.schema.set(index, found)
        elif not pa.types.is_null(found.type) and str(known.type) != str(found.type):
            raise TableError(
                f"{other.place.url!r} has other column types than {first.place.url!r}: {known.name!r} is {found.type}, "
                f"not {known.type}. Convert the file."
            )


def get_schema(table: Table) -> Any:
    """Return the `pyarrow` types of all columns of a table. CSV columns are text."""
    import pyarrow as pa

    if table.types:
        return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(table.types)))
    return pa.schema([(name, pa.string()) for name in table.columns])


def check_unchanged(table: Table) -> None:
    """Check that the files of a table have the content that they had when it was looked at.

    Remote files are not read once more for this: their store says whether they have changed.

    Raises:
        TableError: If one has changed.
    """
    for file in table.files:
        _check_version(replace(file, version="") if Place(file.url).is_local else file)


def _check_version(file: TableFile) -> TableFile:
    """Return the file as it is now. One of this machine that was touched, or copied, may have the same content."""
    place = Place(file.url)
    with suppress(FileNotFoundError):
        version = place.version()
        if version == file.version or (place.is_local and place.digest() == file.digest):
            return replace(file, version=version)
    raise _changed(file)


def _changed(file: TableFile) -> TableError:
    return TableError(f"{redact(file.url)!r} has changed since the batch began. Put it back, or start a new batch.")


def read_chunks(table: Table, rows: Rows | None = None, each: bool = False) -> Iterator[Chunk]:
    """Yield the rows of a table: all, those of a range, or some that were drawn, of which each is a chunk.

    That a file has not changed is checked at its end, or with `each` before each chunk is yielded, so that no row is
    ever of another content than that which was looked at.

    Raises:
        TableError: If a file has changed since it was looked at.
    """
    rows = range(table.rows) if rows is None else rows
    if isinstance(rows, range):
        yield from _read_range(table, rows, each)
        return
    for chunk in _read_range(table, range(rows[0], rows[-1] + 1), each):
        for row in rows[bisect_left(rows, chunk.first) : bisect_left(rows, chunk.first + len(chunk))]:
            yield chunk.part(row, row + 1)


def _read_range(table: Table, rows: range, each: bool) -> Iterator[Chunk]:
    from prefect_huggingface.tasks.storage.tables.readers import open_reader

    offset = 0
    for file in table.files:
        low, high = max(rows.start - offset, 0), min(rows.stop - offset, file.rows)
        if low < high:
            expected = low
            try:
                for chunk in open_reader(Place(file.url), table.format, file.layout).read(file, low, high):
                    if each:
                        file = _check_version(file)
                    expected = chunk.first + len(chunk)
                    chunk.first += offset
                    yield chunk
            except Exception:  # that of a reader who finds another file
                _check_version(file)
                raise
            _check_version(file)
            if expected != high:
                raise _changed(file)
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
                    where = f"line {chunk.lines[place]}" if chunk.lines else f"row {chunk.first + place + 1}"
                    yield chunk.first + place, where, value


def find_layout(place: Place, format: TableFormat, options: SourceOptions, guess: bool = True) -> dict[str, Any]:
    """Return how a file is read where that is not the usual way, from its first bytes; guesses are logged.

    With `guess`, what is called JSON lines may turn out to be an array or indented objects, and the other way round.

    Raises:
        TableError: If the file is something else.
    """
    if options.delimiter and format not in ("csv", "tsv"):
        raise TableError(f"`delimiter` {options.delimiter!r} is for CSV files, but {place.url!r} is {format}. Drop it.")
    if options.encoding and format in ("parquet", "arrow"):
        raise TableError(f"`encoding` {options.encoding!r} is for text files, but {place.url!r} is {format}. Drop it.")
    head, packed = _read_head(place, format)
    layout: dict[str, Any] = {"compression": packed} if packed else {}
    if format in ("parquet", "arrow"):
        what = _describe(head) or packed
        if what and what.split()[1:2] != [format.title()]:
            raise TableError(f"{place.url!r} is {what}, not {format}. Correct its name, or the file.")
        return {}
    if encoding := options.encoding or next((e for mark, e in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None):
        layout |= {"encoding": encoding} if encoding != "utf-8" else {}
    elif what := _describe(head):
        raise TableError(f"{place.url!r} is {what}, not {format}. Correct its name, convert it, or get it again.")
    whole = len(head) < SAMPLE_BYTES
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")("replace")
    text = decoder.decode(head, final=whole).removeprefix("\ufeff")
    layout |= _find_form(place, format, text, whole, options, guess)
    _log_guesses(place, layout, options)
    return layout


def _read_head(place: Place, format: TableFormat) -> tuple[bytes, str | None]:
    """Return the first bytes of a file, unpacked, and how it is packed."""
    packed = None
    try:
        with place.open() as file:
            head = file.read(16)
        packed = next((name for magic, name in PACKED.items() if head.startswith(magic)), None)
        with open_bytes(place, {"compression": packed}, ahead=False) as stream:
            return stream.read(SAMPLE_BYTES), packed
    except TableError:
        raise
    except Exception as exc:  # each kind of compression has its own errors
        raise TableError(f"{place.url!r} cannot be read as {packed or format}: {exc}. Check the file.") from None


def _find_form(
    place: Place, format: TableFormat, text: str, whole: bool, options: SourceOptions, guess: bool
) -> dict[str, Any]:
    if format in ("csv", "tsv"):
        return _find_dialect(place, text, whole, options.delimiter or ("\t" if format == "tsv" else None))
    if (format == "json" and not guess) or (format != "openai" and guess and not _is_lines(text, whole)):
        return {"values": True}
    return {}


def _log_guesses(place: Place, layout: Mapping[str, Any], options: SourceOptions) -> None:
    guessed = []
    if "encoding" in layout and not options.encoding:
        guessed.append(layout["encoding"])
    if "delimiter" in layout and not options.delimiter and not place.name.lower().partition(".")[2].startswith("tsv"):
        guessed.append(f"with the delimiter {layout['delimiter']!r}")
    if "values" in layout:
        guessed.append("as JSON values over several lines")
    if guessed:
        run_log().info("%r is read %s.", place.name, ", ".join(guessed))


def _describe(head: bytes) -> str | None:
    """Return what a file is that is no text in UTF-8, as far as its first bytes tell."""
    if found := next((what for magic, what in MAGIC.items() if head.lstrip().startswith(magic)), None):
        return found
    if head.count(0) > 0.3 * len(head):
        return "UTF-16 or binary data (set `source_options` to {'encoding': 'utf-16-le'} if it is text)"
    return None


def _is_lines(text: str, whole: bool) -> bool:
    """Return whether JSON stands one value per line, as far as the first lines tell."""
    first, _, rest = text.lstrip().partition("\n")
    if first.strip() == "{":
        return False
    try:
        return not isinstance(json.loads(first), list) or not whole or bool(rest.strip())
    except ValueError:  # an array that goes on in the next line, unless the line is torn
        return not re.match(r"\[\s*(\{|\[|$)", first)


def _find_dialect(place: Place, text: str, whole: bool, delimiter: str | None) -> dict[str, Any]:
    """Return the delimiter of a CSV file, if it is not the comma, and whether a line that names it stands before."""
    layout: dict[str, Any] = {}
    if text.lstrip().startswith(('{"', "[{")):
        raise TableError(f"{place.url!r} holds JSON, not CSV. Set `source_format='jsonl'`, or correct its name.")
    if named := _SEPARATOR_LINE.match(text):
        layout["skip"] = True
        text, delimiter = text[named.end() :], delimiter or named[1]
    if delimiter is None:
        fitting = [each for each in ",;\t|" if _fits(text, whole, each)]
        delimiter = fitting[0] if fitting and (fitting[0] == "," or len(fitting) == 1) else ","
    return {**layout, "delimiter": delimiter} if delimiter != "," else layout


def _fits(text: str, whole: bool, delimiter: str) -> bool:
    """Return whether all of the first records have the same number of cells, and more than one."""
    try:
        records = [cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if "".join(cells)]
    except csv.Error:
        return False
    widths = set(map(len, (records if whole else records[:-1])[:SAMPLE_RECORDS]))
    return len(widths) == 1 and widths != {1} and len(records) > 1


@contextmanager
def open_bytes(place: Place, layout: Mapping[str, Any], digest: Any = None, ahead: bool = True) -> Iterator[IO[bytes]]:
    """Open a text file: unpacked, and as UTF-8 whatever its encoding. All bytes that are read go into the digest."""
    with place.open(ahead) as file:
        raw: Any = file if digest is None else io.BufferedReader(_Hashed(file, digest), BLOCK_BYTES)
        kind = layout.get("compression")
        if kind == "zstd":
            import pyarrow as pa

            raw = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), BLOCK_BYTES)
        elif kind:
            from fsspec.compression import compr

            raw = compr[kind](raw, mode="rb")
        if "encoding" in layout:
            raw = io.BufferedReader(_Transcoded(raw, layout["encoding"]), BLOCK_BYTES)
        yield raw


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed while they are read."""

    def __init__(self, file: Any, digest: Any) -> None:
        self._file, self._digest = file, digest

    @override
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count


class _Transcoded(io.RawIOBase):
    """A text file of any encoding, as UTF-8. Bytes that the encoding lacks become bytes that are not UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")

    @override
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._text.read(len(buffer) // 4).encode("utf-8", "surrogateescape")
        buffer[: len(content)] = content
        return len(content)
