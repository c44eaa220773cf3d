"""Owning a journal, so that two runs of one batch never work at once.

On a local file system a lock of the kernel does it, which ends with its process however that ends. Elsewhere there is
none: there an object names the owner and the time until which it holds, and is renewed while the run lives. That is
enough against a second run by accident. Two that start within the same second may both begin; the shards of the first
then give way to the attempt of the second.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

WhenRunning = Literal["refuse", "wait"]

LEASE_SECONDS = 60.0
RENEWAL_SECONDS = 15.0
POLL_SECONDS = 2.0


@contextmanager
def hold_journal(journal: Journal, when_running: WhenRunning = "refuse") -> Iterator[None]:
    """Own the journal for the time of the block.

    Args:
        journal: Journal to own.
        when_running: Whether to fail, or to wait, while another run owns it.

    Raises:
        BatchError: If another run owns it and `when_running` is "refuse".
    """
    with _local_lock(journal, when_running) if journal.place.is_local else _remote_lease(journal, when_running):
        yield


def is_held(journal: Journal) -> bool:
    """Tell whether a run owns the journal now."""
    if not journal.place.is_local:
        return _read_owner(journal.place.child("lock")) is not None
    if not journal.place.child("lock").exists():
        return False
    try:
        with FileLock(f"{journal.place.url}/lock", timeout=0):
            return False
    except Timeout:
        return True


def _refusal(journal: Journal) -> BatchError:
    return BatchError(f"Another run works on {journal.place.url!r}. Wait for its end, or set `when_running='wait'`.")


def _notice(journal: Journal, holder: str) -> WaitNotice:
    return WaitNotice(run_log(), f"Waiting for {holder}, which works on {journal.place.url!r}")


@contextmanager
def _local_lock(journal: Journal, when_running: WhenRunning) -> Iterator[None]:
    Path(journal.place.url).mkdir(parents=True, exist_ok=True)
    path = f"{journal.place.url}/lock"
    notice = _notice(journal, holder_of(path))
    with ExitStack() as stack:
        try:
            stack.enter_context(file_held(FileLock(path), 0 if when_running == "refuse" else -1, notice))
        except Timeout:
            raise _refusal(journal) from None
        yield


@contextmanager
def _remote_lease(journal: Journal, when_running: WhenRunning) -> Iterator[None]:
    place, owner = journal.place.child("lock"), uuid.uuid4().hex
    notice = _notice(journal, "another run")
    while True:
        if _read_owner(place) is None:
            _write_owner(place, owner)
            if _read_owner(place) == owner:
                break
        if when_running == "refuse":
            raise _refusal(journal)
        notice.tell()
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(place, owner, ended), name="journal-lease", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        place.remove()


def _renew(place: Place, owner: str, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL_SECONDS):
        try:
            _write_owner(place, owner)
        except Exception:  # the store may be away for a moment; the lease outlasts several renewals
            continue


def _write_owner(place: Place, owner: str) -> None:
    place.write(json.dumps({"owner": owner, "until": time.time() + LEASE_SECONDS}).encode())


def _read_owner(place: Place) -> str | None:
    """Return who owns a lease that has not run out."""
    try:
        record = json.loads(place.read())
        return str(record["owner"]) if record["until"] > time.time() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
