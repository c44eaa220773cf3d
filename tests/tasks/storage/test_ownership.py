"""A journal has one owner: whoever stalls, dies or asks, nothing of its successor is touched."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals import ownership
from prefect_huggingface.tasks.storage.journals.journal import Journal, ResultRow
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner, hold_journal, is_held
from prefect_huggingface.tasks.storage.places import Place
from support.journals import claim_journal
from support.s3_servers import serve_s3

LEASE_SECONDS = 2.0

# Runs one after the other: "own URL refuse", what the run does, "end"; each is answered with what came of it.
RUNS = """
import sys
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals import ownership
from prefect_huggingface.tasks.storage.journals.journal import Journal, ResultRow
from prefect_huggingface.tasks.storage.places import Place
ownership.LEASE_SECONDS, ownership.RENEWAL_SECONDS, ownership.POLL_SECONDS = float(sys.argv[1]), 0.3, 0.1
remove = Place.remove

def wait_before_deleting(place):
    print("deletes", flush=True)
    sys.stdin.readline()
    Place.remove = remove
    remove(place)

def do(owner, line):
    if line == "work":
        owner.check()
        owner.write("job", {"key": str(owner.epoch)})
        owner.journal.append(owner.epoch, "00000000", 0, "job", [ResultRow(owner.epoch)])
        owner.write("published", {"epoch": owner.epoch})
    elif line == "stop":
        owner.request_stop("test")
    else:
        Place.remove = wait_before_deleting if "slowly" in line else remove
        owner.clear()
    print("done", flush=True)

print("ready", flush=True)
for line in sys.stdin:
    _, url, if_running = line.split()
    try:
        with ownership.hold_journal(Journal(Place.of(url)), if_running) as owner:
            print("owns", owner.epoch, flush=True)
            while (line := sys.stdin.readline().strip()) != "end":
                try:
                    do(owner, line)
                except BatchError as exc:
                    print("refused", exc, flush=True)
        print("ended", flush=True)
    except BatchError as exc:
        print("refused", exc, flush=True)
