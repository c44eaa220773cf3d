"""Which rows run beside each other, and which wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from prefect_huggingface.tasks.engines.genai_rows import Row

# Rows that share this many tokens at their beginning wait until the first of them has computed it for all.
SHARED_TOKENS = 64


class RowQueue:
    """Rows in the order of their submission.

    Attributes:
        waiting: Rows that are not in the pipeline.
        running: Rows that are in the pipeline.
    """

    def __init__(self, places: int, share_beginnings: bool = True) -> None:
        """Start empty.

        Args:
            places: Number of sequences that may run side by side.
            share_beginnings: Whether the pipeline keeps beginnings that it has computed.
        """
        self._places = places
        self._share_beginnings = share_beginnings
        self.waiting: deque[Row] = deque()
        self.running: dict[Row, None] = {}
        self._suspects: set[Row] = set()

    @property
    def rows(self) -> list[Row]:
        """All rows, the running ones first."""
        return [*self.running, *self.waiting]

    def append(self, row: Row) -> None:
        """Put a row at the end."""
        self.waiting.append(row)

    def put_back(self, rows: Iterable[Row]) -> None:
        """Put running rows back to the beginning of the queue."""
        for row in reversed(list(rows)):
            self.running.pop(row, None)
            self.waiting.appendleft(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is."""
        self._suspects.discard(row)
        if row in self.running:
            del self.running[row]
        elif row in self.waiting:
            self.waiting.remove(row)

    def clear(self) -> None:
        """Take all rows out."""
        self.waiting.clear()
        self.running.clear()
        self._suspects.clear()

    def suspect(self, rows: Iterable[Row]) -> None:
        """Have rows run for their first step with no other new row."""
        self._suspects.update(rows)

    def admit(self) -> list[Row]:
        """Move the rows that may run now from the waiting to the running ones and return them."""
        if any(row.alone for row in self.running):
            return []
        self._suspects.difference_update([row for row in self.running if row.proven])
        if self._suspects:
            return self._admit_suspect()
        admitted: list[Row] = []
        room = self._places - sum(row.width for row in self.running)
        beginnings = {self._beginning(row) for row in self.running if not row.has_begun}
        held: list[Row] = []
        while self.waiting and room > 0:
            row = self.waiting[0]
            if row.alone and (self.running or admitted):
                break
            if row.width > room and (self.running or admitted):
                break
            self.waiting.popleft()
            beginning = self._beginning(row)
            if beginning and beginning in beginnings:
                held.append(row)
                continue
            beginnings.add(beginning)
            admitted.append(row)
            room -= row.width
            if row.alone:
                break
        self.waiting.extendleft(reversed(held))
        self.running.update(dict.fromkeys(admitted))
        return admitted

    def _admit_suspect(self) -> list[Row]:
        if any(not row.proven for row in self.running):
            return []
        row = next(row for row in self.waiting if row in self._suspects)
        self.waiting.remove(row)
        self.running[row] = None
        return [row]

    def _beginning(self, row: Row) -> tuple[int, ...]:
        if not self._share_beginnings or len(row.prompt_tokens) <= SHARED_TOKENS:
            return ()
        return tuple(row.prompt_tokens[:SHARED_TOKENS])
