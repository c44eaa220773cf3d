"""Finding rows whose id occurred before, with flat memory."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import Any

from prefect_huggingface.tasks.storage.tables.inputs import Table, read_chunks


def find_duplicates(table: Table, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the id of every row whose id an earlier row has. Rows without one are left out."""
    with tempfile.TemporaryDirectory(prefix="prefect-huggingface-ids-") as folder:
        base = sqlite3.connect(os.path.join(folder, "ids.db"), isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4096"):
            base.execute(f"PRAGMA {pragma}")
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
        base.close()