"""


class Runner:
    """A process for runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", RUNS, str(LEASE_SECONDS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def answer(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        """Tell it what to do, and return its answer."""
        self.tell(line)
        return self.answer()

    def tell(self, line: str) -> None:
        """Tell it what to do."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def claim_journal(self, journal: Journal, if_running: str = "wait") -> str:
        """Let it begin a run, and return whether that owns the journal."""
        return self.do(f"own {journal.place.url} {if_running}")

    def kill(self) -> None:
        """Kill it, and whatever run it has."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def runners(s3: str) -> Iterator[list[Runner]]:
    runners = [Runner() for _ in range(3)]
    try:
        assert {runner.answer() for runner in runners} == {"ready"}
        yield runners
    finally:
        for runner in runners:
            runner.kill()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    pytest.importorskip("moto", reason="needs moto[server]")
    pytest.importorskip("s3fs")
    with serve_s3("ownership") as url:
        yield url


@pytest.fixture
def remote(s3: str, tmp_path: Path) -> Journal:
    return Journal(Place.of(f"{s3}/{tmp_path.name}.journal"))


def contents(journal: Journal, epoch: int) -> dict[str, bytes]:
    """Return all files of an owner but the one that it writes again and again."""
    places = [folder.child(name) for folder in (journal.place, journal.segments) for name in folder.names()]
    mine = [place for place in places if f"{epoch:06}" in place.name[:16] and not place.name.startswith("alive")]
    return {place.name: place.read() for place in mine}


def test_a_run_that_stalled_touches_nothing_of_its_successor(remote: Journal, runners: list[Runner]) -> None:
    first, second, _ = runners
    assert first.claim_journal(remote) == "owns 1"
    assert first.do("work") == "done"
    first.process.send_signal(signal.SIGSTOP)
    assert second.claim_journal(remote) == "owns 2"
    assert second.do("work") == "done"
    before, owner = contents(remote, 2), remote.read_owner() or {}
    first.process.send_signal(signal.SIGCONT)

    assert "Another run has taken over" in first.do("work")
    assert first.do("stop") == "done"
    assert first.do("clear") == "done"
    assert first.do("end") == "ended"
    assert contents(remote, 2) == before
    assert len(before) == 4
    assert not JournalOwner(remote, 2, owner["id"]).is_stopped()
    assert is_held(remote)
    assert remote.read_job() == {"key": "2"}
    assert remote.count().rows == 2  # what the first one committed is kept, too
    assert second.do("end") == "ended"
    assert not is_held(remote)


def test_a_run_that_stalled_while_it_cleared_touches_nothing_of_its_successor(
    remote: Journal, runners: list[Runner]
) -> None:
    first, second, _ = runners
    assert first.claim_journal(remote) == "owns 1"
    assert first.do("work") == "done"
    assert first.do("clear slowly") == "deletes"
    first.process.send_signal(signal.SIGSTOP)
    assert remote.read_job() is None
    assert remote.names() == []
    assert second.claim_journal(remote) == "owns 3"
    assert second.do("work") == "done"
    before = contents(remote, 3)
    first.process.send_signal(signal.SIGCONT)
    assert first.do("go on") == "done"
    assert first.do("end") == "ended"
    assert contents(remote, 3) == before
    assert len(before) == 4
    assert [name.epoch for name in remote.names()] == [3]
    assert second.do("clear") == "done"
    assert second.do("end") == "ended"
    assert remote.place.names() == ["owner-000004.json", "published-000001.json", "published-000003.json"]
    assert remote.read_job() is None
    assert remote.list_published() == [{"epoch": 3}, {"epoch": 1}]


def test_clocks_do_not_decide(remote: Journal, runners: list[Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", LEASE_SECONDS)
    assert runners[0].claim_journal(remote) == "owns 1"
    real = time.time
    for offset in (-1e6, 1e6):
        with monkeypatch.context() as context:
            context.setattr(time, "time", lambda offset=offset: real() + offset)
            with pytest.raises(BatchError, match="already writing"), hold_journal(remote):
                pass
    assert runners[0].do("end") == "ended"


def test_of_many_that_begin_at_once_one_owns(remote: Journal, runners: list[Runner]) -> None:
    for runner in runners:
        runner.tell(f"own {remote.place.url} refuse")
    answers = {runner: runner.answer() for runner in runners}
    (owner,) = [runner for runner, answer in answers.items() if answer == "owns 1"]
    assert all("Another run is already writing" in answers[runner] for runner in runners if runner is not owner)
    assert owner.do("end") == "ended"
    began = time.monotonic()
    assert owner.claim_journal(remote) == "owns 2"  # one that has ended is succeeded at once
    assert time.monotonic() - began < LEASE_SECONDS
    assert owner.do("end") == "ended"


def test_who_waits_for_a_run_that_clears_its_journal_owns_the_next(tmp_path: Path, runners: list[Runner]) -> None:
    journal = Journal(Place.of(tmp_path / "j"))
    first, second, _ = runners
    assert first.claim_journal(journal) == "owns 1"
    assert "already writing" in second.claim_journal(journal, "refuse")
    second.tell(f"own {journal.place.url} wait")
    assert first.do("work") == "done"
    assert is_held(journal)
    assert first.do("clear") == "done"
    assert first.do("end") == "ended"
    assert second.answer() == "owns 2"
    assert journal.read_job() is None
    assert journal.list_published() == [{"epoch": 1}]
    assert second.do("end") == "ended"


def test_a_run_that_was_killed_is_succeeded(remote: Journal, tmp_path: Path, runners: list[Runner]) -> None:
    local = Journal(Place.of(tmp_path / "j"))
    assert runners[0].claim_journal(remote) == "owns 1"
    assert runners[2].claim_journal(local) == "owns 1"
    runners[0].kill()
    runners[2].kill()
    began = time.monotonic()
    assert runners[1].claim_journal(remote, "refuse") == "owns 2"  # it cannot know at once
    assert time.monotonic() - began > LEASE_SECONDS
    assert runners[1].do("end") == "ended"
    assert runners[1].claim_journal(local, "refuse") == "owns 2"
    assert runners[1].do("end") == "ended"


@pytest.mark.parametrize("runs", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_asking_never_disturbs_a_run_that_begins(tmp_path: Path, runs: int) -> None:
    journal = Journal(Place.of(tmp_path / "j"))
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            is_held(journal)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(runs):
            with hold_journal(journal, "refuse"):
                assert is_held(journal)
            assert not is_held(journal)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_shards_of_a_run_whose_journal_was_deleted_stop(tmp_path: Path) -> None:
    journal = Journal(Place.of(tmp_path / "j"))
    one = claim_journal(journal)
    journal.place.remove()  # as a person does who wants to start anew
    two = claim_journal(journal)
    assert one.epoch == two.epoch == 1
    assert one.is_stopped()
    assert not two.is_stopped()
    journal.append(1, "00000000", 0, "job", [ResultRow(0)])
    one.clear()
    assert journal.count().rows == 1
