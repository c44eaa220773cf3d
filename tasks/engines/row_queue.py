"""Which rows run beside each other, and which wait.

A row is let in only where the KV cache has room for all that it can come to need. So the pipeline never runs out in the
middle, which costs it computed tokens at best.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from prefect_huggingface.tasks.engines.openvino.genai_rows import Row
from prefect_huggingface.tasks.engines.openvino.scheduling import BLOCK_TOKENS

# Rows that share this many tokens at their beginning wait until the first of them has computed it for all.
SHARED_TOKENS = 2 * BLOCK_TOKENS
KNOWN_BEGINNINGS = 4096


class RowQueue:
    """Rows in the order of their submission.

    Attributes:
        waiting: Rows that are not in the pipeline.
        running: Rows that are in the pipeline.
    """

    def __init__(self, places: int, cache_tokens: int | None = None, share_beginnings: bool = True) -> None:
        """Start empty.

        Args:
            places: Number of sequences that may run side by side.
            cache_tokens: Number of tokens that the KV cache holds, or None where it is not known.
            share_beginnings: Whether the pipeline keeps beginnings that it has computed.
        """
        self._places = places
        self._cache_tokens = cache_tokens
        self._share_beginnings = share_beginnings
        self.waiting: deque[Row] = deque()
        self.running: dict[Row, None] = {}
        self._suspects: set[Row] = set()
        # Beginnings that were computed, by their hashes. A wrong one costs a little time and nothing else.
        self._known: dict[int, None] = {}

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
            self._note(row)
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
        if not self.waiting or any(row.alone for row in self.running):
            return []
        self._suspects.difference_update([row for row in self.running if row.proven])
        admitted = self._next_suspect() if self._suspects else self._next_rows()
        self.running.update(dict.fromkeys(admitted))
        return admitted

    def _next_suspect(self) -> list[Row]:
        if any(not row.proven for row in self.running):
            return []
        row = next(row for row in self.waiting if row in self._suspects)
        if not self._has_room(row, list(self.running)):
            return []
        self.waiting.remove(row)
        return [row]

    def _next_rows(self) -> list[Row]:
        admitted: list[Row] = []
        held: list[Row] = []
        under_way = self._beginnings_under_way()
        while self.waiting and self._has_room(self.waiting[0], [*self.running, *admitted]):
            row = self.waiting.popleft()
            beginning = self._beginning(row)
            if beginning in under_way:
                held.append(row)
                continue
            admitted.append(row)
            if beginning is not None and beginning not in self._known:
                under_way.add(beginning)
        self.waiting.extendleft(reversed(held))
        return admitted

    def _has_room(self, row: Row, others: list[Row]) -> bool:
        """Tell whether a row may run beside others. With none it always may."""
        if not others:
            return True
        if row.alone or others[-1].alone or self._places < row.width + sum(other.width for other in others):
            return False
        if self._cache_tokens is None:
            return True
        return sum(map(_reserved, [row, *others])) <= self._cache_tokens

    def _beginnings_under_way(self) -> set[int]:
        """Return the beginnings that running rows are computing, and take note of those that they have computed."""
        under_way = set()
        for row in self.running:
            self._note(row)
            beginning = self._beginning(row)
            if beginning is not None:
                under_way.add(beginning)
        return under_way - self._known.keys()

    def _note(self, row: Row) -> None:
        """Take note of the beginning of a row if it is computed."""
        beginning = self._beginning(row)
        if beginning is not None and row.has_begun:
            self._known[beginning] = None
            if len(self._known) > KNOWN_BEGINNINGS:
                del self._known[next(iter(self._known))]

    def _beginning(self, row: Row) -> int | None:
        if not self._share_beginnings or len(row.prompt_tokens) <= SHARED_TOKENS:
            return None
        return hash(tuple(row.prompt_tokens[:SHARED_TOKENS]))


def _reserved(row: Row) -> int:
    # Every answer may leave a block unfilled.
    return row.most_tokens + row.width * BLOCK_TOKENS
