"""The `pyarrow` types of an input's columns, also for formats that have none."""

from __future__ import annotations

from typing import Any

from prefect_huggingface.tasks.storage.tables.inputs import Table, read_chunks


def get_schema(table: Table) -> Any:
    """Return the types of all columns of a table.

    CSV columns are text. The types of JSONL columns are found by reading all of it once: the narrowest type that holds
    every value, and text (JSON) where there is none.
    """
    import pyarrow as pa

    if table.format in ("csv", "tsv"):
        return pa.schema([(name, pa.string()) for name in table.columns])
    if table.format in ("parquet", "arrow"):
        return next(iter(read_chunks(table))).batch.schema
    types: dict[str, Any] = dict.fromkeys(table.columns, pa.null())
    for chunk in read_chunks(table):
        names = dict.fromkeys(name for row in chunk.rows for name in row)
        for name in names:
            values = [row[name] for row in chunk.rows if name in row]
            types[name] = _joined(types.get(name, pa.null()), _type_of(values))
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])


def _type_of(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return pa.string()
    return pa.string() if pa.types.is_nested(kind) and "struct<>" in str(kind) else kind


def _joined(one: Any, other: Any) -> Any:
    import pyarrow as pa

    try:
        schemas = [pa.schema([("column", one)]), pa.schema([("column", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()
