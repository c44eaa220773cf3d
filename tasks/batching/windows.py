"""The order in which rows are generated: within a bounded window, those with a shared beginning stand together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

BEGINNING = 64  # characters after which two beginnings count as shared
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 16 * 2**20


def make_windows(
    items: Iterable[Item], text: Callable[[Item], str], rows: int = WINDOW_ROWS, characters: int = WINDOW_CHARACTERS
) -> Iterator[list[Item]]:
    """Yield the items in lists that are bounded by their number and by the length of their texts together."""
    window: list[Item] = []
    size = 0
    for item in items:
        window.append(item)
        size += len(text(item))
        if len(window) >= rows or size >= characters:
            yield window
            window, size = [], 0
    if window:
        yield window


def order_window(window: list[Item], text: Callable[[Item], str]) -> list[Item]:
    """Return the items of a window in the order in which an engine has the least work with them.

    Items that go on alike after what all have in common stand together, so that the engine finds their beginning in its
    cache. The others come by falling length, so that no long one is left for the end.
    """
    if len(window) < 3:
        return window
    texts = [text(item) for item in window]
    common = len(os.path.commonprefix([min(texts), max(texts)]))
    beginnings = [each[common : common + BEGINNING] for each in texts]
    count = Counter(beginnings)

    def place(index: int) -> tuple[str, int]:
        beginning = beginnings[index]
        shared = count[beginning] > 1 and len(beginning) == BEGINNING
        return (beginning if shared else "", -len(texts[index]))

    return [window[index] for index in sorted(range(len(window)), key=place)]
