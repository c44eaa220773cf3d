"""Tables as people have them: each is read rightly, or refused with file, line and remedy before a model is loaded."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from prefect_huggingface.tasks.batching.job import BatchOptions, plan_job
from prefect_huggingface.tasks.batching.output import plan_output
from prefect_huggingface.tasks.errors import BatchError, TableError
from prefect_huggingface.tasks.storage.tables.inputs import get_schema, inspect_table, read_chunks
from support.table_batches import answer_table

FORMATS = ["jsonl", "csv", "tsv", "parquet", "arrow"]


def read_all(source: Path | str, **reading: Any) -> list[dict[str, Any]]:
    return [row for chunk in read_chunks(inspect_table(str(source), **reading)) for row in chunk.rows]


def problems_of(source: Path) -> list[str]:
    return [problem for chunk in read_chunks(inspect_table(str(source))) for problem in chunk.problems.values()]


def write_bytes(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    return write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows))


# T1: carriage returns


@pytest.mark.parametrize("cell", ["a\rb", "\r", "a\r\nb", "a\nb", "\ra", 'a\r"b"', "a\x00b", "a\x85b", "a\u2028b"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_an_answer_and_a_cell_with_any_line_end_stay_one_record(tmp_path: Path, cell: str, suffix: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"q": cell}, {"q": "next"}])
    answer_table(source, tmp_path / f"out.{suffix}", "Say {q}", answer=cell)
    with open(tmp_path / f"out.{suffix}", newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file, delimiter="\t" if suffix == "tsv" else ","))

    assert [(record["q"], record["completion"]) for record in records] == [(cell, cell), ("next", cell)]


# T2: quotes that are not closed


def test_a_quote_that_is_never_closed_is_refused_with_its_line(tmp_path: Path) -> None:
    lines = [f"{index},text {index}\n" for index in range(1000)]
    lines[10] = '10,"text 10\n'
    path = write_bytes(tmp_path / "in.csv", "\nid,q\n" + "".join(lines))
    with pytest.raises(TableError, match=r"in\.csv.*line 13.*quote"):
        inspect_table(str(path))


def test_a_quote_that_closes_at_another_row_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.csv", 'id,q\n1,a\n2,"b\n3,c\n4,"d"\n5,e\n')
    with pytest.raises(TableError, match=r"in\.csv.*line 3.*quote"):
        inspect_table(str(path))


# T3: columns that come late


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_late_column_that_the_output_adds_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": "x"}] * 1500 + [{"q": "x", "error": "mine"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(BatchError, match=r"'error'.*output_prefix"):
        answer_table(source, tmp_path / f"out.{suffix}", "{q}")
    answer_table(source, tmp_path / f"out.{suffix}", "{q}", prefix="my_")
    assert read_all(tmp_path / f"out.{suffix}")[1500]["error"] == "mine"


def test_the_prompt_may_use_a_column_that_comes_late(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"q": "x"}] * 1500 + [{"q": "x", "late": "y"}])
    assert answer_table(source, tmp_path / "out.jsonl", "{late}").statuses == {"missing_value": 1500, "ok": 1}


# T4: values that Python cannot hold, and files that are damaged


def odd_columns() -> pa.Table:
    nanoseconds = pa.array([1, 1_600_000_000_123_456_789], pa.int64()).cast(pa.timestamp("ns"))
    return pa.table(
        {
            "q": ["one", "two"],
            "nanoseconds": nanoseconds,
            "duration": pa.array([1, 86_400_000_000_001], pa.int64()).cast(pa.duration("ns")),
            "time": pa.array([1, 1_001], pa.int64()).cast(pa.time64("ns")),
            "far": pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
            "late": pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us")),
            "zoned": pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us", tz="Europe/Berlin")),
            "map": pa.array([[("a", 1), ("a", 2)], None], pa.map_(pa.string(), pa.int64())),
            "binary": [b"text", b"\xff\x00"],
            "decimal": pa.array(["1.10", None]).cast(pa.decimal128(38, 2)),
            "nested": [{"when": [datetime.datetime(2020, 1, 1)]}, None],
        }
    )


@pytest.mark.parametrize("source_suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_values_that_python_cannot_hold_become_text(tmp_path: Path, source_suffix: str, suffix: str) -> None:
    source, table = tmp_path / f"in.{source_suffix}", odd_columns()
    if source_suffix == "parquet":
        parquet.write_table(table, source)
    else:
        with pa.ipc.new_file(str(source), table.schema) as writer:
            writer.write_table(table)
    answer_table(source, tmp_path / f"out.{suffix}", "{q} {nanoseconds} {binary} {decimal}")
    rows = read_all(tmp_path / f"out.{suffix}")

    assert [row["status"] for row in rows] == ["ok", "missing_value"]
    if suffix in ("jsonl", "csv", "tsv"):
        assert "00:00:00.000000001" in rows[0]["nanoseconds"]
        assert "2020-09-13" in rows[1]["nanoseconds"]
        assert "26:40.123456789" in rows[1]["nanoseconds"]
        assert rows[0]["binary"] == "text"
        assert rows[0]["decimal"] == "1.10"
        assert json.loads(json.dumps(rows[0]["map"])) in ([["a", 1], ["a", 2]], '[["a",1],["a",2]]')
    else:
        back = pa.ipc.open_file(str(tmp_path / f"out.{suffix}")).read_all() if suffix == "arrow" else None
        back = back or parquet.read_table(tmp_path / f"out.{suffix}")
        for name in table.column_names:
            assert back[name].cast(table[name].type).combine_chunks().equals(table[name].combine_chunks()), name


def test_old_timestamps_of_spark_are_read_rightly(tmp_path: Path) -> None:
    early = pa.array([datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31)], pa.timestamp("us"))
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"when": early}), path, use_deprecated_int96_timestamps=True)
    answer_table(path, tmp_path / "out.jsonl", "{when}")
    assert [row["when"][:10] for row in read_all(tmp_path / "out.jsonl")] == ["0001-01-01", "9999-12-31"]


def test_a_type_that_the_output_cannot_hold_is_refused_before_the_model(tmp_path: Path) -> None:
    source = tmp_path / "in.arrow"
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
    table = pa.table({"q": ["a", "b"], "odd": union})
    with pa.ipc.new_file(str(source), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BatchError, match=r"'odd'.*columns"):
        answer_table(source, tmp_path / "out.parquet", "{q}")
    answer_table(source, tmp_path / "out.jsonl", "{q}")
    assert [row["odd"] for row in read_all(tmp_path / "out.jsonl")] == [1, "b"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl.gz", "csv.bz2", "jsonl.xz", "csv.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": f"text {index * 7919 % 1000}", "n": index} for index in range(20_000)]
    path = tmp_path / f"in.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        text = "q,n\n" + "".join(f"{row['q']},{row['n']}\n" for row in rows)
        if suffix.startswith("jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": pa.compress}[
            suffix[-3:].strip(".l")
        ]
        path.write_bytes(
            pack(text.encode(), codec="zstd", asbytes=True) if suffix.endswith("zst") else pack(text.encode())
        )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4] + bytes(40) + whole[44:] if suffix != "arrow" else whole[:300]):
        path.write_bytes(damaged)
        with pytest.raises(TableError, match=rf"in\.{suffix}"):
            inspect_table(str(path))


def test_a_damaged_page_of_parquet_is_found_before_the_model(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    rows = [{"q": f"text {index * 7919 % 100_000}"} for index in range(50_000)]
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"in\.parquet.*cannot be read"):
        inspect_table(str(path))


# T5: text that is not Unicode


def test_a_header_that_is_not_utf8_is_refused_with_the_option(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.csv", "größe,q\n1,wärme\n".encode("latin-1"))
    with pytest.raises(TableError, match=r"in\.csv.*line 1.*encoding"):
        plan_job(str(path), "{q}")


@pytest.mark.parametrize("suffix", FORMATS)
def test_lone_surrogates_in_keys_and_cells_go_through(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": "fine", "other": "\ud800 half"}, {"q": "fine", "\udfff": 1}, {"q": "\ud83d"}, {"q": "last"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    publication = answer_table(source, tmp_path / f"out.{suffix}", "{q}")
    written = read_all(tmp_path / f"out.{suffix}")

    assert publication.statuses == {"ok": 3, "malformed": 1}
    assert "Line 2 of 'in.jsonl'" in written[1]["error"]
    assert r"\udfff" in written[1]["error"]
    assert [row["q"] for row in written][:2] == ["fine", "fine"]
    assert written[0]["other"] == ("\ud800 half" if suffix == "jsonl" else "\ufffd half")


# T6: compressed files


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("named", [True, False])
def test_compressed_files_are_read_by_their_content(tmp_path: Path, suffix: str, packed: str, named: bool) -> None:
    text = '{"q": "a"}\n{"q": "b"}\n' if suffix == "jsonl" else "q\na\nb\n"
    pack: Any = {
        "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
        "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    }[packed]  # fmt: skip
    middle = len(text) // 2
    content = pack(text[:middle].encode()) + pack(text[middle:].encode())  # as `cat a.gz b.gz` makes it
    path = write_bytes(tmp_path / (f"in.{suffix}.{packed}" if named else f"in.{suffix}"), content)
    assert read_all(path) == [{"q": "a"}, {"q": "b"}]


def test_a_name_that_tells_a_compression_which_is_not_there(tmp_path: Path) -> None:
    assert read_all(write_bytes(tmp_path / "in.jsonl.gz", '{"q": "a"}\n')) == [{"q": "a"}]


# T7: JSON that is not in lines, and content that is something else


OBJECTS: list[dict[str, Any]] = [{"q": "a[1]"}, {"q": 'b "{,} \\'}, {"q": {"deep": [1, {}]}}]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
        "[" + ",\n".join(map(json.dumps, OBJECTS)) + "]",
        "\n".join(json.dumps(row, indent=2) for row in OBJECTS),
        "\ufeff" + json.dumps(OBJECTS, indent=2),
    ],
    ids=["one line", "indented", "object per line", "bracket before", "indented objects", "with a mark"],
)
def test_json_arrays_and_indented_objects_are_read(tmp_path: Path, suffix: str, text: str) -> None:
    path = write_bytes(tmp_path / f"in.{suffix}", text)
    assert read_all(path) == OBJECTS
    assert read_all(path, format="json") == OBJECTS


def test_a_json_array_is_read_in_pieces_with_its_lines(tmp_path: Path) -> None:
    rows = [{"id": index, "text": "x" * (index % 700)} for index in range(10_000)]
    path = write_bytes(tmp_path / "in.json", "[\n\n" + ",\n".join(map(json.dumps, rows)) + "\n,7]")
    table = inspect_table(str(path))

    assert table.rows == 10_001
    assert [row for chunk in read_chunks(table, range(9_000, 9_002)) for row in chunk.rows] == rows[9_000:9_002]
    (problem,) = problems_of(path)
    assert "line 10003 " in problem.lower()


@pytest.mark.parametrize(
    ("text", "line"),
    [('[{"q": 1},\n{"q": }]', 2), ('[{"q": 1}\n\n{"q": 2}]', 3), ('[{"q": 1}', 1), ('[{"q": 1},\n{"q": 2}]\nx', 3)],
)
def test_a_broken_json_array_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(TableError, match=rf"in\.json.*line {line}\b"):
        inspect_table(str(write_bytes(tmp_path / "in.json", text)))


def test_json_files_that_hold_lines_are_read_as_lines(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.json", '{"q": "a"}\nbroken\n{"q": "b"}\n')
    assert inspect_table(str(path)).rows == 3
    assert "Line 2 of 'in.json'" in problems_of(path)[0]


CONTENTS = {
    "Parquet": b"PAR1\x15\x04\x15 PAR1", "Arrow": b"ARROW1\x00\x00\xff\xff", "ZIP": b"PK\x03\x04\x14\x00\x06\x00",
    "HTML": b"<!DOCTYPE html>\n<html><body>404</body></html>", "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
    "UTF-16": '{"q": "a"}\n{"q": "b"}\n'.encode("utf-16-le"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_content_that_is_something_else_is_named(tmp_path: Path, suffix: str, kind: str) -> None:
    path = write_bytes(tmp_path / f"in.{suffix}", CONTENTS[kind])
    with pytest.raises(TableError, match=rf"in\.{suffix}") as caught:
        inspect_table(str(path))
    if suffix.lower() != kind.lower():
        assert kind in str(caught.value)


def test_csv_that_is_called_jsonl_and_jsonl_that_is_called_csv_are_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"in\.jsonl.*[Ll]ine 1.*source_format='csv'"):
        inspect_table(str(write_bytes(tmp_path / "in.jsonl", "id,q\n1,a\n2,b\n")))
    with pytest.raises(TableError, match=r"in\.csv.*source_format='jsonl'"):
        inspect_table(str(write_bytes(tmp_path / "in.csv", '{"id": 1, "q": "a"}\n{"id": 2, "q": "b"}\n')))


# T8: CSV of other houses


@pytest.mark.parametrize(
    "text",
    [
        "\n\n \nid,q\n1,a b\n2,c\n", "id;q\n1;a b\n2;c\n", "id\tq\n1\ta b\n2\tc\n", "sep=;\nid;q\n1;a b\n2;c\n",
        '"sep=|"\r\nid|q\r\n1|a b\r\n2|c\r\n', "id,q\r1,a b\r2,c\r", "\ufeffid,q\n1,a b\n2,c\n", "id,q\n1,a b\n\n2,c",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig", "utf-32"])
def test_csv_is_read_whatever_its_delimiter_and_its_mark(tmp_path: Path, text: str, encoding: str) -> None:
    path = write_bytes(tmp_path / "in.csv", text.removeprefix("\ufeff" if encoding != "utf-8" else "").encode(encoding))
    assert read_all(path) == [{"id": "1", "q": "a b"}, {"id": "2", "q": "c"}]


@pytest.mark.parametrize(
    "text", ["text\na;b\nc;d;e\n", "a,b;c\n1,2;3\n4,5;6\n", 'q\n"a;b"\n"c;d"\n', "x y\n1;2\n", "a;b\n1\n2\n"]
)
def test_a_delimiter_is_not_guessed_where_that_is_not_safe(tmp_path: Path, text: str) -> None:
    path = write_bytes(tmp_path / "in.csv", text)
    expected = list(csv.DictReader(text.splitlines()))
    assert read_all(path) == expected


def test_the_plan_says_what_was_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_bytes(tmp_path / "in.csv", "id;q\n1;a\n2;b\n".encode("utf-16"))
    with caplog.at_level("INFO"):
        inspect_table(str(path))
    (message,) = [record.getMessage() for record in caplog.records if "in.csv" in record.getMessage()]
    assert "utf-16" in message
    assert "';'" in message


def test_options_say_how_to_read(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.csv", "a~q\n1~größe\n".encode("latin-1"))
    assert read_all(path, options={"delimiter": "~", "encoding": "latin-1"}) == [{"a": "1", "q": "größe"}]
    lines = write_bytes(tmp_path / "in.jsonl", '{"q": "größe"}\n'.encode("utf-16-be"))
    assert read_all(lines, options={"encoding": "utf-16-be"}) == [{"q": "größe"}]
    for options, word in [
        ({"delimiter": ";;"}, "delimiter"), ({"encoding": "no-such"}, "encoding"), ({"separator": ";"}, "separator"),
    ]:  # fmt: skip
        with pytest.raises((TableError, ValueError), match=word):
            inspect_table(str(path), options=options)
    with pytest.raises(TableError, match=r"delimiter.*CSV"):
        inspect_table(str(lines), options={"delimiter": ";"})


def test_other_options_are_another_job(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.csv", "q\nwärme\n".encode("latin-1"))
    read_as = [BatchOptions(source_options={"encoding": name}) for name in ("latin-1", "cp437")]
    keys = {plan_job(str(path), "{q}", more=more).key for more in read_as}
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["a.b", "0", "12", "a[0]", "a.b.c", "x-y", "first name", "ü"])
def test_every_column_name_may_stand_in_a_template(tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{name: "Paris", "n": 3.14159}])
    answer_table(source, tmp_path / "out.jsonl", f"Is {{{name}}} {{{{nice}}}}? {{{name}!r:>9}} {{n:.2f}}", answer=None)
    direct = write_jsonl(tmp_path / "direct.jsonl", [{"p": "Is Paris {nice}?   'Paris' 3.14"}])
    answer_table(direct, tmp_path / "out2.jsonl", "{p}", answer=None)
    (one,), (other,) = read_all(tmp_path / "out.jsonl"), read_all(tmp_path / "out2.jsonl")
    assert one["completion"] == other["completion"]


def test_a_name_that_no_template_can_hold_is_explained(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"a:b": "x"}])
    with pytest.raises(BatchError, match=r"no column 'a'.*'a:b'.*[Rr]ename"):
        plan_job(str(source), "{a:b}")


# T9: outputs within inputs, names given twice, deep nesting


def test_an_output_within_the_input_is_found_through_links(tmp_path: Path) -> None:
    real = tmp_path / "real"
    write_jsonl(real / "a.jsonl", [{"q": 1}])
    (tmp_path / "link").symlink_to(real)
    for source, destination in [
        (tmp_path / "link", real / "out.jsonl"), (real, tmp_path / "link" / "out.jsonl"),
        (f"{tmp_path}/link/*.jsonl", real / "out.jsonl"), (tmp_path / "link" / "a.jsonl", real / "a.jsonl"),
    ]:  # fmt: skip
        with pytest.raises(BatchError, match="within the input"):
            plan_output(str(source), str(destination))


def test_an_output_that_only_looks_like_the_input_is_allowed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a[1].jsonl", [{"q": 1}])
    plan_output(str(source), str(tmp_path / "a1.jsonl"))
    plan_output(f"{tmp_path}/*.jsonl", str(tmp_path / "out" / "a.jsonl"))
    plan_output(f"{tmp_path}/**/*.jsonl", str(tmp_path.parent / "a.jsonl"))
    with pytest.raises(BatchError, match="within the input"):
        plan_output(f"{tmp_path}/**/*.jsonl", str(tmp_path / "out" / "deep" / "a.jsonl"))
    with pytest.raises(BatchError, match="within the input"):
        plan_output(str(source), str(source))


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"q": 1}])
    with pytest.raises(BatchError, match=r"`columns`.*'q'.*twice"):
        answer_table(source, tmp_path / "out.csv", "{q}", columns=["q", "q"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_json_of_any_depth_goes_through_or_is_a_malformed_row(tmp_path: Path, suffix: str) -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = [value] if depth % 2 else {"a": value}
        return value

    depths = [1, 29, 60, 61, 100, 150]
    lines = [json.dumps({"q": "x", "deep": nested(depth)}) for depth in depths]
    lines += ['{"q": "x", "deep": ' + "[" * depth + "]" * depth + "}" for depth in (500, 5000, 200_000)]
    source = write_bytes(tmp_path / "in.jsonl", "\n".join(lines))
    publication = answer_table(source, tmp_path / f"out.{suffix}", "{q}")
    rows = read_all(tmp_path / f"out.{suffix}")

    assert publication.statuses == {"ok": len(depths), "malformed": 3}
    assert ["nested" in row["error"] for row in rows[-3:]] == [True] * 3
    for row, depth in zip(rows, depths, strict=False):
        found = json.loads(row["deep"]) if isinstance(row["deep"], str) else row["deep"]
        assert found == nested(depth)


def test_an_output_that_no_writer_can_make_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises((BatchError, TableError), match=r"\.json.*jsonl"):
        plan_output("in.csv", str(tmp_path / "out.json"))


# T10: folders of other tools


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_partitioned_folder_is_read_with_its_columns(tmp_path: Path, suffix: str) -> None:
    for year, month, text in [("2023", "12", "a"), ("2024", "01", "b"), ("__HIVE_DEFAULT_PARTITION__", "a%20b", "c")]:
        path = tmp_path / "data" / f"year={year}" / f"month={month}" / f"part-0.{suffix}"
        path.parent.mkdir(parents=True)
        if suffix == "parquet":
            parquet.write_table(pa.table({"q": [text]}), path)
        else:
            path.write_text(json.dumps({"q": text}) if suffix == "jsonl" else f"q\n{text}\n")
    (tmp_path / "data" / "_SUCCESS").write_text("")
    for source in (tmp_path / "data", f"{tmp_path}/data/*/*/*.{suffix}"):
        rows = read_all(source)
        assert rows == [
            {"q": "a", "year": "2023", "month": "12"}, {"q": "b", "year": "2024", "month": "01"},
            {"q": "c", "year": None, "month": "a b"},
        ]  # fmt: skip
    for format in FORMATS:
        answer_table(tmp_path / "data", tmp_path / f"out.{format}", "{q} {month}")
        assert [row["month"] for row in read_all(tmp_path / f"out.{format}")] == ["12", "01", "a b"]


def test_the_partition_is_part_of_the_job(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data" / "year=2023" / "a.jsonl", [{"q": "a"}])
    before = plan_job(str(tmp_path / "data"), "{q} {year}").key
    path.parent.rename(tmp_path / "data" / "year=2024")
    assert plan_job(str(tmp_path / "data"), "{q} {year}").key != before


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    folder, table = tmp_path / "saved", pa.table({"q": ["a", "b"]})
    folder.mkdir()
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    write_bytes(folder / "dataset_info.json", '{"features": {}}')
    write_bytes(folder / "state.json", '{"_data_files": []}')
    assert [row["q"] for row in read_all(folder)] == ["a", "b"]

    (tmp_path / "dict").mkdir()
    folder.rename(tmp_path / "dict" / "train")
    write_bytes(tmp_path / "dict" / "dataset_dict.json", '{"splits": ["train"]}')
    with pytest.raises(TableError, match=r"dict.*'train'"):
        inspect_table(str(tmp_path / "dict"))


def test_what_is_no_table_is_left_out_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"q": "a"}])
    write_bytes(tmp_path / "README.md", "# Data")
    with caplog.at_level("INFO"):
        assert read_all(tmp_path) == [{"q": "a"}]
    assert "README.md" in caplog.text


# B12: lines, and the cells of malformed rows


def test_byte_order_marks_of_parts_that_were_put_together_are_no_part_of_the_output(tmp_path: Path) -> None:
    part = b"\xef\xbb\xbf" + b"".join(b'{"q": "\xc3\xa9 %d"}\n' % number for number in range(3))
    source = write_bytes(tmp_path / "in.jsonl", part * 3)
    answer_table(source, tmp_path / "out.jsonl", "Say {q}")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["q"] for line in lines] == [f"\u00e9 {number}" for number in range(3)] * 3


@pytest.mark.parametrize("source_suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_column_without_a_value_in_some_parts_has_the_type_of_the_others(
    tmp_path: Path, source_suffix: str, suffix: str
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    items = pa.array([[{"a": 1}], None], pa.list_(pa.struct([("a", pa.int64())])))
    parts = [
        {"q": ["a", "b"], "number": pa.nulls(2), "items": pa.nulls(2), "none": pa.nulls(2)},
        {"q": ["c", "d"], "number": [3, None], "items": items, "none": pa.nulls(2)},
        {"q": ["e"], "number": pa.nulls(1), "items": items[:1], "none": pa.nulls(1)},
    ]
    for number, columns in enumerate(parts):
        write_table(folder / f"{number}.{source_suffix}", pa.table(columns))
    answer_table(folder, tmp_path / f"out.{suffix}", "Say {q}")
    rows = read_all(tmp_path / f"out.{suffix}")
    expected: list[Any] = [None, None, 3, None, None]
    if suffix in ("csv", "tsv"):
        expected = ["", "", "3", "", ""]
    assert [row["number"] for row in rows] == expected
    assert [bool(row["items"]) for row in rows] == [False, False, True, False, True]
    if suffix in ("parquet", "arrow"):
        schema = get_schema(inspect_table(str(tmp_path / f"out.{suffix}")))
        assert schema.field("number").type == pa.int64()
        assert schema.field("items").type.equals(items.type)
    write_table(folder / f"9.{source_suffix}", pa.table({**parts[2], "number": ["text"]}))
    with pytest.raises(TableError, match="9.* has other column types than .*0.*: 'number' is string, not int64"):
        inspect_table(str(folder))


def write_table(path: Path, table: Any) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("empty", ["", "\n\n"])
def test_an_empty_part_of_a_table_is_left_out(tmp_path: Path, suffix: str, empty: str) -> None:
    text = '{"q": "a"}\n' if suffix == "jsonl" else "q\na\n"
    for name, content in (("0", empty), ("1", text), ("2", empty), ("3", text)):
        write_bytes(tmp_path / "parts" / f"{name}.{suffix}", content)
    assert read_all(tmp_path / "parts") == [{"q": "a"}] * 2
    (tmp_path / "parts" / f"1.{suffix}").unlink()
    (tmp_path / "parts" / f"3.{suffix}").unlink()
    with pytest.raises(TableError, match="is empty|has no rows"):
        inspect_table(str(tmp_path / "parts"))


@pytest.mark.parametrize("options", [{"encoding": "cp1252"}, {"delimiter": ";"}])
def test_options_of_text_files_are_refused_where_there_is_no_text(tmp_path: Path, options: dict[str, str]) -> None:
    parquet.write_table(pa.table({"q": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(TableError, match=f"`{next(iter(options))}` .* is parquet. Drop it"):
        inspect_table(str(tmp_path / "in.parquet"), options=options)


def test_messages_name_the_line_of_the_file(tmp_path: Path) -> None:
    lines = write_bytes(tmp_path / "in.jsonl", '\n\n{"q": 1}\n\n{"q": \n{"q": 2}\n' + "\n" * 3000 + "x\n")
    assert [problem[:18] for problem in problems_of(lines)] == ["Line 5 of 'in.json", "Line 3007 of 'in.j"]
    text = write_bytes(tmp_path / "in.csv", '\nid,q\n\n1,"a\nb"\n2\n"x"y,2\n\n3,d,e\n')
    assert [problem[:17] for problem in problems_of(text)] == [
        "Line 6 of 'in.csv",
        "Line 7 of 'in.csv",
        "Line 9 of 'in.csv",
    ]


def test_lines_are_right_also_far_down(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "in.jsonl", '\n{"q": 1}\n\n' * 60_000 + "broken\n")
    table = inspect_table(str(path))
    (chunk,) = read_chunks(table, range(60_000, 60_001))
    assert chunk.problems[0].startswith("Line 180001 of 'in.jsonl'")


def test_malformed_rows_keep_their_cells(tmp_path: Path) -> None:
    source = write_bytes(tmp_path / "in.csv", b'id,q,c\n1,a\n2,b,c,d\n3,\xff,c\n4,"x"y,c\n5,q,c\n')
    publication = answer_table(source, tmp_path / "out.jsonl", "{q}")
    rows = read_all(tmp_path / "out.jsonl")
    assert publication.statuses == {"malformed": 4, "ok": 1}
    assert [row.get("id") for row in rows] == ["1", "2", "3", "4", "5"]
    assert [(row.get("q"), row.get("c")) for row in rows][:3] == [("a", None), ("b", "c"), (None, "c")]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.parquet.gz"])
def test_packed_text_with_the_name_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"id,text\n1,a\n"))
    with pytest.raises(TableError, match=name):
        inspect_table(str(tmp_path / name))
