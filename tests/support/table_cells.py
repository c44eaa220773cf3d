"""Reading outputs by other means than the sources', and comparing their cells with what stood in the input."""

from __future__ import annotations

import base64
import csv
import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from prefect_huggingface.tasks.storage.tables.inputs import Table, get_format, get_schema, read_chunks
from prefect_huggingface.tasks.storage.tables.writers import check_types, open_writer


def read_output(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an output."""
    if path.suffix == ".parquet":
        return list(parquet.read_table(path).to_pylist())
    if path.suffix == ".arrow":
        return list(pa.ipc.open_file(str(path)).read_all().to_pylist())
    if path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def convert(table: Table, target: Path) -> list[dict[str, Any]]:
    """Write a table in the format of a path, and return what is read back."""
    schema, format = get_schema(table), get_format(target.name)[0]
    assert check_types(schema, format) == []
    further = pa.schema([("answer", pa.string())])
    with open_writer(target, format, None if format == "jsonl" else table.columns, ["answer"], schema, further) as out:
        for chunk in read_chunks(table):
            out.write(chunk, {"answer": pa.array(["x\r"] * len(chunk))})
    rows = read_output(target)
    assert [row.pop("answer") for row in rows] == ["x\r"] * table.rows
    return rows


def is_same(value: Any, found: Any) -> bool:
    """Return whether a cell of an output says the same as that of the input."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return found in (None, "", "nan") or (isinstance(found, float) and math.isnan(found))
    if isinstance(value, str):
        return found in (value, _unicode(value))
    if type(value) is type(found) and value == found:
        return True
    if isinstance(value, dict):
        return _is_same_object(value, _loaded(found))
    if isinstance(value, (list, tuple)):
        found = _loaded(found)
        return isinstance(found, (list, tuple)) and len(found) == len(value) and all(map(is_same, value, found))
    return _is_same_scalar(value, found)


def _is_same_object(value: dict[Any, Any], found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    names = {key if key in found else _unicode(str(key)): key for key in value}
    # A typed column gives every object the names of all.
    return all(is_same(value[key], found.get(name)) for name, key in names.items()) and all(
        found[name] is None for name in found.keys() - names.keys()
    )


def _is_same_scalar(value: Any, found: Any) -> bool:
    if isinstance(value, float) and math.isinf(value):
        return found is None or str(found) in (str(value), "null")
    if isinstance(value, bool):
        return str(found).lower() == str(value).lower()
    if isinstance(value, (int, float)):
        return bool(_loaded(found) == value)
    if isinstance(value, bytes):
        return found == value or found == _text(value)
    if isinstance(value, (datetime.datetime, datetime.date)):
        return str(found).replace("T", " ") == str(value)
    return str(found) == str(value)


def _loaded(found: Any) -> Any:
    try:
        return json.loads(found) if isinstance(found, str) else found
    except ValueError:
        return found


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def _unicode(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= each <= "\udfff" else each for each in text)
