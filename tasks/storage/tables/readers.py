"""How each table format is read: first whole, to count, hash and check it, then in chunks."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import chain
from typing import IO, Any, NoReturn

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_ROWS,
    Chunk,
    TableFile,
    TableFormat,
    open_bytes,
)

MARK_ROWS = 50_000  # least number of JSONL rows between two remembered byte offsets
MAX_CELL = 2**31 - 1
MAX_DEPTH = 200  # of nested JSON; `orjson` writes up to 254 levels
MAX_TYPE_DEPTH = 30  # of nested columns in Parquet and Arrow; Arrow reads schemas of up to 64 levels
BOM = b"\xef\xbb\xbf"
# What pyarrow raises where Python has no such value.
UNFIT = (ValueError, OverflowError, TypeError, NotImplementedError)
_decode = json.JSONDecoder().decode
_decode_first = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"\s*")
_DIGITS = bytes(48 if 48 <= code < 58 else 32 for code in range(256))

Problems = dict[int, str]  # by the place of a row in its chunk
Record = tuple[int, int, Any, str | None]  # line, length, content, and what is wrong with it


class Reader:
    """Reads one file of one format.

    Attributes:
        columns: Columns of the file, once it was looked at; empty where each row has its own.
        schema: Types of the columns, where the file has types.
    """

    columns: tuple[str, ...] = ()
    schema: Any = None

    def __init__(self, place: Place, layout: Mapping[str, Any]) -> None:
        self.place, self.layout = place, layout
        self.partition: Mapping[str, str | None] = layout.get("partition", {})


class TextReader(Reader):
    """Rows that are text: a problem of a row is that row's alone, unless no row can be read."""

    hint = ""
    is_clean = False  # whether every row is known to be right, so that none needs to be checked

    def chunks(self, stream: IO[bytes], row: int, line: int) -> Generator[Chunk]:
        """Yield all rows of a stream that begins with a row and a line."""
        raise NotImplementedError

    def inspect(self, types: ColumnTypes) -> TableFile:
        """Read the whole file. Return its rows and hash, and take note of its columns."""
        digest, rows, bad, first = hashlib.sha256(), 0, 0, ""
        marks: list[tuple[int, int, int]] = []
        with open_bytes(self.place, self.layout, digest) as stream:
            for chunk in self.chunks(stream, 0, 1):
                if chunk.origin is not None and (not marks or chunk.first - marks[-1][0] >= MARK_ROWS):
                    marks.append((chunk.first, *chunk.origin))
                rows += len(chunk)
                bad += len(chunk.problems)
                first = first or next(iter(chunk.problems.values()), "")
                if not self.columns:
                    types.add(chunk.rows)
        if bad and bad == rows:
            raise TableError(f"No row of {self.place.url!r} can be read. {first}{self.hint}")
        if bad:
            run_log().warning("%d of %d rows of %r cannot be read. %s", bad, rows, self.place.name, first)
        return TableFile(self.place.url, rows, digest.hexdigest(), dict(self.layout), tuple(marks), bad)

    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        """Yield the rows `start` to `stop` of the file, numbered from the file's first row."""
        self.is_clean = not file.bad_rows
        row, line, offset = max((mark for mark in file.marks if mark[0] <= start), default=(0, 1, 0))
        with open_bytes(self.place, self.layout) as stream:
            if offset:
                stream.seek(offset)
            with closing(self.chunks(stream, row, line)) as chunks:
                for chunk in chunks:
                    if chunk.first + len(chunk) > start:
                        yield chunk.part(start, stop)
                    if chunk.first + len(chunk) >= stop:
                        return

    def _named(self, problems: Problems, lines: Sequence[int]) -> Problems:
        name = self.place.name
        return {place: f"Line {lines[place]} of {name!r} {problem}" for place, problem in sorted(problems.items())}


def _gather(records: Iterator[Record]) -> Iterator[tuple[list[Any], list[int], Problems]]:
    """Yield the rows of records in parts of bounded size, with the line of each, and what is wrong with some."""
    rows: list[Any] = []
    lines: list[int] = []
    problems: Problems = {}
    size = 0
    for line, length, row, problem in records:
        if problem:
            problems[len(rows)] = problem
        rows.append(row)
        lines.append(line)
        size += length
        if len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield rows, lines, problems
            rows, lines, problems, size = [], [], {}, 0
    if rows:
        yield rows, lines, problems


