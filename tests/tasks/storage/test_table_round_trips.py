"""Random tables in each format come out the same in every other, whatever stands in their names and cells."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from prefect_huggingface.tasks.storage.tables.inputs import inspect_table, read_chunks
from prefect_huggingface.tasks.storage.tables.writers import to_json
from support.table_cells import convert, is_same

FORMATS = ["jsonl", "csv", "tsv", "parquet", "arrow"]
ANY = st.characters()
UNICODE = st.characters(exclude_categories=["Cs"])
ODD = st.sampled_from(
    ["\r", "\n", "\r\n", '"', ",", ";", "\t", "\x00", "'", "\u2028", "\x85", "\ufeff", "sep=;", "=1", " ", ""]
)
NUMBERS = st.integers() | st.floats() | st.integers(-(2**70), 2**70) | st.sampled_from([2**53 + 1, 2**63, -(2**63)])


def texts(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.text(characters, max_size=8) | st.lists(ODD | st.text(characters, max_size=3), max_size=5).map("".join)


def values(characters: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | NUMBERS | texts(characters),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(characters), inner, max_size=3),
        max_leaves=8,
    )


def names(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return texts(characters).filter(lambda name: name != "answer")


def check(source: Path, expected: list[dict[str, Any]], format: str) -> None:
    found = convert(inspect_table(str(source)), source.parent / f"out.{format}")
    assert len(found) == len(expected)
    for row, original in zip(found, expected, strict=True):
        wrong = {name: (value, row.get(name)) for name, value in original.items() if not is_same(value, row.get(name))}
        assert not wrong


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.dictionaries(names(UNICODE), values(ANY), max_size=4), min_size=1, max_size=6),
    is_ascii=st.booleans(),
    layout=st.sampled_from(["lines", "array", "indented"]),
)
@example(rows=[{"a": 2**53 + 1}, {"a": 0.5}, {"a": [2**60 + 1]}, {"a": [0.5]}], is_ascii=True, layout="lines")
@example(rows=[{"a": [2**60 + 1]}, {"a": [0.5]}, {"b": {}}, {"b": {"c": [{}]}}], is_ascii=True, layout="lines")
@example(rows=[{"a": [2**60 + 1]}] * 1500 + [{"a": [0.5]}] * 1500, is_ascii=True, layout="lines")
def test_json(format: str, rows: list[dict[str, Any]], is_ascii: bool, layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.json")
        if layout == "lines" or (layout == "indented" and {} in rows):  # an empty object stands in one line
            text = "".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows)
            path = Path(folder, "in.jsonl")
        elif layout == "array":
            text = json.dumps(rows, ensure_ascii=is_ascii, indent=len(rows) % 3 or None)
        else:
            text = "\n".join(json.dumps(row, ensure_ascii=is_ascii, indent=1) for row in rows)
        try:
            path.write_text(text, encoding="utf-8", newline="")
        except UnicodeEncodeError:  # such a file cannot be
            path.write_text(json.dumps(rows), encoding="utf-8")
            path = path.rename(path.with_suffix(".json"))
        check(path, rows, format)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), width=st.integers(1, 4), delimiter=st.sampled_from(",;\t|"), end=st.sampled_from(["\n", "\r\n"]))
def test_csv(format: str, data: st.DataObject, width: int, delimiter: str, end: str) -> None:
    header = data.draw(st.lists(names(UNICODE), min_size=width, max_size=width, unique=True))
    header = [name.removeprefix("\ufeff") for name in header]
    header = [name if name.strip() else f"{name}x" for name in header]
    if len(set(header)) < width or header[0].startswith(("sep=", "{", "[", "<")):
        return
    records = data.draw(st.lists(st.lists(texts(UNICODE), min_size=width, max_size=width), min_size=1, max_size=6))
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([header, *records])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.csv")
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
        rows = [dict(zip(header, cells, strict=True)) for cells in records]
        table = inspect_table(str(path), options={"delimiter": delimiter})
        assert [row for chunk in read_chunks(table) for row in chunk.rows] == rows
        if width > 1 and delimiter == ",":
            assert inspect_table(str(path)) == table  # nothing else is guessed
        found = convert(table, Path(folder, f"out.{format}"))
        assert [{name: row[name] for name in header} for row in found] == rows


COLUMNS: dict[Any, st.SearchStrategy[Any]] = {
    pa.int8(): st.integers(-128, 127), pa.uint64(): st.integers(0, 2**64 - 1), pa.float32(): st.floats(width=32),
    pa.float16(): st.floats(width=16), pa.bool_(): st.booleans(), pa.large_string(): texts(UNICODE),
    pa.binary(): st.binary(max_size=5), pa.binary(2): st.binary(min_size=2, max_size=2),
    pa.decimal128(20, 3): st.decimals(-1000, 1000, places=3), pa.date32(): st.dates(), pa.null(): st.none(),
    pa.time64("us"): st.times(), pa.duration("us"): st.timedeltas(datetime.timedelta(-999), datetime.timedelta(999)),
    pa.timestamp("us"): st.datetimes(), pa.timestamp("ms", "UTC"): st.datetimes().map(
        lambda time: time.replace(microsecond=0, tzinfo=datetime.UTC)
    ),
    pa.list_(pa.list_(pa.string())): st.lists(st.lists(texts(UNICODE), max_size=2), max_size=2),
    pa.struct([("a", pa.int64()), ("b", pa.list_(pa.float64()))]): st.fixed_dictionaries(
        {"a": st.integers(0, 9), "b": st.lists(st.floats(), max_size=2)}
    ),
    pa.map_(pa.string(), pa.int64()): st.lists(st.tuples(texts(UNICODE), st.integers(0, 9)), max_size=2),
    pa.dictionary(pa.int8(), pa.string()): texts(UNICODE),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", ["parquet", "arrow"])
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_typed_columns(format: str, source: str, data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=1, max_size=4))
    header = data.draw(st.lists(names(UNICODE), min_size=len(kinds), max_size=len(kinds), unique=True))
    size = data.draw(st.integers(1, 5))
    columns = [
        pa.array(data.draw(st.lists(st.none() | COLUMNS[kind], min_size=size, max_size=size)), kind) for kind in kinds
    ]
    table = pa.table(columns, names=header)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"in.{source}")
        if source == "parquet":
            parquet.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        check(path, table.to_pylist(), format)


def test_decimals_keep_their_digits() -> None:
    assert is_same(decimal.Decimal("1.10"), "1.10")
    assert not is_same(decimal.Decimal("1.10"), "1.1")


def test_times_keep_their_milliseconds():
    values = [datetime.time(1, 2, 3, microseconds) for microseconds in (1, 10_000, 20_500, 99_999, 100_000)]
    assert json.loads(to_json(values)) == [value.isoformat() for value in values]
