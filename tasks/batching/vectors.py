"""Batches of vectors: which models and outputs they go with, and the vectors between journal and output."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefect_huggingface.blocks.model import VECTOR_TASKS
from prefect_huggingface.tasks.batching.job import BatchJob, InputType, Model, Output
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal

VECTOR_FORMATS = ("parquet", "arrow", "jsonl")


def write_vector(vector: Any) -> str:
    """Return a vector as text, for the details of a row."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def plan_vectors(job: BatchJob, output: Output, models: Sequence[Model], input_type: InputType | None) -> Output:
    """Return the output of a batch of vectors; that of other batches stays as it is.

    Raises:
        BatchError: If a model is not for what is asked for, or the format of the output holds no vectors.
    """
    for model in models:
        task = getattr(model, "task", None)
        if input_type is None and task in VECTOR_TASKS and job.table.format != "openai":
            raise BatchError(f"{model.model_id!r} is for {task!r} and generates no text. Use `batch_embedding`.")
        if input_type is not None and task != "feature-extraction":
            raise BatchError(f"The `task` of {model.model_id!r} must be 'feature-extraction', got {task!r}. Set it.")
    if input_type is None:
        return output
    if output.format not in VECTOR_FORMATS or job.table.format == "openai":
        raise BatchError(
            f"`destination` must be a table that holds vectors, got {output.destination!r}. End it with .parquet."
        )
    return replace(output, vectors=True)


def dimensions_of(job: BatchJob, journal: Journal) -> int:
    """Return the number of dimensions of the first vector, 0 where no row has one."""
    for name in journal.names():
        for details in journal.load(name, job.key)["details"].to_pylist():
            if (vector := read_vector(details)) is not None:
                return len(vector)
    return 0


def read_vector(details: str | None) -> Any | None:
    """Return the vector in the details of a row, an array of float32, or None where it has none."""
    import numpy as np

    encoded = json.loads(details).get("vector") if details else None
    return None if encoded is None else np.frombuffer(base64.b64decode(encoded), dtype="<f4")


def vector_column(answers: Any, dimensions: int) -> Any:
    """Return the vectors as lists of a fixed size; those of rows that failed are null."""
    import numpy as np
    import pyarrow as pa

    found = [read_vector(details) for details in answers["details"].to_pylist()]
    values = np.zeros((len(found), dimensions), dtype=np.float32)
    for place, vector in enumerate(found):
        if vector is not None:
            values[place] = vector
    missing = pa.array([vector is None for vector in found], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=vector_type(dimensions), mask=missing)


def vector_type(dimensions: int) -> Any:
    """Return the type of a column of vectors."""
    import pyarrow as pa

    return pa.list_(pa.float32(), dimensions)
