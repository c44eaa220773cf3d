"""What a file is and how its text lies in it: compression, encoding, delimiter; guessed where a guess is safe."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from typing_extensions import override

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import (
    SourceOptions,
    TableFormat,
)

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
_SEPARATOR_LINE = re.compile(r'^"?sep=(.)"?[\r\n]+')


def find_layout(place: Place, format: TableFormat, options: SourceOptions, guess: bool = True) -> dict[str, Any]:
    """Return how a file is read where that is not the usual way, from its first bytes; guesses are logged.

    Args:
        place: The file.
        format: Format that was given, or that the name tells.
        options: What was given.
        guess: Whether a JSON file may turn out to be an array or indented objects.

    Raises:
        TableError: If the file is something else.
    """
    if options.delimiter and format not in ("csv", "tsv"):
        raise TableError(f"`delimiter` {options.delimiter!r} is for CSV files, but {place.url!r} is {format}. Drop it.")
    with place.open() as file:
        head = file.read(16)
    layout: dict[str, Any] = {}
    if packed := next((name for magic, name in PACKED.items() if head.startswith(magic)), None):
        layout["compression"] = packed
    try:
        with open_bytes(place, layout) as stream:
            head = stream.read(SAMPLE_BYTES)
    except Exception as exc:  # each kind of compression has its own errors
        raise TableError(f"{place.url!r} cannot be read as {packed or format}: {exc}. Check the file.") from None
    if format in ("parquet", "arrow"):
        what = _describe(head) or packed
        if what and what.split()[1] != format.title():
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
def open_bytes(place: Place, layout: Mapping[str, Any], digest: Any = None) -> Iterator[IO[bytes]]:
    """Open a text file: unpacked, and as UTF-8 whatever its encoding. All bytes that are read go into the digest."""
    with place.open(ahead=True) as file:
        raw: Any = file if digest is None else io.BufferedReader(_Hashed(file, digest), BLOCK_BYTES)
        kind = layout.get("compression")
        if kind == "zstd":
            import pyarrow as pa

            raw = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), BLOCK_BYTES)
        elif kind:
            opens: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            raw = opens[kind](raw, "rb")
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


def hash_place(place: Place) -> str:
    """Return the sha256 of a file's content as it lies there."""
    with place.open(ahead=True) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()
