"""How often Python looks for cyclic garbage while rows stream through a process.

Rows are tuples, dictionaries and texts without cycles. With Python's own setting it looks through them after every few
hundred objects, which takes up to a fifth of the time of a batch whose engine is fast.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 50_000

_lock = threading.Lock()
_users = 0
_before = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let more objects be made between two looks, as long as any thread is in such a block."""
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = gc.get_threshold()
            if 0 < _before[0] < NEW_OBJECTS:
                gc.set_threshold(NEW_OBJECTS, *_before[1:])
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                gc.set_threshold(*_before)
