"""Every format is counted, hashed and read alike; bad rows are rows, and bad files are errors that name them."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import CHUNK_ROWS, Table, get_schema, inspect_table, read_chunks
from prefect_huggingface.tasks.storage.tables.readers import parse_json
from prefect_huggingface.tasks.storage.tables.writers import open_writer

ROWS: list[dict[str, Any]] = [
    {"id": index, "name": f'Zoë, "{index}"\nline', "score": index / 4} for index in range(3000)
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the path tells, by other means than the sources'."""
    import csv

    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=900)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_all(table: Table, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
    rows = range(start, table.rows if stop is None else stop)
    return [row for chunk in read_chunks(table, rows) for row in chunk.rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".arrow"])
def test_any_range_of_rows_is_read(tmp_path: Path, suffix: str) -> None:
    table = inspect_table(str(write_rows(tmp_path / f"rows{suffix}", ROWS)))
    expected = ROWS if "sv" not in suffix else [{name: str(value) for name, value in row.items()} for row in ROWS]

    assert table.rows == len(ROWS)
    assert table.columns == ("id", "name", "score")
    for start, stop in [(0, None), (0, 1), (699, 701), (1023, 2500), (2999, 3000), (5, 5)]:
        assert read_all(table, start, stop) == expected[start:stop]
    assert all(len(chunk) <= CHUNK_ROWS for chunk in read_chunks(table))
    drawn = (0, 700, 1023, 1024, 2999)
    found = [(chunk.first, chunk.rows) for chunk in read_chunks(table, drawn)]
    assert found == [(row, [expected[row]]) for row in drawn]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_a_folder_is_one_table(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in range(3):
        write_rows(folder / f"part-{part}{suffix}", ROWS[part * 1000 : part * 1000 + 1000])
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.jsonl").write_text("{}")
    table = inspect_table(str(folder))

    assert [file.rows for file in table.files] == [1000, 1000, 1000]
    assert [int(row["id"]) for row in read_all(table, 900, 2100)] == list(range(900, 2100))
    assert inspect_table(f"{folder}/part-*{suffix}").files == table.files


@pytest.mark.parametrize("source", ["rows", "rows/*.csv"])
def test_no_file_of_many_is_asked_for_whether_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "rows").mkdir()
    for part in range(20):
        write_rows(tmp_path / "rows" / f"part-{part}.csv", ROWS[part : part + 1])
    asked, exists = [], Place.exists
    monkeypatch.setattr(Place, "exists", lambda place: asked.append(place.url) or exists(place))
    assert inspect_table(str(tmp_path / source)).rows == 20
    assert not [url for url in asked if url.endswith(".csv") and "*" not in url]  # each is a request on S3
    assert len(asked) <= 3


def test_a_row_far_down_is_reached_without_reading_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"id": {index}}}\n' for index in range(120_000)))
    table = inspect_table(str(path))

    rows = [row for row, _, _ in table.files[0].marks]
    assert rows[0] == 0
    assert max(after - before for before, after in itertools.pairwise([*rows, 120_000])) < 120_000
    assert read_all(table, 100_001, 100_002) == [{"id": 100_001}]


def test_malformed_lines_are_rows_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": NaN}\n{"a": 123456789012345678901}\n')
    table = inspect_table(str(path))
    (chunk,) = read_chunks(table)

    assert table.rows == 6
    assert sorted(chunk.problems) == [1, 2, 3]
    assert "Line 3 of 'rows.jsonl' is no JSON" in chunk.problems[1]
    assert "is no JSON object but list" in chunk.problems[2]
    assert chunk.rows[0] == {"a": 1}
    assert chunk.rows[5] == {"a": 123456789012345678901}


