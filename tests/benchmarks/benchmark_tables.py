"""Benchmarks of tables and their storage, without a model. Run on an otherwise idle machine:

    python tests/benchmarks/benchmark_tables.py storage    # a file on S3 (moto, a process of its own) against the disk
    python tests/benchmarks/benchmark_tables.py formats    # processor time of looking at, reading and writing rows
    python tests/benchmarks/benchmark_tables.py journal    # processor time of committing, sweeping and sharing results

Each prints lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from prefect_huggingface.tasks.storage.places import Place  # noqa: E402
from prefect_huggingface.tasks.storage.tables.inputs import get_schema, inspect_table, read_chunks  # noqa: E402
from prefect_huggingface.tasks.storage.tables.writers import open_writer  # noqa: E402

MB = 10**6
SERVE = "from support.s3_servers import serve_s3\nwith serve_s3('tables'):\n    import os\n" \
    "    print(os.environ['FSSPEC_S3_ENDPOINT_URL'], flush=True)\n    os.read(0, 1)"  # fmt: skip


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("storage", "formats", "journal"))
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="*", default=["jsonl", "csv", "parquet"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.benchmark == "storage":
            measure_storage(Path(folder), arguments.megabytes, arguments.formats)
        elif arguments.benchmark == "formats":
            measure_formats(Path(folder), arguments.rows, arguments.formats)
        else:
            measure_journal(Path(folder), arguments.rows)


def write_rows(folder: Path, rows: int, format: str, size: int = 40) -> Path:
    """Write rows with an id, a country and a text."""
    dice, path = random.Random(7), folder / f"in.{format}"
    words = ["model", "river", "harbour", "it's", "naïve", "Zürich", '"so"', "plain"]
    table = folder / "rows.jsonl"
    with table.open("w") as file:
        for index in range(rows):
            text = " ".join(dice.choices(words, k=size // 6))
            file.write(json.dumps({"id": index, "country": f"Land {index}", "text": text}, ensure_ascii=False) + "\n")
    if format == "jsonl":
        return table.rename(path)
    found = inspect_table(str(table))
    copy_rows(found, path, format)
    return path


def copy_rows(table: Any, path: Path, format: str) -> None:
    """Write the rows of a table in another format."""
    import pyarrow as pa

    further = pa.schema([("answer", pa.string())])
    kept = None if format == "jsonl" else table.columns
    with open_writer(path, format, kept, ["answer"], get_schema(table), further) as out:  # type: ignore[arg-type]
        for chunk in read_chunks(table):
            out.write(chunk, {"answer": pa.array(["an answer"] * len(chunk))})


@contextmanager
def stopwatch(found: dict[str, float], name: str) -> Iterator[None]:
    """Measure a block in seconds and in processor time."""
    began, processor = time.monotonic(), time.process_time()
    yield
    found[name], found[f"{name}_processor"] = time.monotonic() - began, time.process_time() - processor


def measure_storage(folder: Path, megabytes: int, formats: list[str]) -> None:
    """Look at a file and read it, on disk and on S3."""
    from support.s3_servers import SETTINGS

    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS
    )
    assert server.stdout is not None
    try:
        import os

        import fsspec

        os.environ.update(SETTINGS)
        fsspec.config.conf["s3"] = {"endpoint_url": server.stdout.readline().strip()}
        for format in formats:
            path = write_rows(folder, megabytes * MB // 400, format, 340)
            remote = Place.of(f"s3://tables/{path.name}")
            fsspec.filesystem("s3").put_file(str(path), remote.url)
            found: dict[str, dict[str, float]] = {"disk": {}, "s3": {}}
            for place, figures in ((str(path), found["disk"]), (remote.url, found["s3"])):
                with stopwatch(figures, "inspect"):
                    table = inspect_table(place)
                with stopwatch(figures, "read"):
                    rows = sum(len(chunk.rows) for chunk in read_chunks(table))
                assert rows == table.rows
            shares = {name: found["disk"][name] / found["s3"][name] for name in ("inspect", "read")}
            size = path.stat().st_size / MB
            print(json.dumps({"format": format, "megabytes": size, "rows": rows, **found, "share": shares}), flush=True)
    finally:
        server.communicate("")


def measure_formats(folder: Path, rows: int, formats: list[str]) -> None:
    """Look at rows, read them, and write them again in their format."""
    for format in formats:
        path = write_rows(folder, rows, format)
        found: dict[str, float] = {}
        with stopwatch(found, "inspect"):
            table = inspect_table(str(path))
        with stopwatch(found, "read"):
            assert sum(len(chunk.rows) for chunk in read_chunks(table)) == rows
        with stopwatch(found, "read_and_write"):
            copy_rows(table, folder / f"out.{format}", format)
        print(json.dumps({"format": format, "rows": rows, **found}), flush=True)


def measure_journal(folder: Path, rows: int) -> None:
    """Commit results, take them out in order, and look prompts up among them."""
    from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
    from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows, JournalWriter, ResultRow

    journal, found = Journal(Place.of(folder / "j")), {}
    digests = [blake2b(b"%d" % row, digest_size=16).digest() for row in range(rows)]
    results = [
        ResultRow(row, completion=f"The capital of Land {row} is Town.", digest=digest)
        for row, digest in enumerate(digests)
    ]
    with stopwatch(found, "commit"), JournalWriter(journal, "job", 1) as writer:
        for start in range(0, rows, 256):
            writer.add(results[start : start + 256])
    with stopwatch(found, "sweep"):
        sweep = JournalRows(journal, "job")
        assert sum(sweep.take(start, start + 1024).num_rows for start in range(0, rows, 1024)) == rows
    with stopwatch(found, "share"), ResultIndex() as index:
        for start in range(0, rows, 4096):
            assert not index.find([row.digest or b"" for row in results[start : start + 4096]])
            index.add(results[start : start + 4096])
    print(json.dumps({"rows": rows, "segments": len(journal.names()), **found}), flush=True)


if __name__ == "__main__":
    main()
