"""Finding rows whose id occurred before, with flat memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from prefect_huggingface.tasks.storage.scratch import open_scratch_database
from prefect_huggingface.tasks.storage.tables.inputs import Table, read_chunks


def find_duplicates(table: Table, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the id of every row whose id an earlier row has. Rows without one are left out."""
    with closing(open_scratch_database()) as base:
        base.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        base.execute("BEGIN")
        for chunk in read_chunks(table):
            for number, row in enumerate(chunk.rows, chunk.first):
                value = row.get(column)
                if value is None or value != value:
                    continue
                text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
                if base.execute("INSERT OR IGNORE INTO ids VALUES (?)", (text,)).rowcount == 0:
                    yield number, value