class JsonReader(TextReader):
    """JSON objects, one per line. Empty lines are no rows; a malformed line is a row with a problem."""

    hint = " If the file is CSV, set `source_format='csv'`; if it is a JSON array, set `source_format='json'`."

    @override
    def chunks(self, stream: IO[bytes], row: int, line: int) -> Generator[Chunk]:
        offset = 0
        while block := stream.readlines(BLOCK_BYTES):
            for low in range(0, len(block), CHUNK_ROWS):
                part = block[low : low + CHUNK_ROWS]
                size, lines = len(part), range(line, line + len(part))
                if any(map(bytes.isspace, part)):
                    lines = [number for number, text in zip(lines, part, strict=True) if not text.isspace()]  # type: ignore[assignment]
                    part = [text for text in part if not text.isspace()]
                if part:
                    chunk = self._lazy_chunk(row, part, lines) if self.is_clean else None
                    chunk = chunk or self._chunk(row, *_parse_lines(part), lines)
                    chunk.origin = (
                        (line, offset) if low == 0 and not {"compression", "encoding"} & {*self.layout} else None
                    )
                    yield chunk
                row, line = row + len(part), line + size
            offset += sum(map(len, block))

    def _lazy_chunk(self, row: int, part: list[bytes], lines: Sequence[int]) -> Chunk | None:
        """Return rows that were right when they were looked at, as their text, unless that needs to be changed."""
        block = b"".join(part)
        if self.partition or b"NaN" in block or b"Infinity" in block:
            return None
        texts = list(map(bytes.strip, part))
        if BOM in block:  # at the beginning of each of several files that were put together
            texts = [text.removeprefix(BOM) for text in texts]
        return Chunk(row, len(part), lambda: _parse_lines(part)[0], lines=lines, texts=texts)

    def _chunk(self, row: int, rows: list[Any], problems: Problems, lines: Sequence[int]) -> Chunk:
        for name, value in self.partition.items():
            for each in rows:
                each.setdefault(name, value)
        return Chunk(row, len(rows), lambda: rows, lines=lines, problems=self._named(problems, lines))


class JsonValuesReader(JsonReader):
    """A JSON array of objects, or objects that go over several lines, of which only a part is in memory."""

    @override
    def chunks(self, stream: IO[bytes], row: int, line: int) -> Generator[Chunk]:
        self._source, self._text, self._place, self._line = io.TextIOWrapper(stream, "utf-8-sig", newline=""), "", 0, 1
        for rows, lines, _ in _gather(self._values()):
            yield self._chunk(row, rows, _check_objects(rows), lines)
            row += len(rows)

    def _values(self) -> Iterator[Record]:
        """Yield all elements."""
        in_array = self._take("[")
        if in_array and self._take("]"):
            return
        while self._peek():
            yield self._value()
            if in_array and self._take("]"):
                break
            if in_array and not self._take(","):
                self._fail("a comma or the end of the array is missing")
        if self._peek():
            self._fail("there is more behind the end of the array")

    def _more(self, size: int = BLOCK_BYTES) -> bool:
        more = self._source.read(size)
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def _peek(self) -> str:
        """Return the next character that is no space, empty at the end of the file."""
        while True:
            self._advance(_SPACE.match(self._text, self._place).end())  # type: ignore[union-attr]
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def _take(self, mark: str) -> bool:
        found = self._peek() == mark
        self._place += found
        return found

    def _value(self) -> Record:
        self._peek()
        line, size = self._line, BLOCK_BYTES
        while True:
            try:
                value, end = _decode_first(self._text, self._place)
                if end < len(self._text) or not self._more(size):
                    break
            except RecursionError:
                self._fail("it is nested too deeply")
            except json.JSONDecodeError as exc:
                # What was read so far may end within the value.
                may_go_on = exc.pos > len(self._text) - 16 or "Unterminated string" in exc.msg
                if not may_go_on or not self._more(size):
                    self._advance(len(self._text) if may_go_on else max(exc.pos, self._place))
                    self._fail(exc.msg)
            size *= 2
        length = end - self._place
        self._advance(end)
        return line, length, value, None

    def _advance(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _fail(self, problem: str) -> NoReturn:
        raise TableError(f"{self.place.url!r} is no JSON in line {self._line}: {problem}. Correct the file.") from None


def _parse_lines(lines: list[bytes]) -> tuple[list[Any], Problems]:
    """Return the objects of some lines, and what is wrong with the others, which become empty."""
    import orjson

    block = b"".join(lines)
    may_be_deep = block.count(b"[") + block.count(b"{") > len(lines) + MAX_DEPTH
    if not _has_large_integer(block):
        with suppress(ValueError):
            rows: list[Any] = list(map(orjson.loads, lines))
            # `orjson` refuses names that are not Unicode.
            return rows, _check_objects(rows, may_be_deep, odd_names=False)
    rows, problems = [], {}
    for place, line in enumerate(lines):
        try:
            rows.append(parse_json(line))
        except RecursionError:
            problems[place] = "is nested too deeply. Flatten it."
        except ValueError as exc:
            where = f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)
            problems[place] = f"is no JSON: {where}. Correct the line."
        if place in problems:
            rows.append({})
    return rows, {**problems, **_check_objects(rows, may_be_deep)}


