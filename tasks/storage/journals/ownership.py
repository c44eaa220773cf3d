"""Owning a journal, so that two runs of one batch never work at once.

Owners are numbered. A run becomes the next one by creating the record of its number, which only one of several can:
a conditional write where the store has them (S3, GCS, Azure), a link on a local file system. Numbers are not used
again, and everything that an owner writes or deletes bears its number, so that a run that stalled and wakes up finds
that it was succeeded, and can neither stop nor delete anything of its successor.

On a local file system a lock of the kernel tells whether the owner lives; it ends with its process however that ends.
Elsewhere the owner rewrites a file of its own while it lives. Who wants to succeed it watches that file for the time of
a lease by its own clock, so that the clocks of two machines are never compared. One that ended says so there.
"""

from __future__ import annotations

import contextvars
import itertools
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from prefect_huggingface.tasks.errors import BatchError, TableError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.journals.journal import Journal, encode_record
from prefect_huggingface.tasks.storage.locks import Lease, is_taken, take_alone
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.waiting import WAKE_SECONDS, WaitNotice

IfRunning = Literal["refuse", "wait"]

LEASE_SECONDS = 60.0
RENEWAL_SECONDS = 10.0
POLL_SECONDS = 2.0
LOCK_TRIES, LOCK_SECONDS = 3, 0.02


@dataclass(frozen=True, slots=True)
class JournalOwner:
    """A run that owns a journal, until another run succeeds it.

    Attributes:
        epoch: Its number.
        id: Its random name.
        base: Number under which the journal was cleared last, 0 if it never was. What is older is void.
    """

    journal: Journal
    epoch: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    base: int = 0

    @classmethod
    def after(cls, journal: Journal, record: Mapping[str, Any] | None) -> JournalOwner:
        """Return the owner that succeeds the one of a record, which has yet to claim the journal."""
        return cls(journal, record["epoch"] + 1, base=record["base"]) if record else cls(journal, 1)

    def is_current(self) -> bool:
        """Return whether no other run has succeeded this one. Only names are looked at, which no store shows torn."""
        return self._is_current(self.journal.place.names())

    def is_stopped(self) -> bool:
        """Return whether the shards of this run have to stop: they were asked to, or another run has taken over."""
        names = self.journal.place.names()
        return f"stop-{self.epoch:06}.json" in names or not self._is_current(names)

    def _is_current(self, names: Sequence[str]) -> bool:
        return f"owner-{self.epoch + 1:06}.json" not in names and self._alive.name in names

    def check(self) -> None:
        """Check that no other run has succeeded this one, before something that cannot be undone.

        Raises:
            BatchError: If another run has.
        """
        if not self.is_current():
            raise BatchError(
                f"Another run has taken over {self.journal.place.url!r}, since this one did not answer for a while. "
                "Wait for its end, or set `if_running='wait'`."
            )

    def write(self, kind: Literal["job", "published", "stop"], record: Mapping[str, Any]) -> None:
        """Write a record of this run: what the job consists of, what is known of the output, or that it has to stop."""
        self.journal.place.child(f"{kind}-{self.epoch:06}.json").write(encode_record(record))

    def request_stop(self, reason: str, is_over: Callable[[], bool] = lambda: False) -> None:
        """Ask the shards of this run to stop. They commit what is finished.

        While the store is away it tries again, for the time of a lease at most and not when they are over.
        """
        outage = StoreOutage()
        while not is_over():
            with outage:
                self.write("stop", {"reason": reason, "owner": self.id})
                return
            time.sleep(self.journal.poll_seconds)

    def clear(self) -> None:
        """Delete the job and the rows, unless another run has succeeded this one. What was published stays known."""
        place, segments = self.journal.place, self.journal.segments
        # From here on nobody can succeed this run on a remote store but one that knows that its rows are void.
        after = JournalOwner(self.journal, self.epoch + 1, base=self.epoch + 1)
        if not (self.is_current() if place.is_local else after.claim(cleared=True)):
            return
        kept = re.compile(rf"published-|(owner|alive)-{self.epoch:06}" if place.is_local else "published-")
        for folder in (segments, place):
            for name in folder.names():
                number = re.match(r"(?:e|\w+-)(\d{6,})", name)
                if number and int(number[1]) <= self.epoch and not kept.match(name):
                    folder.child(name).remove()

    def claim(self, cleared: bool = False) -> bool:
        """Become the owner of this number, unless somebody else already is, and return whether it worked."""
        record = {
            "epoch": self.epoch, "id": self.id, "base": self.base, "cleared": cleared, "host": socket.gethostname(),
            "process": os.getpid(), "time": time.time(),
        }  # fmt: skip
        claimed = self.journal.place.child(f"owner-{self.epoch:06}.json").create(encode_record(record))
        if claimed and not cleared:
            self.beat(0)
        return claimed

    def beat(self, count: int, ended: bool = False) -> None:
        """Say that this run lives, or that it has ended."""
        self._alive.write(encode_record({"count": count, "ended": ended, "time": time.time()}))

    @property
    def _alive(self) -> Place:
        return self.journal.place.child(f"alive-{self.epoch:06}-{self.id}.json")


