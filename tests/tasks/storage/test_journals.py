"""What is in the journal is whole and of the right job, or it is noticed; rows come back in order with flat memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import (
    Journal,
    JournalCounts,
    JournalRows,
    JournalWriter,
    ResultRow,
    SegmentError,
    SegmentName,
    checksum,
    decode_segment,
    encode_segment,
    make_batch,
)
from prefect_huggingface.tasks.storage.places import Place
from support.journals import claim_journal

JOB = "a" * 32


def answer(row: int, text: str = "", error: str | None = None, **fields: Any) -> ResultRow:
    return ResultRow(row, 0, text or f"text {row}", "ok", "stop", 3, 4, 0.5, error)._replace(**fields)


def append(journal: Journal, number: int, answers: list[ResultRow], epoch: int = 1) -> SegmentName:
    return journal.append(epoch, "0123abcd", number, JOB, answers)


@pytest.fixture(params=["local", "memory"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    url = str(tmp_path / "j") if request.param == "local" else f"memory://journals/{tmp_path.name}"
    return Journal(Place.of(url))


def test_names_tell_the_counts() -> None:
    segment = SegmentName(12, "00ff00ff", 7, 5000, 9000, 700, 512, 3, 2, 99, "0" * 16)
    assert SegmentName.parse(str(segment)) == segment
    assert SegmentName.parse("notes.txt") is None


def test_rows_come_back_in_order_whatever_the_order_of_writing(journal: Journal) -> None:
    rows = list(range(1000))
    random.Random(7).shuffle(rows)
    for number in range(10):
        append(journal, number, [answer(row) for row in rows[number * 100 : number * 100 + 100]])
    sweep = JournalRows(journal, JOB)

    taken = [sweep.take(start, start + 64) for start in range(0, 1000, 64)]
    assert [row for table in taken for row in table["row"].to_pylist()] == list(range(1000))
    assert taken[3]["completion"].to_pylist()[0] == f"text {3 * 64}"
    assert journal.count().rows == 1000


def test_a_later_epoch_replaces_rows_and_no_row_comes_twice(journal: Journal) -> None:
    append(journal, 0, [answer(0), answer(1, error="bad"), answer(2)])
    append(journal, 1, [answer(2), answer(3)])
    append(journal, 0, [answer(1, "better")], epoch=2)

    table = JournalRows(journal, JOB).take(0, 10)
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert table["completion"].to_pylist()[1] == "better"


def test_steps_of_a_row_are_kept_apart_and_counted_once(journal: Journal) -> None:
    append(journal, 0, [answer(0, is_last=False), answer(1, is_last=False), answer(0, step=1, shared=True)])
    append(journal, 1, [answer(1, step=1, error="bad"), answer(2, error="worse", status="schema_invalid")])
    assert journal.count() == JournalCounts(rows=3, failed=2, invalid=1, tokens=16)
    append(journal, 0, [answer(1, "better", step=1)], epoch=2)

    table = JournalRows(journal, JOB).take(0, 10)
    assert list(zip(table["row"].to_pylist(), table["step"].to_pylist(), strict=True)) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0),
    ]  # fmt: skip
    assert table["is_last"].to_pylist() == [False, True, False, True, True]
    assert table["error"].to_pylist() == [None, None, None, None, "worse"]
    assert [ResultRow(*row.values()) for row in table.drop("epoch").to_pylist()][3].completion == "better"


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([(0, 1), (1, 1), (2, 1, "last")], [0, 1, 2]),
        ([(1, 1), (2, 1, "last")], []),  # the first is lost
        ([(0, 1), (2, 1, "last")], [0]),
        ([(0, 2), (1, 1), (2, 1, "last")], [0]),  # it was lost, and was asked again
        ([(0, 1), (1, 2), (2, 3, "last")], [0, 1, 2]),
        ([(0, 2, "last"), (1, 1), (2, 1, "last")], [0]),  # it failed when it was asked again
        ([(0, 1), (1, 2, "last"), (2, 1, "last")], [0, 1]),
    ],
)
def test_a_step_counts_with_those_that_it_was_made_of(
    journal: Journal, steps: list[tuple[Any, ...]], kept: list[int]
) -> None:
    whole = [(0, 1), (1, 1), (2, 1, "last")]
    for row, each in enumerate([whole, steps, whole]):
        for step, epoch, *last in each:
            append(journal, 10 * row + step, [answer(row, step=step, is_last=bool(last))], epoch)
    table = JournalRows(journal, JOB).take(0, 10)
    found = [step.as_py() for row, step in zip(table["row"], table["step"], strict=True) if row.as_py() == 1]
    assert found == kept
    assert table.num_rows == 6 + len(kept)


def test_texts_that_are_not_unicode_do_not_end_a_batch(journal: Journal) -> None:
    append(journal, 0, [answer(0, error="not a number: '\udcff'")])
    assert JournalRows(journal, JOB).take(0, 1)["error"].to_pylist() == ["not a number: '?'"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "no Arrow"])
def test_damaged_segments_are_set_aside(journal: Journal, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    append(journal, 0, [answer(0)])
    name = append(journal, 1, [answer(1)])
    place = journal.segments.child(str(name))
    content = bytearray(place.read())
    if damage == "flipped":
        content[-200] ^= 1
    if damage == "no Arrow":
        content = bytearray(b"{}")
    if damage == "foreign":
        content = bytearray(encode_segment("b" * 32, make_batch([answer(2)])))
    if damage in ("no Arrow", "foreign"):
        place.remove()
        place = journal.segments.child(str(name._replace(checksum=checksum(bytes(content)))))
    place.write({"cut": bytes(content[: len(content) // 2]), "empty": b""}.get(damage, bytes(content)))
    with pytest.raises(BatchError, match="is damaged"):
        JournalRows(journal, JOB).take(0, 10)
    assert JournalRows(journal, JOB, repair=True).take(0, 10)["row"].to_pylist() == [0]

    assert [name.number for name in journal.names()] == [0]
    assert sum(found.endswith(".damaged") for found in journal.segments.names()) == 1
    assert JournalRows(journal, JOB).take(0, 10)["row"].to_pylist() == [0]  # it is noticed once


def test_every_cut_and_every_flipped_bit_is_noticed(journal: Journal) -> None:
    rows = [answer(row) for row in range(5)]
    content, name = encode_segment(JOB, make_batch(rows)), append(journal, 0, rows)
    assert decode_segment(JOB, name, content).num_rows == 5
    for end in range(len(content)):
        with pytest.raises(SegmentError):
            decode_segment(JOB, name, content[:end])
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(SegmentError):
            decode_segment(JOB, name, bytes(flipped))


def test_a_broken_record_is_an_error_with_a_remedy(journal: Journal) -> None:
    assert journal.read_job() is None
    owner = claim_journal(journal)
    owner.write("job", {"key": "x"})
    assert journal.read_job() == {"key": "x"}
    journal.place.child("job-000001.json").write(b'{"key"')
    with pytest.raises(BatchError, match="Delete the journal"):
        journal.read_job()


def test_stopping_and_being_taken_over(journal: Journal) -> None:
    one = claim_journal(journal)
    assert not one.is_stopped()
    one.request_stop("cancelled")
    assert one.is_stopped()
    two = claim_journal(journal)
    one.request_stop("cancelled once more")  # a stop is for those of its owner
    assert not two.is_stopped()
    assert one.is_stopped()
    assert two.is_current()
    with pytest.raises(BatchError, match="Another run has taken over"):
        one.check()


def test_records_that_are_being_written_do_not_stop_a_shard(journal: Journal) -> None:
    owner = claim_journal(journal)
    journal.place.child("owner-000001.json").write(b'{"epo')  # as sftp and smb show it
    assert not owner.is_stopped()


def test_the_writer_commits_without_being_closed(tmp_path: Path) -> None:
    journal = Journal(Place.of(tmp_path))
    with JournalWriter(journal, JOB, 1) as writer:
        writer.add([answer(0)])
        deadline = time.monotonic() + 10
        while journal.count().rows == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert journal.count().rows == 1
        writer.add([answer(row) for row in range(1, 2000)])
    assert journal.count().rows == 2000
    assert JournalRows(journal, JOB).take(0, 3000)["row"].to_pylist() == list(range(2000))


def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "segments").write_text("a file where the folder should be")
    writer = JournalWriter(Journal(Place.of(tmp_path)), JOB, 1)
    writer.add([answer(0)])
    with pytest.raises(OSError, match="segments"):
        writer.close()


WRITER = """
import sys
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalWriter, ResultRow
from prefect_huggingface.tasks.storage.places import Place
writer = JournalWriter(Journal(Place.of(sys.argv[1])), "a" * 32, int(sys.argv[2]))
row = int(sys.argv[3])
print("writing", flush=True)
while True:
    writer.add([ResultRow(row, completion="text %d" % row * 50)])
    row += 1
"""


def test_killed_writers_leave_whole_segments_only(tmp_path: Path) -> None:
    journal, dice, first = Journal(Place.of(tmp_path)), random.Random(3), 0
    for epoch in range(1, 4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(epoch), str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(dice.uniform(0.1, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        JournalRows(journal, JOB, repair=True).take(0, 10**9)
        first = max((name.last for name in journal.names()), default=-1) + 1
    rows = JournalRows(journal, JOB).take(0, first)["row"].to_pylist()

    assert rows == list(range(first))
    assert not any(found.endswith((".tmp", ".damaged")) for found in journal.segments.names())