def test_malformed_csv_rows_are_rows_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n1,2,3\n"x"y,2\n\n\xff,2\n007,\n')
    (chunk,) = read_chunks(inspect_table(str(path)))

    assert sorted(chunk.problems) == [1, 2, 3]
    assert "has 3 cells where the header has 2" in chunk.problems[1]
    assert "not UTF-8" in chunk.problems[3]
    assert chunk.rows[4] == {"a": "007", "b": ""}  # text stays as it is written


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_cell_of_ten_megabytes_is_read(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": "x"}, {"text": "y" * 10_000_000}, {"text": "z"}])
    chunks = list(read_chunks(inspect_table(str(path))))

    assert [len(row["text"]) for chunk in chunks for row in chunk.rows] == [1, 10_000_000, 1]


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "no.parquet").write_text("PAR1 it says")
    (tmp_path / "notes.txt").write_text("hello")
    for name, message in {
        "empty.jsonl": "has no rows",
        "empty.csv": "is empty",
        "header.csv": "has no rows",
        "twice.csv": "names a column twice",
        "no.parquet": "cannot be read as parquet",
        "notes.txt": "format of 'notes.txt' is not known",
        "missing.csv": "holds no file to read",
        "*.json": "holds no file to read",
    }.items():
        with pytest.raises(TableError, match=message.replace("*", r"\*")) as caught:
            inspect_table(str(tmp_path / name))
        assert name in str(caught.value)


def test_files_of_a_folder_must_go_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [{"x": 1, "y": 2}])
    write_rows(tmp_path / "b.csv", [{"x": 1, "z": 2}])
    with pytest.raises(TableError, match=r"b.csv.*has other columns.*\['y', 'z'\]"):
        inspect_table(str(tmp_path))
    (tmp_path / "b.csv").unlink()
    write_rows(tmp_path / "b.parquet", [{"x": 1, "y": 2}])
    with pytest.raises(TableError, match=r"several formats: \['csv', 'parquet'\]"):
        inspect_table(str(tmp_path))
    write_rows(tmp_path / "a.parquet", [{"x": "1", "y": 2}])
    with pytest.raises(TableError, match="other column types"):
        inspect_table(f"{tmp_path}/*.parquet")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    table = inspect_table(str(path))
    write_rows(path, ROWS[:10])
    with pytest.raises(TableError, match="has changed"):
        read_all(table)


@pytest.mark.parametrize("source", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("destination", ["jsonl", "csv", "parquet", "arrow"])
def test_every_format_becomes_every_other(tmp_path: Path, source: str, destination: Any) -> None:
    import pyarrow as pa

    rows = [{"id": 1, "text": "a"}, {"id": 2, "text": 'b,\n"c"'}]
    table = inspect_table(str(write_rows(tmp_path / f"in{source}", rows)))
    target = tmp_path / f"out.{destination}"
    further = pa.schema([("answer", pa.string())])
    with open_writer(target, destination, ["text", "id"], ["answer"], get_schema(table), further) as writer:
        for chunk in read_chunks(table):
            writer.write(chunk, {"answer": pa.array(["x"] * len(chunk))})

    back = read_all(inspect_table(str(target)))
    texts = "sv" in source or destination == "csv"
    assert back == [{"text": row["text"], "id": str(row["id"]) if texts else row["id"], "answer": "x"} for row in rows]


def test_types_of_jsonl_are_found_over_all_rows(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None, "c": 1, "d": [1]}] * 2000 + [{"a": 2.5, "b": "x", "c": "text", "d": [2], "e": True}]
    table = inspect_table(str(write_rows(tmp_path / "rows.jsonl", rows)))

    assert {name: str(kind) for name, kind in zip(*_names_and_types(get_schema(table)), strict=True)} == {
        "a": "double", "b": "string", "c": "string", "d": "list<item: int64>", "e": "bool",
    }  # fmt: skip


def _names_and_types(schema: Any) -> tuple[list[str], list[Any]]:
    return schema.names, schema.types


JSON_LINES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(JSON_LINES, st.booleans())
@example(10**19, True)
@example(-(2**63) - 1, True)
@example({"a": [float("nan"), float("-inf"), -0.0, 5e-324]}, False)
@example("\ud800", True)
def test_json_is_read_as_the_json_module_reads_it(value: object, is_ascii: bool) -> None:
    line = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(line.decode())
    except ValueError:
        with pytest.raises(ValueError):
            parse_json(line)
        return
    assert repr(parse_json(line)) == repr(expected)