def _has_large_integer(text: bytes) -> bool:
    """Return whether a number may have more than 64 bits, which would become a float in `orjson`."""
    return b"0" * 19 in text.translate(_DIGITS)


def _check_objects(rows: list[Any], may_be_deep: bool = True, odd_names: bool = True) -> Problems:
    """Make rows that are no objects empty, drop keys that are not Unicode, and return the problems."""
    problems: Problems = {}
    if set(map(type, rows)) == {dict} and not may_be_deep and not odd_names:
        return problems
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            problems[place] = f"is no JSON object but {type(row).__name__}. Write the row as {{...}}."
            rows[place] = {}
        elif may_be_deep and is_deep(row):
            problems[place] = f"is nested more than {MAX_DEPTH} levels deep. Flatten it."
            rows[place] = {name: value for name, value in row.items() if not isinstance(value, (dict, list))}
        elif odd_names and (odd := [name for name in row if not _is_unicode(name)]):
            problems[place] = f"has the key {odd[0]!r}, which is not valid Unicode. Rename it."
            rows[place] = {name: value for name, value in row.items() if name not in odd}
    return problems


def is_deep(value: Any) -> bool:
    """Return whether a JSON value is nested more deeply than tables hold."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        children = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [child for child in children if isinstance(child, (dict, list))]
    return bool(level)


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def parse_json(line: bytes) -> Any:
    """Return the value of a line as the `json` module reads it: with NaN, lone surrogates and integers of any size.

    Raises:
        ValueError: If it is no JSON.
        RecursionError: If it is nested too deeply.
    """
    import orjson

    if not _has_large_integer(line):
        with suppress(ValueError):
            return orjson.loads(line)
    return _decode(line.removeprefix(BOM).decode())


class CsvReader(TextReader):
    """Cells with a header. Every cell is text, exactly as it is written."""

    @override
    def chunks(self, stream: IO[bytes], row: int, line: int) -> Generator[Chunk]:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        for rows, lines, broken in _gather(self._records(text)):
            yield self._chunk(row, rows, lines, broken)
            row += len(rows)

    def _records(self, text: IO[str]) -> Iterator[Record]:
        """Yield the cells of each record behind the header."""
        # The limit is one number per process; the module's default would refuse cells above 128 KB.
        csv.field_size_limit(MAX_CELL)
        delimiter, last = self.layout.get("delimiter", ","), ""
        skipped = 1 if self.layout.get("skip") and text.readline() else 0

        def remember() -> Iterator[str]:
            nonlocal last
            for last in text:  # noqa: UP028
                yield last

        records = csv.reader(remember(), delimiter=delimiter, strict=True)
        self._read_header(records, skipped)
        while True:
            line = skipped + records.line_num + 1
            try:
                cells = next(records, None)
            except csv.Error as exc:
                # Nobody knows how many rows lie within the quotes.
                if "end of data" in str(exc) or skipped + records.line_num > line:
                    raise self._unclosed(line, skipped + records.line_num) from None
                cells = next(csv.reader([last], delimiter=delimiter))
                yield line, len(last), cells, f"is no CSV: {exc}. Correct its quotes."
                continue
            if cells is None:
                return
            if cells:
                yield line, sum(map(len, cells)), cells, None

    def _unclosed(self, first: int, last: int) -> TableError:
        return TableError(
            f"{self.place.url!r} has a quote in the record of line {first} that is not closed properly; it goes on up "
            f"to line {last}. Close it, or write quotes within a quoted cell twice."
        )

    def _read_header(self, records: Any, skipped: int) -> None:
        try:
            header = next((tuple(cells) for cells in records if len(cells) > 1 or "".join(cells).strip()), None)
        except csv.Error:
            raise self._unclosed(skipped + 1, skipped + records.line_num) from None
        if header is None:  # an empty part of a table
            return
        _check_names(self.place, header)
        if not all(map(_is_unicode, header)):
            raise TableError(
                f"The header of {self.place.url!r}, line {skipped + records.line_num}, is not {self._encoding}. "
                "Set `source_options`, {'encoding': 'cp1252'} for instance, or convert the file."
            )
        self._header = header
        self.columns = (*header, *(name for name in self.partition if name not in header))

    @property
    def _encoding(self) -> str:
        return str(self.layout.get("encoding", "UTF-8"))

    def _chunk(self, row: int, rows: list[list[str]], lines: list[int], broken: Problems) -> Chunk:
        width, added = len(self._header), {n: self.partition[n] for n in self.columns[len(self._header) :]}
        if set(map(len, rows)) != {width}:
            for place, cells in enumerate(rows):
                if len(cells) != width and place not in broken:
                    broken[place] = f"has {len(cells)} cells where the header has {width}. Correct the row."
        if not self.is_clean and not _is_unicode("".join(map("".join, rows))):
            for place, cells in enumerate(rows):
                if not _is_unicode("".join(cells)):
                    broken.setdefault(place, f"is not {self._encoding}. Convert the file, or set its encoding.")
                    # None stands for a cell that could not be read.
                    rows[place] = [cell if _is_unicode(cell) else None for cell in cells]  # type: ignore[misc]

        def make() -> list[dict[str, Any]]:
            return [{**dict(zip(self._header, cells, strict=False)), **added} for cells in rows]

        return Chunk(row, len(rows), make, lines=lines, problems=self._named(broken, lines))


def _check_names(place: Place, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise TableError(f"{place.url!r} names a column twice: {list(names)!r}. Rename one of them.")


class ColumnarReader(Reader):
    """Parquet or Arrow: typed record batches."""

    def __init__(self, place: Place, layout: Mapping[str, Any], format: TableFormat) -> None:
        super().__init__(place, layout)
        self.format = format

    def inspect(self, types: ColumnTypes) -> TableFile:
        """Read the whole file. Return its rows and hash."""
        with self.place.open() as file:
            schema, batches = self._open(file)
            _check_names(self.place, schema.names)
            rows = sum(batch.num_rows for _, batch in batches(0))
        self.schema = self._plain_schema(schema)
        self.columns = tuple(self.schema.names)
        return TableFile(self.place.url, rows, self.place.digest(), dict(self.layout))

    def read(self, file: TableFile, start: int, stop: int) -> Iterator[Chunk]:
        """Yield the rows `start` to `stop` of the file, numbered from the file's first row."""
        with self.place.open() as opened:
            for offset, batch in self._open(opened)[1](start):
                low, high = max(start - offset, 0), min(stop - offset, batch.num_rows)
                for first in range(low, high, CHUNK_ROWS):
                    part = self._plain(batch.slice(first, min(CHUNK_ROWS, high - first)))
                    yield Chunk(offset + first, part.num_rows, partial(to_rows, part), batch=part)
                if offset + batch.num_rows >= stop:
                    return

    def _open(self, file: IO[bytes]) -> tuple[Any, Callable[[int], Iterator[tuple[int, Any]]]]:
        """Return the schema, and what yields the batches from a row on, with the number of their first row."""
        import pyarrow as pa
        from pyarrow import parquet

        if self.format == "arrow":
            try:
                table = pa.ipc.open_file(file)
                parts = (table.get_batch(index) for index in range(table.num_record_batches))
                return table.schema, lambda _: _counted(parts, 0)
            except pa.ArrowInvalid:
                file.seek(0)
                stream = pa.ipc.open_stream(file)
                return stream.schema, lambda _: _counted(stream, 0)

        # The nanoseconds of old files end in 2262; what Spark writes into them need not.
        opened = parquet.ParquetFile(file, coerce_int96_timestamp_unit="us")

        def batches(start: int) -> Iterator[tuple[int, Any]]:
            offset, first, groups = 0, 0, opened.metadata.num_row_groups
            while first < groups and offset + (size := opened.metadata.row_group(first).num_rows) <= start:
                offset, first = offset + size, first + 1
            return _counted(opened.iter_batches(batch_size=CHUNK_ROWS, row_groups=list(range(first, groups))), offset)

        return opened.schema_arrow, batches

    def _plain_schema(self, schema: Any) -> Any:
        """Return the types without dictionaries, and with the columns that the folders tell."""
        import pyarrow as pa

        fields = [
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in schema
        ]
        fields += [pa.field(name, pa.string()) for name in self.partition if name not in schema.names]
        return pa.schema(fields)

    def _plain(self, batch: Any) -> Any:
        import pyarrow as pa

        schema = self._plain_schema(batch.schema)
        if schema.equals(batch.schema):
            return batch
        for name in schema.names[batch.num_columns :]:
            batch = batch.append_column(name, pa.array([self.partition[name]] * len(batch), pa.string()))
        return batch.cast(schema)


