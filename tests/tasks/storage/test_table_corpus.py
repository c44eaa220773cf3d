"""Test files of other projects: as many records as the usual reader finds, and the same cells in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import feather, parquet

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table
from support.table_cells import convert, is_same

CORPUS = Path(__file__).parents[2] / "data" / "tables"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())
FORMATS = ["jsonl", "csv", "tsv", "parquet", "arrow"]
REFUSED = {
    "csvkit/test_empty_columns.csv": "names a column twice",
    "csvkit/test_empty_columns_long_row.csv": "Line 2 .* has 4 cells where the header has 3",
    "csvkit/test_empty_columns_short_row.csv": "Line 2 .* has 2 cells where the header has 3",
    "csvkit/test_extra_header.csv": "Line 2 .* has 3 cells where the header has 4",
    "frictionless/defective-rows.csv": "Line 2 .* has 2 cells where the header has 3",
    "frictionless/duplicate-column.csv": "names a column twice: .*'B', 'B'",
    "frictionless/duplicate-headers.csv": "names a column twice: .*'id'",
    "frictionless/empty.csv": "is empty",
    "frictionless/implicit-zip.csv": "is a ZIP archive",
    "frictionless/invalid.csv": "names a column twice: .*'name'",
    "frictionless/matrix-with-comment.csv": "Line 2 .* has 4 cells where the header has 1",
    "frictionless/skip-rows-before-headers.csv": "Line 2 .* has 2 cells where the header has 1",
    "frictionless/table-output.json": "no JSON object but list",
    "frictionless/table.json": "no JSON object but list",
    "frictionless/without-rows.csv": "has no rows",
}
OPTIONS = {
    "csvkit/test_latin1.csv": {"encoding": "latin-1"},
    "frictionless/latin1.csv": {"encoding": "latin-1"},
    "frictionless/table-infer-iso-8859-7.csv": {"encoding": "iso-8859-7"},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_of_another_project(tmp_path: Path, path: Path) -> None:
    name = f"{path.parent.name}/{path.name}"
    options = OPTIONS.get(name, {})
    if name in REFUSED:
        with pytest.raises(TableError, match=REFUSED[name]) as caught:
            inspect_table(str(path), options=options)
        assert path.name in str(caught.value)
        return
    table = inspect_table(str(path), options=options)
    expected = read_reference(path, table.files[0].layout)

    assert table.rows == len(expected)
    for format in FORMATS:
        found = convert(table, tmp_path / f"out.{format}")
        assert len(found) == len(expected)
        for row, original in zip(found, expected, strict=True):
            wrong = {key: (value, row.get(key)) for key, value in original.items() if not is_same(value, row.get(key))}
            assert not wrong


def read_reference(path: Path, layout: Any) -> list[Any]:
    """Return the records as the usual reader gives them."""
    if path.suffix in (".parquet", ".parq"):
        return list(parquet.read_table(path).to_pylist())
    if path.suffix == ".feather":
        return list(feather.read_table(path).to_pylist())
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        import gzip

        content = gzip.decompress(content)
    text = content.decode(layout.get("encoding", "utf-8-sig")).removeprefix("\ufeff")
    if path.suffix in (".json", ".jsonl", ".ndjson"):
        try:
            value = json.loads(text)
        except ValueError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return list(value) if isinstance(value, list) else [value]
    lines = text.lstrip().splitlines(keepends=True)
    records = [cells for cells in csv.reader(lines, delimiter=layout.get("delimiter", ",")) if cells]
    return [dict(zip(records[0], cells, strict=False)) for cells in records[1:]]
