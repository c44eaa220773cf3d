"""Going through the rows of a journal in the order of the input, a range at a time, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.segments import SegmentError, SegmentName, segment_schema


class JournalRows:
    """A sweep over the rows of a journal. Ranges are taken in ascending order.

    Only the segments that overlap the current range are in memory: rows finish within a bounded window, so these are
    few, whatever the number of rows.

    Args:
        journal: Journal to read.
        job: Key of its job.
        names: Segments to look at; all of the journal by default.
    """

    def __init__(self, journal: Journal, job: str, names: Iterable[SegmentName] | None = None) -> None:
        self._journal, self._job = journal, job
        chosen = journal.names() if names is None else names
        self._waiting = sorted(chosen, key=lambda name: (name.first, name), reverse=True)
        self._open: list[Any] = []

    def take(self, start: int, stop: int) -> Any:
        """Return the committed rows from `start` up to, and without, `stop`, as a `pyarrow.Table` sorted by row.

        It has the columns of a segment and the epoch. A row of a later epoch replaces one of an earlier. Rows before
        `stop` cannot be taken any more.

        Raises:
            BatchError: If a segment cannot be trusted any more.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        while self._waiting and self._waiting[-1].first < stop:
            self._open.append(self._load(self._waiting.pop()))
        taken, kept = [], []
        for table in self._open:
            rows = table["row"]
            inside = table.filter(pc.and_(pc.greater_equal(rows, start), pc.less(rows, stop)))
            rest = table.filter(pc.greater_equal(rows, stop))
            taken += [inside] if inside.num_rows else []
            kept += [rest] if rest.num_rows else []
        self._open = kept
        if not taken:
            return segment_schema().append(pa.field("epoch", pa.int32())).empty_table()
        return _latest(pa.concat_tables(taken).combine_chunks())

    def _load(self, name: SegmentName) -> Any:
        import pyarrow as pa

        try:
            table = self._journal.load(name, self._job)
        except SegmentError as exc:
            raise BatchError(
                f"Segment {str(name)!r} of the journal {self._journal.place.url!r} is damaged: {exc}. Start again: "
                "it is set aside then, and its rows are generated again."
            ) from None
        return table.append_column("epoch", pa.array([name.epoch] * table.num_rows, pa.int32()))


def _latest(table: Any) -> Any:
    """Sort by row and keep of each row the one with the latest epoch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = table.sort_by([("row", "ascending"), ("epoch", "descending")])
    if table.num_rows > 1:
        rows = table["row"].combine_chunks()
        is_first = pc.not_equal(rows[1:], rows[:-1])
        if not pc.all(is_first).as_py():
            table = table.filter(pa.concat_arrays([pa.array([True]), is_first]))
    return table