def _counted(batches: Iterable[Any], offset: int) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        yield offset, batch
        offset += batch.num_rows


def to_rows(batch: Any) -> list[dict[str, Any]]:
    """Return a batch as dictionaries. What Python cannot hold becomes text, and so do bytes that are UTF-8."""
    columns = {name: _to_values(batch.column(name)) for name in batch.schema.names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _to_values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UNFIT:
        values = [_to_value(scalar) for scalar in column]
    return [_to_text(value) for value in values] if bytes in set(map(type, values)) else values


def _to_value(scalar: Any) -> Any:
    import pyarrow as pa

    with suppress(*UNFIT):
        return scalar.as_py()
    if pa.types.is_struct(scalar.type):
        return {field.name: _to_value(scalar[field.name]) for field in scalar.type}
    if pa.types.is_map(scalar.type):
        return [(_to_value(pair["key"]), _to_value(pair["value"])) for pair in scalar.values]
    if pa.types.is_nested(scalar.type):
        return [_to_value(each) for each in scalar.values]
    with suppress(ValueError, NotImplementedError):
        return str(scalar.cast(pa.string()))
    return f"{getattr(scalar, 'value', scalar)} {getattr(scalar.type, 'unit', '')}".strip()


def _to_text(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


class ColumnTypes:
    """The narrowest `pyarrow` type of each column that holds every value; text (JSON) where there is none."""

    def __init__(self) -> None:
        self.types: dict[str, Any] = {}
        self._inexact: set[str] = set()  # columns with integers that a floating-point number does not hold

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take some rows into account."""
        import pyarrow as pa

        if len(names := set(map(tuple, rows))) == 1:  # the usual case, at a third of the time
            columns = dict(zip(names.pop(), zip(*map(dict.values, rows), strict=True), strict=True))
        else:
            every = dict.fromkeys(chain.from_iterable(rows))
            columns = {name: tuple(row[name] for row in rows if name in row) for name in every}
        for name, values in columns.items():
            known = self.types.get(name, pa.null())
            self.types[name] = known if pa.types.is_string(known) else self._join(name, known, values)

    def schema(self) -> Any:
        """Return the types of all columns."""
        import pyarrow as pa

        return pa.schema([(name, pa.string() if kind == pa.null() else kind) for name, kind in self.types.items()])

    def _join(self, name: str, known: Any, values: Sequence[Any]) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            array = pa.array(values)
            pair = [pa.schema([("column", kind)]) for kind in (known, array.type)]
            joined = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            return pa.string()
        if pa.types.is_integer(array.type):
            bounds = pc.min_max(array).as_py()
            if not -(2**53) < bounds["min"] <= bounds["max"] < 2**53:
                self._inexact.add(name)
        if pa.types.is_floating(joined) and name in self._inexact:
            return pa.string()
        # Parquet has no empty objects.
        return pa.string() if "struct<>" in str(joined) or _type_depth(joined) > MAX_TYPE_DEPTH else joined


def _type_depth(kind: Any) -> int:
    return 1 + max((_type_depth(kind.field(index).type) for index in range(kind.num_fields)), default=0)


def open_reader(place: Place, format: TableFormat, layout: Mapping[str, Any]) -> Any:
    """Return the reader of a file."""
    if format in ("parquet", "arrow"):
        return ColumnarReader(place, layout, format)
    if format in ("csv", "tsv"):
        return CsvReader(place, layout)
    return (JsonValuesReader if layout.get("values") else JsonReader)(place, layout)