class StoreOutage(AbstractContextManager["StoreOutage"]):
    """Forgives, block after block, what a store or a disk says while it is away, for the time of a lease."""

    def __init__(self) -> None:
        self._since: float | None = None

    @override
    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> bool:
        if not isinstance(error, (TableError, OSError)):
            self._since = None
            return False
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since < LEASE_SECONDS


@contextmanager
def hold_journal(journal: Journal, if_running: IfRunning = "refuse") -> Iterator[JournalOwner]:
    """Own the journal for the time of the block.

    Raises:
        BatchError: If another run owns it and `if_running` is "refuse", or if it cannot be written.
    """
    notice = WaitNotice(run_log(), f"Waiting for the run that works on {journal.place.url!r}")
    with ExitStack() as stack:
        try:
            if journal.place.is_local:
                for name in ("lock", "held"):
                    stack.enter_context(_take_lock(journal, name, if_running if name == "lock" else "wait", notice))
                owner = JournalOwner.after(journal, journal.read_owner())
                owner.claim()
            else:
                owner = _succeed_remotely(journal, if_running, notice)
                stack.enter_context(_renewed(owner))
        except OSError as exc:
            raise BatchError(
                f"The journal {journal.place.url!r} cannot be written: {exc}. Correct `destination`, or its rights."
            ) from None
        yield owner


def is_held(journal: Journal) -> bool:
    """Return whether a run seems to own the journal now. Asking never disturbs a run that begins or ends."""
    if journal.place.is_local:
        # Beginning is decided by another lock than this one.
        return is_taken(Path(journal.place.url, "held"))
    record = journal.read_owner()
    alive = _read_alive(journal, record)
    return bool(alive) and not alive["ended"] and abs(time.time() - alive["time"]) < LEASE_SECONDS


def _take_lock(journal: Journal, name: str, if_running: IfRunning, notice: WaitNotice) -> Lease:
    tries = 0
    while True:
        # The run before may just have removed the journal, and the file with it.
        with suppress(FileNotFoundError):
            os.makedirs(journal.place.url, exist_ok=True)
            lease = take_alone(Path(journal.place.url, name), create=True)
            if lease is not None:
                return lease
        tries += 1
        if if_running == "refuse" and tries == LOCK_TRIES:
            raise _refusal(journal)
        notice.tell()
        time.sleep(LOCK_SECONDS if tries < LOCK_TRIES else WAKE_SECONDS)


def _refusal(journal: Journal) -> BatchError:
    return BatchError(
        f"Another run is already writing {journal.place.url!r}. Wait for its end, or set `if_running='wait'`."
    )


def _succeed_remotely(journal: Journal, if_running: IfRunning, notice: WaitNotice) -> JournalOwner:
    """Become the next owner once the last one has ended, or has not moved for the time of a lease."""
    seen: Any = None
    since = time.monotonic()
    while True:
        record = journal.read_owner()
        alive = _read_alive(journal, record)
        is_free = record is None or record["cleared"] or alive.get("ended")
        if is_free or (seen == (record, alive) and time.monotonic() - since > LEASE_SECONDS):
            owner = JournalOwner.after(journal, record)
            if owner.claim():
                return owner
        elif seen != (record, alive):
            if seen is not None and if_running == "refuse":
                raise _refusal(journal)
            seen, since = (record, alive), time.monotonic()
        notice.tell()
        time.sleep(POLL_SECONDS)


def _read_alive(journal: Journal, record: Mapping[str, Any] | None) -> dict[str, Any]:
    return journal.read_record(f"alive-{record['epoch']:06}-{record['id']}.json") or {} if record else {}


@contextmanager
def _renewed(owner: JournalOwner) -> Iterator[None]:
    """Say that a run lives for the time of the block, and at its end that it has ended."""
    ended = threading.Event()

    def renew() -> None:
        for count in itertools.count(1):
            if ended.wait(RENEWAL_SECONDS):
                return
            with suppress(Exception):  # the store may be away for a moment; the lease outlasts several renewals
                if not owner.is_current():
                    return
                owner.beat(count)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(renew,), name="journal-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if owner.is_current():
            owner.beat(0, ended=True)
